"""What a server offers: a run, the memory policies whose programs it compiles, and how sessions of it are opened."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cfjax.core.errors import UserError
from cfjax.data.steered import KEYS, as_keys, spoken
from cfjax.experiment.runs import Run
from cfjax.memory.names import FULL, POLICIES, memory_name, parse_memory
from cfjax.models.experts import takes_picture
from cfjax.rollout.blocks import layout_from
from cfjax.rollout.generate import ManyStep
from cfjax.rollout.session import Session
from cfjax.rollout.session_state import Mode
from cfjax.rollout.sizes import pixel_frames
from cfjax.serving.pictures import given_video
from cfjax.serving.protocol import BLENDS, FORMATS, MODES, VERSION, Open, Refused
from cfjax.worlds.toy import ToyWorld

# (session, the keys that are held) -> None: before each block of a model that can be steered
Steer = Callable[[Session, tuple[str, ...]], None]


@dataclass(frozen=True)
class Limits:
    """What clients may take.

    Attributes:
      sessions: at a time.  queue: blocks that may be unacknowledged.
      snapshots, seek_blocks: caches that a session may hold besides its own.
      message_bytes: of a text message; `image_bytes`: of a picture, which only an `open` has.
      messages_per_second: of one socket; so many at once are taken too.
      open_seconds: from a socket to its `open`.
      idle_seconds: without any message.  resume_seconds: without a socket.
    """

    sessions: int = 8
    queue: int = 3
    snapshots: int = 16
    seek_blocks: int = 8
    message_bytes: int = 65_536
    image_bytes: int = 4_000_000
    messages_per_second: float = 100.0
    open_seconds: float = 10.0
    idle_seconds: float = 300.0
    resume_seconds: float = 30.0

    @property
    def open_bytes(self) -> int:
        """Of an `open` with a picture in base64."""
        return self.message_bytes + (self.image_bytes + 2) // 3 * 4


@dataclass(frozen=True)
class Policy:
    """A memory policy that sessions may have: its text, a line about it, how prompts can change under it."""

    name: str
    about: str
    modes: tuple[Mode, ...]


@dataclass(frozen=True)
class Served:
    """A model as clients see it.

    Attributes:
      height, width: of frames, in pixels.  fps: of its videos.  frames_per_block: pixel frames.
      make: (prompt, seed, memory, picture in base64 or "") -> a session.
      policies, samplers: the first is the default.
      examples: prompts to begin with.  vocabulary: of a model that knows few words.
      actions: keys that steer it, with `steer`.
      takes_image: whether a video can begin with a picture.
    """

    name: str
    height: int
    width: int
    fps: float
    frames_per_block: int
    make: Callable[[str, int, str, str], Session] = field(repr=False)
    policies: tuple[Policy, ...]
    samplers: tuple[str, ...]
    examples: tuple[str, ...]
    vocabulary: dict[str, Any] | None = None
    actions: tuple[str, ...] = ()
    steer: Steer | None = None
    takes_image: bool = False

    def check_memory(self, name: str) -> str:
        """The policy's name, the default for "". Raises Refused for one that is not offered."""
        names = [policy.name for policy in self.policies]
        if name and name not in names:
            raise Refused("invalid_value", f"memory={name!r}: this server has {', '.join(names)}")
        return name or names[0]

    def open(self, asked: Open) -> Session:
        """A session.

        Raises:
          UserError: a prompt, policy or picture that it cannot have.
        """
        if asked.sampler and asked.sampler not in self.samplers:
            raise Refused("invalid_value", f"sampler={asked.sampler!r}: this server has {', '.join(self.samplers)}")
        memory = self.check_memory(asked.memory)
        if asked.image and not self.takes_image:
            raise Refused("unsupported", "image: this model does not encode pictures; leave it out")
        return self.make(asked.prompt, asked.seed, memory, asked.image)

    def capabilities(self, limits: Limits) -> dict[str, Any]:
        """The answer of /api/model."""
        shown = asdict(limits)
        del shown["open_seconds"]
        return {
            "version": VERSION,
            "name": self.name,
            "width": self.width,
            "height": self.height,
            "fps": self.fps,
            "frames_per_block": self.frames_per_block,
            "formats": list(FORMATS),
            "samplers": list(self.samplers),
            "memory": [asdict(policy) for policy in self.policies],
            "prompts": {"examples": list(self.examples), "vocabulary": self.vocabulary},
            "modes": [mode for mode in MODES if any(mode in policy.modes for policy in self.policies)],
            "blends": list(BLENDS),
            "actions": list(self.actions),
            "image": self.takes_image,
            "limits": {**shown, "image_bytes": limits.image_bytes if self.takes_image else 0},
        }


