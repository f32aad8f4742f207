# shellcheck shell=bash
# Sourced by the other scripts. Creates .venv in the repository, and installs a requirements file if it has changed.
#   environment requirements.txt [requirements-test.txt ...]
environment() {
  if ! [ -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "Python 3.11 or newer is needed: set PYTHON=/path/to/python3.11" >&2
      return 1
    }
    echo "creating .venv"
    "${PYTHON:-python3}" -m venv .venv
  fi
  local file missing=()
  for file in "$@"; do
    cmp -s "$file" ".venv/$file.installed" || missing+=("$file")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  echo "installing ${missing[*]} (takes minutes, only once)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "${missing[@]/#/-r}" || return 1
  for file in "${missing[@]}"; do cp "$file" ".venv/$file.installed"; done
}
