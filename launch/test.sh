#!/usr/bin/env bash
# Fresh machine -> .venv -> the whole test suite. Run twice, the second time installs nothing.
# Arguments go to pytest: `bash launch/test.sh -m slow`, `bash launch/test.sh tests/test_golden.py`.
set -euo pipefail
cd "$(dirname "$0")/.."

. launch/environment.sh
environment requirements.txt requirements-test.txt

.venv/bin/ruff check --quiet .
# Two workers: compiling takes most of the time and uses one core each. Files stay together, as they share fixtures.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
