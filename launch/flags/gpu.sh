# shellcheck shell=bash
# Environment and XLA flags for all NVIDIA GPUs, sourced by a100.sh and h100.sh. They change speed, not results, and
# follow the vendors' documentation; they were not measured.

# JAX reserves three quarters of a GPU's memory by default; cuDNN and NCCL need about 4 GB outside of it.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

flags=(
  # Overlap gathers of the next block's weights and reductions of gradients with independent products.
  --xla_gpu_enable_latency_hiding_scheduler=true
  # FSDP sends one weight at a time. Combine small messages up to this size: a quarter of a LLaMA-13B block (630 MB in
  # bfloat16), so that two messages are in flight while a block computes.
  --xla_gpu_all_gather_combine_threshold_bytes=167772160
  --xla_gpu_reduce_scatter_combine_threshold_bytes=167772160
  --xla_gpu_all_reduce_combine_threshold_bytes=167772160
  # In the scan over layers, start the gather of layer i + 1 while layer i computes.
  --xla_gpu_enable_pipelined_all_gather=true
  --xla_gpu_enable_pipelined_reduce_scatter=true
  --xla_gpu_enable_while_loop_double_buffering=true
)
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }${flags[*]}"

# A failed collective ends the process instead of hanging; radfm_jax then ends the others and asks for a requeue.
export NCCL_ASYNC_ERROR_HANDLING=${NCCL_ASYNC_ERROR_HANDLING:-1}
