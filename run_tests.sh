#!/usr/bin/env bash
# Lint and tests, on the CPU, without network once the packages are there.
# Sets itself up: uses the python at hand if it has all packages, else a virtual environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PYTHON=${PYTHON:-python3}
lacks() { ! "$1" -c 'import torch, torchvision, matplotlib, numpy, pytest, ruff' 2> /dev/null; }
if lacks "$PYTHON"; then
  if lacks .venv/bin/python; then
    echo "installing requirements.txt, pytest and ruff into .venv (a few minutes, only once)"
    "$PYTHON" -m venv .venv
    .venv/bin/python -m pip install --quiet -r requirements.txt pytest ruff
  fi
  PYTHON=.venv/bin/python
fi
"$PYTHON" -m ruff check
"$PYTHON" -m ruff format --check
"$PYTHON" -m pytest -q "$@"
