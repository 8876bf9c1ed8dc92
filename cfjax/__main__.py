"""`cfjax VERB ...`: finds the verb's module, runs its `main`, and turns a user's mistake into one line."""

import importlib
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack

from cfjax import __version__
from cfjax.core.console import complain, say, tolerate_output_errors
from cfjax.core.errors import UserError
from cfjax.core.machine import ensure_open_files, storage_failure

VERBS = {
    "quickstart": "train and watch a tiny streaming video generator on this machine",
    "convert": "other people's weights into a run directory, and back out",
    "precompute": "render or encode a data set once: latents, captions, ODE pairs",
    "train": "train one stage of an experiment, or resume it",
    "generate": "generate videos from a trained run, block by block",
    "serve": "live streams for browsers and programs, and a page to play with",
    "play": "watch a server's stream from here, and write it to an mp4 file",
    "evaluate": "measure the videos of a run or of any folder, and compare two systems",
    "bench": "how fast a run streams: frames/s, latencies, FLOPs, memory, beside PyTorch if asked",
    "compare": "the same weights through cfjax and through PyTorch, one table of errors",
    "study": "the paper's claim on laws with exact scores, and on the toy world, over seeds",
    "plan": "compile an experiment for a pod that need not be attached: memory, FLOPs, collectives, a verdict",
    "check": "whether the files of a run, a set of records, an export or videos match their checksums",
    "export": "write a run's weights and world as one small folder",
    "profile_heads": "which attention heads look at recent frames alone: a table for memory policies",
}
SHARED = ("train", "precompute")  # verbs that several processes may work on together; the others are one process's
COMPILES_NOTHING = ("check",)


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {purpose}" for verb, purpose in VERBS.items()]
    return "\n".join(["usage: cfjax VERB [--help] [--FLAG=value ...], or cfjax --version", "", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0, 2 after a user's mistake, 75 after a temporary failure."""
    verb, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if verb in ("--help", "-h", "help"):
        with tolerate_output_errors():
            say(_usage())
        return 0
    if verb in ("--version", "version"):
        with tolerate_output_errors():
            say(f"cfjax {__version__}")
        return 0
    if verb not in VERBS:
        complain(f"cfjax: unknown verb {verb!r}; use one of {', '.join(VERBS)}")
        return 2
    with tolerate_output_errors():
        return _run(verb, rest)


def _run(verb: str, argv: Sequence[str]) -> int:
    """The exit code of a verb; errors are printed as one line."""
    try:
        ensure_open_files()
        with ExitStack() as around:
            joined = verb in SHARED and importlib.import_module("cfjax.core.distributed").initialize()
            if joined:
                around.enter_context(importlib.import_module("cfjax.training.watchdog").exit_on_failure())
            if verb not in COMPILES_NOTHING:
                around.enter_context(_compile_cache(argv, joined))
            return importlib.import_module(f"cfjax.{verb}").main(argv) or 0
    except Exception as error:
        failure = error if isinstance(error, UserError) else storage_failure(error)
        if failure is None:
            raise
        complain(f"cfjax {verb}: {' '.join(str(failure).split())}")
        return failure.exit_code


def _compile_cache(argv: Sequence[str], joined: bool) -> AbstractContextManager[None]:
    """Around a verb, before JAX compiles anything."""
    where, _ = importlib.import_module("cfjax.core.cli").take_flag("compile_cache", argv, "FOLDER")
    return importlib.import_module("cfjax.core.compile_cache").compile_cache(where or "", joined=joined)


if __name__ == "__main__":
    sys.exit(main())
