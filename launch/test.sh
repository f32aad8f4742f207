#!/usr/bin/env bash
# Create .venv if needed and run the test suite.
# Arguments are passed to pytest: `bash launch/test.sh -m slow`, `bash launch/test.sh tests/test_golden.py`.
set -euo pipefail
cd "$(dirname "$0")/.."

. launch/environment.sh
environment requirements.txt requirements-test.txt

.venv/bin/ruff check --quiet .
.venv/bin/mypy --no-error-summary
# Most of the time goes into compiling, which uses one core per worker; the third one runs while others wait for child
# processes. The tests of a file share fixtures.
exec .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
