"""Metrics of a run: TensorBoard event files written without TensorFlow, and the same scalars as JSON lines."""

import io
import itertools
import json
import os
import platform
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter

from cfjax.core.errors import UserError
from cfjax.core.paths import Mirror, path_of
from cfjax.training.appender import Appender

JSONL = "metrics.jsonl"
PERFORMANCE = "performance.jsonl"  # what differs from machine to machine and from run to run
FLUSH_SECONDS = 60.0  # after which points are on disk, or in the bucket
LONGEST = 32e6  # bytes of an event file that goes to a bucket; it is sent whole, again and again, until the next begins

# TensorBoard sorts its sections by name; metrics.jsonl has the names without these.
CONFIG, TRAINING, SAMPLES = "0_config", "1_training", "2_samples"
SECTIONS = {"samples": SAMPLES, "guard": "3_guard", "perf": "4_performance", "data": "5_data"}

_files = itertools.count()  # of this process, whose names may else be equal


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    with io.BytesIO() as buffer:
        image.save(buffer, kind, **options)
        return buffer.getvalue()


def _pixels(frames: np.ndarray, what: str, ndim: int, scale: int) -> np.ndarray:
    """uint8 frames, enlarged by pixel repetition over H and W."""
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != ndim or frames.shape[-1] != 3:
        raise UserError(f"{what}: expected uint8 with {ndim} axes and 3 channels, got {frames.dtype} {frames.shape}")
    return frames.repeat(scale, axis=-3).repeat(scale, axis=-2)


def _is_before(step: int, line: bytes) -> bool:
    """Whether a JSON line is complete and of an earlier step."""
    try:
        return json.loads(line)["step"] < step
    except (ValueError, KeyError, TypeError):
        return False


def tag_of(name: str) -> str:
    """TensorBoard's name of a curve: "student/loss" is "1_training/student/loss", "perf/mfu" "4_performance/mfu"."""
    group, _, rest = name.partition("/")
    return f"{SECTIONS[group]}/{rest}" if rest and group in SECTIONS else f"{TRAINING}/{name}"


class EventWriter:
    """Writes scalars, text, images and videos of one run into `workdir`; a context manager.

    A full, read-only or lost disk is logged once; points are buffered and written when that works again.

    Args:
      workdir: the run's folder, here or in a bucket; event files go to `workdir/events`, scalars also to
        `workdir/metrics.jsonl` (rates to `performance.jsonl`).
      enabled: False makes a writer that writes nothing, for all but one process of a multi-host run.
    """

    def __init__(self, workdir: str | Path, *, enabled: bool = True) -> None:
        self._enabled, self._flushed = enabled, time.monotonic()
        if enabled:
            self._mirror = Mirror(path_of(workdir))
            self._mirror.pull(JSONL, PERFORMANCE)
            self._lines = {name: Appender(self._mirror.folder / name) for name in (JSONL, PERFORMANCE)}
            self._begin_events()

    def _begin_events(self) -> None:
        """A new event file; TensorBoard reads all that are there."""
        name = f"events.out.tfevents.{time.time():010.0f}.{platform.node()}.{os.getpid()}"
        file = self._mirror.folder / "events" / f"{name}.{next(_files)}"
        self._events = Appender(file)
        self._add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))

    def _add_event(self, event: Event) -> None:
        with io.BytesIO() as buffer:
            RecordWriter(buffer).write(event.SerializeToString())
            self._events.add(buffer.getvalue())

    def __enter__(self) -> "EventWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def restart(self, step: int) -> None:
        """Resumes at `step`: points at or after it are withdrawn, so that no curve has a point twice."""
        if not self._enabled:
            return
        for lines in self._lines.values():
            lines.rewrite(partial(_is_before, step))
        self._add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point to each named curve, and one line {"step": step, name: value, ...}."""
        self._numbers(step, values, JSONL)

    def performance(self, step: int, values: Mapping[str, float]) -> None:
        """The same for times and rates, which go to performance.jsonl: metrics.jsonl is equal for equal runs."""
        if values:
            self._numbers(step, values, PERFORMANCE)

    def _numbers(self, step: int, values: Mapping[str, float], name: str) -> None:
        numbers = {tag: float(value) for tag, value in values.items()}
        self._add(step, [Summary.Value(tag=tag_of(tag), simple_value=value) for tag, value in numbers.items()])
        if self._enabled:
            self._lines[name].add((json.dumps({"step": int(step), **numbers}) + "\n").encode())
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self.flush()

    def text(self, step: int, name: str, markdown: str) -> None:
        """Adds markdown text."""
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
        tensor = TensorProto(dtype=DT_STRING, string_val=[markdown.encode()], tensor_shape=shape)
        self._add(step, [Summary.Value(tag=f"{name}/text_summary", metadata=metadata, tensor=tensor)])

    def config(self, step: int, config: Any) -> None:
        """Adds a config (a mapping) as a JSON block."""
        self.text(step, CONFIG, f"```json\n{json.dumps(config, indent=2, default=str)}\n```")

    def image(self, step: int, name: str, image_HWC: np.ndarray, *, scale: int = 1) -> None:
        """Adds a uint8 RGB picture, enlarged `scale` times."""
        pixels = _pixels(image_HWC, name, 3, scale)
        self._picture(step, name, pixels.shape, _encode(Image.fromarray(pixels), "PNG"))

    def video(self, step: int, name: str, video_PHWC: np.ndarray, *, fps: float = 8.0, scale: int = 1) -> None:
        """Adds a uint8 RGB clip as an animated GIF, enlarged `scale` times."""
        pixels = _pixels(video_PHWC, name, 4, scale)
        first, *rest = [Image.fromarray(frame) for frame in pixels]
        gif = _encode(first, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
        self._picture(step, name, pixels.shape[1:], gif)

    def flush(self) -> None:
        """Brings the files up to date on disk, or in the bucket; failed uploads are retried next time."""
        if not self._enabled:
            return
        self._flushed = time.monotonic()
        for grown in (self._events, *self._lines.values()):
            grown.flush(sync=True)
        if self._mirror.push() > LONGEST:
            self._begin_events()

    def close(self) -> None:
        """Brings the files up to date and closes them; nothing when that was done already."""
        if self._enabled:
            self.flush()
            self._enabled = False
            self._mirror.close()

    def _picture(self, step: int, name: str, shape: tuple[int, ...], encoded: bytes) -> None:
        image = Summary.Image(height=shape[0], width=shape[1], colorspace=3, encoded_image_string=encoded)
        self._add(step, [Summary.Value(tag=f"{SAMPLES}/{name}", image=image)])

    def _add(self, step: int, values: list[Summary.Value]) -> None:
        if self._enabled:
            self._add_event(Event(step=int(step), wall_time=time.time(), summary=Summary(value=values)))
