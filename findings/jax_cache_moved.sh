#!/usr/bin/env bash
# JAX 0.10.2: a persistent compilation cache that is copied, moved, or named otherwise (a relative path, a link) is empty.
#
# The key of a program has the cache's own path in it: among the options that are hashed is the folder of GPU autotuning
# results, which JAX puts below the cache, on every platform. So a cache that is packed into an image, or mounted
# elsewhere, saves nothing.
# Output seen: "the same folder: a hit; a copy of it: no hit".
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
python="$folder/venv/bin/python"
export JAX_PLATFORMS=cpu
"$python" "$folder/run.py" "$folder/cache" >/dev/null 2>&1
cp -r "$folder/cache" "$folder/copy"
same="$("$python" "$folder/run.py" "$folder/cache" 2>/dev/null)"
copied="$("$python" "$folder/run.py" "$folder/copy" 2>/dev/null)"
seen="the same folder: $same; a copy of it: $copied"
echo "$seen"
[ "$seen" = "the same folder: a hit; a copy of it: no hit" ]
