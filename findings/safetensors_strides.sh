#!/usr/bin/env bash
# safetensors 0.8.0 (NumPy): an array that is not in row-major order is written scrambled, without an error.
#
# save() and save_file() of safetensors.numpy take the bytes that lie from an array's first one on, whatever its strides
# say. A transposed or Fortran-ordered array comes back with its values in another order (its shape is right), and every
# second row of an array comes back as its first rows. 0.5.0 wrote all of these correctly. Such arrays are common: NumPy's .T, and
# a jax.Array on TPU or GPU whose layout on the device is not row-major, once it has become a NumPy array.
# Output seen: "0.5.0: transposed right, fortran right, every second row right", "0.8.0: transposed wrong, fortran wrong,
# every second row wrong".
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
for version in 0.5.0 0.8.0; do
  "${PYTHON:-python3}" -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "safetensors==$version" numpy==2.4.6
  "$folder/$version/bin/python" - "$version" <<'PY'
import sys

import numpy as np
from safetensors.numpy import load, save

rows = np.arange(24, dtype=np.float32).reshape(4, 6)
arrays = {"transposed": rows.T, "fortran": np.asfortranarray(rows), "every second row": rows[::2]}
right = {name: np.array_equal(load(save({"x": array}))["x"], array) for name, array in arrays.items()}
print(f"{sys.argv[1]}:", ", ".join(f"{name} {'right' if same else 'wrong'}" for name, same in right.items()))
sys.exit(set(right.values()) != {sys.argv[1] == "0.5.0"})
PY
done
