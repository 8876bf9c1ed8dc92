"""The page in a real browser: what it is asked for is in the pixels of its canvas. `launch/test.sh` installs Chromium.

The model is one whose pictures are known (tests/serving/drawing.py), behind the real server. Nothing is timed: the page
is waited for, however busy the machine is.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator

import av
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from cfjax.data.shapes import DIRECTIONS, PALETTE
from cfjax.experiment.runs import open_run
from cfjax.serving.app import Access
from cfjax.serving.served import serve_run
from tests.serving.drawing import WORLD, drawing_served
from tests.serving.running import Running, running, until

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60
expect.set_options(timeout=1000 * SECONDS)

# Frames as they are drawn, at the video's own size.
COLLECT = """(count) => new Promise((done) => {
  const scratch = Object.assign(document.createElement("canvas"), { width: 32, height: 32 });
  const context = scratch.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = false;
  const frames = [];
  const look = () => {
    context.drawImage(document.getElementById("video"), 0, 0, 32, 32);
    const frame = Array.from(context.getImageData(0, 0, 32, 32).data);
    if (!frames.length || frame.some((value, i) => value !== frames.at(-1)[i])) frames.push(frame);
    if (frames.length < count) requestAnimationFrame(look); else done(frames);
  };
  look();
})"""
# The name of what has the focus, and the outlines of it and of what stands for it.
FOCUSED = """() => {
  const here = document.activeElement;
  const label = here.labels?.[0]?.textContent.trim();
  const shown = [here, here.nextElementSibling].map((one) => one && getComputedStyle(one).outlineStyle);
  return [here.getAttribute("aria-label") || label || here.textContent.trim(), shown];
}"""


def counted(server: Running, name: str) -> float:
    """One of /metrics."""
    found = re.search(rf"^cfjax_{name} (\S+)$", server.host.metrics.page().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(drawing_served()) as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail("no browser: `apt-get install chromium`, or bash launch/test.sh, which does")
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=args)
        yield started
        started.close()


@pytest.fixture
def opened(server: Running, browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens the page in a window of its own. At the end nothing may have been complained of, and a page that is left
    gives its place back at once."""
    complaints: list[str] = []
    windows = []

    def open_page(width: int = 1280, url: str = server.url, **options) -> Page:
        window = browser.new_context(viewport={"width": width, "height": 900}, **options)
        windows.append(window)
        page = window.new_page()
        page.set_default_timeout(1000 * SECONDS)
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url)
        expect(page.locator("#cover")).to_be_hidden(timeout=1000 * SECONDS)
        return page

    yield open_page
    for window in windows:
        window.pages[0].goto("about:blank")
    until(lambda: counted(server, "sessions") == 0, SECONDS)
    for window in windows:
        window.close()
    assert complaints == []


# ---- what is in the pixels


def frames_of(page: Page, count: int = 4) -> np.ndarray:
    """Different frames in a row, uint8 [P, H, W, 3]."""
    return np.array(page.evaluate(COLLECT, count), np.uint8).reshape(count, WORLD.size, WORLD.size, 4)[..., :3]


def colour_of(frame_HWC: np.ndarray) -> str:
    """The nearest colour of what is brightest against the background."""
    away = frame_HWC.astype(np.float32) / 127.5 - 1 - np.asarray(WORLD.background)
    strength = np.square(away).sum(-1)
    mean = (away * strength[..., None]).sum((0, 1)) / strength.sum() + np.asarray(WORLD.background)
    return min(WORLD.colours, key=lambda name: float(np.square(mean - np.asarray(PALETTE[name])).sum()))


def heading_of(frames_PHWC: np.ndarray) -> str:
    """Which way the shape went; the frame's sides are one."""
    away = np.square(frames_PHWC.astype(np.float32) / 127.5 - 1 - np.asarray(WORLD.background)).sum(-1)
    turns = np.exp(2j * np.pi * (np.arange(WORLD.size) + 0.5) / WORLD.size)
    angles = np.angle(np.stack([away.sum(1) @ turns, away.sum(2) @ turns], -1))
    moved = np.angle(np.exp(1j * np.diff(angles, axis=0))).mean(0) * WORLD.size / (2 * np.pi)
    return max(WORLD.directions, key=lambda name: float(moved @ np.array(DIRECTIONS[name])))


def seen(page: Page, colour: str, heading: str) -> None:
    """Waits until the canvas shows this."""
    end, found = time.monotonic() + SECONDS, ("", "")
    while found != (colour, heading):
        assert time.monotonic() < end, f"asked for {colour}, {heading}; the canvas shows {found}"
        frames = frames_of(page)
        found = (colour_of(frames[-1]), heading_of(frames))


