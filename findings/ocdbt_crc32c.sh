#!/usr/bin/env bash
# tensorstore 0.1.86: the CRC-32C of each manifest of OCDBT (the format of Orbax's checkpoints) is the same number.
#
# The file ends in its own CRC-32C, and the CRC-32C of any bytes followed by theirs is a constant (0x48674bc7). So a list
# of CRC-32C sums beside a checkpoint, which is what cloud storage keeps of every object, tells a damaged manifest, and
# not one that is another checkpoint's, or an older one. Another polynomial (zlib's CRC-32) does.
# Output seen: "three manifests: 1 CRC-32C (0x48674bc7), 3 CRC-32".
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tensorstore==0.1.86 numpy==2.4.6 google-crc32c==1.8.0
"$folder/venv/bin/python" - "$folder" <<'PY'
import pathlib
import sys
import zlib

import google_crc32c
import tensorstore as ts

sums, others = set(), set()
for number in range(3):
    place = pathlib.Path(sys.argv[1], str(number))
    store = ts.KvStore.open({"driver": "ocdbt", "base": place.as_uri() + "/"}).result()
    store.write("a", bytes([number]) * 100).result()
    manifest = (place / "manifest.ocdbt").read_bytes()
    sums.add(google_crc32c.value(manifest))
    others.add(zlib.crc32(manifest))
print(f"three manifests: {len(sums)} CRC-32C ({', '.join(map(hex, sums))}), {len(others)} CRC-32")
sys.exit(not (sums == {0x48674BC7} and len(others) == 3))
PY
