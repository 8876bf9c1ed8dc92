"""Opening a dataset by what is there: records, the toy's arrays, or an LMDB with its text beside it."""

from pathlib import Path

from cfjax.core.errors import UserError
from cfjax.data.latents import ClipDataset, LatentDataset, read_json
from cfjax.data.lmdb_rows import is_lmdb
from cfjax.data.parts import JOB
from cfjax.data.precompute import MANIFEST_VERSION
from cfjax.data.records import MANIFEST, RECORDS_VERSION, RecordDataset


def text_beside(path: str | Path) -> Path:
    """Where the text rows of an LMDB are kept when no other place is named."""
    path = Path(path)
    return path.with_name(f"{path.name}.text")


def open_dataset(path: str | Path) -> ClipDataset:
    """The dataset at `path`.

    Raises:
      UserError: nothing there, it is unfinished or broken, or an LMDB whose prompts were not encoded yet.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        manifest = read_json(path / MANIFEST)
        version = manifest.get("version") if isinstance(manifest, dict) else None
        if version == RECORDS_VERSION:
            return RecordDataset(path)
        if version == MANIFEST_VERSION:
            return LatentDataset(path)
        raise UserError(f"{path / MANIFEST}: no dataset of a known version ({version}); precompute it again")
    if (path / JOB).is_file():
        raise UserError(f"{path} is unfinished; run its cfjax precompute again until all parts are there")
    if is_lmdb(path):
        if (text_beside(path) / MANIFEST).is_file():
            return RecordDataset(text_beside(path))
        raise UserError(
            f"{path} is an LMDB, which holds prompts and no text rows; encode them once with "
            f"cfjax precompute --config=configs/precompute.py --config.source={path} --config.world=WORLD"
        )
    raise UserError(f"{path / MANIFEST}: missing; no dataset there; make one with cfjax precompute")
