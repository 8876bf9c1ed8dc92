#!/usr/bin/env bash
# JAX 0.10.2: a CPU program of the persistent compilation cache is loaded although the processor lacks what it was
# compiled for, and the cache's key has the cache's own path in it, but not the processor.
#
# A feature of the processor (avx2, or neon) is renamed in an entry. JAX counts a hit and runs the program; XLA writes a
# long line to standard error that ends in "This could lead to execution errors such as SIGILL". A copy of the same
# folder, meanwhile, has nothing for the same program: the options that are hashed name the folder of GPU autotuning
# results below the cache, on every platform. So machines of different kinds must not share a folder, and a folder
# that is moved, or spelt otherwise (relative, by a link), is empty.
# Output seen: "foreign: a hit, warned; copied: no hit".
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2
cat >"$folder/run.py" <<'PY'
import sys

import jax
import numpy as np

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
y = jax.jit(lambda x: np.float32(2) * x + x @ x)(np.ones((8, 8), np.float32))
assert float(y[0, 0]) == 10
print("a hit" if any(hits) else "no hit")
PY
cat >"$folder/rename.py" <<'PY'
import pathlib
import sys
import zlib

for path in pathlib.Path(sys.argv[1]).glob("*-cache"):
    data = zlib.decompress(path.read_bytes())
    path.write_bytes(zlib.compress(data.replace(b"+avx2,", b"+avxQ,").replace(b"+neon,", b"+neoQ,")))
PY
python="$folder/venv/bin/python"
export JAX_PLATFORMS=cpu
"$python" "$folder/run.py" "$folder/cache" >/dev/null 2>&1
cp -r "$folder/cache" "$folder/copy"
"$python" "$folder/rename.py" "$folder/cache"
foreign="$("$python" "$folder/run.py" "$folder/cache" 2>"$folder/errors")"
grep -q SIGILL "$folder/errors" && foreign="$foreign, warned"
copied="$("$python" "$folder/run.py" "$folder/copy" 2>/dev/null)"
seen="foreign: $foreign; copied: $copied"
echo "$seen"
[ "$seen" = "foreign: a hit, warned; copied: no hit" ]
