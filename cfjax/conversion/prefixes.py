"""What others put around a network's names: wrappers' parts, prefixes, and tensors that are no weights.

A network is found by `ANCHORS`, names without a layer's number that its every file has: what stands before one is the
prefix, whatever it says (`model.diffusion_model.`, `module.`, `pipe.dit.` ...), and what does not begin with it belongs
to something else. Who wrote them: FSDP and activation checkpointing (torch, `_fsdp_wrapped_module`), torch.compile
(`_orig_mod`), torch's `DistributedDataParallel` (`module.`), ComfyUI (`model.diffusion_model.`, `comfy/sd.py`), Kijai's
and lightx2v's files (`diffusion_model.`), DiffSynth-Studio's trainers (`pipe.dit.`), the reference's (`generator`,
`model.`).
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from cfjax.conversion.weight_file import Arrays
from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray

PREFIX = "model."  # of the reference's checkpoints
# What FSDP, activation checkpointing and torch.compile put into names, anywhere.
WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"}
# Of CLIP (transformers'), the transformer and CLIP (the original's), umT5 (the original's, transformers' two), the VAE
# (the original's, diffusers') and the tiny VAE. The first that a name ends with is its own.
ANCHORS = (
    "embeddings.patch_embedding.weight",
    "patch_embedding.weight",
    "token_embedding.weight",
    "shared.weight",
    "encoder.embed_tokens.weight",
    "encoder.conv1.weight",
    "encoder.conv_in.weight",
    "encoder.0.weight",
)
# Tensors at the top of a file that are about all of its networks: ComfyUI's mark of scaled float8, umT5's tokenizer.
MARKER, SPIECE = "scaled_fp8", "spiece_model"
# Words around a state dict that say nothing of its role.
PLAIN = (
    *("generator", "student", "model", "transformer", "dit", "net", "unet", "module", "diffusion_model"),
    *("online_model", "state_dict", "model_state_dict", "generator_state_dict"),
    *("pipe", "app", "state", "weights", "params"),
)
CRITICS = {"critic", "fake_score", "fake_model", "fake_score_model", "guidance_model"}
FROZEN = {"teacher", "real_score", "real_model", "real_score_model", "discriminator"}
AVERAGED = re.compile(r"(.*_)?(ema|shadow|averaged?)(_.*)?")
# Last parts of names: buffers that are computed (RoPE's tables, a scheduler's), counters and random states of trainers.
NO_WEIGHTS = re.compile(
    r"_extra_state|.*freqs.*|inv_freq|rope\w*|(cos|sin)_cached|sigmas|timesteps|.*_step_list|n_averaged|num_updates|initted"
    r"|num_batches_tracked|(global_)?steps?|epoch|iteration|decay|loss_scale|.*rng_state.*|.*random_state.*"
)
ROTARY = {"rope", "rotary_emb", "rotary", "rope_embedder"}  # modules that compute


def unwrapped(arrays: Mapping[str, LazyArray], path: Path) -> Arrays:
    """Arrays by their names without wrappers' parts (`WRAPPERS`, at any depth).

    Raises:
      UserError: two names become one.
    """
    out: Arrays = {}
    origin: dict[str, str] = {}
    for name, array in arrays.items():
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if bare in out:
            raise UserError(f"{path}: {origin[bare]} and {name} are both {bare} without their wrappers' names")
        out[bare], origin[bare] = array, name
    return out


def prefixes(names: Iterable[str]) -> list[str]:
    """What stands before the anchors of networks, the longest first; [] where there is none."""
    found = set()
    for name in names:
        anchor = next((one for one in ANCHORS if name == one or name.endswith(f".{one}")), None)
        if anchor is not None:
            found.add(name.removesuffix(anchor))
    return sorted(found, key=lambda prefix: (-len(prefix), prefix))


def split(arrays: Mapping[str, LazyArray], path: Path) -> tuple[dict[str, Arrays], list[str]]:
    """The networks of one state dict by their prefixes, their names without them; and the names of all else.

    A state dict without a network that is known comes back whole, less the words of `PLAIN` before every name.

    Raises:
      UserError: two names become one.
    """
    bare = unwrapped(arrays, path)
    found = prefixes(bare)
    if not found:
        return {"": _less_common(bare)}, []
    out: dict[str, Arrays] = {prefix: {} for prefix in found}
    left = []
    for name, array in bare.items():
        prefix = next((prefix for prefix in found if name.startswith(prefix)), None)
        if prefix is not None:
            out[prefix][name.removeprefix(prefix)] = array
        elif name in (MARKER, SPIECE):
            for one in out.values():
                one[name] = array
        else:
            left.append(name)
    return out, left


def _less_common(arrays: Arrays) -> Arrays:
    """The arrays less the words that all of their names begin with, where those say nothing."""
    while arrays:
        first = {name.partition(".")[0] for name in arrays}
        if len(first) > 1 or not first <= {*PLAIN} or not all("." in name for name in arrays):
            break
        arrays = {name.partition(".")[2]: array for name, array in arrays.items()}
    return arrays


def entry_name(key: str, prefix: str) -> str:
    """What an entry of a file is called: the words of its key and prefix that say something, else the first one."""
    words = [word for word in f"{key}.{prefix}".split(".") if word]
    telling = [word for word in words if word not in PLAIN]
    if telling:
        return ".".join(telling)
    return "generator" if "generator" in words else key.partition(".")[0]


def is_weight(array: LazyArray) -> bool:
    """Whether its numbers could be weights: real, and not whole."""
    return array.dtype.kind == "f" or array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")


def is_extra(name: str, array: LazyArray) -> bool:
    """Whether a tensor inside a state dict that its network does not have is computed or a trainer's, no weight."""
    *parts, last = name.split(".")
    named = NO_WEIGHTS.fullmatch(last) or not ROTARY.isdisjoint(parts)
    return bool(named) or not is_weight(array) or not array.shape


def summary(names: Iterable[str]) -> list[str]:
    """Names as a message gives them: those under one first word together."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    return [some[0] if len(some) == 1 else f"{first}.* ({len(some)} tensors)" for first, some in groups.items()]
