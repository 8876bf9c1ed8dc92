"""Prompts over time, as several systems write them: when a stream changes its prompt, and how.

    a calm sea[5s] | a storm rises[10s] | lightning[5s#]         seconds of each; # cuts the scene at its start

| source | written as | mode |
|---|---|---|
| Infinity-RoPE, `_parse_scene_durations` | the line above | keep; # cut |
| LongLive, interactive inference | {"prompts": ["a", "b"], "switch_frame_indices": [40]}, latent frames | recache |
| Scope, timeline export | [{"prompts": [{"text", "weight"}], "startTime", "endTime", "transitionSteps"}] | recache |

Seconds are rounded to the nearest block, latent frames up to the next one. (Infinity-RoPE rounds seconds down, and cuts
at the end of the marked scene, against its README, and at any # in a prompt.)
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cfjax.core.errors import UserError
from cfjax.rollout.session_state import Mode, Prompt

TIMED = re.compile(r"^(?P<text>.*?)\s*\[\s*(?P<seconds>[0-9]+(?:\.[0-9]*)?)\s*s\s*(?P<cut>#?)\s*\]\s*$", re.DOTALL)


@dataclass(frozen=True)
class Switch:
    """From which block on, which prompt, and how a session changes to it (`Session.set_prompt`)."""

    block: int
    prompt: Prompt
    mode: Mode = "recache"
    blend_blocks: int = 0


@dataclass(frozen=True)
class Timeline:
    """The switches of one video, the first at block 0; and how it was written, for records."""

    switches: tuple[Switch, ...]
    text: str

    def prompts(self) -> list[str]:
        """Every prompt, once."""
        found = (s.prompt if isinstance(s.prompt, str) else [text for text, _ in s.prompt] for s in self.switches)
        return list(dict.fromkeys(text for some in found for text in ([some] if isinstance(some, str) else some)))

    def check(self, num_blocks: int) -> None:
        """Raises UserError if a switch is after the video's end."""
        last = self.switches[-1]
        if last.block >= num_blocks:
            where = f"begins at block {last.block}, the video has {num_blocks}"
            raise UserError(f"timeline: {_short(last.prompt)!r} {where}: ask for more frames, or shorten it")


@dataclass(frozen=True)
class Clock:
    """How seconds and latent frames become blocks.

    Attributes:
      fps: of the pixels.  frames: latent frames of a block.  stride: pixel frames of a latent frame.
    """

    fps: float
    frames: int
    stride: int

    def at_seconds(self, seconds: float) -> int:
        """The nearest block border."""
        return math.floor(seconds * self.fps / (self.stride * self.frames) + 0.5)

    def at_frame(self, frame: int) -> int:
        """The first block that begins at this latent frame or later."""
        return -(-frame // self.frames)


def read_timelines(source: str, clock: Clock) -> list[Timeline]:
    """The timelines that a text holds, or a file: .json (one), .jsonl (one per line), else text (one per line).

    Raises:
      UserError: prompts that are empty, overlap, leave a gap or begin after 0; a file that cannot be read.
    """
    file = Path(source)
    if file.suffix.lower() not in (".json", ".jsonl", ".txt"):
        return [parse_timed(source, clock)]
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"timeline={source}: cannot be read ({error})") from error
    if file.suffix.lower() == ".json":
        return [_parsed(text, clock, source)]
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{source}: no timeline in it")
    found = []
    for number, line in lines:
        place = f"{source}:{number}"
        try:
            found.append(_parsed(line, clock, place) if file.suffix == ".jsonl" else parse_timed(line, clock))
        except UserError as error:
            raise UserError(str(error) if place in str(error) else f"{place}: {error}") from error
    return found


