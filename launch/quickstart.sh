#!/usr/bin/env bash
# Makes an environment, trains stages 1 to 3 on the toy world, writes runs/quickstart/report/index.html.
# Arguments go to `cfjax quickstart`, e.g. --config.budget=long --workdir=runs/long. Interrupted? Run it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
make_environment .venv "."
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec .venv/bin/cfjax quickstart "$@"
