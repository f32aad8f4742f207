#!/usr/bin/env bash
# Fresh machine -> .venv -> the whole test suite. Run twice, the second time installs nothing.
# Arguments go to pytest: `bash launch/test.sh -m slow`, `bash launch/test.sh tests/test_golden.py`.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! [ -x .venv/bin/python ]; then
  "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed: set PYTHON=/path/to/python3.11" >&2
    exit 1
  }
  echo "making .venv"
  "${PYTHON:-python3}" -m venv .venv
fi

stamp=.venv/requirements.installed
if ! cat requirements.txt requirements-test.txt | cmp -s - "$stamp"; then
  echo "installing requirements (minutes, once)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-test.txt
  cat requirements.txt requirements-test.txt >"$stamp"
fi

.venv/bin/ruff check --quiet .
# Two workers: compiling takes most of the time and uses one core each. Files stay together, as they share fixtures.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
