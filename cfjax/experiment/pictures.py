"""A picture that videos begin with, of a call from Python: checked, encoded, and where the network takes it."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from cfjax.core.errors import UserError
from cfjax.experiment.checks import video_of
from cfjax.models.experts import Conditioned, picture_condition, takes_picture, with_picture
from cfjax.models.wan import Wan, WanConfig
from cfjax.worlds.wan import load_image_encoder
from cfjax.worlds.world import World


def check_picture(name: str, config: WanConfig, image: Any, given: Any) -> None:
    """Raises UserError unless a run has a picture where its network takes one, and no other beginning beside it."""
    if takes_picture(config):
        if image is None:
            raise UserError(f"run={name!r} is image to video: it needs a picture; give image=")
        if given is not None:
            raise UserError(f"given_BFHWC: run={name!r} is image to video: it begins with image= alone; leave it out")
    elif image is not None and given is not None:
        raise UserError("image and given_BFHWC are both given; a video continues one of them")


def picture_of(image: Any, world: World, height: int, width: int, batch: int) -> np.ndarray:
    """picture_BHWC, float32 in [-1, 1], B = 1 or `batch`, of [H, W, 3] or [B, H, W, 3], uint8 or float.

    Args:
      height, width: of the videos, in pixels.

    Raises:
      UserError: another shape or range.
    """
    array = np.asarray(image)
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[1:] != (height, width, 3) or len(array) not in (1, batch):
        raise UserError(
            f"image: {list(np.shape(image))}; needs [{height}, {width}, 3], the size of the videos (height, width), or"
            f" one for each of {batch}"
        )
    return video_of(array[:, None], world.codec)[:, 0]


def encoded_start(picture_BHWC: np.ndarray, world: World) -> np.ndarray:
    """latents_BFHWC of a picture as the first latent frame."""
    return np.asarray(world.open_encoder()(jnp.asarray(picture_BHWC[:, None])), np.float32)


def conditioned(model: Wan, world: World, picture_BHWC: np.ndarray, latent_frames: int) -> Conditioned:
    """The network with a picture beside the latents of a video so long, and CLIP's features where it takes some.

    Raises:
      UserError: the world has no CLIP, or none of this network's width.
    """
    pixels = 1 + world.codec.stride[0] * (latent_frames - 1)
    still = np.concatenate([picture_BHWC[:, None], np.zeros_like(picture_BHWC)[:, None].repeat(pixels - 1, 1)], 1)
    condition = picture_condition(world.open_encoder()(jnp.asarray(still)))
    features = None
    if width := model.config.image_dim:
        features = load_image_encoder(world.folder, width)(jnp.asarray(picture_BHWC))
    made = with_picture(model, condition, features)
    assert isinstance(made, Conditioned)
    return made
