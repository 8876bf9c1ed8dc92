"""Rollouts longer than the scores' window: the gradient of the sequential loop, one compile for every length."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.flow.path import add_noise, x0_from_flow
from cfjax.models.cache import KVCache, init_cache
from cfjax.models.codec import PatchCodec
from cfjax.models.tiny_vae import TinyVAEConfig, make_tiny_vae
from cfjax.models.vae import VAEConfig, make_vae
from cfjax.models.wan import embed_text, forward_block
from cfjax.nn.visibility import Blocks
from cfjax.rollout.blocks import commit_block
from cfjax.rollout.long_video import LongVideo, draw_long, last_picture, roll_window
from cfjax.rollout.self_forcing import SelfForcing, replay_exit, rollout
from tests.tiny import BATCH, CONFIG, SIDE, normal, relative, text, tiny

TOKENS = CONFIG.tokens_per_frame(SIDE, SIDE)
SIGMAS = (1.0, 0.9375, 0.8333333)
SHAPE = (BATCH, 4, SIDE, SIDE, CONFIG.in_dim)
SLOW = pytest.mark.slow


@dataclass(frozen=True)
class Fading:
    """A codec whose every picture depends on all latents before it, and whose encoder is no inverse of its decoder."""

    keep: float = 0.5

    def encode(self, video_BPHWC):
        return 0.7 * video_BPHWC + 0.1

    def decode(self, latents_BFHWC):
        pictures, state = [], self.init_state(0)
        for number in range(latents_BFHWC.shape[1]):
            picture, state = self.decode_step(latents_BFHWC[:, number : number + 1], state)
            pictures.append(picture)
        return jnp.concatenate(pictures, axis=1)

    def init_state(self, _):
        return jnp.float32(0.0)

    def decode_step(self, latents_BFHWC, state):
        assert latents_BFHWC.shape[1] == 1
        picture = latents_BFHWC + self.keep * state
        return picture, picture


LAYOUTS = {
    "blocks": (Blocks(2), LongVideo(4, 8), "detached"),
    "attention_window": (Blocks(2, window=4, sink=1), LongVideo(4, 8), "straight_through"),
    "first_frame": (Blocks(2, independent_first_frame=True), LongVideo(5, 9), "straight_through"),
    "saved": (Blocks(2, independent_first_frame=True), LongVideo(5, 9), "straight_through"),
}


@cache
def settings(name: str) -> tuple[SelfForcing, dict, jax.Array]:
    """The rollout, its draws (exit at step 1 of the first block, 2 of the others), the weights of the window's sum."""
    blocks, long, kv_gradient = LAYOUTS[name]
    saves = {"save_activations": name == "saved"}
    config = SelfForcing(SIGMAS[:2], SIGMAS, context_noise=0.005, kv_gradient=kv_gradient, **saves)
    draws = jax.jit(lambda key: draw_long(key, SHAPE, config, long, blocks))(jax.random.key(3))
    exits = np.array([0] + [1] * (draws["exit_G"].shape[0] - 1), np.int32)
    return config, {**draws, "exit_G": exits}, normal(9, (BATCH, long.window_frames, *SHAPE[2:]))


def sequential(model, name: str, count: int, early: jax.Array) -> jax.Array:
    """The reference's loop over `count` blocks, written out; gradient to those before the window times `early`."""
    blocks, long, kv_gradient = LAYOUTS[name]
    config, draws, _ = settings(name)
    spans = blocks.spans(long.max_frames)[:count]
    frames, exits = spans[-1][1], draws["exit_G"].tolist()
    kv_text = embed_text(model, text())
    frozen, frozen_kv = jax.lax.stop_gradient((model, kv_text))
    clean = init_cache(CONFIG, BATCH, frames, TOKENS, Blocks(blocks.frames))
    seen, outputs = clean, []
    for b, (start, stop) in enumerate(spans):
        sigmas, levels = (config.sigmas if b else config.first_sigmas), jnp.ones((BATCH, stop - start))
        at, x = jnp.int32(start), draws["noise_BFHWC"][:, start:stop]
        for j in range(exits[b]):
            flow, _ = forward_block(frozen, x, sigmas[j] * levels, frozen_kv, clean, at, blocks)
            x0 = x0_from_flow(flow, x, sigmas[j] * levels)
            x = add_noise(x0, draws["renoise_BFJHWC"][:, start:stop, j], sigmas[j + 1])
        x, level = jax.lax.stop_gradient(x), sigmas[exits[b]] * levels
        flow, own = forward_block(model, x, level, kv_text, seen, at, blocks)
        x0 = x0_from_flow(flow, x, level)
        if start < frames - long.window_frames:
            x0, own = jax.tree.map(lambda y: jax.lax.stop_gradient((1 - early) * y) + early * y, (x0, own))
        outputs.append(x0)
        committed = add_noise(jax.lax.stop_gradient(x0), draws["context_BFHWC"][:, start:stop], config.context_noise)
        clean = jax.lax.stop_gradient(commit_block(frozen, committed, frozen_kv, clean, at, blocks))

        def through(cached, exit_kv, own_part, cut=slice(start, stop)):
            if kv_gradient == "detached":
                return own_part
            return cached.at[:, :, cut].set(own_part[:, :, cut] + exit_kv - jax.lax.stop_gradient(exit_kv))

        seen = KVCache(
            through(seen.k_LBFTNK, own.k_LBFTNK, clean.k_LBFTNK),
            through(seen.v_LBFTNK, own.v_LBFTNK, clean.v_LBFTNK),
            clean.frame_F,
        )
    return jnp.concatenate(outputs, axis=1)


