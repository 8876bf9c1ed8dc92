#!/usr/bin/env bash
# benchmarks/device.py on a GPU that is lent for minutes and reaches no network: one JSON whatever goes wrong.
#
#     bash benchmarks/device.sh --download          beforehand, on Linux x86-64 with a network: wheels for Python 3.12
#     bash benchmarks/device.sh --out=runs/device   there; every flag of benchmarks/device.py
#
# Python and JAX are the machine's own (PYTHON names another interpreter). Of what cfjax imports besides, only what is
# missing there is taken from benchmarks/wheels (or --wheels=FOLDER), into a temporary folder. A process that dies goes on
# with the next case; after --minutes (8) it ends wherever it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-python3}" wheels=benchmarks/wheels minutes=8 download="" flags=()
# What cfjax's networks, streams and updates import: module, package.
needed="absl:absl-py einops:einops etils:etils filelock:filelock flax:flax fsspec:fsspec
  msgpack:msgpack optax:optax rich:rich safetensors:safetensors treescope:treescope yaml:pyyaml"
for argument in "$@"; do
  case "$argument" in
    --download) download=yes ;;
    --wheels=*) wheels="${argument#*=}" ;;
    --minutes=*) minutes="${argument#*=}" flags+=("$argument") ;;
    *) flags+=("$argument") ;;
  esac
done

if [ -n "$download" ]; then
  platforms=(manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64)
  packages=()
  for pair in $needed; do packages+=("${pair#*:}"); done
  "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]/#/--platform=}" --dest "$wheels" "${packages[@]}"
  du -sh "$wheels"
  exit
fi

folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
missing=($("$python" -c "import importlib.util, sys
print(*(pair.split(':')[1] for pair in sys.argv[1:] if not importlib.util.find_spec(pair.split(':')[0])))" $needed))
if [ ${#missing[@]} -gt 0 ]; then
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --find-links "$wheels" --target "$folder/packages" \
    "${missing[@]}" || {
    echo "missing here: ${missing[*]}; bash benchmarks/device.sh --download, where there is a network, fills $wheels" >&2
    exit 2
  }
fi

export PYTHONPATH="$PWD:$folder/packages${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# DMD's roles need more than JAX's own share of 0.75; the rest is for CUDA's context and cuDNN.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
# Most of the compile time is trying kernels: none in Triton for matrix products (cuBLAS has them), and no check of each.
# A version of XLA that does not know a flag would end every process: then there are none.
quick="--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=2 ${XLA_FLAGS:-}"
if XLA_FLAGS="$quick" JAX_PLATFORMS=cpu "$python" -c "import jax; jax.numpy.ones(1)" 2>"$folder/flags"; then
  export XLA_FLAGS="$quick"
else
  echo "without $quick: $(tail -n 1 "$folder/flags")" >&2
fi
# A process that takes over from one that died reads what that one compiled.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$folder/compiled}"
ends="$("$python" -c "import time; print(time.time() + 60 * $minutes)")"
left() { "$python" -c "import time; print(max(0, int($ends - time.time())))"; }
for resume in "" --resume --resume; do
  code=0
  timeout --kill-after=10 "$(left)" "$python" benchmarks/device.py "${flags[@]}" --ends="$ends" $resume || code=$?
  # 0: all done; 1, 2: a mistake that would happen again; 124: out of time. Else it died: 75 by itself, above 128 by a signal.
  case "$code" in 0 | 1 | 2) exit "$code" ;; esac
  [ "$(left)" -gt 30 ] || break
  echo "ended with exit code $code; going on with the next case" >&2
done
echo "out of time; what was measured until then is in the JSON" >&2
