"""Memory policies by name: `--config.memory=infinity_rope`, or with settings, `"deep_sink(window=16, codec=int8)"`."""

import hashlib
import re
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, TypeVar

from cfjax.core.errors import UserError
from cfjax.memory.bank import MemoryBank
from cfjax.memory.codecs import Codec
from cfjax.memory.compression import DeepForcing
from cfjax.memory.heads import DummyForcing, ForcingKV
from cfjax.memory.policies import ContextRecompute, DeepSink, EmaSink, MemoryTokens, RollingSink, SlotRelative
from cfjax.memory.profile import HeadLabels, HeadTable, read_heads, read_labels
from cfjax.memory.pyramid import PyramidHeads
from cfjax.memory.rolling import RollingForcing
from cfjax.memory.slots import Everything, Memory
from cfjax.nn.visibility import Blocks


@dataclass(frozen=True)
class Named:
    """A policy with its published settings, and a line for documentation."""

    policy: Memory
    about: str


POLICIES = {
    "window": Named(
        Memory(21, 3), "a sliding window with a sink; positions are frame indices (LongLive, Self-Forcing)"
    ),
    "infinity_rope": Named(SlotRelative(6, 1), "positions are slot numbers, a window of 6 (Infinity-RoPE)"),
    "longlive_infinity": Named(SlotRelative(12, 3), "positions are slot numbers, a window of 12 (LongLive, infinity)"),
    "deep_sink": Named(DeepSink(), "a sink of 10 frames that moves along (Deep Forcing, without its compression)"),
    "deep_forcing": Named(
        DeepForcing(), "the same, and of older frames the tokens that queries look at (Deep Forcing)"
    ),
    "ema_sink": Named(EmaSink(), "what leaves is averaged into the sink (Reward Forcing)"),
    "memory_tokens": Named(MemoryTokens(), "two moving averages of what leaves (MemRoPE)"),
    "memory_bank": Named(MemoryBank(), "recorded frames that fit the prompt, beside a window (MemFlow)"),
    "context_recompute": Named(ContextRecompute(), "latents stay; their keys are made again for every block (Krea)"),
    "rolling_forcing": Named(RollingForcing(), "the first block next to the newest; of sampler.kind='rolling'"),
    "rolling_sink": Named(RollingSink(), "the first frames over and over, the newest block (Rolling Sink)"),
    "dummy_forcing": Named(DummyForcing(), "heads see the sink, the newest frames or the newest one (Dummy Forcing)"),
    "forcing_kv": Named(ForcingKV(), "static heads see the newest frame, dynamic ones what changed too (Forcing-KV)"),
    "pyramid": Named(PyramidHeads(), "anchor, wave and veil heads, each with frames of its own (Pyramid Forcing)"),
}
FULL = "full"  # every frame: no policy
CALL = re.compile(r"\s*(\w+)\s*(?:\((.*)\))?\s*", re.DOTALL)


def parse_memory(text: str) -> Memory | None:
    """The policy that a text such as `ema_sink` or `ema_sink(window=12, alpha=0.99, codec=int8)` names.

    Returns:
      None for "full": no policy.

    Raises:
      UserError: no such policy or setting, or a value that it cannot have.
    """
    found = CALL.fullmatch(text)
    name, inside = found.groups() if found else (text, None)
    if name == FULL and not inside:
        return None
    if not found or name not in POLICIES:
        near = get_close_matches(name, [*POLICIES, FULL], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"memory={text!r}: use {FULL}, {', '.join(POLICIES)}, or NAME(setting=value, ...){hint}")
    policy = POLICIES[name].policy
    known = {f.name: getattr(policy, f.name) for f in fields(policy)}
    changes = dict[str, Any]()
    for part in filter(str.strip, (inside or "").split(",")):
        key, equals, value = (x.strip() for x in part.partition("="))
        if not equals or key not in known:
            raise UserError(f"memory={text!r}: {part.strip()!r} is no setting of {name}; it has {', '.join(known)}")
        changes[key] = _setting(value, known[key], f"memory={text!r}: {key}")
    return replace(policy, **changes)


def with_memory(blocks: Blocks, text: str, *, window: int = -1, sink: int = -1) -> Blocks:
    """A block layout with the memory that a text names; `window` and `sink` of 0 or more replace the policy's.

    "full" and a plain "window" are the layout's own, which has programs of its own for them.

    Raises:
      UserError: see `parse_memory`; or they do not fit the layout.
    """
    plain = replace(blocks, window=0, sink=0, memory=None)
    memory = parse_memory(text)
    given = {name: value for name, value in (("window", window), ("sink", sink)) if value >= 0}
    if memory is None:
        if given:
            raise UserError(f"{', '.join(given)}: memory={FULL!r} holds all frames; leave them out")
        return plain
    memory = replace(memory, window=given.get("window", memory.window), sink=given.get("sink", memory.sink))
    if memory == Memory(memory.window, memory.sink):
        return replace(plain, window=memory.window, sink=memory.sink)
    memory.slots(plain)
    return replace(plain, memory=memory)


def blocks_record(blocks: Blocks) -> dict[str, Any]:
    """A block layout as plain values; a memory policy as its text, and no such key without one.

    With a table of heads also a checksum of what that says, as its file may be another one later.
    """
    record = {f.name: getattr(blocks, f.name) for f in fields(blocks) if f.name != "memory"}
    if blocks.memory is None:
        return record
    record |= {"memory": memory_name(blocks.memory)}
    profile = getattr(blocks.memory, "profile", None)
    return (
        record if profile is None else record | {"heads": hashlib.sha256(repr(profile.table_LN).encode()).hexdigest()}
    )


def _setting(value: str, like: Any, where: str) -> Any:
    """A setting of the same type; a codec by its name, a table of heads by its file."""
    if isinstance(like, Codec):
        return Codec(value.strip("'\""))  # type: ignore[arg-type]
    if isinstance(like, HeadTable | HeadLabels):
        read = read_heads if isinstance(like, HeadTable) else read_labels
        return read(value.strip("'\""))
    return _number(value, like, where)


T = TypeVar("T", bool, int, float)


def _number(value: str, like: T, where: str) -> T:
    """A number of the same type, or True or False."""
    if isinstance(like, bool):
        if value not in ("True", "False"):
            raise UserError(f"{where}={value!r}: use True or False")
        return value == "True"
    try:
        return type(like)(value)
    except ValueError:
        kind = "a whole number" if isinstance(like, int) else "a number"
        raise UserError(f"{where}={value!r} is not {kind}") from None


def memory_name(memory: Memory | None) -> str:
    """The text that `parse_memory` makes this policy of."""
    if memory is None or isinstance(memory, Everything):
        return FULL
    same = [(name, n.policy) for name, n in POLICIES.items() if type(n.policy) is type(memory)]
    values = {f.name: getattr(memory, f.name) for f in fields(memory)}

    def changed(policy: Memory) -> dict[str, Any]:
        return {key: value for key, value in values.items() if value != getattr(policy, key)}

    name, policy = min(same, key=lambda item: len(changed(item[1])))
    shown = lambda v: v.name if isinstance(v, Codec) else v.path if isinstance(v, HeadTable | HeadLabels) else v
    settings = [f"{k}={shown(v)}" for k, v in changed(policy).items()]
    return f"{name}({', '.join(settings)})" if settings else name
