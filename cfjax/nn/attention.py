"""One `attend` for every visibility, with the attention kernel of the platform.

xla       dense rectangles, all scores in memory.
cudnn     dense rectangles on cuDNN's flash kernel.
splash    TPU's flash kernel, one call per visibility (`nn.splash`); "splash_interpreted" runs it on a CPU, slowly.
chunked   dense rectangles, the scores of a few queries at a time: little memory on any platform.
per_head  dense rectangles, the scores of a few queries of one head at a time, which stay in a CPU core's cache: the
          fastest on a CPU. Small rectangles, and those of a sharded program, are xla's.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from cfjax.core.errors import UserError
from cfjax.core.sharding import active_mesh
from cfjax.nn.splash import splash_attend, splash_dense
from cfjax.nn.visibility import Span, Visibility

BACKENDS = ("auto", "xla", "cudnn", "splash", "splash_interpreted", "chunked", "per_head")
CHUNK = 128  # queries whose scores exist at a time
HEAD_SCORES = 2**20  # the most scores of one head at a time: four megabytes
SMALL = 2**20  # scores of all heads that are computed at once: a loop costs more


def pick_backend(name: str, dtype: jnp.dtype, platform: str | None = None) -> str:
    """Resolves "auto" once, by platform: splash on TPU; cuDNN for half precision on GPU, else XLA; per_head on CPU.

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
    return {"tpu": "splash", "gpu": "cudnn", "cpu": "per_head"}.get(platform, "xla")


