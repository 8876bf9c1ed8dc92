"""A model whose pictures are known: what its prompt names, drawn, moving as the prompt or the keys say, without an end:
what leaves on one side comes in on the other.

Sessions are real ones of a tiny random network (tests/serving/running.py), so that recaching, policies and snapshots
are too; only their pixels are drawn. A browser's picture can then be held against what was asked, exactly and without
training. That trained networks draw what they are asked is measured elsewhere (docs/results.md).
"""

import itertools
from dataclasses import dataclass, fields, replace

import numpy as np

from cfjax.core.errors import UserError
from cfjax.data.shapes import DIRECTIONS, PALETTE, ShapesConfig, coverage, parse_caption
from cfjax.rollout.session import Session
from cfjax.rollout.session_state import Made, SessionState, Text
from cfjax.rollout.stream import Pipeline
from cfjax.serving.served import Served
from tests.serving.running import tiny_run, tiny_served

WORLD = ShapesConfig()
ACTIONS = ("up", "left", "down", "right")
MEMORIES = ("infinity_rope(window=4, sink=1)", "infinity_rope(window=6, sink=2)")
SPEED, RADIUS = 1.0, 6.0  # px


@dataclass(frozen=True)
class Drawn(SessionState):
    """`at`: where the shape is (x, y), px."""

    at: tuple[float, float] = (WORLD.size / 2, WORLD.size / 2)


class Drawing(Session):
    """See the module."""

    keys: tuple[str, ...] = ()

    def __init__(self, prompt: str, seed: int, memory: str) -> None:
        run = tiny_run()

        def encode(prompts):
            if wrong := next(filter(None, map(run.world.prompt_fault, prompts)), ""):
                raise UserError(f"prompt {wrong}")
            return run.world.encode_prompts(prompts)

        pipeline = Pipeline(run.model, run.world.codec, run.sampler, run.blocks)
        super().__init__(pipeline, Text(encode), prompt, latent_shape=run.latent_shape[1:], seed=seed, memory=memory)
        at = tuple(map(float, np.random.default_rng(seed).uniform(0, WORLD.size, 2)))
        self._state = Drawn(**{f.name: getattr(self.state, f.name) for f in fields(SessionState)}, at=at)

    def went_on(self, after: SessionState, pixels_BPHWC: np.ndarray, begun: float, made: float) -> Made:
        """As a session has it, with drawn pixels; of several prompts the heaviest is drawn."""
        state = self.state
        assert isinstance(state, Drawn)
        text = state.prompt if isinstance(state.prompt, str) else max(state.prompt, key=lambda one: one[1])[0]
        wanted = {name: str(value[0]) for name, value in parse_caption(text, WORLD).items()}
        step = SPEED * np.sum([DIRECTIONS[key] for key in self.keys or (wanted["direction"],)], axis=0)
        path = np.stack([(state.at + (frame + 1) * step) % WORLD.size for frame in range(pixels_BPHWC.shape[1])])
        around = np.array(list(itertools.product((-WORLD.size, 0, WORLD.size), repeat=2)))
        masks = [coverage(wanted["shape"], path + by, RADIUS, WORLD.size, WORLD.softness) for by in around]
        mask = np.max(masks, axis=0)[..., None]
        video = np.asarray(WORLD.background) * (1 - mask) + np.asarray(PALETTE[wanted["colour"]]) * mask
        after = replace(after, at=tuple(map(float, path[-1])))
        return super().went_on(after, video[None].astype(np.float32), begun, made)


def steer(session: Session, keys: tuple[str, ...]) -> None:
    assert isinstance(session, Drawing)
    session.keys = keys


def drawing_served() -> Served:
    served = tiny_served(memories=MEMORIES)
    return replace(
        served,
        width=WORLD.size,
        height=WORLD.size,
        make=lambda prompt, seed, memory, image: Drawing(prompt, seed, memory),
        actions=ACTIONS,
        steer=steer,
        takes_image=False,
    )