def position(page: Page) -> int:
    return int(page.locator("#position").inner_text().removeprefix("block "))


def ask(page: Page, prompt: str) -> None:
    page.locator("#prompt").fill(prompt)
    page.locator("#prompt").press("Enter")


# ---- the tests


def test_the_picture_is_what_is_asked_for(opened):
    """Typed, chosen, steered; refused prompts leave the stream as it is. Measurements are of all of this."""
    page = opened()
    seen(page, "red", "left")
    ask(page, "a blue square moving up")
    seen(page, "blue", "up")
    expect(page.locator("#changes li").first).to_contain_text("a blue square moving up")
    expect(page.locator("#changes li").first).to_contain_text("seen with block")
    expect(page.locator("[data-word=blue] input")).to_be_checked()

    page.locator("[data-word=green]").click()
    page.locator("[data-word=down]").click()
    seen(page, "green", "down")
    expect(page.locator("#video")).to_be_focused()

    ask(page, "a purple cow")
    expect(page.locator("#line")).to_contain_text("purple")
    expect(page.locator("#changes")).not_to_contain_text("purple")
    seen(page, "green", "down")

    page.keyboard.press("Escape")
    for key, heading in (("ArrowRight", "right"), ("w", "up")):
        page.keyboard.down(key)
        seen(page, "green", heading)
        page.keyboard.up(key)
    seen(page, "green", "down")

    for name in ("fps", "first", "p50", "p95", "lag", "cache"):
        expect(page.locator(f"[data-value={name}] b")).to_have_text(re.compile(r"^[\d.]+$"))


def test_one_can_go_back_to_a_branch(opened):
    """And on from there, with the same seed or another one: a tree."""
    page = opened()
    seen(page, "red", "left")
    page.locator("#snapshot").click()
    expect(page.locator(".back")).to_have_count(1)
    ask(page, "a yellow circle moving right")
    seen(page, "yellow", "right")
    page.keyboard.press("Escape")  # shortcuts are not for whoever writes
    page.keyboard.press("b")
    expect(page.locator("#branches ul .back")).to_have_count(1)
    kept = int(page.locator(".back b").first.inner_text().removeprefix("block "))
    page.locator(".back").first.click()
    seen(page, "red", "left")
    jump = f"from block {kept + 1}: a red circle moving left"
    expect(page.locator(".run.jump").first).to_have_attribute("title", jump)
    expect(page.locator("#prompt")).to_have_value("a red circle moving left")
    expect(page.locator(".back").first).to_have_attribute("aria-current", "true")

    seed = page.locator("#seed").input_value()
    page.locator(".fork").nth(1).click()
    seen(page, "yellow", "right")
    expect(page.locator("#seed")).not_to_have_value(seed)
    page.locator("#snapshot").click()
    expect(page.locator("#branches ul ul .back")).to_have_count(1)


