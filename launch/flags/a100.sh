# shellcheck shell=bash
# Environment and XLA flags for A100.
# shellcheck source=launch/flags/gpu.sh
. "$(dirname "${BASH_SOURCE[0]}")/gpu.sh"
