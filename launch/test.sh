#!/usr/bin/env bash
# What every change must pass: lint, format, types, tests. Arguments go to pytest, e.g. `launch/test.sh -k rollout -x`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_environment .venv ".[test]"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest "$@"