@pytest.mark.parametrize("kind", ["webm", "mp4"])
def test_recordings_can_be_downloaded_and_read(opened, tmp_path, kind):
    page = opened()
    assert kind in page.locator("#format option").all_inner_texts()
    page.locator("#format").select_option(kind)
    page.locator("#record").click()
    expect(page.locator("#recording")).to_be_visible()
    seen(page, "red", "left")
    frames_of(page, 8)
    page.locator("#record").click()
    with page.expect_download() as download:
        page.locator("#recordings a").click()
    assert download.value.suggested_filename == f"cfjax-1.{kind}"
    file = tmp_path / f"clip.{kind}"
    download.value.save_as(file)
    with av.open(str(file)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(pictures) >= 4 and pictures[0].shape == (512, 512, 3)
    assert colour_of(pictures[-1][8::16, 8::16]) == "red"


def test_a_pause_holds_the_picture_and_a_policy_can_be_changed(opened):
    page = opened()
    frames_of(page)
    page.locator("#video").focus()
    page.keyboard.press("Space")
    expect(page.locator("#pause")).to_have_attribute("aria-pressed", "true")
    (held,), at = frames_of(page, 1), position(page)
    page.wait_for_timeout(800)
    np.testing.assert_array_equal(held, frames_of(page, 1)[0])
    assert position(page) == at
    page.keyboard.press("Space")
    frames_of(page)

    other = page.locator("#memory option").nth(1).inner_text()
    page.locator("#memory").select_option(other)
    frames_of(page, 8)
    expect(page.locator("#memory")).to_have_value(other)
    expect(page.locator("#line")).to_be_empty()
    ask(page, "a blue square moving up")
    seen(page, "blue", "up")
    page.locator("#seed").fill("7")
    page.locator("#restart").click()
    expect(page.locator("#changes li")).to_have_count(1)
    expect(page.locator("#changes li")).to_contain_text("from block 0")
    seen(page, "blue", "up")


def test_a_lost_socket_comes_back_to_its_stream(opened, server):
    page = opened()
    ask(page, "a cyan circle moving right")
    seen(page, "cyan", "right")
    before, sessions = position(page), counted(server, "sessions_opened_total")
    lost = counted(server, "sockets_lost_total")
    for connection in list(server.server.server_state.connections):
        connection.loop.call_soon_threadsafe(connection.transport.abort)
    until(lambda: counted(server, "sockets_lost_total") > lost, SECONDS)
    frames_of(page, 12)  # more than there can have been in the buffer
    seen(page, "cyan", "right")
    expect(page.locator("#state")).to_have_text("live")
    assert position(page) > before and counted(server, "sessions_opened_total") == sessions
    expect(page.locator("#changes li")).to_have_count(2)


@pytest.mark.parametrize("width", [360, 768])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_narrow_screens_and_both_themes(opened, width, scheme):
    page = opened(width, color_scheme=scheme, has_touch=True, reduced_motion="reduce")
    page.locator("#snapshot").tap()
    expect(page.locator(".back")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") <= width

    def dark() -> bool:
        red, *_ = map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")))
        return red < 64

    assert dark() == (scheme == "dark")
    page.locator("#theme").tap()
    assert dark() == (scheme == "light")
    page.reload()
    assert dark() == (scheme == "light")


def test_a_finger_steers(opened):
    page = opened(360, has_touch=True)
    seen(page, "red", "left")
    box = page.locator(".key.down").bounding_box()
    assert box is not None and min(box["width"], box["height"]) >= 44
    touch = page.context.new_cdp_session(page)
    point = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [point]})
    seen(page, "red", "down")
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    seen(page, "red", "left")


def test_a_token_behind_the_address_opens_a_guarded_server(opened):
    """For the model's description and for the stream."""
    token = "a-secret-of-the-tests"
    with running(drawing_served(), access=Access(token)) as guarded:
        page = opened(url=f"{guarded.url}/#token={token}")
        seen(page, "red", "left")
        page.goto("about:blank")
        until(lambda: counted(guarded, "sessions") == 0, SECONDS)


def test_everything_can_be_reached_by_keyboard(opened):
    """Every control has a name, and its focus can be seen; the list of shortcuts opens and closes."""
    page = opened()
    found = {}
    page.locator("#theme").focus()
    while True:
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):  # the end
            break
        name, outlines = page.evaluate(FOCUSED)
        found[name] = "solid" in outlines
    assert all(found) and all(found.values()), found
    assert {"Pause", "Branch", "Record", "Prompt", "red", "circle", "left", "up", "Another seed"} <= set(found)
    page.locator("#video").focus()
    page.keyboard.press("?")
    expect(page.locator("#shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#shortcuts")).to_be_hidden()
    page.keyboard.press("/")
    expect(page.locator("#prompt")).to_be_focused()


# ---- a trained student


def centre_of(page: Page) -> np.ndarray:
    """Where the shape is (x, y), px."""
    away = np.square(frames_of(page, 1)[0].astype(np.float32) / 127.5 - 1 - np.asarray(WORLD.background)).sum(-1)
    mass = np.where(away > 0.1 * away.max(), away, 0.0)
    axis = np.arange(WORLD.size) + 0.5
    return np.array([mass.sum(0) @ axis, mass.sum(1) @ axis]) / mass.sum()


def test_the_shipped_student_is_steered(opened):
    """By the arrow keys, or WASD, to every side of its world."""
    run = open_run("toy_steered")
    served = serve_run(run, fps=30.0, memories=("longlive_infinity",), examples=("a red circle moving left",))
    with running(served) as steered:
        page = opened(url=steered.url)
        expect(page.locator("[data-word=left]")).to_have_count(0)  # keys say which way, not prompts
        for key, axis, beyond in (("ArrowRight", 0, True), ("ArrowUp", 1, False), ("a", 0, False), ("s", 1, True)):
            page.keyboard.down(key)
            until(lambda a=axis, b=beyond: (centre_of(page)[a] > 16) == b and abs(centre_of(page)[a] - 16) > 6, SECONDS)
            page.keyboard.up(key)
        assert colour_of(frames_of(page, 1)[0]) == "red"
        page.goto("about:blank")
        until(lambda: counted(steered, "sessions") == 0, SECONDS)
