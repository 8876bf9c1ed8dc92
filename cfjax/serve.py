"""`cfjax serve`: live streams of a run for browsers and programs."""

import logging as python_logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from ml_collections import ConfigDict

from cfjax.core.cli import parse
from cfjax.core.console import say
from cfjax.experiment.runs import open_run
from cfjax.rollout.batched import SIZES, groups, step_together
from cfjax.serving.app import Access, application, check_token
from cfjax.serving.engine import Together
from cfjax.serving.host import Host
from cfjax.serving.served import Limits, on_devices, serve_run
from cfjax.serving.web import Server, address_of, bind, run
from cfjax.worlds.world import WorldParts

DESCRIPTION = """Serves a trained or converted run: a page to play with, and live streams over WebSockets
(docs/serving.md). Listens to this machine alone, unless it is given a token."""


def main(argv: Sequence[str]) -> int:
    """Parses the command line, opens the run, serves until it is told to end."""
    c, _, _ = parse(
        "serve",
        argv,
        description=DESCRIPTION,
        default_config="configs/serve.py",
        default_workdir="runs/serve",
    )
    check_token(c.token, c.host)
    bound = bind(c.host, c.port)
    try:
        serve(c, bound)
    finally:
        bound.close()
    return 0


def serve(c: ConfigDict, bound) -> None:  # type: ignore[no-untyped-def]
    """Serves on a socket until a signal."""
    python_logging.getLogger("uvicorn").setLevel(python_logging.WARNING)
    host = open_host(c)
    address = address_of(bound)

    def warmed() -> None:
        if host.failure is not None:
            server.should_exit = True
        elif not host.closing:
            say(f"ready: {address}" + ("#token=..." if c.token else ""))

    def begun() -> None:
        size = f"{host.served.width} x {host.served.height}"
        say(f"{host.served.name}, {size}: compiling; {address}healthz says when ready")

    server = Server(application(host, Access(c.token, tuple(c.origins)), warmed, say), host, begun)
    run(server, bound)
    if host.failure is not None:
        raise host.failure
    if host.working():  # XLA compiles, which nothing stops, and would meet an interpreter that is gone
        sys.stdout.flush()
        os._exit(0)


def open_host(c: ConfigDict) -> Host:
    """The run, opened, and what clients may take.

    Raises:
      UserError: it cannot be served.
    """
    devices = devices_of(c)
    opened = open_run(
        c.run,
        ema=c.ema,
        world=c.world,
        parts=WorldParts(c.decoder, c.decoder_precision, text_cache=c.text_cache),
        precision=c.precision,
        attention=c.attention,
    )
    limits = replace(
        Limits(),
        sessions=c.sessions,
        snapshots=c.snapshots,
        seek_blocks=c.seek_blocks,
        idle_seconds=c.idle_seconds,
        resume_seconds=c.resume_seconds,
    )
    offer = partial(serve_run, fps=c.fps, memories=tuple(c.memories), examples=tuple(c.prompts), limits=limits)
    served, *copies = map(offer, on_devices(opened, devices))
    most = -(-limits.sessions // len(devices))  # sessions of one device
    sizes = tuple(size for size in SIZES if size < 2 * most)  # three fill four places
    return Host(served, limits, Together(step_together, groups, sizes) if c.together else Together(), copies)


def devices_of(c: ConfigDict) -> list[Any]:
    """The devices that sessions are spread over. To be called before JAX has any: a CPU is made so many."""
    if c.devices > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with suppress(RuntimeError):  # JAX has its devices already
            jax.config.update("jax_num_cpu_devices", c.devices)
    return jax.local_devices()[: c.devices or None][: c.sessions]