def dense(
    q_BTNK: jax.Array,
    k_BTNK: jax.Array,
    v_BTNK: jax.Array,
    *,
    key_mask_T: jax.Array | None = None,
    key_bias_T: jax.Array | None = None,
    num_keys: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """softmax(q k^T / sqrt(K)) v over all keys, or some of them; softmax in float32.

    Args:
      key_mask_T: bool; keys where it is false are not seen. Or a mask for every head, [B, N, T], which "xla" and
        "chunked" take; the other backends leave it to "chunked".
      key_bias_T: instead of a mask: float32, added to the logits of each key; -inf is not seen. (Splash has no such
        bias: "chunked" computes it there.)
      num_keys: instead of a mask: only so many first keys are seen (traced, 1 or more). The flash kernels compute no
        tile behind them; the other backends mask them.
    """
    backend = pick_backend(backend, q_BTNK.dtype)
    if key_mask_T is not None and key_mask_T.ndim == 3 and backend != "xla":
        backend = "chunked"
    if backend == "cudnn":
        lengths = None if num_keys is None else jnp.full(q_BTNK.shape[:1], num_keys, jnp.int32)
        # cuDNN takes no mask that is broadcast over the queries (jax-ml/jax#28974).
        rows = (1, 1, q_BTNK.shape[1], k_BTNK.shape[1])
        mask = None if key_mask_T is None else jnp.broadcast_to(key_mask_T, rows)
        bias = None if key_bias_T is None else jnp.broadcast_to(_finite(key_bias_T).astype(q_BTNK.dtype), rows)
        return jax.nn.dot_product_attention(
            q_BTNK, k_BTNK, v_BTNK, bias=bias, mask=mask, key_value_seq_lengths=lengths, implementation="cudnn"
        )
    if num_keys is not None:
        key_mask_T = jnp.arange(k_BTNK.shape[1]) < num_keys
    if key_bias_T is not None:
        key_mask_T, backend = _finite(key_bias_T), "chunked" if backend.startswith("splash") else backend
    if backend.startswith("splash"):
        interpret = backend == "splash_interpreted"
        return splash_dense(q_BTNK, k_BTNK, v_BTNK, key_mask_T=key_mask_T, interpret=interpret)
    # Head-major matrix products: XLA's CPU backend runs these 1.4 times faster than BTNK einsums.
    q, k, v = (x.swapaxes(1, 2) for x in (q_BTNK, k_BTNK, v_BTNK))
    if backend == "chunked":
        out = _chunked(q, k, v, key_mask_T, CHUNK)
    elif backend == "per_head" and q.size // q.shape[-1] * k.shape[2] > SMALL and active_mesh() is None:
        out = _per_head(q, k, v, key_mask_T)
    else:
        out = _scored(q, k, v, key_mask_T)
    return out.swapaxes(1, 2)


def _finite(bias_T: jax.Array) -> jax.Array:
    """A bias whose -inf is a large number, which no arithmetic turns into NaN."""
    return jnp.maximum(bias_T, -1e30)


@jax.custom_vjp
def _per_head(q_BNTK: jax.Array, k: jax.Array, v: jax.Array, mask_T: jax.Array | None) -> jax.Array:
    """`_scored` for some queries of one head at a time.

    XLA's CPU backend multiplies bfloat16 natively only if the second factor is not transposed, and else widens it, far
    ahead of the loop: all heads, or all of the cache that they come from. It cannot where the loop gets their bits.
    """
    if q_BNTK.dtype != jnp.bfloat16:
        return _each_head(lambda q, k, v: _chunked(q, k, v, mask_T, _queries(k.shape[0])), q_BNTK, k, v)

    def one_head(*bits: jax.Array) -> jax.Array:
        q, k_KT, v = (jax.lax.bitcast_convert_type(x, jnp.bfloat16) for x in bits)
        return _chunked(q, k_KT, v, mask_T, _queries(v.shape[0]), transposed=True)

    bits = [jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (q_BNTK, k.swapaxes(2, 3), v)]
    return _each_head(one_head, *bits)


def _each_head(one_head: Callable[..., jax.Array], *heads_BN: jax.Array) -> jax.Array:
    out = jax.lax.map(lambda qkv: one_head(*qkv), tuple(x.reshape(-1, *x.shape[2:]) for x in heads_BN))
    return out.reshape(*heads_BN[0].shape[:2], *out.shape[1:])


def _queries(keys: int) -> int:
    """How many queries at a time, for scores that stay in a CPU core's cache."""
    return max(CHUNK // 2, min(2 * CHUNK, HEAD_SCORES // keys))


def _per_head_forward(*qkvm: Any) -> tuple[jax.Array, Any]:
    return _per_head(*qkvm), qkvm


def _per_head_backward(qkvm: Any, grad: jax.Array) -> Any:
    *qkv, mask_T = qkvm
    one_head = lambda q, k, v: _chunked(q, k, v, mask_T, _queries(k.shape[0]))
    return *jax.vjp(lambda *qkv: _each_head(one_head, *qkv), *qkv)[1](grad), None


_per_head.defvjp(_per_head_forward, _per_head_backward)


def _scored(
    q: jax.Array, k: jax.Array, v: jax.Array, mask_T: jax.Array | None, *, transposed: bool = False
) -> jax.Array:
    """Attention [..., T, K] with all its scores in memory; `transposed`: k is [..., K, T]; `mask_T`: or
    a bias, or a mask [B, N, T].
    """
    k_KT = k if transposed else k.swapaxes(-1, -2)
    scores = jnp.matmul(q, k_KT, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if mask_T is not None:
        row = mask_T[:, :, None] if mask_T.ndim == 3 else mask_T.reshape((1,) * (scores.ndim - 1) + (-1,))
        unseen = jnp.finfo(jnp.float32).min
        scores = jnp.where(row, scores, unseen) if row.dtype == jnp.bool_ else scores + row
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    # XLA's CPU backend multiplies bfloat16 as it is only where float32 is asked for, and widens it first elsewhere.
    return jnp.matmul(weights, v, preferred_element_type=jnp.float32).astype(v.dtype)


def _chunked(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask_T: jax.Array | None,
    size: int,
    *,
    transposed: bool = False,
) -> jax.Array:
    """`_scored` over chunks of `size` queries; the backward pass computes a chunk's scores again."""
    queries = q.shape[-2]
    chunks = -(-queries // size)
    size = -(-queries // chunks)  # as even as they come: less padding
    widths = [(0, 0)] * (q.ndim - 2) + [(0, chunks * size - queries), (0, 0)]
    padded = rearrange(jnp.pad(q, widths), "... (c t) k -> c ... t k", t=size)
    one = jax.checkpoint(lambda q: _scored(q, k, v, mask_T, transposed=transposed))
    return rearrange(jax.lax.map(one, padded), "c ... t k -> ... (c t) k")[..., :queries, :]


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
