"""Codecs: pixels to latents and back, whole or as a stream.

`Codec` is the interface of every video autoencoder. `PatchCodec` is the toy's: a fixed linear projection of 8x8 patches
on their principal components, 1:1 in time, fitted in a second and easy to test.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from safetensors import SafetensorError, safe_open

from cfjax.core.errors import UserError
from cfjax.core.paths import write_atomically
from cfjax.core.schema import parse_json
from cfjax.core.tensor_files import tensor_bytes


class Codec(Protocol):
    """A video autoencoder. `stride` is (time, height, width) in pixels per latent; videos are float32 in [-1, 1]."""

    @property
    def latent_channels(self) -> int: ...

    @property
    def stride(self) -> tuple[int, int, int]: ...

    def encode(self, video_BPHWC: jax.Array) -> jax.Array:
        """Normalised latents_BFHWC of a whole clip."""
        ...

    def decode(self, latents_BFHWC: jax.Array) -> jax.Array:
        """video_BPHWC of a whole latent clip."""
        ...

    def init_state(self, batch: int) -> Any:
        """The state of `decode_step` before the first frame."""
        ...

    def decode_step(self, latents_BFHWC: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """Decodes the next latent frames of a stream; steps over all frames together equal `decode`."""
        ...

    def describe(self) -> dict[str, Any]:
        """The codec's description in a dataset's manifest (JSON-able); equal for equal weights only."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PatchCodec:
    """Linear codec of px-by-px patches: z = (patch - mean) @ basis / scale.

    mean [px*px*3], basis [px*px*3, C] orthonormal columns, scale [C]. Scale is std_c**0.5 times a constant that makes
    the overall latent variance 1: *partial* whitening. Full whitening would blow up the faintest components, which
    hold edge detail of little visual weight, until the denoiser spends as much of its loss on them as on position and
    colour; no whitening would drown them in noise at nearly every sigma. The square root is half way in log variance.
    """

    mean: jax.Array
    basis: jax.Array
    scale: jax.Array

    @property
    def px(self) -> int:
        """Side of a patch in pixels."""
        return round((self.basis.shape[0] / 3) ** 0.5)

    @property
    def latent_channels(self) -> int:
        return self.basis.shape[1]

    @property
    def stride(self) -> tuple[int, int, int]:
        return (1, self.px, self.px)

    def encode(self, video_BPHWC: jax.Array) -> jax.Array:
        """latents_BFHWC float32, one latent frame per pixel frame. Raises UserError if px does not divide H and W."""
        if video_BPHWC.ndim != 5 or video_BPHWC.shape[-1] != 3 or any(n % self.px for n in video_BPHWC.shape[2:4]):
            raise UserError(f"codec: video {video_BPHWC.shape} needs [B,P,H,W,3], H and W multiples of {self.px}")
        patches = rearrange(video_BPHWC, "b p (h y) (w x) c -> b p h w (y x c)", y=self.px, x=self.px)
        return jnp.einsum("bphwd,dc->bphwc", patches - self.mean[None, None, None, None], self.basis / self.scale[None])

    def decode(self, latents_BFHWC: jax.Array) -> jax.Array:
        """video_BPHWC float32; not clipped. Raises UserError on another number of channels."""
        if latents_BFHWC.ndim != 5 or latents_BFHWC.shape[-1] != self.latent_channels:
            raise UserError(f"patch codec: latents {latents_BFHWC.shape} need [B,F,H,W,{self.latent_channels}]")
        patches = jnp.einsum("bfhwc,dc->bfhwd", latents_BFHWC, self.basis * self.scale[None])
        patches = patches + self.mean[None, None, None, None]
        return rearrange(patches, "b f h w (y x c) -> b f (h y) (w x) c", y=self.px, x=self.px)

    def init_state(self, batch: int) -> jax.Array:
        """int32 [batch]: latent frames decoded so far."""
        return jnp.zeros((batch,), jnp.int32)

    def init_encode_state(self, batch: int) -> jax.Array:
        """int32 [batch]: pixel frames encoded so far."""
        return jnp.zeros((batch,), jnp.int32)

    def encode_step(self, video_BPHWC: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Frames are independent here, as in `decode_step`."""
        return self.encode(video_BPHWC), state + video_BPHWC.shape[1]

    def decode_step(self, latents_BFHWC: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Frames are independent here: the state only counts them."""
        return self.decode(latents_BFHWC), state + latents_BFHWC.shape[1]

    def describe(self) -> dict[str, Any]:
        """The codec's description in a manifest (JSON-able); its fingerprint differs between two fits."""
        weights = b"".join(np.asarray(array, np.float32).tobytes() for array in (self.mean, self.basis, self.scale))
        return {
            "name": "patch",
            "px": self.px,
            "channels": self.latent_channels,
            "stride": list(self.stride),
            "fingerprint": hashlib.sha256(weights).hexdigest()[:16],
        }

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, atomically; its header carries `describe()` as JSON."""
        tensors = {name: np.asarray(getattr(self, name), np.float32) for name in ("mean", "basis", "scale")}
        write_atomically(path, tensor_bytes(tensors, {"codec": json.dumps(self.describe())}))

    @classmethod
    def load(cls, path: str | Path) -> "PatchCodec":
        """Reads what `save` wrote. Raises UserError if the file is missing, broken or of another codec."""
        try:
            with safe_open(str(path), framework="numpy") as file:
                described = parse_json((file.metadata() or {}).get("codec", "{}"))
                if not isinstance(described, dict) or described.get("name") != "patch":
                    raise UserError(f"{path}: not a patch codec; fit one with fit_patch_codec(...).save(path)")
                arrays = {name: file.get_tensor(name) for name in ("mean", "basis", "scale")}
        except UserError:
            raise
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot read the codec ({error}); write it again") from error
        mean, basis, scale = arrays.values()
        if basis.ndim != 2 or mean.shape != basis.shape[:1] or scale.shape != basis.shape[1:] or not basis.size:
            raise UserError(
                f"{path}: mean {mean.shape}, basis {basis.shape} and scale {scale.shape} do not go together"
            )
        codec = cls(**{name: jnp.asarray(array) for name, array in arrays.items()})
        if codec.describe() != described:
            raise UserError(f"{path}: header says {described}, tensors say {codec.describe()}; write it again")
        return codec


def abstract_patch_codec(*, px: int = 8, channels: int = 16) -> PatchCodec:
    """A patch codec's shapes."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    return PatchCodec(mean=shape(px * px * 3), basis=shape(px * px * 3, channels), scale=shape(channels))  # type: ignore[arg-type]


def fit_patch_codec(videos: Iterable[np.ndarray], *, px: int = 8, channels: int = 16) -> PatchCodec:
    """Principal components of the patches of these clips (float32 [P, H, W, 3]); about 500 clips suffice.

    Deterministic: components in descending variance, each signed so that its largest weight is positive.
    """
    width = px * px * 3
    if not 0 < channels <= width:
        raise UserError(f"codec.channels={channels}: use 1 to {width} for {px}x{px} patches")
    count, total, moment = 0, np.zeros(width), np.zeros((width, width))
    remaining = iter(videos)
    while clips := list(itertools.islice(remaining, 64)):
        patches = np.concatenate([rearrange(v, "p (h y) (w x) c -> (p h w) (y x c)", y=px, x=px) for v in clips])
        count += len(patches)
        total += patches.sum(axis=0, dtype=np.float64)
        moment += patches.T @ patches
    if count < width:
        raise UserError(f"patch codec: {count} patches cannot fit {width} dimensions; give more clips")
    mean = total / count
    variances, vectors = np.linalg.eigh(moment / count - np.outer(mean, mean))
    basis = vectors[:, ::-1][:, :channels]
    basis = basis * np.sign(basis[np.abs(basis).argmax(axis=0), np.arange(channels)])
    std = np.sqrt(np.maximum(variances[::-1][:channels], 1e-12))
    # var(z_c) = std_c^2 / scale_c^2 = std_c / mean(std), whose mean over channels is 1
    scale = np.sqrt(std * std.mean())
    return PatchCodec(*(jnp.asarray(array, jnp.float32) for array in (mean, basis, scale)))