def parse_timed(text: str, clock: Clock) -> Timeline:
    """`a[5s] | b[10s#] | c`: the last prompt may go without a duration, and lasts to the end.

    Raises:
      UserError: see `read_timelines`.
    """
    parts, switches, seconds = text.split("|"), list[Switch](), 0.0
    for number, part in enumerate(parts, 1):
        found = TIMED.match(part)
        if not found and number < len(parts):
            raise UserError(f"timeline: prompt {number}, {part.strip()!r}, has no duration: write {part.strip()}[5s]")
        prompt, cut = (found["text"].strip(), bool(found["cut"])) if found else (part.strip(), False)
        _add(switches, Switch(clock.at_seconds(seconds), prompt, "cut" if cut else "keep"), f"prompt {number}")
        seconds += float(found["seconds"]) if found else 0.0
    return Timeline(tuple(switches), text.strip())


def _parsed(text: str, clock: Clock, place: str) -> Timeline:
    """A timeline from JSON."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error})") from error
    try:
        if isinstance(value, dict) and "switch_frame_indices" in value:
            made = list(_by_frames(value, clock))
        else:
            made = list(_by_seconds(value["prompts"] if isinstance(value, dict) else value, clock))
        switches: list[Switch] = []
        for number, switch in enumerate(made, 1):
            _add(switches, switch, f"prompt {number}")
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f'{place}: no timeline: give {{"prompts": [...], "switch_frame_indices": [...]}} or a list of {{"text", '
            f'"startTime", "endTime"}} ({type(error).__name__}: {error})'
        ) from error
    if not switches:
        raise UserError(f"{place}: no prompts in it")
    return Timeline(tuple(switches), json.dumps(value, ensure_ascii=False))


def _by_frames(value: dict[str, Any], clock: Clock) -> Iterator[Switch]:
    """LongLive's form; the frames may be one text, `40,80`."""
    at = value["switch_frame_indices"]
    frames = [int(x) for x in (at.split(",") if isinstance(at, str) else at)]
    prompts = [str(x) for x in value["prompts"]]
    if len(frames) != len(prompts) - 1:
        raise UserError(f"{len(prompts)} prompts with {len(frames)} switch_frame_indices: give one less than prompts")
    yield Switch(0, prompts[0])
    yield from (Switch(clock.at_frame(f), prompt) for f, prompt in zip(frames, prompts[1:], strict=True))


def _by_seconds(value: Sequence[dict[str, Any]], clock: Clock) -> Iterator[Switch]:
    """Scope's form. The `transitionSteps` of a segment are those into it."""
    end: float | None = None
    for number, segment in enumerate(value, 1):
        start = float(segment["startTime"])
        if end is not None and not math.isclose(start, end, abs_tol=1e-6):
            what = "overlaps the one before it" if start < end else "leaves a gap after the one before it"
            raise UserError(f"prompt {number} begins at {start:g} s and {what}, which ends at {end:g} s")
        if float(segment["endTime"]) <= start:
            raise UserError(f"prompt {number} ends at {segment['endTime']} s, where it begins or before")
        end = float(segment["endTime"])
        prompt: Prompt = str(segment["text"]) if "text" in segment else _weighted(segment["prompts"])
        yield Switch(clock.at_seconds(start), prompt, "recache", int(segment.get("transitionSteps", 0)))


def _weighted(prompts: Sequence[dict[str, Any]]) -> Prompt:
    pairs = tuple((str(p["text"]), float(p.get("weight", 1.0))) for p in prompts)
    return pairs[0][0] if len(pairs) == 1 else pairs


def _add(switches: list[Switch], switch: Switch, what: str) -> None:
    """Appends a switch that comes after those before it."""
    texts = [switch.prompt] if isinstance(switch.prompt, str) else [text for text, _ in switch.prompt]
    if not texts or not all(text.strip() for text in texts):
        raise UserError(f"{what} is empty")
    if not switches and switch.block:
        raise UserError(f"{what} begins at block {switch.block}: the first one has to begin with the video")
    if switches and switch.block <= switches[-1].block:
        raise UserError(
            f"{what}, {_short(switch.prompt)!r}, begins at block {switch.block}, no later than the one before it: give "
            "that one at least a block"
        )
    switches.append(switch)


def _short(prompt: Prompt) -> str:
    text = prompt if isinstance(prompt, str) else " + ".join(text for text, _ in prompt)
    return text if len(text) < 40 else text[:37] + "..."
