#!/usr/bin/env bash
# orbax-checkpoint 0.12.8 with etils 1.15.0: below a folder whose name holds a sign of glob patterns, a checkpoint is
# saved without an error and cannot be restored.
#
# A PyTree is written to pieces that are merged at the end. They are looked up by a pattern that is made of the whole
# path, in which [ ] means a choice of letters (and * ? others; so does a backslash): of "lr[1e-4]" none is found. The
# log then says that the merge is skipped, saving returns as always, and only restoring says that something is missing.
# A sweep that names its folders so trains to the end and has nothing.
# Output seen: "runs: saved, restored; lr[1e-4]: saved, ValueError".
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check orbax-checkpoint==0.12.8 \
  "etils[epath]==1.15.0" jax==0.10.2 jaxlib==0.10.2 tensorstore==0.1.86 numpy==2.4.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - "$folder" <<'PY'
import logging
import pathlib
import sys
import warnings

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")
tree, found = {"a": jnp.arange(4.0)}, []
for name in ("runs", "lr[1e-4]"):
    place = pathlib.Path(sys.argv[1], name, "1")
    place.parent.mkdir()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(place, tree)
        said = "saved"
        try:
            assert np.array_equal(checkpointer.restore(place)["a"], tree["a"])
            said += ", restored"
        except (FileNotFoundError, ValueError) as error:
            said += f", {type(error).__name__}"
    found.append(f"{name}: {said}")
print("; ".join(found))
sys.exit(not (found[0].endswith("restored") and not found[1].endswith("restored")))
PY
