# shellcheck shell=bash
# Environment and XLA flags for all NVIDIA GPUs, sourced by a100.sh and h100.sh; none of it changes a result, only how
# fast it comes. None of it has been measured here: each is what its maker's documentation says of it.

# Of a GPU's memory JAX takes three quarters at start by default; cuDNN and NCCL need about 4 GB of the rest.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

flags=(
  # Gathers of the next block's weights and sums of the last one's gradients run beside the products that do not need them.
  --xla_gpu_enable_latency_hiding_scheduler=true
  # FSDP sends one weight at a time: many small messages. Up to so many bytes are sent as one (a block of LLaMA-13B has
  # 630 MB in bfloat16; a quarter of it keeps two messages on their way while one block computes).
  --xla_gpu_all_gather_combine_threshold_bytes=167772160
  --xla_gpu_reduce_scatter_combine_threshold_bytes=167772160
  --xla_gpu_all_reduce_combine_threshold_bytes=167772160
  # In the scan over layers, the gather of layer i + 1 is begun while layer i computes.
  --xla_gpu_enable_pipelined_all_gather=true
  --xla_gpu_enable_pipelined_reduce_scatter=true
  --xla_gpu_enable_while_loop_double_buffering=true
)
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }${flags[*]}"

# A collective that fails ends the process instead of waiting for ever (radfm_jax ends the others and asks to be requeued).
export NCCL_ASYNC_ERROR_HANDLING=${NCCL_ASYNC_ERROR_HANDLING:-1}
