"""Training curves: read from a run, and drawn as SVG, inline ones in colours that follow the page, light or dark."""

import html
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

_INCHES = (3.5, 1.75)  # a panel's shape; the page sets its size
_BINS = 240  # points kept of the raw curve
_SMOOTH_FROM = 24  # points from which a running mean is drawn over the raw curve
_LOG_FROM = 8.0  # ratio of largest to smallest value from which the axis is logarithmic

# Stand-ins that matplotlib writes into the SVG, and what the page's style sheet puts in their place.
_COLOURS = {"#010203": "var(--series)", "#040506": "var(--muted)", "#070809": "var(--line)"}
_COLOURS |= {f"#0a0b0{n}": f"var(--series-{n})" for n in range(1, 6)}
_SERIES, _MUTED, _LINE, *_OTHERS = _COLOURS
_DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)), (0, (1, 1)))  # told apart without colour too
SERIES = len(_OTHERS)  # lines of one panel, at most


def compact(number: float) -> str:
    """A number in few characters: 20000 -> 20k, 0.00012 -> 1.2e-04."""
    if abs(number) >= 1000:
        return f"{number / 1000:g}k" if abs(number) < 1e6 else f"{number / 1e6:g}M"
    return f"{number:g}" if number == 0 or abs(number) >= 0.001 else f"{number:.1e}"


def clean(points: Sequence[tuple[int, float]]) -> np.ndarray:
    """The finite points of a curve, in order of step, as float64 [n, 2]."""
    array = np.asarray(list(points), np.float64).reshape(-1, 2)
    array = array[np.isfinite(array).all(1)]
    return array[np.argsort(array[:, 0], kind="stable")]


def _thin(points: np.ndarray) -> np.ndarray:
    """Means of at most `_BINS` runs of neighbouring points."""
    if len(points) <= _BINS:
        return points
    return np.stack([part.mean(0) for part in np.array_split(points, _BINS)])


def _running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Centred mean over up to 2 * half + 1 neighbours, fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _draw(axes: Axes, points: np.ndarray) -> None:
    steps, values = _thin(points).T
    smooth = len(values) >= _SMOOTH_FROM
    axes.plot(steps, values, color=_SERIES, lw=0.8 if smooth else 1.5, alpha=0.4 if smooth else 1.0)
    if smooth:
        axes.plot(steps, _running_mean(values, max(2, len(values) // 30)), color=_SERIES, lw=1.6)
    _style(axes, values)


def _style(axes: Axes, values: np.ndarray) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(value)))
    if values.min() > 0 and values.max() / values.min() > _LOG_FROM:
        wide = values.max() / values.min() > 1e3
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=6))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: compact(round(value, 10))))
    axes.margins(x=0.02, y=0.08)
    axes.grid(axis="y", color=_LINE, lw=0.7)
    axes.tick_params(length=0, pad=4, labelsize=8, labelcolor=_MUTED)
    for side, spine in axes.spines.items():
        spine.set(visible=side == "bottom", color=_LINE, linewidth=0.7)


def curve_svg(points: Sequence[tuple[int, float]], name: str, prefix: str) -> str:
    """An <svg> element for one curve of (step, value); "" if no finite point is in it.

    The raw curve (in at most 240 points) is pale with a running mean over it; the axis is logarithmic where positive
    values span more than a factor of eight. `name` labels it for screen readers; `prefix` keeps its ids apart from
    other panels'. Colours are the page's custom properties --series, --muted and --line, text is its font.
    """
    array = clean(points)
    return _svg(lambda axes: _draw(axes, array), name, prefix) if len(array) else ""


