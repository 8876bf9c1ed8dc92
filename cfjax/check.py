"""`cfjax check`: whether the files of a folder are as they were written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cfjax.core.checksums import SUMS, differing, read_sums
from cfjax.core.console import counted, say
from cfjax.core.errors import Temporary, UserError
from cfjax.core.paths import file_sizes, in_bucket, is_folder, path_of
from cfjax.data.check import check_dataset
from cfjax.data.lmdb_files import is_lmdb
from cfjax.data.parts import JOB
from cfjax.data.records import MANIFEST
from cfjax.evaluation.video_set import SETTINGS, latents_name, read_set
from cfjax.training.checkpoint import FOLDER
from cfjax.training.sums import faults

USAGE = """usage: cfjax check PLACE [PLACE ...]

Compares every file with the checksum that was written with it, and names each one that differs. PLACE is the --workdir
of train or convert (all its checkpoints, and those of the world beside it), of export or of generate, or a set that
precompute has made (each record is looked at as well); a run or its videos may be in a bucket. A file that was never
given a checksum is not compared, and that is said. The exit code is 2 if something differs."""
DIFFERENT = 2


@dataclass
class Findings:
    """What was found in a place.

    Attributes:
      kinds: what it is, as the last line says it.
      bad: the faults reported so far.
      unsure: why some files could not be compared.
    """

    kinds: list[str]
    bad: int
    unsure: list[str]


def main(argv: Sequence[str]) -> int:
    """Checks every place that is named; 2 if one of them is not as it was written."""
    if {"--help", "-h", "-help"} & set(argv):
        say(USAGE)
        return 0
    if not argv or any(word.startswith("-") for word in argv):
        raise UserError(f"{argv[0]}: there are no such flags; write cfjax check PLACE" if argv else _MISSING)
    return max([check_place(path_of(place)) for place in argv])


_MISSING = "name the folder to check, as cfjax check runs/dmd"


def check_place(place: Path) -> int:
    """Prints every fault of a folder and then, in a line, its kind and whether it is intact.

    Raises:
      UserError: there is nothing that this package has written.
    """
    found = Findings([], 0, [])
    for line in _faults(place, found):
        say(line)
        found.bad += 1
    if not found.kinds:
        raise UserError(f"{place}: no run, export, set of records or videos there; name the --workdir of what made it")
    for line in found.unsure:
        say(f"note: {line}")
    what = ", ".join(found.kinds)
    say(
        f"{place}: {what}: "
        + (counted(found.bad, "fault") if found.bad else "all that has checksums is as it was written")
    )
    return DIFFERENT if found.bad else 0


def _faults(place: Path, found: Findings) -> Iterator[str]:
    """Every fault, "FILE: what is wrong", as it is found."""
    names = file_sizes(place)
    for folder in _folders_of_checkpoints(place):
        yield from _checkpoints(folder, found)
    if SUMS in names:
        found.kinds.append("a folder with checksums")
        yield from _listed(place)
    if MANIFEST in names or JOB in names or (not in_bucket(place) and is_lmdb(place)):
        found.kinds.append("a set of records")
        if SUMS not in names:
            found.unsure.append(f"{place} has no checksums, as sets of older versions: its records were read")
        yield from map(str, check_dataset(place, progress=False))
    if SETTINGS in names:
        yield from _videos(place, found, summed=SUMS in names)


def _folders_of_checkpoints(place: Path) -> list[Path]:
    """A run's own, and those of the networks of the world in it."""
    run_folders = [place, place / "world"]
    if is_folder(place / "world"):
        run_folders += [
            path for path in sorted((place / "world").iterdir()) if path.name not in ("tokenizer", "world.json")
        ]
    return [run_folder / FOLDER for run_folder in run_folders if is_folder(run_folder / FOLDER)]


def _checkpoints(folder: Path, found: Findings) -> Iterator[str]:
    steps = sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    found.kinds.append(counted(len(steps), "checkpoint"))
    for step in steps:
        try:
            if read_sums(step) is None:
                found.unsure.append(f"{step} has no checksums (an older version's, or checksums=False)")
            yield from (f"{step}/{line}" for line in faults(step))
        except Temporary:
            raise
        except UserError as error:
            yield str(error)


def _listed(place: Path) -> Iterator[str]:
    try:
        yield from (f"{place}/{line}" for line in differing(place, read_sums(place) or {}))
    except Temporary:
        raise
    except UserError as error:
        yield str(error)


def _videos(place: Path, found: Findings, *, summed: bool) -> Iterator[str]:
    """Sizes of the videos that are recorded as finished; their bits are in the sums, which a set gets at its end."""
    videos = read_set(place, resume=True)
    found.kinds.append(f"{counted(len(videos.done), 'finished video')} of {len(videos.asked)}")
    if not summed:
        found.unsure.append(f"{place} has no checksums, which come when all videos are made: sizes were compared")
    for line in videos.done.values():
        if not videos.mp4_unchanged(line):
            yield f"{place}/{line.file}: missing, or not of {line.bytes} bytes"
        if line.latents is not None and not videos.latents_unchanged(line):
            yield f"{place}/{latents_name(line.file)}: missing, or not of {line.latents} bytes"
