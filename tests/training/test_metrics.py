"""What is written can be read back: TensorBoard events, pictures, clips, and JSON lines without duplicates."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cfjax.core.errors import UserError
from cfjax.training.metrics import EventWriter


def read(workdir) -> EventAccumulator:
    accumulator = EventAccumulator(str(workdir / "events"))
    accumulator.Reload()
    return accumulator


def test_scalars_text_image_and_video_come_back(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (4, 6, 3)).astype(np.uint8)
    video = np.stack([np.full((4, 6, 3), shade, np.uint8) for shade in (0, 100, 200)])
    with EventWriter(tmp_path) as writer:
        writer.scalars(3, {"student/loss": np.float32(0.5)})
        writer.config(0, {"optim": {"lr": 0.1}})
        writer.image(1, "picture", image, scale=2)
        writer.video(1, "clip", video, fps=10, scale=3)
    events = read(tmp_path)
    assert [(point.step, point.value) for point in events.Scalars("1_training/student/loss")] == [(3, 0.5)]
    assert '"lr": 0.1' in events.Tensors("0_config/text_summary")[0].tensor_proto.string_val[0].decode()
    with Image.open(io.BytesIO(events.Images("2_samples/picture")[0].encoded_image_string)) as picture:
        np.testing.assert_array_equal(np.asarray(picture)[::2, ::2], image)
    with Image.open(io.BytesIO(events.Images("2_samples/clip")[0].encoded_image_string)) as clip:
        assert (clip.n_frames, clip.size, clip.info["duration"]) == (3, (18, 12), 100)
        for frame, shade in enumerate((0, 100, 200)):
            clip.seek(frame)
            assert abs(int(np.asarray(clip.convert("RGB"))[0, 0, 0]) - shade) < 8


def test_restart_withdraws_later_points(tmp_path):
    for start in (0, 3):
        with EventWriter(tmp_path) as writer:
            writer.restart(start)
            for step in range(start, 5):
                writer.scalars(step, {"loss": step + 10 * start})
        with (tmp_path / "metrics.jsonl").open("a") as lines:
            lines.write('{"step": 5, "lo')
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1]
    assert [json.loads(line)["loss"] for line in lines] == [0, 1, 2, 33, 34]


def test_a_disabled_writer_writes_nothing(tmp_path):
    with EventWriter(tmp_path / "run", enabled=False) as writer:
        writer.restart(0)
        writer.scalars(0, {"loss": 1.0})
        writer.flush()
    assert not (tmp_path / "run").exists()


def test_float_pictures_are_refused(tmp_path):
    with EventWriter(tmp_path) as writer, pytest.raises(UserError, match="expected uint8"):
        writer.video(0, "clip", np.zeros((2, 4, 4, 3)))