def curves_svg(curves: Mapping[str, Sequence[tuple[int, float]]], name: str, prefix: str) -> str:
    """An <svg> element with several curves of (step, value) over one axis, as they are; see `curve_svg`.

    Their colours are --series-1 to --series-5, in order, and each has a dash pattern of its own; `swatch` draws it for
    a legend.

    Raises:
      ValueError: more than `SERIES` curves.
    """
    arrays = {label: clean(points) for label, points in curves.items()}
    shown = [array for array in arrays.values() if len(array)]
    if len(arrays) > SERIES:
        raise ValueError(f"{name}: {len(arrays)} curves in a panel of {SERIES} at most")

    def draw(axes: Axes) -> None:
        for array, colour, dashes in zip(arrays.values(), _OTHERS, _DASHES, strict=False):
            if len(array):
                axes.plot(*array.T, color=colour, lw=1.5, ls=dashes)
        _style(axes, np.concatenate(shown)[:, 1])

    return _svg(draw, name, prefix) if shown else ""


def swatch(number: int) -> str:
    """A piece of curve `number` of `curves_svg`, from 0 on, as an <svg> element."""
    style = _DASHES[number]
    dashes = "" if isinstance(style, str) else f' stroke-dasharray="{" ".join(f"{1.5 * x:g}" for x in style[1])}"'
    line = f'<line x1="0" y1="5" x2="28" y2="5" stroke="var(--series-{number + 1})" stroke-width="2"{dashes}/>'
    return f'<svg class="swatch" viewBox="0 0 28 10" aria-hidden="true">{line}</svg>'


def _svg(draw: Callable[[Axes], None], name: str, prefix: str) -> str:
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "axes.unicode_minus": False}):
        figure = Figure(figsize=_INCHES, layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02))
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        draw(axes)
        with io.StringIO() as buffer:
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
            svg = buffer.getvalue()
    return _inline(svg, name, prefix)


def _inline(svg: str, name: str, prefix: str) -> str:
    """matplotlib's SVG file as an element for an HTML page: no outside names, the page's font and colours, own ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    view, label = f"0 0 {72 * _INCHES[0]:g} {72 * _INCHES[1]:g}", html.escape(name)
    svg = re.sub(r"^<svg[^>]*>", f'<svg viewBox="{view}" role="img" aria-label="{label}">', svg)
    svg = re.sub(r"font: ?([\d.]+)px [^;\"]*|font-size: ?([\d.]+)px; font-family: ?[^;\"]*", r"font-size: \1\2px", svg)
    svg = re.sub(r"\d+\.\d{3,}(?=[^<>]*>)", lambda match: f"{float(match[0]):.2f}", svg)  # in tags, not in labels
    svg = re.sub(r"\s+", " ", svg).replace("> <", "><").replace('xlink:href="#', 'href="#')
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for sentinel, colour in _COLOURS.items():
        svg = svg.replace(sentinel, colour)
    return svg.strip()


def read_curves(run: Path, *, every: int = 1) -> dict[str, list[tuple[int, float]]]:
    """name -> [(step, value)] of a run's metrics.jsonl, averaged over windows of `every` steps."""
    curves: dict[str, dict[int, list[float]]] = {}
    file = run / "metrics.jsonl"
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        try:
            row: dict[str, Any] = json.loads(line)
            step = row.pop("step")
        except (ValueError, KeyError, TypeError, AttributeError):  # cut, as of a run that was killed
            continue
        for name, value in row.items():
            curves.setdefault(name, {}).setdefault(step // every * every, []).append(value)
    return {
        name: [(step, sum(values) / len(values)) for step, values in points.items()] for name, points in curves.items()
    }


def draw_curves(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """The loss and, where it was sampled, caption following over training steps, as an SVG picture."""
    shown = [name for name in ("student/loss", "samples/all_correct") if name in curves]
    figure = Figure(figsize=(4 * max(len(shown), 1), 2.8), layout="constrained")
    for index, name in enumerate(shown):
        axes = figure.add_subplot(1, len(shown), index + 1, xlabel="step", title=name)
        axes.plot(*zip(*curves[name], strict=True), marker="." if len(curves[name]) < 12 else "")
        axes.grid(alpha=0.3)
    with rc_context({"svg.hashsalt": "cfjax"}):  # the same curves are the same bytes
        figure.savefig(path, metadata={"Date": None})
