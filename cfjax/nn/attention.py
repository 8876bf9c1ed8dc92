"""One `attend` for every visibility, with the attention kernel of the platform.

xla      dense rectangles, all scores in memory: the fastest on a CPU.
cudnn    dense rectangles on cuDNN's flash kernel.
splash   TPU's flash kernel, one call per visibility (`nn.splash`); "splash_interpreted" runs it on a CPU, slowly.
chunked  dense rectangles, the scores of a few queries at a time: little memory on any platform.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from cfjax.core.errors import UserError
from cfjax.nn.splash import splash_attend, splash_dense
from cfjax.nn.visibility import Span, Visibility

BACKENDS = ("auto", "xla", "cudnn", "splash", "splash_interpreted", "chunked")
CHUNK = 128  # queries whose scores exist at a time


def pick_backend(name: str, dtype: jnp.dtype, platform: str | None = None) -> str:
    """Resolves "auto" once, by platform: splash on TPU, cuDNN for half precision on GPU, XLA elsewhere.

    Args:
      platform: "cpu", "gpu" or "tpu"; None is the one that this process runs on.

    Raises:
      UserError: an unknown name.
    """
    if name not in BACKENDS:
        raise UserError(f"attention={name!r}: use one of {', '.join(BACKENDS)}")
    if name != "auto":
        return name
    platform = platform or jax.default_backend()
    if platform == "gpu" and dtype not in (jnp.bfloat16, jnp.float16):
        return "xla"
    return {"tpu": "splash", "gpu": "cudnn"}.get(platform, "xla")


def dense(
    q_BTNK: jax.Array,
    k_BTNK: jax.Array,
    v_BTNK: jax.Array,
    *,
    key_mask_T: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over all keys, or over those where `key_mask_T` is true; softmax in float32."""
    backend = pick_backend(backend, q_BTNK.dtype)
    if backend.startswith("splash"):
        interpret = backend == "splash_interpreted"
        return splash_dense(q_BTNK, k_BTNK, v_BTNK, key_mask_T=key_mask_T, interpret=interpret)
    if backend == "chunked":
        return _chunked(q_BTNK, k_BTNK, v_BTNK, key_mask_T)
    if backend == "cudnn":
        mask = None if key_mask_T is None else key_mask_T[None, None, None, :]
        return jax.nn.dot_product_attention(q_BTNK, k_BTNK, v_BTNK, mask=mask, implementation="cudnn")
    # Head-major batched matrix products: XLA's CPU backend runs these 1.4 times faster than BTNK einsums.
    q, k, v = (x.swapaxes(1, 2) for x in (q_BTNK, k_BTNK, v_BTNK))
    scores = jnp.matmul(q, k.swapaxes(-1, -2), preferred_element_type=jnp.float32) * (q.shape[-1] ** -0.5)
    if key_mask_T is not None:
        scores = jnp.where(key_mask_T[None, None, None, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.matmul(weights, v).swapaxes(1, 2)


def _chunked(q_BTNK: jax.Array, k: jax.Array, v: jax.Array, mask_T: jax.Array | None) -> jax.Array:
    """`dense` over chunks of queries; the backward pass computes a chunk's scores again."""
    queries = q_BTNK.shape[1]
    padded = jnp.pad(q_BTNK, ((0, 0), (0, -queries % CHUNK), (0, 0), (0, 0)))
    chunks = rearrange(padded, "b (c t) n k -> c b t n k", t=CHUNK)
    one = jax.checkpoint(lambda q: dense(q, k, v, key_mask_T=mask_T, backend="xla"))
    return rearrange(jax.lax.map(one, chunks), "c b t n k -> b (c t) n k")[:, :queries]


@jax.named_scope("attention")
def attend(
    q_BTNK: jax.Array,
    k_BTNK: jax.Array,
    v_BTNK: jax.Array,
    visibility: Visibility,
    *,
    num_frames: int,
    backend: str = "auto",
) -> jax.Array:
    """Attention under a static visibility; costs exactly its rectangles.

    Args:
      q_BTNK, k_BTNK, v_BTNK: frame-major tokens. Queries and keys hold `num_frames` frames, except that
        `teacher_forced` has [clean, noisy] in both and `replay` has [context, noisy] in the keys. The queries may be
        the same part of every frame.
      visibility: who sees whom.
      num_frames: frames of one half.
      backend: one of `BACKENDS`.

    Returns:
      The attended values, shaped like `q_BTNK`.
    """
    backend = pick_backend(backend, q_BTNK.dtype)
    if backend.startswith("splash"):
        interpret = backend == "splash_interpreted"
        return splash_attend(q_BTNK, k_BTNK, v_BTNK, visibility, num_frames=num_frames, interpret=interpret)
    q_frames = num_frames * (2 if visibility.kind == "teacher_forced" else 1)
    k_frames = num_frames * (2 if visibility.kind in ("teacher_forced", "replay") else 1)
    q_tokens, k_tokens = q_BTNK.shape[1] // q_frames, k_BTNK.shape[1] // k_frames
    cut = lambda x, span, tokens: x[:, span[0] * tokens : span[1] * tokens]

    def gather(x: jax.Array, spans: tuple[Span, ...]) -> jax.Array:
        pieces = [cut(x, span, k_tokens) for span in spans]
        return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=1)

    outputs = [
        dense(cut(q_BTNK, r.queries, q_tokens), gather(k_BTNK, r.keys), gather(v_BTNK, r.keys), backend=backend)
        for r in visibility.rectangles(num_frames)
    ]
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)
