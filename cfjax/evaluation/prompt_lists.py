"""Lists of prompts as the family has them, read from where the user has them: none comes with cfjax.

.txt    a prompt a line: MovieGen's, the 100 of the demos, VBench's `all_dimension.txt`
.json   VBench's `VBench_full_info.json`, objects with `prompt_en` and `dimension`; or a list of texts
other   tables with a column of prompts (`data.tables`)

A second list, behind a |, has line by line what clips were made of in place of the first's prompts, as
`all_dimension_extended.txt`: clips are generated from extended prompts, and scored by the original ones.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cfjax.core.console import counted
from cfjax.core.errors import UserError
from cfjax.core.limits import LIST_BYTES
from cfjax.core.paths import local_path, one_line
from cfjax.core.schema import load_bytes
from cfjax.data.captions import Columns, caption_of
from cfjax.data.pictures import Unusable
from cfjax.data.tables import TEXT, Row, read_table
from cfjax.evaluation.clip_identity import Identity

KEY = "--config.prompts"
DIMENSION = "dimension"  # VBench's column


@dataclass(frozen=True)
class PromptList:
    """A list of prompts.

    Attributes:
      file, sha256: of the list, and of the extended one where there is one.
      prompts: in order.
      dimensions: VBench's of each prompt; () for lists without.
      extended: what clips were made of, line by line; () for the same.
    """

    file: str
    sha256: str
    prompts: tuple[str, ...]
    dimensions: tuple[tuple[str, ...], ...] = ()
    extended: tuple[str, ...] = ()
    extended_file: str = ""
    extended_sha256: str = ""

    def __len__(self) -> int:
        return len(self.prompts)

    def by_key(self) -> dict[str, str]:
        """The prompt of each key (`Identity.key`), of its own text and of the extended one's."""
        out = {Identity(text).key(): prompt for text, prompt in zip(self.extended, self.prompts, strict=False)}
        return out | {Identity(prompt).key(): prompt for prompt in self.prompts}

    def as_json(self, clips: int, seen: int) -> dict[str, Any]:
        """What a record says of it: files, hashes, and how much of it there are clips of."""
        about: dict[str, Any] = {"file": self.file, "sha256": self.sha256, "prompts": len(self)}
        if self.extended:
            about |= {"extended": self.extended_file, "extended_sha256": self.extended_sha256}
        return {**about, "clips": clips, "prompts_with_clips": seen}


def read_prompt_list(places: str) -> PromptList:
    """The list of a file, or of `FILE|EXTENDED`.

    Raises:
      UserError: a file that is no such list, or two of different lengths.
    """
    parts = [part.strip() for part in places.split("|")]
    if len(parts) > 2 or not all(parts):
        raise UserError(f"{KEY}={places}: name a file, or a list and its extended one as FILE|EXTENDED")
    listed = _read(parts[0])
    if len(parts) == 1:
        return listed
    other = _read(parts[1])
    if len(other) != len(listed):
        raise UserError(
            f"{KEY}={places}: {counted(len(listed), 'prompt')} and {counted(len(other), 'extended one')}; both lists "
            "need the same, line by line"
        )
    return replace(listed, extended=other.prompts, extended_file=other.file, extended_sha256=other.sha256)


def _read(place: str) -> PromptList:
    path = local_path(place, KEY, "it is read from this machine")
    if not path.is_file():
        raise UserError(
            f"{KEY}={place}: no such file; beside --config.videos and compare it names a list of prompts, .txt with "
            "one a line, VBench_full_info.json, or a table"
        )
    try:
        digest = hashlib.sha256(load_bytes(path, LIST_BYTES)).hexdigest()
    except (OSError, ValueError) as error:
        raise UserError(f"{KEY}={place}: {one_line(error)}") from None
    prompts, dimensions = [], []
    for row in read_table(path):
        try:
            prompt = caption_of(row.values[_column(path, row)])
        except Unusable as error:
            if path.suffix.lower() == ".txt" and not str(row.values[TEXT]).strip():
                continue
            raise UserError(f"{path}, {row.place}: {error}") from None
        prompts.append(prompt)
        dimensions.append(_dimensions(path, row.place, row.values))
    if not prompts:
        raise UserError(f"{KEY}={place}: no prompts in it")
    return PromptList(place, digest, tuple(prompts), tuple(dimensions) if any(dimensions) else ())


def _column(path: Path, row: Row) -> str:
    try:
        return Columns().of(path, row, clips=False)["caption"]
    except UserError:
        raise UserError(
            f"{path}, {row.place}: no list of prompts: it has {', '.join(row.values) or 'no columns'}, and one column "
            "must be prompt, caption, text or prompt_en"
        ) from None


def _dimensions(path: Path, place: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    found = values.get(DIMENSION, ())
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list | tuple) or not all(isinstance(name, str) for name in found):
        raise UserError(f"{path}, {place}: {DIMENSION} is {found!r:.60}; VBench's are lists of names")
    return tuple(found)


@dataclass(frozen=True)
class Listed:
    """Clips by a list: their identities, the files of those that are not on it, and its prompts without a clip.

    Attributes:
      seen: different prompts with a clip.
    """

    identity: Sequence[Identity]
    unlisted: Sequence[str]
    without: Sequence[str]
    seen: int

    def notes(self) -> list[str]:
        """Lines on what is left over."""
        lines = []
        if self.unlisted:
            shown = ", ".join(self.unlisted[:3]) + (", ..." if len(self.unlisted) > 3 else "")
            lines.append(f"{counted(len(self.unlisted), 'clip')} of no prompt in the list: {shown}")
        if self.without:
            shown = ", ".join(repr(prompt) for prompt in self.without[:2]) + (", ..." if len(self.without) > 2 else "")
            lines.append(
                f"{len(self.without)} of {counted(self.seen + len(self.without), 'prompt')} without a clip: {shown}"
            )
        return lines


def apply_list(prompts: PromptList, files: Sequence[str], identity: Sequence[Identity]) -> Listed:
    """The clips' prompts as the list spells them.

    Raises:
      UserError: no clip is of a prompt in the list.
    """
    known = prompts.by_key()
    out, unlisted, seen = [], [], set()
    for file, one in zip(files, identity, strict=True):
        prompt = known.get(one.key())
        if prompt is None:
            unlisted.append(file)
        else:
            seen.add(prompt)
        out.append(one if prompt is None else replace(one, prompt=prompt))
    if not seen:
        raise UserError(
            f"{KEY}={prompts.file}: no clip is of a prompt in it; the first clip's is {identity[0].prompt!r:.80}, the "
            f"list's {prompts.prompts[0]!r:.80}"
        )
    without = [prompt for prompt in dict.fromkeys(prompts.prompts) if prompt not in seen]
    return Listed(out, unlisted, without, len(seen))
