#!/usr/bin/env bash
# JAX 0.10.2 with jax_compilation_cache_max_size: what a killed process leaves in the persistent compilation cache is a
# warning for ever after.
#
# JAX writes KEY-cache and then KEY-atime, neither by way of another name. A process that is killed in between, or whose
# disk is full, leaves the first alone. From then on no program at all is written (reading them goes on): every write
# looks at every entry's time first. And a KEY-cache that was cut short is found, cannot be read, is compiled again, and
# is not written over. Merged since: https://github.com/jax-ml/jax/pull/39883 for the first of the two.
# Output seen: "written beside a lost entry: 0, a cut entry is mended: False, warnings: 3".
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 filelock==4.3.1
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder/cache" <<'PY'
import pathlib
import sys
import warnings

import jax
import numpy as np

cache = pathlib.Path(sys.argv[1])
jax.config.update("jax_compilation_cache_dir", str(cache))
jax.config.update("jax_compilation_cache_max_size", 10**9)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def run(times):
    jax.clear_caches()
    return jax.jit(lambda x: x * times + 1)(np.float32(1))


run(2)
(entry,) = cache.glob("*-cache")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    lost = cache / "jit_f-0-cache"
    lost.write_bytes(b"")
    run(3)
    written = len(list(cache.glob("*-cache"))) - 2
    lost.unlink()
    entry.write_bytes(entry.read_bytes()[:99])
    run(2)
    run(2)
mended = entry.stat().st_size > 99
print(f"written beside a lost entry: {written}, a cut entry is mended: {mended}, warnings: {len(caught)}")
sys.exit((written, mended, len(caught)) != (0, False, 3))
PY
