#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg 8.1.2): an mp4 of variable rate says that it ends before its last frame is shown.
#
# H.264 with B-frames (x264's default) and time stamps of a screen recording: 60 frames in the first second, then one every
# half second, the last at 5.5 s. Written by PyAV, read by PyAV: every frame has its right time, but
#   stream.duration and container.duration   4.57 s, a second before the last frame is shown (5.53 s is right)
#   stream.average_rate                      15.3 (70 frames in 5.53 s are 12.7)
# The track's duration is counted in times of decoding, in which B-frames shift the long gaps. The same frames in Matroska
# have the right duration. So neither duration nor frames / average_rate tell where a file's last second begins.
# Output seen: "mp4: duration 4.566 s, last frame at 5.500 s, average_rate 15.33", "mkv: duration 5.533 s, ... 5.500 s ...".
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check av==18.1.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PY'
import sys
from fractions import Fraction

import av
import numpy as np

times = np.round(np.r_[np.arange(0, 1, 1 / 60), np.arange(1, 6, 0.5)], 3)
ends = {}
for kind in ("mp4", "mkv"):
    path = f"{sys.argv[1]}/clip.{kind}"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time in times:
            grey = np.full((32, 48, 3), 20 + 40 * time, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(path) as container:
        stream = container.streams.video[0]
        duration, rate = container.duration / av.time_base, float(stream.average_rate)
        shown = [float(frame.time) for frame in container.decode(stream)]
    assert np.allclose(shown, times, atol=1e-3)
    ends[kind] = duration - shown[-1]
    print(f"{kind}: duration {duration:.3f} s, last frame at {shown[-1]:.3f} s, average_rate {rate:.2f}")
sys.exit(not (ends["mp4"] < -0.5 and ends["mkv"] > 0))
PY
