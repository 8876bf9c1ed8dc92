"""The GAN: its losses by their formulas and by the reference's numbers, the slope penalty against an exact gradient,
what a branch leaves alone, and a critic that learns to tell as much as can be told."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.comparison.probe import jit_once
from cfjax.core.errors import UserError
from cfjax.core.tree import named_leaves
from cfjax.models.discriminator import BranchConfig, tapped_layers, with_branch
from cfjax.models.wan import KV, embed_text, make_wan
from cfjax.nn.visibility import Blocks
from cfjax.objectives import dmd
from cfjax.objectives import gan as module
from cfjax.objectives.dmd import DMDConfig
from cfjax.objectives.gan import GanConfig, critic_loss, critic_value, draw, generator_loss, generator_value, slope
from cfjax.objectives.stage import Stage
from cfjax.rollout.long_video import LongVideo
from cfjax.rollout.self_forcing import SelfForcing
from cfjax.training.optim import OptimizerConfig, make_optimizer
from cfjax.training.state import advance, init_state
from cfjax.training.step import make_update, role_key
from tests.golden import record_gan
from tests.golden.record_gan import GAMES, Game
from tests.objectives import learning
from tests.objectives.learning import FRAMEWISE, REAL_MEAN, STD, batch_of, fresh, learn
from tests.tiny import CONFIG, SHAPE, normal, random_weights, text

BLOCKS = Blocks(3)
DMD = DMDConfig(SelfForcing((1.0, 0.9375, 0.8333333, 0.625)))
KEY = jax.random.key(0)
FAKE, REAL = np.array([[0.3], [-1.2]]), np.array([[2.0], [-0.5]])
GOLDEN = np.load(record_gan.FILE)
VALUE, GRADIENT = 2e-6, 4e-4  # measured: 3e-7 and, where differences of logits cancel, 1e-5 to 1e-4 by machine
LEARNT = 0.015  # nats above the least loss; measured: 0.008


def softplus(x):
    return np.mean(np.log1p(np.exp(x)))


def test_losses_are_the_formulas():
    plain = GanConfig(generator_weight=0.5, critic_weight=0.25)
    paired = replace(plain, relativistic=True)
    fake, real = jnp.asarray(FAKE), jnp.asarray(REAL)
    assert float(generator_value(fake, real, plain)) == pytest.approx(0.5 * softplus(-FAKE), rel=1e-6)
    assert float(critic_value(fake, real, plain)) == pytest.approx(0.25 * (softplus(-REAL) + softplus(FAKE)), rel=1e-6)
    assert float(generator_value(fake, real, paired)) == pytest.approx(0.5 * softplus(REAL - FAKE), rel=1e-6)
    assert float(critic_value(fake, real, paired)) == pytest.approx(0.25 * softplus(FAKE - REAL), rel=1e-6)


def test_the_slope_is_the_squared_gradient():
    """D(x) = sum sin(w x): the mean over many directions against |grad D|^2 in closed form."""
    w, x = np.linspace(0.5, 1.5, 6), np.linspace(-1.0, 1.0, 6)
    judge = lambda clips: jnp.sum(jnp.sin(jnp.asarray(w)[None] * clips), axis=1, keepdims=True)
    clips = jnp.broadcast_to(jnp.asarray(x)[None], (40000, 6))
    eps = jax.random.normal(jax.random.key(0), clips.shape)
    measured = float(slope(judge(clips), judge(clips + 0.01 * eps), 0.01))
    exact = float(np.sum(np.square(w * np.cos(w * x))))
    print(f"slope {measured:.4f}, exact {exact:.4f}")
    assert measured == pytest.approx(exact, rel=0.03)


class Judge:
    """A discriminator in closed form: D = gain mean sin(x) + sigma + mean text, of each clip."""

    def __init__(self, gain):
        self.gain = gain

    def classify(self, x, sigma_BF, text_kv):
        prompt_B = jnp.mean(text_kv.k_LBSNK, axis=(0, 2, 3, 4))
        return (self.gain * jnp.mean(jnp.sin(x), axis=(1, 2, 3, 4)) + sigma_BF[:, 0] + prompt_B)[:, None]


class Played:
    """Both losses with a `Judge` and the student's video given, and the same by NumPy in float64."""

    gain = 20.0

    def __init__(self, gan: GanConfig, dmd: DMDConfig = DMD):
        self.gan, self.dmd = gan, dmd
        self.batch = {"latents_BFHWC": normal(2) + 1.0, "text_BSE": text()}
        self.draws = draw(jax.random.key(3), SHAPE, dmd, BLOCKS)
        self.video = normal(4)

    def loss(self, make, video, gain):
        models = {"student": video, "critic": Judge(gain), "codec": "a codec"}
        return make(self.dmd, self.gan, BLOCKS)(models, self.batch, jax.random.key(0), self.draws)

    def noised(self, clip, eps="score_eps_BFHWC", step=0.0, along="r1_eps_BFHWC"):
        """(1 - sigma) clip + sigma eps, and a step along other noise."""
        sigma = np.asarray(self.draws["score_sigma_B"], np.float64)[:, None, None, None, None]
        x = (1 - sigma) * np.asarray(clip, np.float64) + sigma * np.asarray(self.draws[eps])
        return x + step * np.asarray(self.draws[along])

    def logits(self, x):
        sigma = np.asarray(self.draws["score_sigma_B"], np.float64)
        prompt = np.asarray(self.batch["text_BSE"], np.float64).mean(axis=(1, 2))
        return self.gain * np.sin(x).mean(axis=(1, 2, 3, 4)) + sigma + prompt


