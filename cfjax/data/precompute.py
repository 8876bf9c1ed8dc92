"""Encoding a source once: the latent dataset on disk, and the writer that puts it there atomically.

A latent dataset is a folder: manifest.json, latents.npy [N, F, H, W, C], caption_id.npy int32 [N], captions.json,
text.npy float32 [captions, S, E], negative_text.npy float32 [S, E] (the empty caption), factors.npz (what the source
knows of each record), for ODE sets trajectory.npy [N, J, F, H, W, C], and of steered clips actions.npy [N, F, A]. The
folder is written under a hidden name and renamed when complete, so a folder that exists is whole. `cfjax.data.latents`
reads it.
"""

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import jax
import numpy as np

from cfjax.core.checksums import write_sums
from cfjax.core.errors import Temporary, UserError
from cfjax.core.paths import to_disk
from cfjax.core.progress import Progress

MANIFEST_VERSION = 1
EncodeCaptions = Callable[[list[str]], np.ndarray]


class VideoSource(Protocol):
    """Random access to {"video_PHWC", "caption", "factors"}, perhaps "actions_FA"; `config.to_json()` describes it."""

    config: Any

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class VideoEncoder(Protocol):
    """The part of a codec that precomputing needs: pixels to latents, and its description in the manifest."""

    def encode(self, video_BPHWC: jax.Array) -> jax.Array: ...

    def describe(self) -> dict[str, Any]: ...


def digest(values: Mapping[str, Any]) -> str:
    """sha256 of a JSON-able mapping, independent of key order, computed as a stream."""
    hashed = hashlib.sha256()
    for piece in json.JSONEncoder(sort_keys=True).iterencode(values):
        hashed.update(piece.encode())
    return hashed.hexdigest()


