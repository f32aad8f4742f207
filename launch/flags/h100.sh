# shellcheck shell=bash
# Environment and XLA flags for H100 and H200.
# shellcheck source=launch/flags/gpu.sh
. "$(dirname "${BASH_SOURCE[0]}")/gpu.sh"

# Several streams to a GPU would let kernels wait behind those of a collective; one keeps their order (Hopper and older).
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