@cache
def window_of(name: str):
    """(model, count) -> the gradient of the window's weighted sum, and the window; compiled once."""
    blocks, long, _ = LAYOUTS[name]
    config, draws, weight = settings(name)

    @jax.jit
    def run(model, count):
        def value(model):
            drawn = {**draws, "count": count}
            x0 = roll_window(model, embed_text(model, text()), drawn, config, long, blocks, Fading(), gradient=True)
            return jnp.sum(x0 * weight), x0

        return jax.grad(value, has_aux=True)(model)

    return run


def worst(a, b) -> float:
    """Largest difference of two gradients, over the largest number in the second."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    scale = max(float(jnp.max(jnp.abs(y))) for _, y in pairs)
    return max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs) / scale


@pytest.mark.parametrize(
    "name", ["attention_window", *(pytest.param(name, marks=SLOW) for name in ("blocks", "first_frame", "saved"))]
)
def test_the_windows_gradient_is_the_sequential_loops(name):
    """For a rollout between the shortest and the longest; the frames left out of the loss hand nothing on themselves.

    Where caches hand gradient on, that of the blocks before the window would change the whole by the last figure.
    """
    blocks, long, kv_gradient = LAYOUTS[name]
    weight, codec, count = settings(name)[2], Fading(), long.counts(blocks)[0] + 1
    start, left_out = int(long.start(jnp.int32(count), blocks)), blocks.spans(long.window_frames)[0][1]

    def by_loop(model, early):
        video = sequential(model, name, count, early)
        end = video[:, start:].at[:, :left_out].set(jax.lax.stop_gradient(video[:, start : start + left_out]))
        first = codec.encode(codec.decode(jax.lax.stop_gradient(video[:, : start + 1]))[:, -1:])
        window = jnp.concatenate([first, end[:, 1:]], axis=1)
        return jnp.sum(window * weight), window

    differentiated = jax.jit(jax.grad(by_loop, has_aux=True))
    wanted, window = differentiated(tiny(), 0.0)
    gradient, x0 = window_of(name)(tiny(), jnp.int32(count))
    print(f"{name}: window {relative(x0, window):.1e}, gradient {worst(gradient, wanted):.1e}")
    assert relative(x0, window) < 1e-6
    assert worst(gradient, wanted) < 1e-6
    if kv_gradient == "straight_through":
        reached = worst(gradient, differentiated(tiny(), 1.0)[0])
        print(f"{name}: with gradient to earlier blocks {reached:.1e}")
        assert reached > 1e-3


@pytest.mark.parametrize("name", ["attention_window", pytest.param("first_frame", marks=SLOW)])
def test_one_compile_whatever_the_number_of_blocks(name):
    blocks, long, _ = LAYOUTS[name]
    least, most = long.counts(blocks)
    windows = [window_of(name)(tiny(), jnp.int32(count))[1] for count in range(least, most + 1)]
    assert window_of(name)._cache_size() == 1
    assert all(relative(a, windows[0]) > 1e-2 for a in windows[1:])


def test_the_shortest_rollout_is_the_window_itself():
    """As if it were not long: values, gradient, and the first latent, which is nobody's end."""
    blocks, long, _ = LAYOUTS["blocks"]
    config, draws, weight = settings("blocks")
    count = long.counts(blocks)[0]
    short = {n: x[:, : long.window_frames] for n, x in draws.items() if n.endswith(("BFHWC", "BFJHWC"))}
    short["exit_G"] = draws["exit_G"][:count]

    @jax.jit
    def plain(model):
        def value(model):
            kv = embed_text(model, text())
            rolled = rollout(*jax.lax.stop_gradient((model, kv)), short, config, blocks)
            x0 = replay_exit(model, kv, rolled, config, blocks)
            return jnp.sum(x0 * weight), x0

        return jax.grad(value, has_aux=True)(model)

    wanted, video = plain(tiny())
    gradient, x0 = window_of("blocks")(tiny(), jnp.int32(count))
    print(f"shortest: window {relative(x0, video):.1e}, gradient {worst(gradient, wanted):.1e}")
    assert relative(x0, video) < 1e-6
    assert worst(gradient, wanted) < 1e-6


