"""Frozen configs of networks, codecs and encoders from their JSON records, and templates to restore them into."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from cfjax.core.limits import AXIS, LAYERS
from cfjax.core.precision import Policy
from cfjax.core.schema import EPS, SIZE, Rule, checked, flag, number, one_of, row, several, table, text, whole
from cfjax.models.actions import FORMS, ActionConfig
from cfjax.models.clip import CLIP_RULE, CLIPConfig
from cfjax.models.tiny_vae import TinyVAEConfig
from cfjax.models.umt5 import UMT5_RULE, UMT5Config
from cfjax.models.vae import VAEConfig
from cfjax.models.wan import WanConfig

_DTYPE = one_of("float32", "bfloat16")
_PRECISION = {"precision": table({"compute": _DTYPE, "island": _DTYPE}, closed=True)}
_ACTIONS = table(
    {"form": one_of(*FORMS)},
    dict.fromkeys(("keys", "window", "frames", "width"), whole(1, 4096)),
    closed=True,
)
# What a run's record says of each network: its config's fields, and no others.
SIZES: dict[type, Rule] = {
    WanConfig: table(
        dict.fromkeys(("dim", "ffn_dim", "num_heads", "in_dim", "out_dim", "text_dim", "freq_dim"), SIZE)
        | {"num_layers": whole(1, LAYERS), "patch": row(SIZE, SIZE), "eps": EPS},
        {"remat": one_of("none", "full", "dots"), "attention": text(), "image_dim": whole(0, AXIS)}
        | {"actions": _ACTIONS, **_PRECISION},
        closed=True,
    ),
    VAEConfig: table(
        {"base_dim": SIZE, "z_dim": SIZE},
        {
            "decoder_base_dim": whole(0, AXIS),
            "residual": flag,
            "patch": whole(1, 16),
            "multipliers": several(SIZE, 2, 8),
            "res_blocks": whole(1, LAYERS),
            "temporal_downsample": several(flag, 1, 7),
            "latents_mean": several(number(-1000, 1000), 1),
            "latents_std": several(number(0, 1000, above=True), 1),
            **_PRECISION,
        },
        closed=True,
    ),
    TinyVAEConfig: table(
        {"latent_channels": SIZE, "encoder_width": SIZE, "decoder_widths": row(SIZE, SIZE, SIZE, SIZE)},
        {"time_pool": row(SIZE, SIZE, SIZE), "time_grow": row(SIZE, SIZE, SIZE), "patch": whole(1, 2), **_PRECISION},
        closed=True,
    ),
    UMT5Config: UMT5_RULE,
    CLIPConfig: CLIP_RULE,
}
C = TypeVar("C")
M = TypeVar("M")


def config_from_record(cls: type[C], values: dict[str, Any], where: object = "the run's record") -> C:
    """A frozen config from `dataclasses.asdict` as JSON left it: lists are tuples, `precision` is a policy.

    Args:
      where: whose record it is, for the message.

    Raises:
      UserError: a key is missing, unknown or has a value that it cannot have (`SIZES`).
    """
    checked(SIZES[cls], values, f"{where}: {cls.__name__}")

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value

    values = {key: tuples(value) for key, value in values.items()}
    if isinstance(values.get("precision"), dict):
        values["precision"] = Policy.from_record(values["precision"])
    if isinstance(values.get("actions"), dict):
        values["actions"] = ActionConfig(**values["actions"])
    return cls(**values)


def placed_template(make: Callable[[], M], dtype: str = "") -> M:
    """The structure that `make` builds with shapes in place of arrays, on the first device: what `load_role` takes.

    Args:
      dtype: of every leaf ("" keeps each one's own).
    """
    place = SingleDeviceSharding(jax.devices()[0])

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype) if dtype else x.dtype, sharding=place)

    return jax.tree.map(leaf, jax.eval_shape(make))