class LatentWriter:
    """Writes a latent dataset in order, batch by batch; use it in a `with` block.

    with LatentWriter(path, records=N, latent_shape=(F, H, W, C)) as writer:
        writer.append(latents, caption_ids)        # N records in all, in any batches
        writer.write_text(captions, text, negative_text)
        writer.write_factors(factors)              # optional

    Leaving the block normally publishes the folder; leaving it by an exception removes every trace.

    Args:
      trajectory_points: J > 0 adds trajectory.npy with J states per record, which `append` then expects.
      action_keys: A > 0 adds actions.npy, the keys held in each latent frame, which `append` then expects.
      description: JSON-able entries for the manifest: "codec", "text_encoder", "source" and whatever the caller adds.
      overwrite: replaces an existing dataset at the moment of publishing; without it an existing path is a UserError.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        records: int,
        latent_shape: tuple[int, int, int, int],
        dtype: str = "float16",
        trajectory_points: int = 0,
        action_keys: int = 0,
        description: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        if dtype not in ("float16", "float32"):
            raise UserError(f"latent dataset: dtype={dtype!r}; use 'float16' or 'float32'")
        if records < 1:
            raise UserError("latent dataset: no records to write")
        self.path = Path(path)
        self._overwrite = overwrite
        self._check_free()
        self._partial = self.path.parent / f".{self.path.name}.partial-{uuid.uuid4().hex[:8]}"
        self._records, self._filled, self._captions = records, 0, -1
        self._arrays: dict[str, np.memmap] = {}
        self._specs = {"latents": ((records, *latent_shape), dtype), "caption_id": ((records,), "int32")}
        if trajectory_points:
            self._specs["trajectory"] = ((records, trajectory_points, *latent_shape), dtype)
        if action_keys:
            self._specs["actions"] = ((records, latent_shape[0], action_keys), dtype)
        self._description = dict(description or {})

    def _check_free(self) -> None:
        if self.path.exists() and not self._overwrite:
            raise UserError(f"{self.path}: already exists; choose another path or pass overwrite")
        if self.path.exists() and not (self.path / "manifest.json").exists():
            raise UserError(f"{self.path}: not a latent dataset, so it is not overwritten; choose another path")

    def __enter__(self) -> Self:
        self._partial.mkdir(parents=True)
        try:
            for name, (shape, dtype) in self._specs.items():
                file = self._partial / f"{name}.npy"
                self._arrays[name] = np.lib.format.open_memmap(file, mode="w+", dtype=np.dtype(dtype), shape=shape)
                _reserve(file)
        except OSError as error:
            self.__exit__(type(error), error, None)
            raise Temporary(f"{self.path}: no room for {name}.npy ({error.strerror}); is the disk full?") from None
        return self

    def append(
        self, latents_BFHWC: Any, caption_id_B: Any, trajectory_BJFHWC: Any = None, actions_BFA: Any = None
    ) -> None:
        """Stores the next B records. Raises UserError on a wrong shape, too many records or non-finite latents."""
        given = {"latents": latents_BFHWC, "caption_id": caption_id_B}
        given |= {"trajectory": trajectory_BJFHWC, "actions": actions_BFA}
        given = {name: np.asarray(array) for name, array in given.items() if array is not None}
        if given.keys() != self._arrays.keys():
            raise UserError(f"{self.path}: expected {sorted(self._arrays)}, got {sorted(given)}")
        count = len(given["latents"])
        rows = slice(self._filled, self._filled + count)
        if rows.stop > self._records:
            raise UserError(f"{self.path}: more than the announced {self._records} records")
        for name, array in given.items():
            if array.shape != (count, *self._arrays[name].shape[1:]):
                raise UserError(f"{self.path}: {name} {array.shape}, expected [B, *{self._arrays[name].shape[1:]}]")
            stored = array.astype(self._arrays[name].dtype)
            if not np.isfinite(stored).all():
                raise UserError(f"{self.path}: {name} of records {rows.start}..{rows.stop - 1} is not finite as stored")
            self._arrays[name][rows] = stored
        self._filled = rows.stop

    def write_text(self, captions: Sequence[str], text_table: Any, negative_text_SE: Any) -> None:
        """Stores the captions that caption_id indexes and their encodings, row by row. Raises UserError on misfits."""
        text, negative = np.asarray(text_table, np.float32), np.asarray(negative_text_SE, np.float32)
        if text.ndim != 3 or len(text) != len(captions) or negative.shape != text.shape[1:]:
            raise UserError(
                f"{self.path}: text {text.shape} and negative text {negative.shape} for {len(captions)} captions; "
                "the text encoder must give float32 [captions, S, E]"
            )
        np.save(self._partial / "text.npy", text)
        np.save(self._partial / "negative_text.npy", negative)
        (self._partial / "captions.json").write_text(json.dumps(list(captions), ensure_ascii=False))
        self._captions = len(captions)
        self._specs["text"] = (text.shape, "float32")
        self._specs["negative_text"] = (negative.shape, "float32")

    def write_factors(self, factors: Mapping[str, np.ndarray]) -> None:
        """Per-record arrays [N, ...] (numbers or fixed-width strings) as factors.npz."""
        for name, array in factors.items():
            if len(array) != self._records or array.dtype.hasobject:
                raise UserError(f"{self.path}: factor {name!r} needs one plain value per record")
        np.savez(self._partial / "factors.npz", allow_pickle=False, **factors)

    def _publish(self) -> None:
        if self._filled != self._records or self._captions < 0:
            missing = "no text" if self._captions < 0 else f"{self._filled} of {self._records} records"
            raise UserError(f"{self.path}: incomplete ({missing}); nothing was kept")
        if not ((self._arrays["caption_id"] >= 0) & (self._arrays["caption_id"] < self._captions)).all():
            raise UserError(f"{self.path}: a caption_id lies outside the {self._captions} captions; nothing was kept")
        for array in self._arrays.values():
            array.flush()
        self._arrays.clear()
        manifest = {
            "version": MANIFEST_VERSION,
            "records": self._records,
            "captions": self._captions,
            "arrays": {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in self._specs.items()},
            **self._description,
            "source_sha256": digest(self._description.get("source", {})),
        }
        (self._partial / "manifest.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        write_sums(self._partial)
        for file in self._partial.iterdir():
            to_disk(file)
        self._check_free()
        aside = self._partial.with_name(self._partial.name + ".old")
        if self.path.exists():
            os.rename(self.path, aside)
        os.rename(self._partial, self.path)
        shutil.rmtree(aside, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._arrays.clear()
            shutil.rmtree(self._partial, ignore_errors=True)


def _reserve(file: Path) -> None:
    """Allocates the disk space of a memory-mapped file: writing to one on a full disk kills the process (SIGBUS).

    Raises:
      OSError: there is not enough.
    """
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            try:
                os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some file systems cannot
                    raise


def _batches(source: VideoSource, batch_size: int, progress: bool) -> Iterator[list[dict[str, Any]]]:
    with Progress(len(source), "clip", "precompute", shown=progress) as bar:
        for start in range(0, len(source), batch_size):
            items = [source[i] for i in range(start, min(start + batch_size, len(source)))]
            yield items
            bar.update(len(items))


def encode_table(encode_captions: EncodeCaptions, captions: Sequence[str], chunk: int = 64) -> np.ndarray:
    """float32 [captions, S, E], `chunk` captions at a time. Raises UserError if the encoder gives other shapes."""
    parts: list[np.ndarray] = []
    for start in range(0, len(captions), chunk):
        names = list(captions[start : start + chunk])
        part = np.asarray(encode_captions(names), np.float32)
        if part.ndim != 3 or len(part) != len(names) or (parts and part.shape[1:] != parts[0].shape[1:]):
            raise UserError(f"text encoder: {part.shape} for {len(names)} captions; it must give [captions, S, E]")
        parts.append(part)
    return np.concatenate(parts)


def precompute(
    source: VideoSource,
    codec: VideoEncoder,
    encode_captions: EncodeCaptions,
    path: str | Path,
    *,
    text_encoder: Mapping[str, Any],
    batch_size: int = 64,
    dtype: str = "float16",
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Encodes every record of `source` and every distinct caption once, and publishes the latent dataset at `path`.

    Args:
      encode_captions: list[str] -> float32 [n, S, E].
      text_encoder: what the manifest says about it (JSON-able).

    Raises:
      UserError: the path is taken, a shape is wrong or a latent is not finite. Nothing is left behind then.
    """
    caption_ids: dict[str, int] = {}
    factors: list[Mapping[str, np.ndarray]] = []
    first = source[0]
    shape = jax.eval_shape(codec.encode, np.asarray(first["video_PHWC"])[None]).shape[1:]
    keys = first["actions_FA"].shape[1] if "actions_FA" in first else 0
    seed = getattr(source, "seed", None)
    description = {
        "codec": codec.describe(),
        "text_encoder": dict(text_encoder),
        "source": {"name": type(source).__name__, "seed": seed, "config": source.config.to_json()},
    }
    if steering := getattr(source, "steering", None):
        description["source"]["steering"] = steering.to_json()
    encode = jax.jit(codec.encode)
    writer = LatentWriter(
        path,
        records=len(source),
        latent_shape=shape,
        dtype=dtype,
        action_keys=keys,
        description=description,
        overwrite=overwrite,
    )
    with writer:
        for items in _batches(source, batch_size, progress):
            latents = np.asarray(encode(np.stack([item["video_PHWC"] for item in items])))
            ids = [caption_ids.setdefault(item["caption"], len(caption_ids)) for item in items]
            actions = np.stack([item["actions_FA"] for item in items]) if keys else None
            writer.append(latents, np.asarray(ids, np.int32), actions_BFA=actions)
            factors += [item["factors"] for item in items]
        captions = list(caption_ids)
        writer.write_text(captions, encode_table(encode_captions, captions), encode_table(encode_captions, [""])[0])
        writer.write_factors({name: np.stack([f[name] for f in factors]) for name in factors[0]})
    return writer.path