def test_a_perfect_codec_leaves_the_video_as_it_is():
    """Pictures that say everything about a latent, one each (the toy's codec): the window is the rollout's end."""
    blocks, long, _ = LAYOUTS["blocks"]
    config, draws, _ = settings("blocks")
    count = long.counts(blocks)[1]
    kv = embed_text(tiny(), text())

    @jax.jit
    def run(model, count):
        drawn = {**draws, "count": count}
        whole = rollout(model, kv, draws, config, blocks).x0_BFHWC
        return roll_window(model, kv, drawn, config, long, blocks, perfect_codec(), gradient=False), whole

    window, whole = run(tiny(), jnp.int32(count))
    assert relative(window, whole[:, -long.window_frames :]) < 1e-6


def perfect_codec() -> PatchCodec:
    """One pixel per latent of three channels and one more, which stays 0 in both."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((12, CONFIG.in_dim)))[0]
    return PatchCodec(*(jnp.asarray(x, jnp.float32) for x in (rng.standard_normal(12), basis, 1 + rng.random(4))))


def codec_named(name: str) -> Any:
    if name == "patch":
        return perfect_codec()
    if name == "wan":
        return make_vae(VAEConfig(base_dim=4), jax.random.key(0))
    return make_tiny_vae(TinyVAEConfig(encoder_width=4, decoder_widths=(4, 4, 4, 4)), jax.random.key(0))


@pytest.mark.parametrize("name", ["patch", "tiny", pytest.param("wan", marks=SLOW)])
def test_the_last_picture_is_that_of_a_whole_decode(name):
    """Streamed one latent at a time, up to any frame, by one program; and it encodes as one latent."""
    codec = codec_named(name)
    latents = normal(5, (1, 4, 2, 2, codec.latent_channels))
    last = jax.jit(lambda codec, latents, stop: last_picture(codec, latents, stop))
    whole = jax.jit(lambda codec, latents: codec.decode(latents))(codec, latents)
    for stop in (1, 2, 4):
        wanted = whole[:, (stop - 1) * codec.stride[0]][:, None]
        picture = last(codec, latents, jnp.int32(stop))
        print(f"{name}, frame {stop}: {relative(picture, wanted):.1e}")
        assert relative(picture, wanted) < 1e-5
    assert last._cache_size() == 1
    assert jax.eval_shape(codec.encode, picture).shape == (1, 1, 2, 2, codec.latent_channels)


def test_the_number_of_blocks_is_uniform():
    blocks, long = Blocks(3), LongVideo(21, 27)
    shape = (1, 21, 1, 1, 1)
    draw = jax.jit(jax.vmap(lambda key: draw_long(key, shape, SelfForcing(SIGMAS), long, blocks)["count"]))
    counts = np.bincount(np.asarray(draw(jax.random.split(jax.random.key(0), 600))), minlength=10)
    assert counts[:7].sum() == 0 and (counts[7:] > 150).all() and len(counts) == 10
    for count, start in ((7, 0), (8, 3), (9, 6)):
        assert int(long.start(jnp.int32(count), blocks)) == start
        assert long.counted_F(jnp.int32(count), blocks).tolist() == [count == 7] * 3 + [True] * 18


@pytest.mark.parametrize(("window", "most"), [(0, 27), (21, 0), (21, 18)])
def test_half_a_setting_is_named(window, most):
    with pytest.raises(UserError, match=f"objective.window_frames={window}, objective.max_frames={most}"):
        LongVideo(window, most)


def test_frames_that_are_no_whole_blocks_are_named():
    with pytest.raises(UserError, match="20 latent frames do not divide into blocks"):
        LongVideo(20, 27).counts(Blocks(3))
