"""Opening a dataset of any format: records, the toy's arrays, or an LMDB with its text rows beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfjax.core.errors import UserError
from cfjax.data.latents import Batch, ClipDataset, LatentDataset, WrappedDataset, read_json
from cfjax.data.lmdb_files import is_lmdb
from cfjax.data.lmdb_paths import default_text_path
from cfjax.data.parts import JOB
from cfjax.data.precompute import MANIFEST_VERSION, digest
from cfjax.data.records import MANIFEST, RECORDS_VERSION, RecordDataset, manifest_layout

_PLACES = ("path", "relative", "world_path", "source_sha256")  # keys of a manifest that say where things lay


def open_dataset(path: str | Path, *, lmdb: str | Path = "") -> ClipDataset:
    """The dataset at `path`.

    Args:
      lmdb: where the LMDB with the set's latents was moved to; "": the recorded path, or beside the set.

    Raises:
      UserError: nothing there, it is unfinished or broken, or an LMDB whose prompts were not encoded yet.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        manifest = read_json(path / MANIFEST)
        version = manifest.get("version") if isinstance(manifest, dict) else None
        if version == RECORDS_VERSION:
            return RecordDataset(path, lmdb=lmdb)
        if version == MANIFEST_VERSION and lmdb:
            raise UserError(f"lmdb={str(lmdb)!r}: {path} keeps its latents in no LMDB; leave the key empty")
        if version == MANIFEST_VERSION:
            return LatentDataset(path)
        raise UserError(f"{path / MANIFEST}: no dataset of a known version ({version}); precompute it again")
    if (path / JOB).is_file():
        raise UserError(f"{path} is unfinished; run its cfjax precompute again until all parts are there")
    if is_lmdb(path):
        text = default_text_path(path)
        if (text / MANIFEST).is_file():
            kept_there = manifest_layout(text, read_json(text / MANIFEST)).kept_in == "lmdb"
            return RecordDataset(text, lmdb=lmdb or (path if kept_there else ""))
        raise UserError(
            f"{path} is an LMDB, which holds prompts and no text rows; encode them once with "
            f"cfjax precompute --config=configs/precompute.py --config.source={path} --config.world=WORLD"
        )
    raise UserError(f"{path / MANIFEST}: missing; no dataset there; make one with cfjax precompute")


def identity(dataset: ClipDataset) -> str:
    """A digest of a set's content and of the job that made it, without paths, so that moving it keeps the digest."""

    def stripped(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: stripped(item) for key, item in value.items() if key not in _PLACES}
        return [stripped(item) for item in value] if isinstance(value, list) else value

    job = read_json(dataset.path / JOB) if (dataset.path / JOB).is_file() else {}
    return digest({"manifest": stripped(dataset.manifest), "job": stripped(job)})


def has_ground_truth(manifest: Mapping[str, Any]) -> bool:
    """Whether the latents of an ODE set are clean clips, by its manifest (default: yes)."""
    kept, source = (manifest.get(key, {}) for key in ("lmdb", "source"))
    return bool(kept.get("ground_truth", source.get("ground_truth", True)))


class WithoutGroundTruth(WrappedDataset):
    """An ODE set without clean clips: its last stored state is the ODE's end point, which takes the clip's place.

    Self Forcing's and CausVid's pairs are of this kind, as they are made from noise alone.
    """

    def __getitem__(self, index: int) -> Batch:
        record = super().__getitem__(index)
        states = np.concatenate([record["trajectory_JFHWC"], record["latents_FHWC"][None]])
        return {**record, "trajectory_JFHWC": states}

    @property
    def trajectory_points(self) -> int:
        """J, the end point included."""
        return super().trajectory_points + 1


def without_ground_truth(dataset: ClipDataset) -> ClipDataset:
    """The set read as pairs without clean clips; unchanged if it holds no pairs, or is of that kind already."""
    return WithoutGroundTruth(dataset) if dataset.trajectory_points and has_ground_truth(dataset.manifest) else dataset
