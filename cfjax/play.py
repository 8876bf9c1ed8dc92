"""`cfjax play`: a stream of a server, watched from here and written to an mp4 file."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from cfjax.core.cli import parse
from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.core.lock import holding
from cfjax.core.paths import check_writable, reporting_storage_errors
from cfjax.evaluation.video import write_mp4
from cfjax.serving.client import Client

DESCRIPTION = "Plays a live stream of `cfjax serve` and writes video.mp4 (docs/serving.md)."


def main(argv: Sequence[str]) -> int:
    """Parses the command line, plays, writes."""
    c, workdir, _ = parse(
        "play", argv, description=DESCRIPTION, default_config="configs/play.py", default_workdir="runs/play"
    )
    prompts = [prompt for part in c.prompt.split("|") if (prompt := part.strip())]
    if not prompts:
        raise UserError(f"--config.prompt={c.prompt!r}: give a prompt, or several, a | b")
    file = workdir / "video.mp4"
    check_writable(workdir)
    if file.exists() and not c.overwrite:
        raise UserError(f"{file} is there: another --workdir, or --config.overwrite=True replaces it")
    with holding(workdir), reporting_storage_errors(workdir, "run the command again"):
        play(c, prompts, file)
    return 0


def play(c: ConfigDict, prompts: Sequence[str], file: Path) -> None:
    """The stream, and its file.

    Raises:
      UserError: the server cannot be reached, or refuses.
    """
    frames: list[np.ndarray] = []
    with Client(c.url, c.token) as client:
        # As fast as the server makes them: this is a file. PNG loses nothing.
        memory = {"memory": c.memory} if c.memory else {}
        ready = client.open(prompts[0], seed=c.seed, format="png", fps=0, **memory)
        for number, prompt in enumerate(prompts):
            if number:
                client.send("prompt", prompt=prompt, mode=c.mode)
            left = c.blocks
            while left:  # a few blocks are made already when the server hears of another prompt
                (block,) = client.blocks(1)
                left -= block.message["prompt_applied"] == prompt
                frames += list(block.frames_PHWC)
                say(f"block {block.index}: {len(block.frames_PHWC)} frames, {block.message['prompt_applied']}")
        client.close()
    # `open` without a rate of its own would show the model's
    size = write_mp4(file, np.stack(frames), fps=ready["fps"], scale=c.scale)
    say(f"{file}: {len(frames)} frames, {size:,} bytes")
