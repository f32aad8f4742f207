# shellcheck shell=bash
# Environment and flags for TPU v4, v5e, v5p and v6e. Sourced by launch/tpu_vm.sh and the containers. libtpu reads
# LIBTPU_INIT_ARGS instead of XLA_FLAGS. To see their effect on the compiled step without a TPU, source this file and run
# `python -m radfm_jax.plan --topology ... --compile best`. Their speed was not measured.

flags=(
  # Overlap the gathers and reductions of FSDP with independent products, over all axes of the slice.
  --xla_tpu_enable_async_collective_fusion=true
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true
  --xla_tpu_overlap_compute_collective_tc=true
  --xla_enable_async_all_gather=true
)
export LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:+$LIBTPU_INIT_ARGS }${flags[*]}"
