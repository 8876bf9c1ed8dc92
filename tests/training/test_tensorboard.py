"""What a user of TensorBoard sees of a run: its page, from a server of its own, with sections in the order of use."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
from playwright.sync_api import expect, sync_playwright

from cfjax.training.metrics import EventWriter, tag_of
from tests.training.toy import run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 120


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    """The toy's run of two roles, whose samples are a grey clip."""

    def sample(state, step, writer: EventWriter) -> None:
        writer.video(step, "videos", np.full((2, 16, 16, 3), 99, np.uint8), scale=4)
        writer.scalars(step, {"guard/motion": 1.0, "samples/all_correct": 0.5})
        writer.config(step, {"optim": {"lr": 0.1}})

    folder = tmp_path_factory.mktemp("runs")
    run(folder / "dmd", 20, sample_fn=sample)
    return folder


@pytest.fixture(scope="module")
def served(logdir) -> Iterator[str]:
    """The address of `tensorboard --logdir=runs`."""
    command = [sys.executable, "-W", "ignore", "-m", "tensorboard.main", f"--logdir={logdir}", "--port=0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            for line in server.stderr:
                if found := re.search(r"http://[^/ ]+/", line):
                    yield found[0].replace("localhost", "127.0.0.1")
                    break
            else:
                pytest.fail("tensorboard did not start")
        finally:
            server.terminate()


def asked(address: str, path: str):
    with urllib.request.urlopen(f"{address}data/plugin/{path}", timeout=SECONDS) as answer:
        return json.load(answer)


def sections(tags) -> list[str]:
    return sorted({tag.partition("/")[0] for run in tags.values() for tag in run})


def test_names_sort_by_what_is_looked_at_first():
    names = ["student/loss", "samples/all_correct", "guard/motion", "perf/mfu", "data/broken_records"]
    tags = [tag_of(name) for name in names]
    assert tags == sorted(tags) and tags[0] == "1_training/student/loss" and tags[3] == "4_performance/mfu"
    assert tag_of("samples") == "1_training/samples"  # no section without a name in it


def test_the_page_that_a_user_sees(served, tmp_path):
    """The server's own lists of names, and the page in a browser, which shows their sections in this order."""
    for _ in range(SECONDS):  # it reads the files in the background
        scalars = asked(served, "scalars/tags")
        if scalars and "3_guard" in sections(scalars):
            break
        time.sleep(0.5)
    assert sections(scalars) == ["1_training", "2_samples", "3_guard", "4_performance"]
    assert {"1_training/critic/loss", "1_training/student/grad_norm"} <= set(scalars["dmd/events"])
    assert sections(asked(served, "images/tags")) == ["2_samples"]
    assert asked(served, "text/tags") == {"dmd/events": ["0_config/text_summary"]}
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, "no browser: `apt-get install chromium`, or bash launch/test.sh, which does"
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=args)
        page = browser.new_page(viewport={"width": 1280, "height": 1600})
        page.goto(f"{served}#timeseries")
        titles = page.locator("metrics-card-group-toolbar .group-title")
        expect(titles.first).to_be_visible(timeout=1000 * SECONDS)
        seen = [title.strip() for title in titles.all_inner_texts()]
        page.screenshot(path=tmp_path / "tensorboard.png")
        browser.close()
    assert seen == ["1_training", "2_samples", "3_guard", "4_performance"]
    assert (tmp_path / "tensorboard.png").stat().st_size > 20_000