@pytest.fixture
def given_videos(monkeypatch):
    monkeypatch.setattr(module, "student_video", lambda model, *_, gradient, codec: model)
    monkeypatch.setattr(module, "embed_text", lambda _, text: KV(text[None, :, :, None], text[None, :, :, None]))


@pytest.mark.parametrize("relativistic", [False, True])
def test_generator_loss_and_its_gradient_are_the_formulas(given_videos, relativistic):
    """Real clips are noised at the same level with other noise; each clip under its own prompt."""
    game = Played(GanConfig(generator_weight=0.5, relativistic=relativistic))
    (value, _), gradient = jax.value_and_grad(lambda video: game.loss(generator_loss, video, game.gain), has_aux=True)(
        game.video
    )
    x = game.noised(game.video)
    margin = game.logits(x)
    if relativistic:
        margin = margin - game.logits(game.noised(game.batch["latents_BFHWC"], "real_eps_BFHWC"))
    assert float(value) == pytest.approx(0.5 * softplus(-margin), rel=1e-5)
    by_logit = -0.5 / len(margin) / (1 + np.exp(margin))
    level = 1 - np.asarray(game.draws["score_sigma_B"], np.float64)
    by_clip = (by_logit * level)[:, None, None, None, None] * game.gain * np.cos(x) / x[0].size
    np.testing.assert_allclose(gradient, by_clip, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("relativistic", [False, True])
@pytest.mark.parametrize("slopes", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.7), (0.3, 0.7)])
def test_critic_loss_is_the_formula(given_videos, relativistic, slopes):
    """R1 at real clips, R2 at generated ones, half of each; what is off is not computed."""
    gan = GanConfig(1.0, 0.5, relativistic, *slopes, r1_sigma=0.2, r2_sigma=0.1)
    game = Played(gan)
    value, metrics = game.loss(critic_loss, game.video, game.gain)
    clip = game.batch["latents_BFHWC"]
    fake, real = game.logits(game.noised(game.video)), game.logits(game.noised(clip))
    expected = 0.5 * (softplus(fake - real) if relativistic else softplus(-real) + softplus(fake))
    r1 = np.mean(((game.logits(game.noised(clip, step=0.2)) - real) / 0.2) ** 2)
    r2 = np.mean(((game.logits(game.noised(game.video, step=0.1, along="r2_eps_BFHWC")) - fake) / 0.1) ** 2)
    assert float(value) == pytest.approx(expected + 0.5 * (slopes[0] * r1 + slopes[1] * r2), rel=1e-4)
    assert {"r1", "r2"} & metrics.keys() == {name for name, w in zip(("r1", "r2"), slopes, strict=True) if w}
    assert float(metrics["told_apart"]) == np.mean(0.5 * (real > 0) + 0.5 * (fake < 0))


@pytest.mark.parametrize("make", [generator_loss, critic_loss])
def test_long_rollouts_are_held_against_the_beginning_of_clips(monkeypatch, given_videos, make):
    """The window is made to begin as a video does. Its codec reaches the rollout."""
    gan = GanConfig(relativistic=True, r1_weight=0.3, r2_weight=0.7)
    usual, codecs = Played(gan), []
    long = Played(gan, replace(DMD, long=LongVideo(SHAPE[1], SHAPE[1] + 6)))
    long.draws = {**long.draws, **{name: value for name, value in usual.draws.items() if name.endswith("eps_BFHWC")}}
    clip = long.batch["latents_BFHWC"]
    long.batch["latents_BFHWC"] = jnp.concatenate([clip, clip + 3.0], axis=1)
    monkeypatch.setattr(module, "student_video", lambda model, *_, gradient, codec: codecs.append(codec) or model)
    value, _ = long.loss(make, long.video, long.gain)
    assert codecs == ["a codec"] and float(value) == float(usual.loss(make, usual.video, usual.gain)[0])
    long.batch["latents_BFHWC"] = clip[:, :3]
    with pytest.raises(UserError, match=f"objective.window_frames={SHAPE[1]}: the clips of this dataset have 3 latent"):
        long.loss(make, long.video, long.gain)


