#!/usr/bin/env bash
# PyAV 18.1.0 (FFmpeg 8.1.2): after a seek in an MPEG program stream frames carry wrong times.
#
# An .mpg of 100 frames at 25 a second (MPEG-2 video), whose picture n is known by its brightness. Decoded from the start
# frame n has time 0.54 + n / 25. After seek(3.0 s) the first frames are those of groups before it, and their times are
# made up: some repeat, some skip, until the next time stamp of the stream puts them right. Nothing is raised, no frame is
# marked corrupt, and the first frame is a key frame. Who cuts "the last second" out of such a file by seeking gets others.
# Output seen: "from the start: 0 of 100 frames are not at their time",
#   "after seek(3.0): 27 of 43 frames are not at their time".
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check av==18.1.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder/clip.mpg" <<'PY'
import sys

import av
import numpy as np

path = sys.argv[1]
video = np.random.default_rng(0).integers(0, 40, (100, 48, 64, 3), dtype=np.uint8)
video += 2 * np.arange(100, dtype=np.uint8)[:, None, None, None]
with av.open(path, "w") as container:
    stream = container.add_stream("mpeg2video", rate=25)
    stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    stream.options = {"g": "12", "bf": "2"}
    for picture in video:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    container.mux(stream.encode(None))


def frames(seek=None):
    """(time, picture) of every frame from a seek, or from the start, on."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        if seek is not None:
            container.seek(int(seek / stream.time_base), stream=stream)
        out = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
        assert out
        return out


whole = frames()
known = {picture.tobytes(): n for n, (_, picture) in enumerate(whole)}
first = whole[0][0]
found = {}
for name, some in (("from the start", whole), ("after seek(3.0)", frames(3.0))):
    wrong = [n for time, picture in some if abs(time - first - (n := known.get(picture.tobytes(), -1)) / 25) > 1e-3]
    found[name] = len(wrong)
    print(f"{name}: {len(wrong)} of {len(some)} frames are not at their time")
sys.exit(not (found["from the start"] == 0 and found["after seek(3.0)"] > 0))
PY
