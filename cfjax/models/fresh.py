"""Networks that start from weights without some of their parameters, which are fresh then: those of actions."""

from typing import Any

import jax

from cfjax.core.tree import check_fit, from_named, match, named_leaves
from cfjax.models.wan import Wan, WanConfig, make_wan

# Parameters that pretrained weights may lack.
FRESH: tuple[tuple[str, bool], ...] = ((r"(blocks/action_attn|action_embedding)/.*", True), (r".*", False))


def with_actions(network: Wan, config: WanConfig, key: jax.Array) -> Wan:
    """The network with the parameters of `config.actions` beside its own; their output is zero.

    Raises:
      UserError: its weights are not those of `config` but for these.
    """
    template = make_wan(config, key)
    leaves: dict[str, Any] = named_leaves(template)
    fresh = match(FRESH, leaves)
    own = named_leaves(network)
    check_fit({name: leaf for name, leaf in leaves.items() if not fresh[name]}, own)
    result: Wan = from_named(template, {name: leaf if fresh[name] else own[name] for name, leaf in leaves.items()})
    return result
