#!/usr/bin/env bash
# safetensors 0.8.0: save_file() writes to a hidden file beside the target first, and a process that is killed leaves it.
#
# save_file() of 0.5.0 wrote into the target itself. 0.8.0 writes ".tmp" and six letters or digits in the target's folder
# and renames that, so the target is never half there; but SIGKILL (preemption, the kernel out of memory) leaves the
# hidden file, as large as it had become, under a name that no later run of the same program recognises. A program that
# writes to a temporary name of its own and renames that, as many do, cleans up after itself and misses this one.
# Output seen: "0.5.0: left x.safetensors", "0.8.0: left .tmpXXXXXX".
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
for version in 0.5.0 0.8.0; do
  "${PYTHON:-python3}" -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "safetensors==$version" numpy==2.4.6
  "$folder/$version/bin/python" - "$version" "$folder/$version/out" <<'PY'
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

version, out = sys.argv[1], Path(sys.argv[2])
out.mkdir()
write = f"""
import numpy as np
from safetensors.numpy import save_file
arrays = {{str(i): np.ones(2**22, np.float32) for i in range(32)}}  # 512 MiB
print("ready", flush=True)
save_file(arrays, {str(out / "x.safetensors")!r})
"""
left = []
for _ in range(20):  # a moment amid the writing
    process = subprocess.Popen([sys.executable, "-c", write], stdout=subprocess.PIPE)
    process.stdout.readline()
    while not any(out.iterdir()) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    killed = process.wait() == -signal.SIGKILL
    left = sorted(re.sub(r"^\.tmp\w{6}$", ".tmpXXXXXX", file.name) for file in out.iterdir())
    for file in out.iterdir():
        os.unlink(file)
    if killed and left:
        break
print(f"{version}: left {', '.join(left) or 'nothing'}")
sys.exit(left != (["x.safetensors"] if version == "0.5.0" else [".tmpXXXXXX"]))
PY
done