class Student:
    """v = slope x."""

    def __init__(self, slope):
        self.slope = slope

    def __call__(self, x, *_):
        return self.slope * x


def test_whose_gradient_is_whose(monkeypatch):
    """The student's loss moves the student through its video; the critic's moves the critic, and the student not."""
    for place in (module, dmd):
        monkeypatch.setattr(place, "embed_text", lambda _, text: KV(text[None, :, :, None], text[None, :, :, None]))
    config = replace(DMD, student_input="noised_data")
    draws = draw(jax.random.key(3), SHAPE, config, BLOCKS)
    batch = {"latents_BFHWC": normal(2) + 1.0, "text_BSE": text()}

    def value(slope, gain, make):
        models = {"student": Student(slope), "critic": Judge(gain)}
        return make(config, GanConfig(r1_weight=1.0, r2_weight=1.0), BLOCKS)(models, batch, KEY, draws)[0]

    by_student, _ = jax.grad(value, argnums=(0, 1))(0.3, 20.0, generator_loss)
    step = (value(0.301, 20.0, generator_loss) - value(0.299, 20.0, generator_loss)) / 0.002
    assert abs(float(by_student)) > 1e-4 and float(by_student) == pytest.approx(float(step), rel=0.02)
    by_student, by_critic = jax.grad(value, argnums=(0, 1))(0.3, 20.0, critic_loss)
    assert float(by_student) == 0.0 and abs(float(by_critic)) > 1e-4


SLOW = ("generator, relativistic", "critic, relativistic")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in GAMES])
def test_losses_and_gradients_are_the_references(monkeypatch, name):
    """Network, taps, branch and losses of 30 layers, against its own code (tests/golden/record_gan.py)."""
    monkeypatch.setattr(module, "student_video", lambda model, *_, gradient, codec: model)
    ours = record_gan.kept(play(GAMES[name]))
    theirs = {key.rpartition("|")[2]: x for key, x in GOLDEN.items() if key.rpartition("|")[0] == name}
    assert ours.keys() == theirs.keys()
    for key, x in theirs.items():
        if key == "gradients":
            norms = np.maximum(x[:, :1], 1e-3 * x[:, 0].max())
            worst, tolerance = np.max(np.abs(ours[key] - x) / norms), GRADIENT
            assert np.mean(x[:, 0] > 1e-3 * x[:, 0].max()) > 0.6  # a vanishing gradient would agree with anything
        else:
            worst, tolerance = np.max(np.abs(ours[key] - x)) / np.max(np.abs(x)), GRADIENT if key else VALUE
        print(f"{name} {key or 'value'}: {worst:.1e}")
        assert worst <= tolerance, key


def play(game: Game) -> dict[str, np.ndarray]:
    given, draws = record_gan.inputs(), jax.tree.map(jnp.asarray, record_gan.draws())
    video = jnp.asarray(given.pop("video"))
    batch, critic = jax.tree.map(jnp.asarray, given), jax.tree.map(jnp.asarray, record_gan.critic(game))
    loss = (generator_loss if game.which == "generator" else critic_loss)(DMD, game.gan, BLOCKS)

    def value(video, critic):
        return loss({"student": video, "critic": critic}, batch, jax.random.key(0), draws)[0]

    by = 0 if game.which == "generator" else 1
    result, gradient = jit_once(jax.value_and_grad(value, argnums=by))(video, critic)
    if by == 0:
        return {"": np.asarray(result), "video": np.asarray(gradient)}
    return {"": np.asarray(result)} | {f"grad/{name}": x for name, x in record_gan.weights(gradient).items()}


def test_a_branch_leaves_the_network_as_it_is():
    """Its weights are the very arrays; the branch's are the rest, and the flow is the same program."""
    network = random_weights(CONFIG)
    judge = with_branch(network, BranchConfig(time_embedding=True), KEY)
    leaves, own = named_leaves(judge), named_leaves(network)
    assert all(leaves[name] is x for name, x in own.items())
    assert {name.partition("/")[0] for name in leaves.keys() - own.keys()} == {"branch"}
    flow = lambda model: model(normal(1), jnp.full(SHAPE[:2], 0.5), embed_text(model, text()))
    used, traced = (jax.make_jaxpr(lambda model: flow(model))(model) for model in (network, judge))
    assert [str(eqn) for eqn in used.eqns] == [str(eqn) for eqn in traced.eqns]


FAKE_MEAN = 0.5


