"""The report: whole, balanced HTML that asks nothing of the network, with every clip; metrics.json has its table."""

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cfjax.core.errors import UserError
from cfjax.evaluation.curves import curve_svg
from cfjax.evaluation.report import Report, StageReport, metrics_table, write_report
from cfjax.evaluation.results import COLUMNS

VOID = {"meta", "link", "img", "input", "br"}
CAPTIONS = ["a red square moving left", 'a "blue" circle & <b>more</b>', "a green ring moving up"]
KEYS = ("teacher", "ar", "ode", "dmd")


class Page(HTMLParser):
    """Collects elements; fails on a tag that is closed out of turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in attributes.items())]


def clips(seed: int, count: int = 3) -> np.ndarray:
    """Bouncing squares in a little noise."""
    videos = np.random.default_rng(seed).integers(20, 60, (count, 8, 16, 16, 3)).astype(np.uint8)
    for n in range(count):
        for p in range(8):
            x = 12 - abs((2 * p + n) % 24 - 12)
            videos[n, p, 5:9, x : x + 4] = (240, 60, 60)
    return videos


def summary(correct: float, step: float = 1.2) -> dict[str, float]:
    values = {"step": step, "jerkiness": 0.2, "residual": 0.05, "displacement": 1.0}
    for name in ("all_correct", "shape_correct", "colour_correct", "direction_correct", "presence"):
        values |= {name: correct, f"{name}_low": correct - 0.05, f"{name}_high": min(1.0, correct + 0.02)}
    return values


def stages() -> list[StageReport]:
    curve = [(step, 2.0 / (1 + step)) for step in range(0, 500, 5)]
    return [
        StageReport(
            key=key,
            title=f"The {key} stage",
            brief={"ar": "AR teacher", "dmd": "Student"}.get(key, ""),
            text="What it <is>.",
            videos=clips(n),
            summary=summary(0.9 + 0.02 * n),
            network_calls=400 // (n + 1),
            frames_per_second=10.0 * (n + 1),
            train_seconds=100.0 * n,
            curves={"loss": curve, "grad_norm": [(0, math.nan), (1, 1.0)]},
            command=f"cfjax train --config=configs/{key}.py",
        )
        for n, key in enumerate(KEYS)
    ]


def write(path: Path, **changes: Any) -> Page:
    fields = {
        "title": "Moving shapes <toy>",
        "real_videos": clips(9),
        "captions": CAPTIONS,
        "real_summary": summary(1.0, 1.25),
        "codec_summary": summary(1.0, 1.24),
        "stages": stages(),
        "commands": ["cfjax quickstart && echo 'done'"],
        "config": {"model": {"width": np.int64(192)}, "lr": np.float32(0.5), "scores": [1, math.inf]},
        "environment": {"machine": "two cores", "jax": "0.10"},
        "notes": ["Intervals are wide."],
    }
    write_report(path, Report(**{**fields, **changes}))
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    path = tmp_path_factory.mktemp("report") / "deep" / "index.html"
    return path, write(path)


def test_page_is_one_self_contained_file(written: tuple[Path, Page]):
    path, page = written
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\((?!#)", text)
    assert len(text) < 6_000_000
    sources = [a.get(name) for _, a in page.elements for name in ("src", "href", "xlink:href") if a.get(name)]
    assert all(source.startswith(("data:", "#")) for source in sources)
    identifiers = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    references = set(re.findall(r"url\(#([^)]+)\)", text)) | {s[1:] for s in sources if s.startswith("#")}
    assert references <= set(identifiers)
    assert sorted(file.name for file in path.parent.iterdir()) == ["index.html", "metrics.json"]


def test_sections_come_in_order_and_text_is_escaped(written: tuple[Path, Page]):
    path, page = written
    order = ["headline", "wall", "metrics", "training", "commands", "config", "environment", "notes"]
    assert [a["id"] for a in page.all("section")] == order
    assert ("h1", "Moving shapes <toy>") in page.texts
    assert any(CAPTIONS[1] in text for tag, text in page.texts if tag == "p")
    assert "<b>more" not in path.read_text(encoding="utf-8")


def test_wall_holds_every_clip_exactly(written: tuple[Path, Page]):
    _, page = written
    images = page.all("img", **{"class": "clip"})
    assert len(images) == len(CAPTIONS) * (1 + len(KEYS))
    assert images[0]["alt"] == f"Real clip: {CAPTIONS[0]}" and images[-1]["alt"] == f"Student: {CAPTIONS[-1]}"
    expected = [source[n] for n in range(3) for source in (clips(9), *(clips(k) for k in range(4)))]
    for image, clip in zip(images, expected, strict=True):
        data = base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,"))
        with Image.open(io.BytesIO(data)) as strip:
            frames = np.asarray(strip).reshape(16, 8, 16, 3).transpose(1, 0, 2, 3)
        np.testing.assert_array_equal(frames, clip)
    [wall] = page.all("div", **{"class": "wall"})
    assert "--frames: 8;" in str(wall["style"]) and "--columns: 5;" in str(wall["style"])


def test_metrics_json_equals_the_table(written: tuple[Path, Page]):
    path, page = written
    record = json.loads((path.parent / "metrics.json").read_text(encoding="utf-8"))
    assert list(record["stages"]) == ["real", "codec", *KEYS]
    assert record["commands"] == ["cfjax quickstart && echo 'done'"]
    assert record["environment"] == {"machine": "two cores", "jax": "0.10"}
    shown: dict[tuple[str, str], float] = {}
    row = column = ""
    for tag, attributes in page.elements:
        row = str(attributes.get("data-row", row))
        column = str(attributes.get("data-column", column))
        if tag == "data":
            shown[row, column] = float(str(attributes["value"]))
    keys = [column.key for column in COLUMNS]
    expected = {
        (r, c): v for r, cells in record["stages"].items() for c, v in cells.items() if c in keys and v is not None
    }
    assert shown == expected
    assert record["stages"]["dmd"]["step_ratio"] == pytest.approx(1.2 / 1.25)
    assert record["stages"]["ar"]["all_correct_low"] == pytest.approx(0.87)
    assert record["stages"]["real"]["network_calls"] is None


def test_headline_compares_the_student_with_the_ar_teacher(written: tuple[Path, Page]):
    _, page = written
    text = "\n".join(text for tag, text in page.texts if tag == "p")
    for line in ("96.0\u202f%", "AR teacher 92.0\u202f%", "2.0\u00d7 fewer", "100 per video", "2.0\u00d7 faster"):
        assert line in text


def test_a_student_that_is_worse_is_reported_as_such(tmp_path: Path):
    worse = replace(stages()[3], network_calls=4000, frames_per_second=2.0)
    page = write(tmp_path / "page.html", stages=[stages()[1], worse])
    text = "\n".join(text for tag, text in page.texts if tag == "p")
    assert "20\u00d7 more" in text and "10\u00d7 slower" in text


def test_bold_marks_the_best_generated_value_only(written: tuple[Path, Page]):
    _, page = written
    bold, row, column = set(), "", ""
    for tag, attributes in page.elements:
        row = str(attributes.get("data-row", row))
        column = str(attributes.get("data-column", column))
        if tag == "b":
            bold.add((row, column))
    assert {("dmd", "all_correct"), ("dmd", "network_calls"), ("dmd", "frames_per_second")} <= bold
    assert not {cell for cell in bold if cell[0] in ("real", "codec") or cell[1] in ("step", "residual")}


def test_curves_are_drawn_in_the_colours_of_the_page(written: tuple[Path, Page]):
    _, page = written
    labels = [str(a["aria-label"]) for a in page.all("svg")]
    assert labels == [f"The {key} stage: {name}" for key in KEYS for name in ("loss", "grad_norm")]
    styles = " ".join(str(a.get("style", "")) for tag, a in page.elements if tag == "path")
    assert "var(--series)" in styles and not re.search(r"#[0-9a-f]{6}", styles)


def test_curve_labels_keep_their_digits():
    svg = curve_svg([(step, 0.2 * 0.99**step) for step in range(400)], "loss", "one")
    labels = re.findall(r"<text[^>]*>([^<]+)</text>", svg)
    assert {"0.1", "0.01"} <= set(labels) and len(labels) == len(set(labels))
    assert curve_svg([(0, math.nan)], "loss", "two") == curve_svg([], "loss", "two") == ""


def test_missing_pieces_leave_their_place_out(tmp_path: Path):
    bare = StageReport(key="dmd", title="Student")
    page = write(
        tmp_path / "page.html", real_videos=None, captions=[], real_summary=None, codec_summary=None, stages=[bare],
        commands=[], config={}, environment={}, notes=[],
    )  # fmt: skip
    assert not page.all("section") and not page.all("img") and not page.all("svg") and not page.all("table")
    fewer = replace(stages()[3], videos=clips(3, count=1))
    page = write(tmp_path / "page.html", stages=[replace(stages()[0], videos=None), fewer])
    assert len(page.all("img")) == 4 and len(page.all("span", **{"class": "clip"})) == 2


def test_large_clips_are_reduced_and_a_long_wall_is_cut(tmp_path: Path):
    rng = np.random.default_rng(0)
    large = rng.integers(0, 256, (1, 20, 64, 1024, 3)).astype(np.uint8)
    page = write(tmp_path / "page.html", real_videos=large, stages=[])
    data = base64.b64decode(str(page.all("img")[0]["src"]).split(",")[1])
    with Image.open(io.BytesIO(data)) as strip:
        assert strip.size == (20 * 341, 21)
    noise = rng.integers(0, 256, (60, 10, 64, 64, 3)).astype(np.uint8)
    page = write(tmp_path / "page.html", real_videos=noise, captions=["noise"] * 60, stages=[])
    shown = len(page.all("img"))
    assert 10 < shown < 60 and any(f"first {shown} of 60 captions" in text for _, text in page.texts)
    assert (tmp_path / "page.html").stat().st_size < 6_000_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"real_videos": clips(0).astype(np.float32)}, r"report: Real clip: expected uint8 \[N, P, H, W, 3\]"),
        ({"real_videos": clips(0)[:, :4]}, "same frames, height and width"),
        ({"fps": 0}, "fps=0"),
        ({"stages": [StageReport("real", "Mine")]}, "must be distinct"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_file(tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "page.html", **changes)
    assert not list(tmp_path.iterdir())


def test_table_turns_what_is_not_finite_into_null():
    table = metrics_table({"step": 0.0}, None, [StageReport("ar", "AR", summary={"step": 1.0, "residual": math.nan})])
    assert table["ar"]["residual"] is None and table["ar"]["step_ratio"] is None
    json.dumps(table, allow_nan=False)
