#!/usr/bin/env bash
# PyAV 18.1.0 (x264 in libavcodec 62.28.102), on x86-64 with AVX-512: the same frames are not the same file.
#
# Thirteen frames of 64 x 64 pixels encoded again and again by libx264 with its defaults (crf=14), everything else equal:
# several different files, whose decoded pixels differ too. With x264-params asm=AVX, or mbtree=0, all of them are one
# file. It also shows at 480 x 832. Who compares videos of two runs by their bytes finds differences that are none.
# On a machine without AVX-512 this script says so and exits with 3: there is nothing to see.
# Output seen (AMD EPYC with AVX-512): "default: 4 files of 60 encodings, asm=AVX: 1".
set -euo pipefail
grep -qw avx512bw /proc/cpuinfo || { echo "no AVX-512 here"; exit 3; }
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check av==18.1.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/clip.mp4" <<'PY'
import hashlib
import pathlib
import sys

import av
import numpy as np

path, rng = sys.argv[1], np.random.default_rng(0)
large = rng.integers(0, 255, (24, 24, 3), np.uint8).repeat(4, 0).repeat(4, 1)
clip = np.stack([large[p : p + 64, p : p + 64] for p in range(13)]) + rng.integers(-40, 41, (13, 64, 64, 3))
clip = np.clip(clip, 0, 255).astype(np.uint8)


def encode(options):
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "14", **options})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for picture in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()


default = len({encode({}) for _ in range(60)})
avx = len({encode({"x264-params": "asm=AVX"}) for _ in range(60)})
print(f"default: {default} files of 60 encodings, asm=AVX: {avx}")
sys.exit(not (default > 1 and avx == 1))
PY
