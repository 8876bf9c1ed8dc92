#!/usr/bin/env bash
# NumPy 2.4.6 with ml_dtypes 0.6.0: what np.save writes of a bfloat16 or float8 array is not what np.load gives back.
#
# np.save and np.savez write arrays of ml_dtypes' types (what np.asarray makes of such a jax.Array) without a word.
#   bfloat16        comes back as raw bytes, "|V2": neither arithmetic nor astype(float32) takes them
#   float8_e4m3fn   comes back as "|V1"; which float8 it was is nowhere in the file
#   float8_e5m2     makes a file that NumPy refuses to read ('<f1' is no type), though its bytes are all there
# Output seen: "bfloat16: |V2; float8_e4m3fn: |V1; float8_e5m2: ValueError".
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check ml_dtypes==0.6.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import io
import sys

import ml_dtypes
import numpy as np

found = []
for kind in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
    stored = np.arange(6).reshape(2, 3).astype(kind)
    np.save(file := io.BytesIO(), stored)
    file.seek(0)
    try:
        loaded = np.load(file)
        assert np.array_equal(loaded.view(kind), stored)
        found.append(loaded.dtype.str)
    except ValueError as error:
        found.append(type(error).__name__)
print("bfloat16: {}; float8_e4m3fn: {}; float8_e5m2: {}".format(*found))
sys.exit(found != ["|V2", "|V1", "ValueError"])
PY
