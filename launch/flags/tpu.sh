# shellcheck shell=bash
# Environment and flags for TPU v4, v5e, v5p and v6e. Sourced by launch/tpu_vm.sh and the containers; libtpu reads
# LIBTPU_INIT_ARGS, not XLA_FLAGS. What a flag does to the compiled step can be seen without a TPU: source this file, then
# run `python -m radfm_jax.plan --topology ... --compile best`. Speed has not been measured here.

flags=(
  # Gathers and sums of FSDP run beside the products that do not need them, over all axes of the slice.
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  --xla_tpu_overlap_compute_collective_tc=true
  --xla_enable_async_all_gather=true
)
export LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:+$LIBTPU_INIT_ARGS }${flags[*]}"
