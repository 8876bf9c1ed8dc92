"""A server of a tiny run, in a thread of this process or as one of its own."""

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from cfjax.core.errors import UserError
from cfjax.experiment.runs import Run, open_run
from cfjax.models.wan import WanConfig
from cfjax.nn.visibility import Blocks
from cfjax.rollout.generate import FewStep
from cfjax.serving.app import Access, application
from cfjax.serving.engine import Together
from cfjax.serving.host import Host
from cfjax.serving.served import Limits, Served, on_devices, serve_run
from cfjax.serving.web import Server, address_of, bind
from tests.tiny import random_weights

PROMPTS = ("a red circle moving left", "a blue square moving up")
MEMORIES = ("infinity_rope(window=4, sink=1)",)
QUICK = Limits(open_seconds=20.0, resume_seconds=20.0)


@cache
def tiny_run() -> Run:
    """The toy's world, and a random causal network of two layers that makes two frames at a time in two steps."""
    shipped = open_run("toy_teacher")
    c = shipped.model.config
    small = WanConfig(
        dim=24, ffn_dim=32, num_heads=2, num_layers=2, in_dim=c.in_dim, out_dim=c.out_dim, text_dim=c.text_dim,
        freq_dim=16, patch=c.patch,
    )  # fmt: skip
    frames, _, _, channels = shipped.latent_shape
    return replace(
        shipped,
        name="runs/tiny",
        model=random_weights(small),
        sampler=FewStep((1000, 500)),
        blocks=Blocks(2),
        latent_shape=(frames, 2, 2, channels),
    )


def tiny_served(limits: Limits = QUICK, memories: Sequence[str] = MEMORIES) -> Served:
    return serve_run(tiny_run(), fps=8.0, memories=memories, examples=PROMPTS, limits=limits)


def tiny_copies(devices: Sequence[Any], limits: Limits = QUICK) -> list[Served]:
    """The same on several devices."""
    runs = on_devices(tiny_run(), devices)
    return [serve_run(one, fps=8.0, memories=MEMORIES[:1], examples=PROMPTS, limits=limits) for one in runs]


@dataclass
class Running:
    """A server that answers."""

    host: Host
    url: str
    server: Server


@contextmanager
def running(
    served: Served | None = None,
    limits: Limits = QUICK,
    access: Access = Access(),
    together: Together = Together(),
    copies: Sequence[Served] = (),
) -> Iterator[Running]:
    """A server in a thread, until all its programs are compiled; at the end it is stopped in order."""
    host = Host(served or tiny_served(limits), limits, together, copies)
    warmed = threading.Event()
    server = Server(application(host, access, warmed.set), host)
    bound = bind("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])), name="server")
    thread.start()
    try:
        assert warmed.wait(300)
        if host.failure is not None:
            raise host.failure
        yield Running(host, address_of(bound).rstrip("/"), server)
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()
        assert not thread.is_alive()


def until(true: Any, seconds: float = 20.0) -> None:
    """Waits until something is so; a server's threads take their time."""
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise UserError("waited in vain")
        time.sleep(0.005)
