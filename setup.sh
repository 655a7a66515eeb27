#!/bin/sh
# Makes .venv with all dependencies; called by the Makefile when .venv/ready is missing or older than the requirements.
set -eu
cd "$(dirname "$0")"

fail() { echo "error: $*" >&2; exit 2; }

command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON; install Python 3.11, or name yours: make PYTHON=/path/to/python3"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
  || fail "$PYTHON is $("$PYTHON" --version 2>&1); Python 3.10 or newer is needed: make PYTHON=/path/to/python3"
"$PYTHON" -c 'import venv, ensurepip' 2>/dev/null || fail "$PYTHON lacks venv; on Debian: apt-get install python3-venv"
free_mb=$(df -Pm . | awk 'NR == 2 {print $4}')
[ "$free_mb" -ge 4000 ] || fail "the disk has $free_mb MB left here and the set-up takes up to 4000 MB; make room"

echo "Setting up .venv (a minute or two) ..."
[ -x .venv/bin/python ] || "$PYTHON" -m venv --clear .venv
.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt \
  || fail "pip could not install the requirements (its message is above); check the network or the package index, then try again"
touch .venv/ready
