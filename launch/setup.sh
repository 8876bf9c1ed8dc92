#!/usr/bin/env bash
# Makes .venv on this machine for one kind of device: `bash launch/setup.sh tpu`, gpu or cpu. PYTHON names another python.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
case "${1:-}" in
  cpu) make_environment .venv "." ;;
  gpu) make_environment .venv ".[gpu]" ;;
  tpu) make_environment .venv ".[tpu,gcs]" ;; # their workdirs lie in buckets more often than not
  *)
    echo "launch/setup.sh: say what for: tpu, gpu or cpu" >&2
    exit 2
    ;;
esac
