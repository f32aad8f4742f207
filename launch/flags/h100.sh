# shellcheck shell=bash
# Environment and XLA flags for H100 and H200.
# shellcheck source=launch/flags/gpu.sh
. "$(dirname "${BASH_SOURCE[0]}")/gpu.sh"

# With several hardware queues kernels may be scheduled ahead of a collective; one keeps their order (up to Hopper).
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
