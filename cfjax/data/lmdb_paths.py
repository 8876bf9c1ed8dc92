"""The LMDB that holds a set's latents: its description in the manifest, and finding it after both were moved."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cfjax.core.errors import Temporary, UserError
from cfjax.data.lmdb_files import is_lmdb
from cfjax.data.lmdb_rows import LmdbRows

TEXT_SUFFIX = ".text"
KEY = "--config.data.lmdb=PATH (cfjax train) or --config.lmdb=PATH (cfjax precompute)"
Misfit = Callable[[LmdbRows], str]


def default_text_path(path: str | Path) -> Path:
    """Default folder of the text rows of an LMDB."""
    path = Path(path)
    return path.with_name(path.name + TEXT_SUFFIX)


def describe_lmdb(rows: LmdbRows, folder: Path) -> dict[str, Any]:
    """The manifest's description of the LMDB of the set in `folder`: absolute and relative path, and fingerprint."""
    place = rows.path.resolve()
    return {
        "path": str(place),
        "relative": os.path.relpath(place, folder.resolve()),
        "ground_truth": rows.ground_truth,
        "fingerprint": rows.fingerprint(),
    }


def lmdb_job(rows: LmdbRows) -> dict[str, Any]:
    """An LMDB as part of a job's settings: its rows, independent of its path."""
    return {"fingerprint": rows.fingerprint(), "ground_truth": rows.ground_truth}


def is_same_job(found: Any, rows: LmdbRows) -> bool:
    """Whether a folder was begun with this LMDB: by its fingerprint, or in records of older versions by its path.

    For an older job whose LMDB is no longer there, the number of rows and the shapes in the rest of its record decide.
    """
    if not isinstance(found, Mapping) or found.get("ground_truth") != rows.ground_truth:
        return False
    if "path" not in found:
        return found == lmdb_job(rows)
    before = Path(found["path"])
    if before == rows.path.resolve() or not is_lmdb(before):
        return True
    try:
        return LmdbRows(before, fallback_shape=rows.latent_shape).fingerprint() == rows.fingerprint()
    except UserError:
        return True


def candidate_paths(folder: Path, about: Mapping[str, Any], given: str | Path = "") -> list[Path]:
    """Where the LMDB of the set in `folder` may be: the recorded path, beside the set, and the recorded relative path.

    Paths that are not beside the set are used only if its record also holds the LMDB's fingerprint, which sets of
    cfjax 0.1.0 do not: the record of someone else must not lead to an arbitrary LMDB.
    """
    if given:
        return [Path(given)]
    beside = [folder.with_name(folder.name.removesuffix(TEXT_SUFFIX))] if folder.name.endswith(TEXT_SUFFIX) else []
    moved = [Path(os.path.normpath(folder / about["relative"]))] if "relative" in about else []
    found = dict.fromkeys([Path(about["path"]), *beside, *moved])
    parent = folder.resolve().parent
    return [place for place in found if about.get("fingerprint") or place.resolve().is_relative_to(parent)]


def open_lmdb_of(
    folder: Path,
    about: Mapping[str, Any],
    shape: tuple[int, int, int, int],
    misfit: Misfit,
    given: str | Path = "",
) -> LmdbRows:
    """The LMDB of the set in `folder`, at the first of its `candidate_paths` that holds it.

    Args:
      about: the manifest's "lmdb".
      shape: (F, H, W, C) of the set.
      misfit: why an LMDB is not the set's, "" if it is.
      given: its new path; no other is then tried.

    Raises:
      UserError: it is not found, or another one is there; the line names the paths and the key.
    """
    tried: list[str] = []
    for place in candidate_paths(folder, about, given):
        if not is_lmdb(place):
            tried.append(f"{place} (no LMDB there)")
            continue
        try:
            rows = LmdbRows(place, ground_truth=about["ground_truth"], fallback_shape=shape)
            wrong = misfit(rows)
        except Temporary:
            raise
        except UserError as error:
            wrong = str(error)
        if not wrong:
            return rows
        tried.append(f"{place} ({wrong})")
    where = " nor at ".join(tried) or "its place"
    raise UserError(
        f"{folder}: the LMDB with its latents is not at {where}; name its place with {KEY}, or precompute the set again"
    )
