"""Rollouts longer than the scores' window: the gradient of the sequential loop, one compile for every length."""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import UserError
from cfjax.flow.path import add_noise, x0_from_flow
from cfjax.models.cache import KVCache, init_cache
from cfjax.models.codec import fit_patch_codec
from cfjax.models.tiny_vae import TinyVAE, TinyVAEConfig
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
STEPS = SelfForcing(SIGMAS, context_noise=0.005)


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
}


@cache
def case(name: str):
    blocks, long, kv_gradient = LAYOUTS[name]
    config = SelfForcing(SIGMAS, SIGMAS[:2], context_noise=0.005, kv_gradient=kv_gradient)
    draws = jax.jit(lambda key: draw_long(key, SHAPE, config, long, blocks))(jax.random.key(3))
    draws["exit_N"] = np.array([1] + [2] * (draws["exit_N"].shape[0] - 1), np.int32)
    weight = normal(9, (BATCH, long.window_frames, *SHAPE[2:]))

    @partial(jax.jit, static_argnames="whole")
    def by_replay(model, count, whole=False):
        """The window and its gradient; `whole`: without a codec and every frame counted."""

        def value(model):
            kv = embed_text(model, text())
            if whole:
                rolled = rollout(*jax.lax.stop_gradient((model, kv)), draws, config, blocks, count=count)
                start = long.start(count, blocks)
                end = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=long.window_frames, axis=1)
                stretch = type(rolled)(
                    end(rolled.x_exit_BFHWC), end(rolled.sigma_exit_BF), rolled.x0_BFHWC, rolled.context
                )
                x0 = replay_exit(model, kv, stretch, config, blocks, start=start)
            else:
                x0 = roll_window(model, kv, {**draws, "count": count}, config, long, blocks, Fading(), gradient=True)
            return jnp.sum(x0 * weight), x0

        return jax.grad(value, has_aux=True)(model)

    return config, draws, weight, by_replay


def sequential(model, draws, config, blocks, long, count, *, early_gradient=False):
    """The reference's loop written out and differentiated directly; [B, frames of `count` blocks, ...]."""
    spans = blocks.spans(long.max_frames)[:count]
    frames = spans[-1][1]
    exits = np.asarray(draws["exit_N"]).tolist()
    kv_text = embed_text(model, text())
    frozen, frozen_kv = jax.lax.stop_gradient((model, kv_text))
    clean = init_cache(CONFIG, BATCH, frames, TOKENS, Blocks(blocks.frames))
    seen, outputs = clean, []
    for b, (start, stop) in enumerate(spans):
        sigmas = config.first_sigmas if b == 0 else config.sigmas
        at, x = jnp.int32(start), draws["noise_BFHWC"][:, start:stop]
        for j in range(exits[b]):
            level = jnp.full((BATCH, stop - start), sigmas[j])
            v, _ = forward_block(frozen, x, level, frozen_kv, clean, at, blocks)
            x = add_noise(x0_from_flow(v, x, level), draws["renoise_BFJHWC"][:, start:stop, j], sigmas[j + 1])
        x = jax.lax.stop_gradient(x)
        level = jnp.full((BATCH, stop - start), sigmas[exits[b]])
        v, own = forward_block(model, x, level, kv_text, seen, at, blocks)
        x0 = x0_from_flow(v, x, level)
        if start < frames - long.window_frames and not early_gradient:
            x0, own = jax.lax.stop_gradient((x0, own))
        outputs.append(x0)
        committed = add_noise(jax.lax.stop_gradient(x0), draws["context_BFHWC"][:, start:stop], config.context_noise)
        clean = jax.lax.stop_gradient(commit_block(frozen, committed, frozen_kv, clean, at, blocks))

        def through(cached, exit_kv, own_part, cut=slice(start, stop)):
            if config.kv_gradient == "detached":
                return own_part
            return cached.at[:, :, cut].set(own_part[:, :, cut] + exit_kv - jax.lax.stop_gradient(exit_kv))

        seen = KVCache(
            through(seen.k_LBFTNK, own.k_LBFTNK, clean.k_LBFTNK),
            through(seen.v_LBFTNK, own.v_LBFTNK, clean.v_LBFTNK),
            clean.frame_F,
        )
    return jnp.concatenate(outputs, axis=1)


def worst(a, b) -> float:
    """Largest difference of two gradients, over the largest number in the second."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    scale = max(float(jnp.max(jnp.abs(y))) for _, y in pairs)
    return max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs) / scale


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_windows_gradient_is_the_sequential_loops(name):
    """For a rollout between the shortest and the longest; the left-out frames' own gradient is cut in both."""
    blocks, long, _ = LAYOUTS[name]
    config, draws, weight, by_replay = case(name)
    count = long.counts(blocks)[0] + 1
    start, left_out = int(long.start(jnp.int32(count), blocks)), blocks.spans(long.window_frames)[0][1]
    codec = Fading()

    def by_loop(model):
        video = sequential(model, draws, config, blocks, long, count)
        end = video[:, start:].at[:, :left_out].set(jax.lax.stop_gradient(video[:, start : start + left_out]))
        first = codec.encode(codec.decode(jax.lax.stop_gradient(video[:, : start + 1]))[:, -1:])
        window = jnp.concatenate([first, end[:, 1:]], axis=1)
        return jnp.sum(window * weight), window

    wanted, window = jax.jit(jax.grad(by_loop, has_aux=True))(tiny())
    gradient, x0 = by_replay(tiny(), jnp.int32(count))
    print(f"{name}: window {relative(x0, window):.1e}, gradient {worst(gradient, wanted):.1e}")
    assert relative(x0, window) < 2e-6
    assert worst(gradient, wanted) < 2e-6


def test_no_gradient_reaches_the_blocks_before_the_window():
    """What the loop hands back when every block may take part is something else: the test above can tell."""
    name = "attention_window"
    blocks, long, _ = LAYOUTS[name]
    config, draws, weight, by_replay = case(name)
    count = long.counts(blocks)[0] + 1

    @partial(jax.jit, static_argnames="early_gradient")
    def by_loop(model, early_gradient):
        def value(model):
            video = sequential(model, draws, config, blocks, long, count, early_gradient=early_gradient)
            return jnp.sum(video[:, -long.window_frames :] * weight)

        return jax.grad(value)(model)

    gradient, _ = by_replay(tiny(), jnp.int32(count), whole=True)
    assert worst(gradient, by_loop(tiny(), False)) < 2e-6
    assert worst(gradient, by_loop(tiny(), True)) > 1e-3


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_compile_whatever_the_number_of_blocks(name):
    blocks, long, _ = LAYOUTS[name]
    _, _, _, by_replay = case(name)
    by_replay.clear_cache()
    least, most = long.counts(blocks)
    windows = [by_replay(tiny(), jnp.int32(count))[1] for count in range(least, most + 1)]
    assert by_replay._cache_size() == 1
    assert all(relative(a, windows[0]) > 1e-2 for a in windows[1:])