def policy_of(name: str) -> Policy:
    """A memory policy by its text (`memory.names`).

    Raises:
      UserError: there is none.
    """
    memory = parse_memory(name)
    if memory is None:
        return Policy(FULL, "every frame, up to the length that it was trained on; the stream ends there", MODES)
    without = {"recache": memory.recaches, "cut": memory.cuts}
    modes = tuple(mode for mode in MODES if without.get(mode, True))
    whole = memory_name(memory)  # as sessions call it
    return Policy(whole, POLICIES[whole.partition("(")[0]].about, modes)


def serve_run(
    run: Run, *, fps: float, memories: Sequence[str], examples: Sequence[str], limits: Limits = Limits()
) -> Served:
    """A run as a server offers it.

    Raises:
      UserError: it is bidirectional, or has no such policy.
    """
    blocks = run.blocks
    if blocks is None:
        raise UserError(f"run={run.name!r} is bidirectional: it makes all frames at once; serve a causal one")
    if takes_picture(run.model.config):
        raise UserError(f"run={run.name!r} is image to video, which is not served; use cfjax generate")
    if not memories or not examples:
        raise UserError("memories and examples: give at least one of each")
    if wrong := next(filter(None, map(run.world.prompt_fault, examples)), ""):
        raise UserError(f"--config.prompts: {wrong}")
    codec = run.world.codec
    time, down, right = codec.stride
    _, height, width, _ = run.latent_shape
    encode = jax.jit(codec.encode) if hasattr(codec, "encode") else None
    first = 1 if layout_from(blocks, 0).independent_first_frame else blocks.frames
    still = partial(
        given_video,
        most_bytes=limits.image_bytes,
        frames=pixel_frames(first, time),
        height=height * down,
        width=width * right,
    )

    keys = KEYS if run.model.config.actions is not None else ()

    def make(prompt: str, seed: int, memory: str, image: str) -> Session:
        given = None
        if image:
            assert encode is not None
            given = np.asarray(encode(still(image)))
        return run.session(prompt, seed=seed, memory=memory, given_BFHWC=given)

    return Served(
        name=Path(run.name).name,
        height=height * down,
        width=width * right,
        fps=fps,
        frames_per_block=blocks.frames * time,
        make=make,
        policies=tuple(policy_of(name) for name in memories),
        samplers=(sampler_name(run),),
        examples=tuple(dict.fromkeys(spoken(prompt, silent=bool(keys)) for prompt in examples)),
        vocabulary=vocabulary(run.world, steered=bool(keys)) if isinstance(run.world, ToyWorld) else None,
        actions=keys,
        steer=steer if keys else None,
        takes_image=encode is not None,
    )


def steer(session: Session, held: tuple[str, ...]) -> None:
    """The arrow keys of the toy, from the session's next block on."""
    session.set_actions(list(as_keys(held)))


def on_devices(run: Run, devices: Sequence[Any]) -> list[Run]:
    """Copies of a run, its network and codec on these devices; the text encoder stays where it is."""
    if len(devices) < 2:
        return [run]
    copies = []
    for device in devices:
        model, codec = jax.device_put((run.model, run.world.codec), device)
        copies.append(replace(run, model=model, world=replace(run.world, codec=codec)))  # type: ignore[type-var]
    return copies


def sampler_name(run: Run) -> str:
    """A run's sampler in a few words."""
    sampler = run.sampler
    if isinstance(sampler, ManyStep):
        return f"{sampler.solver}, {sampler.steps} steps"
    kind = "rolling" if sampler.rolling else "few-step"
    return f"{kind}, {', '.join(map(str, sampler.steps))}"


def vocabulary(world: ToyWorld, *, steered: bool = False) -> dict[str, Any]:
    """The words that the toy knows; `steered`: where keys say which way to go, not prompts."""
    shapes = world.shapes
    return {
        "pattern": "a COLOUR SHAPE" if steered else "a COLOUR SHAPE moving DIRECTION",
        "colours": list(shapes.colours),
        "shapes": list(shapes.shapes),
        "directions": [] if steered else list(shapes.directions),
    }
