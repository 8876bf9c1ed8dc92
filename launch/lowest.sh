#!/usr/bin/env bash
# The lowest versions that setup.cfg allows must do: installs them into .venv-lowest (again when setup.cfg changes) and
# cfjax's wheel beside them, then runs tests/smoke.py there. No PyTorch. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_lowest .venv-lowest
wheels="$(mktemp -d)" && trap 'rm -rf "$wheels"' EXIT
# By way of the source archive, in a folder of its own: nothing of an older build gets into it.
.venv-lowest/uv/bin/uv build --quiet --out-dir "$wheels" .
.venv-lowest/uv/bin/uv pip install --quiet --python .venv-lowest --no-deps --reinstall "$wheels"/*.whl
export JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR="$PWD/.cache/jax-lowest" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
# From another folder and without this one's settings, so that nothing of the checkout is taken for what is installed.
smoke="$PWD/tests/smoke.py" python="$PWD/.venv-lowest/bin/python"
cd "$wheels"
"$python" -m pytest -q -W ignore -c /dev/null --rootdir="$wheels" --noconftest --import-mode=importlib -p no:cacheprovider "$smoke" "$@"
