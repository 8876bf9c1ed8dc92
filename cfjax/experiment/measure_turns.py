"""A run's videos of the turning world, made from the same clean pasts, and latents of everything that may follow."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.data.shapes import render
from cfjax.evaluation.turns import Past, Table, first_turned, measure_turns, pasts_of, real_futures
from cfjax.experiment.runs import Run
from cfjax.rollout.generate import FewStep, ManyStep, generate
from cfjax.worlds.toy import EVALUATION_SEED, SplitSource, ToyWorld

BATCH = 512  # videos at a time
GIVEN = 3  # clean frames of a past: one block, or three
# How a network is sampled, by the ending of its name in the study: as a teacher is (without guidance, which narrows the
# law), in one step, or in the student's four.
SAMPLERS: dict[str, FewStep | ManyStep] = {
    "_solver": ManyStep("euler", 24, 5.0, 1.0),
    "_one": FewStep((1000,)),
    "": FewStep(),
}
_generate = jax.jit(generate, static_argnames=("sampler", "blocks"))


@dataclass(frozen=True)
class Trial:
    """What every network is asked to go on from.

    Attributes:
      given: clean frames of each past: the last whole block of three before a turn can show.
      futures: videos of each past.
    """

    world: ToyWorld
    pasts: list[Past]
    given: int
    futures: int

    @property
    def shows(self) -> slice:
        """The frames in which a turn can first show."""
        config = self.world.shapes
        return slice(first_turned(config), config.frames - config.frames // 4 + 1)

    def measured(self, video_BPHWC: np.ndarray) -> Table:
        """`measure_turns` of `futures` videos of each past, in their order."""
        factors = [past.factors for past in self.pasts for _ in range(self.futures)]
        return measure_turns(video_BPHWC, factors, self.world.shapes, given=self.given)

    def real(self, seed: int) -> Table:
        """The same measurements of real futures, after the codec's round trip."""
        rng = np.random.default_rng(seed)
        clips = [real_futures(past, self.world.shapes, rng, self.futures) for past in self.pasts]
        codec = self.world.codec
        return self.measured(np.asarray(codec.decode(codec.encode(jnp.asarray(np.concatenate(clips))))))


def trial_of(world: ToyWorld, pasts: int, futures: int) -> Trial:
    """The trial of a world, of `pasts` clips that no stage trains on, with captions that they do train on: a dozen
    captions in all are too few to read a new one, and what is asked is how a past goes on.

    Raises:
      UserError: nothing turns in it, or it turns before a block of three frames has passed.
    """
    shapes = world.shapes
    if not shapes.branching or first_turned(shapes) < GIVEN or shapes.frames % GIVEN:
        raise UserError(f"{world.folder}: a world without turns after its first three frames; use branching_teacher")
    source = SplitSource(shapes, EVALUATION_SEED, pasts)
    return Trial(world, pasts_of([source[i] for i in range(pasts)], shapes), GIVEN, futures)


def futures_of(run: Run, trial: Trial, seed: int, sampler: FewStep | ManyStep) -> Table:
    """Measurements of a causal run's videos of a trial; the same noise for every run."""
    assert run.blocks is not None
    codec, shape = run.toy.codec, run.latent_shape
    clean = np.asarray(codec.encode(jnp.asarray(np.stack([past.video_PHWC[: trial.given] for past in trial.pasts]))))
    given = np.repeat(clean, trial.futures, axis=0)
    text = np.repeat(run.toy.encode_prompts([past.caption for past in trial.pasts]), trial.futures, axis=0)
    negative = jnp.asarray(run.toy.negative_text_SE())
    sample = partial(_generate, sampler=sampler, blocks=run.blocks)
    size, videos = min(BATCH, len(given)), []
    for start in range(0, len(given), size):
        rows = np.minimum(np.arange(start, start + size), len(given) - 1)  # one shape, so one program
        key = jax.random.fold_in(jax.random.key(seed), start)
        noise = jax.random.normal(key, (size, shape[0] - trial.given, *shape[1:]))
        work = (run.model, noise, jnp.asarray(text[rows]), negative, jax.random.fold_in(key, 1))
        latents = sample(*work, given_BFHWC=jnp.asarray(given[rows]))
        videos.append(np.asarray(codec.decode(latents))[: len(given) - start])
    return trial.measured(np.concatenate(videos))


def everything_after(past: Past, trial: Trial) -> dict[str, np.ndarray]:
    """The fields of `studies.turning.Futures` for one past."""
    shapes, codec, given = trial.world.shapes, trial.world.codec, trial.given
    clips = np.stack([render({**past.factors, "centres": path[None]}, shapes) for path in past.centres_KP2])
    latents = codec.encode(jnp.asarray(clips))
    shown = np.asarray(codec.decode(latents), np.float64)[:, given:]
    edges = [np.diff(shown, axis=axis).reshape(*shown.shape[:2], -1) for axis in (2, 3)]
    speed = float(past.factors["speed"][0])
    return {
        "latents_KFD": np.asarray(latents, np.float64)[:, given:].reshape(*shown.shape[:2], -1),
        "chance_K": past.chance_K,
        "products_FKK": sum(np.einsum("kfg,lfg->fkl", edge, edge) for edge in edges),
        "centres_KF2": past.centres_KP2[:, given:] / speed,
        "before_2": past.centres_KP2[0, given - 1] / speed,
    }
