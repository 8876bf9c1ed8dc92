"""Which prompt and which seed a clip was made for, as far as its folder says.

In this order: `settings.json` of `cfjax generate`; a table of the folder (manifest, metadata or captions, .csv, .tsv,
.jsonl or .json) with a column for the file, one for the prompt, and perhaps `seed`; names as VBench's, PROMPT-0.mp4;
names as `cfjax generate` gives them, 000_PROMPT_seed0.mp4; else a clip is its own prompt, by its name.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cfjax.core.errors import UserError
from cfjax.data.captions import Columns
from cfjax.data.tables import read_table
from cfjax.evaluation.clip_source import SourceClip
from cfjax.evaluation.video_set import SETTINGS, read_set

TABLES = tuple(
    f"{stem}{suffix}" for stem in ("manifest", "metadata", "captions") for suffix in (".csv", ".tsv", ".jsonl", ".json")
)
_VBENCH = re.compile(r"(.+)-(\d{1,10})")
_OURS = re.compile(r"\d{3,}_(.+)_seed(\d{1,10})")


@dataclass(frozen=True)
class Identity:
    """What a clip was made for; `seed` is -1 where nothing says it."""

    prompt: str
    seed: int = -1

    def key(self) -> str:
        """The prompt in a form that does not depend on case, punctuation or spaces."""
        return " ".join(re.findall(r"\w+", self.prompt.casefold().replace("_", " "))) or self.prompt


def identities(folder: Path, clips: Sequence[SourceClip]) -> tuple[dict[str, Identity], str]:
    """The identity of every clip by name, and in words how they were found.

    Raises:
      UserError: a table that cannot be read, or has no columns for file and prompt.
    """
    listed, how = _listed(folder)
    out, counts = {}, dict.fromkeys(("", "VBench's names PROMPT-SEED", "names 000_PROMPT_seed0", "names alone"), 0)
    for clip in clips:
        name = PurePosixPath(clip.stem).name
        found = listed.get(clip.name) or listed.get(PurePosixPath(clip.name).name) or listed.get(name)
        if found:
            out[clip.name], way = found, ""
        elif match := _OURS.fullmatch(name):
            out[clip.name], way = Identity(match[1], int(match[2])), "names 000_PROMPT_seed0"
        elif match := _VBENCH.fullmatch(name):
            out[clip.name], way = Identity(match[1], int(match[2])), "VBench's names PROMPT-SEED"
        else:
            out[clip.name], way = Identity(clip.stem), "names alone"
        counts[way] += 1
    ways = [f"{how or ''}{way}" + ("" if n == len(clips) else f" ({n})") for way, n in counts.items() if n]
    return out, ", ".join(way if not listed else way.removeprefix(how) or how for way in ways)


def _listed(folder: Path) -> tuple[Mapping[str, Identity], str]:
    """What the folder's own list says, by file, and which file that is."""
    if (folder / SETTINGS).is_file() and (asked := read_set(folder, resume=False).asked):
        return {video.file: Identity(video.prompt, video.seed) for video in asked}, SETTINGS
    for name in TABLES:
        if (folder / name).is_file():
            return _table(folder / name), name
    return {}, ""


def _table(file: Path) -> dict[str, Identity]:
    out = {}
    for row in read_table(file):
        columns = Columns().of(file, row, clips=True)
        seed = row.values.get("seed")
        try:
            number = -1 if seed in (None, "") else int(float(str(seed)))
        except ValueError:
            raise UserError(f"{file}, {row.place}: seed={seed!r} is no whole number") from None
        path = str(row.values[columns["file"]]).replace("\\", "/")
        found = Identity(str(row.values[columns["caption"]]).strip(), number)
        out[path] = out[PurePosixPath(path).name] = found
    return out
