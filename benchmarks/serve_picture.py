"""The README's picture of the page: a server of a run, and Chromium that plays with it.

    python benchmarks/serve_picture.py --run=runs/quickstart/dmd

Writes cfjax/assets/serve.png; `--scheme=dark`, `--width=360` and `--out=FILE` for others.
"""

import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.core.paths import write_atomically

ROOT = Path(__file__).parents[1]
MOST = 300_000  # bytes
SECONDS = 120


def serve(run: str, workdir: str) -> tuple[subprocess.Popen[str], str]:
    """A server, and its address once it is ready."""
    alone = "--config.together=False"  # fewer programs to compile: there is one client
    words = ["serve", f"--config.run={run}", "--config.port=0", alone, f"--workdir={workdir}"]
    command = [sys.executable, "-P", "-m", "cfjax", *words]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.match(r"ready: (\S+)", line):
            return server, found[1]
    raise UserError(f"run={run!r} is not served")


def play(page: Page) -> None:
    """What somebody may do in half a minute: prompts, branches, one of them gone back to."""
    latest = page.locator("#changes li").first

    def choose(word: str) -> None:
        page.locator(f"[data-word={word}]").click()
        expect(latest).to_contain_text("seen with block")
        page.wait_for_timeout(1500)

    page.wait_for_timeout(1000)
    page.locator("#snapshot").click()
    choose("right")
    choose("yellow")
    page.locator("#snapshot").click()
    choose("left")
    page.locator("#snapshot").click()
    page.wait_for_timeout(500)
    page.locator(".back").nth(1).click()
    page.wait_for_timeout(500)
    choose("blue")
    page.locator("#snapshot").click()
    choose("right")
    page.locator("#pause").focus()


def main() -> None:
    """Takes the picture."""
    arguments = ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--run", default="runs/quickstart/dmd")
    arguments.add_argument("--out", default=str(ROOT / "cfjax" / "assets" / "serve.png"))
    arguments.add_argument("--width", type=int, default=1280)
    arguments.add_argument("--scheme", choices=("light", "dark"), default="light")
    given = arguments.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if browser is None:
        raise UserError("no browser: apt-get install chromium")
    expect.set_options(timeout=1000 * SECONDS)
    with tempfile.TemporaryDirectory() as workdir, sync_playwright() as playwright:
        server, address = serve(given.run, workdir)
        try:
            args = ["--no-sandbox"] if os.geteuid() == 0 else []
            opened = playwright.chromium.launch(executable_path=browser, args=args)
            page = opened.new_page(viewport={"width": given.width, "height": 900}, color_scheme=given.scheme)
            page.goto(address)
            expect(page.locator("#cover")).to_be_hidden()
            play(page)
            shot = page.screenshot(full_page=True)
            opened.close()
        finally:
            server.terminate()
            server.wait()
    buffer = io.BytesIO()
    Image.open(io.BytesIO(shot)).convert("RGB").save(buffer, "PNG", optimize=True)
    if buffer.tell() > MOST:
        raise UserError(f"the picture has {buffer.tell():,} bytes; at most {MOST:,}")
    write_atomically(given.out, buffer.getvalue())
    say(f"{given.out}: {buffer.tell():,} bytes")


if __name__ == "__main__":
    main()
