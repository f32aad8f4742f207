# shellcheck shell=bash
# Sourced by the scripts beside it: makes .venv in the repository, or brings it up to date. Nothing to do, nothing done.
#   environment requirements.txt [requirements-test.txt ...]
environment() {
  if ! [ -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "Python 3.11 or newer is needed: set PYTHON=/path/to/python3.11" >&2
      return 1
    }
    echo "making .venv"
    "${PYTHON:-python3}" -m venv .venv
  fi
  local file missing=()
  for file in "$@"; do
    cmp -s "$file" ".venv/$file.installed" || missing+=("$file")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  echo "installing ${missing[*]} (minutes, once)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "${missing[@]/#/-r}" || return 1
  for file in "${missing[@]}"; do cp "$file" ".venv/$file.installed"; done
}
