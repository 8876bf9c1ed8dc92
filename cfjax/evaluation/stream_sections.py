"""Sections of a report for streams: long videos under memory policies, and prompts that change in the middle."""

from collections.abc import Mapping, Sequence
from typing import Any

from cfjax.evaluation.curves import curves_svg, swatch
from cfjax.evaluation.results import number, percent
from cfjax.evaluation.wall import WallColumn, checked_columns, escaped, wall_of

# curve, its title, and the unit of its values
LONG_CURVES = (
    ("follows", "Shape and colour as captioned", "share of clips"),
    ("step", "Motion", "px per frame"),
    ("residual", "Drift: pixel error of the best explanation", "rms, of a range of 2"),
    ("saturation", "Drift: saturation", "0 to 1"),
)
SWITCH_CURVES = (
    ("follows", "Shape and colour of the second prompt", "share of clips"),
    ("directs", "Its direction too", "share of clips"),
)
DRIFTS = ("luma", "saturation", "contrast", "sharpness")


def long_sections(result: Mapping[str, Any], fps: float) -> list[str]:
    """The parts of the section on `experiment.measure_streams.measure_long`'s result."""
    policies = result["policies"]
    columns = checked_columns([(name, None, clips) for name, clips in result["videos"].items()])
    length = len(next(iter(policies.values()))["over_time"]["frame"])
    said = (
        f"The same noise and captions under {len(policies)} memory policies, {result['frames']} latent frames each, of "
        f"a model that was trained on fewer. Judged in {length} pieces, one after the other."
    )
    return [
        f"<p>{said}</p>",
        wall_of(columns, result["captions"], fps),
        _panels({name: policy["over_time"] for name, policy in policies.items()}, LONG_CURVES, "frame", "long"),
        _table(
            ["Policy", "Follows, first", "Follows, last", *(f"{x} drift" for x in DRIFTS), "Cache, MiB", "Frames/s"],
            [_long_row(name, policy) for name, policy in policies.items()],
        ),
    ]


def switch_sections(result: Mapping[str, Any], fps: float) -> list[str]:
    """The parts of the section on `experiment.measure_streams.measure_switch`'s result."""
    first, second = result["prompts"]
    modes, blocks = result["modes"], result["blocks"]
    columns: list[WallColumn] = checked_columns([(name, None, clips) for name, clips in result["videos"].items()])
    curves = {name: {"frame": blocks, **{key: mode[key] for key, *_ in SWITCH_CURVES}} for name, mode in modes.items()}
    captions = [f"{first}, then {second}"] * max(len(clips) for _, _, clips in columns)
    rows = [
        f"<tr><th>{escaped(name)}</th><td>{percent(mode['settled'])}<small>{percent(mode['settled_low'])} to "
        f"{percent(mode['settled_high'])}</small></td>"
        + "".join(f"<td>{percent(mode[key][at])}</td>" for key, at in _columns_of(result))
        + "</tr>"
        for name, mode in modes.items()
    ]
    heads = ["Mode", "All of it two blocks later"]
    heads += [
        f"{'Shape, colour' if key == 'follows' else 'direction too'}, block {at}" for key, at in _columns_of(result)
    ]
    said = (
        f"The prompt \u201c{escaped(first)}\u201d becomes \u201c{escaped(second)}\u201d at block {result['switch']}"
        " of sessions: recache commits the remembered blocks again under the new prompt, keep leaves them as they are, "
        "cut also moves the next block away in time."
    )
    return [
        f"<p>{said}</p>",
        wall_of(columns, captions, fps),
        _panels(curves, SWITCH_CURVES, "frame", "switch"),
        _table(heads, rows),
    ]


def _columns_of(result: Mapping[str, Any]) -> list[tuple[str, int]]:
    at, last = result["switch"], len(result["blocks"]) - 1
    shown = sorted({at, min(at + 1, last), last})
    return [("follows", block) for block in shown] + [("directs", block) for block in shown]


def _long_row(name: str, policy: Mapping[str, Any]) -> str:
    over, drift = policy["over_time"], policy["drift"]
    cells = [percent(over["follows"][0]), percent(over["follows"][-1]), *(f"{drift[x]:+.3f}" for x in DRIFTS)]
    cells += [f"{policy['cache_bytes'] / 2**20:.2f}", number(policy["frames_per_second"])]
    return f"<tr><th>{escaped(name)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    row = "".join(f"<th>{escaped(head)}</th>" for head in heads)
    return f'<div class="scroll"><table><thead><tr>{row}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _panels(
    rows: Mapping[str, Mapping[str, Sequence[float]]],
    wanted: Sequence[tuple[str, str, str]],
    axis: str,
    prefix: str,
) -> str:
    panels = []
    for key, title, unit in wanted:
        curves = {name: list(zip(row[axis], row[key], strict=True)) for name, row in rows.items()}
        svg = curves_svg(curves, title, f"{prefix}-{key}")  # type: ignore[arg-type]
        panels.append(f"<figure><figcaption>{escaped(title)}<small>{escaped(unit)}</small></figcaption>{svg}</figure>")
    legend = "".join(f"<li>{swatch(n)}{escaped(name)}</li>" for n, name in enumerate(rows))
    note = '<p class="note">Over the frame at which a piece begins.</p>'
    return f'<div class="curves">{"".join(panels)}</div><ul class="legend">{legend}</ul>{note}'
