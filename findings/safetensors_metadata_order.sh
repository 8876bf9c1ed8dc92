#!/usr/bin/env bash
# safetensors 0.8.0: the same tensors with the same metadata are other bytes from one process to the next.
#
# The entries of the header's __metadata__ are written in an order that is drawn anew in every process (with two entries,
# in half of them). Hashes of whole files then differ though nothing in them does: compare tensors, or hash these.
# Output seen: "12 processes: 2 different files, 1 set of tensors".
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
for number in $(seq 12); do
  "$folder/venv/bin/python" - "$folder/$number.safetensors" <<'PY'
import sys

import numpy as np
from safetensors.numpy import save_file

save_file({"a": np.arange(4.0)}, sys.argv[1], metadata={"prompt": "a cat", "seed": "0"})
PY
done
"$folder/venv/bin/python" - "$folder" <<'PY'
import pathlib
import sys

from safetensors.numpy import load_file

files = sorted(pathlib.Path(sys.argv[1]).glob("*.safetensors"))
different = {file.read_bytes() for file in files}
tensors = {load_file(file)["a"].tobytes() for file in files}
print(f"{len(files)} processes: {len(different)} different files, {len(tensors)} set of tensors")
sys.exit(not (len(different) == 2 and len(tensors) == 1))
PY
