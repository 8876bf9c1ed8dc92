#!/usr/bin/env bash
# What every change must pass: lint, format, types, tests. Arguments go to pytest, e.g. `launch/test.sh -k rollout -x`;
# `launch/test.sh -m slow` runs the checks that take minutes, as `.ci/run` does beside the others.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_environment .venv ".[test]"
make_files .cache/real_files tests/real_files.txt || echo "not fetched: tests/test_real_files.py will fail" >&2
make_browser || echo "not installed: tests/serving/test_page.py will fail" >&2
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Two workers: most of the time goes into compiling, which uses one core. A file stays on one worker: fixtures are shared.
exec .venv/bin/python -m pytest -n "${CFJAX_TEST_WORKERS:-2}" --dist loadfile -m "not slow" "$@"