@pytest.mark.slow
def test_a_critic_learns_the_optimal_discriminator(monkeypatch):
    """Clips N(1, STD^2) against N(0.5, STD^2), noised: the best logit is log p(real) - log p(fake), linear in x."""
    fakes = lambda model, batch, draws, *_, gradient, codec: FAKE_MEAN + STD * draws["noise_BFHWC"]
    monkeypatch.setattr(module, "student_video", fakes)
    config = DMDConfig(SelfForcing((1.0,)), score_shift=1.0)
    loss = critic_loss(config, GanConfig(critic_weight=1.0), FRAMEWISE)
    critic = with_branch(make_wan(learning.CONFIG, KEY), BranchConfig(), KEY)
    more = lambda key: batch_of(fresh(key, 128, REAL_MEAN))
    state = learn(Stage("gan", {"critic": loss}), {"critic": critic}, more, 300, frozen={"student": KEY})
    batch = batch_of(fresh(jax.random.key(8), 4000, REAL_MEAN))
    draws = draw(jax.random.key(9), batch["latents_BFHWC"].shape, config, FRAMEWISE)
    least = best_critic_loss(batch["latents_BFHWC"], draws)
    examine = jax.jit(lambda critic: loss({"student": None, "critic": critic}, batch, KEY, draws)[0])
    before, after = (float(examine(one)) for one in (critic, state.params["critic"]))
    print(f"loss before {before:.4f}, after {after:.4f}, of the best critic {least:.4f}, of chance 1.3863")
    assert least - 0.01 < after < least + LEARNT


def best_critic_loss(clips, draws) -> float:
    """Of the two Gaussians' log ratio, on the same clips."""
    level = np.asarray(draws["score_sigma_B"], np.float64)[:, None, None, None, None]
    real, fake = (1 - level) * REAL_MEAN, (1 - level) * FAKE_MEAN
    variance = ((1 - level) * STD) ** 2 + level**2
    logit = lambda x: np.sum((real - fake) * (2 * x - real - fake) / (2 * variance), axis=(1, 2, 3, 4))
    noised = lambda x: (1 - level) * np.asarray(x) + level * np.asarray(draws["score_eps_BFHWC"])
    return softplus(-logit(noised(clips))) + softplus(logit(noised(FAKE_MEAN + STD * draws["noise_BFHWC"])))


@pytest.mark.slow
def test_one_compile_per_role_and_each_changes_its_own_weights():
    """Over rollouts that stop at different steps."""
    gan = GanConfig(relativistic=True, r1_weight=0.1, r2_weight=0.1)
    losses = {"student": generator_loss(DMD, gan, FRAMEWISE), "critic": critic_loss(DMD, gan, FRAMEWISE)}
    stage = Stage("dmd", losses, cadence={"student": 2})
    network = make_wan(learning.CONFIG, KEY)
    txs = {role: make_optimizer(OptimizerConfig(lr=1e-3), steps=8) for role in losses}
    models = {"student": network, "critic": with_branch(network, BranchConfig(), KEY)}
    state = init_state(stage, jax.tree.map(jnp.array, models), txs, 0)
    updates = {role: make_update(stage, role, txs[role]) for role in losses}
    batch, exits = batch_of(fresh(KEY, 4, REAL_MEAN)), set()
    for iteration in range(8):
        for role in stage.roles_at(iteration):
            exits.add(int(draw(role_key(state, role), (1, 2, 1, 1, 1), DMD, FRAMEWISE)["exit_G"][0]))
            before = {name: np.array(x) for name, x in named_leaves(state.params).items()}
            state, metrics = updates[role](state, {}, batch)
            assert np.isfinite([float(x) for x in metrics.values()]).all()
            after = named_leaves(state.params)
            assert {name.partition("/")[0] for name, x in after.items() if (x != before[name]).any()} == {role}
        state = advance(state)
    assert len(exits) > 2 and [update._cache_size() for update in updates.values()] == [1, 1]


def test_layers_are_as_deep_as_the_references():
    layers = {n: tapped_layers(BranchConfig(), n) for n in (1, 2, 4, 30, 40)}
    assert layers == {1: (0,), 2: (0, 1), 4: (1, 2, 3), 30: (13, 21, 29), 40: (18, 28, 39)}


def test_wrong_settings_are_named():
    with pytest.raises(UserError, match="layers are 0 to 3"):
        tapped_layers(BranchConfig(layers=(1, 4)), 4)
    with pytest.raises(UserError, match="ascending"):
        BranchConfig(layers=(2, 1))
    with pytest.raises(UserError, match="r1_sigma=0"):
        GanConfig(r1_sigma=0)
    with pytest.raises(UserError, match="r2_weight=-1"):
        GanConfig(r2_weight=-1)
