"""Ranges of every number of a config: a table for each verb, checked before anything is read or compiled.

String values (`objective.weighting`), and constraints that depend on data or weights, are checked where they are used.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cfjax.core.errors import UserError

INT32 = 2**31 - 1  # JAX counts in these
FLOAT32, TINY = 3.4028234e38, 1.1754944e-38  # and computes in these
SIDE = 16384  # pixels; H.264 takes no more
FRAMES = 1_000_000  # of a video: hours
LEVELS = 1000  # noise levels that the networks know


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; of a tuple each.

    Attributes:
      low, high: ends, themselves allowed unless `below`.
      whole: no fractions.
      below: less than `high`.
      length: of a tuple; 0: any.
      zero: 0 is allowed too, and turns the setting off.
    """

    low: float
    high: float
    whole: bool = False
    below: bool = False
    length: int = 0
    zero: bool = False

    def holds(self, number: float) -> bool:
        """Whether `number` is one of them; NaN never is."""
        if self.whole and not isinstance(number, int):
            return False
        if self.zero and number == 0:
            return True
        return self.low <= number and (number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        if self.low == -FLOAT32:
            return "a finite number"
        bounded = self.high not in (INT32, FLOAT32)
        if bounded and self.low != TINY and not self.below:
            return f"{'0, or ' if self.zero else ''}{self.low:g} to {_plain(self.high)}"
        low = "more than 0" if self.low == TINY else f"{self.low:g} or more"
        return low + (f", {'less than' if self.below else 'at most'} {_plain(self.high)}" if bounded else "")


def _plain(number: float) -> str:
    return str(int(number)) if abs(number) <= 2**32 and number == int(number) else f"{number:g}"


def whole(low: int, high: int = INT32, length: int = 0) -> Range:
    """Whole numbers."""
    return Range(low, high, whole=True, length=length)


def real(low: float = -FLOAT32, high: float = FLOAT32, *, below: bool = False) -> Range:
    """Numbers from `low` on."""
    return Range(low, high, below=below)


def positive(high: float = FLOAT32, *, below: bool = False, length: int = 0) -> Range:
    """Numbers above 0, in float32 too."""
    return Range(TINY, high, below=below, length=length)


Rules = list[tuple[str, Range]]
SHARE, SEED, STEPS = real(0.0, 1.0), whole(0, 2**32 - 1), whole(1, LEVELS)  # keys beyond 2**32 would be others' again
SHIFT, GUIDANCE = real(0.001, 1000.0), real(-1000.0, 1000.0)  # a smaller shift leaves no noise levels
SHIFT_OR_OWN = replace(SHIFT, zero=True)
FPS = real(0.001, 1000.0)  # the rates that a video file can state
PARTS: Rules = [("part_items", whole(0)), ("shard", whole(-1)), ("shards", whole(0))]

# Per experiment, whichever verb reads it; keys by regular expression, the first match counts.
EXPERIMENT: Rules = [
    ("seed", SEED),
    ("steps|sample_(every|clips)", whole(0)),
    ("(log|save)_every|keep|pairs", whole(1)),
    ("stall_seconds", real(0.0)),
    ("loss_growth", replace(real(1.0), zero=True)),
    (r"mesh\..*|cadence\..*|guard\.(prompts|seeds)", whole(1)),
    # the data
    (r"data\.batch_size", whole(1)),
    (r"data\.clips", whole(0)),
    (r"data\.max_corrupt", SHARE),
    (r"data\.(channels|text_length)", whole(1, 65536)),
    (r"data\.shapes\.size", whole(8, 1024)),
    (r"data\.shapes\.frames", whole(2, 4096)),
    (r"data\.shapes\.(speed|radius)", positive(length=2)),
    (r"data\.shapes\.branching", SHARE),
    (r"data\.steering\.speed", positive()),
    (r"data\.steering\.held", whole(1, 4096, length=2)),
    (r"data\.steering\.(still|both|silent)", SHARE),
    # the networks
    (r"blocks\.frames", whole(1, FRAMES)),
    (r"blocks\.(window|sink)", whole(0, FRAMES)),
    (r"roles\..*\.branch\.(layers|ffn_dim)", whole(0)),
    (r"roles\..*\.branch\.num_class", whole(1)),
    (r"roles\..*\.actions\.(keys|window|frames|width)", whole(1, 256)),
    (r"roles\..*\.lora\.rank", whole(0, 65536)),
    (r"roles\..*\.lora\.alpha", real(0.0)),
    # the losses
    (r"objective\.(steps|first_steps|solver_steps|history_steps|bagger_steps)", STEPS),
    (r"objective\.(shift|score_shift|history_shift)", SHIFT),
    (r"objective\.score_table_shift", SHIFT_OR_OWN),
    (r"objective\.((real|fake|bagger)_)?guidance|objective\.sid_alpha", GUIDANCE),
    (r"objective\.(text_dropout|context_noise)", real(0.0, 1.0, below=True)),
    (r"objective\.(bagger|rolling|image_start)", SHARE),
    (r"objective\.bagger_prefix", positive(1.0, below=True)),
    (r"objective\.score_(min|max)", positive(1.0)),
    (r"objective\.noise_augmentation", whole(0, LEVELS - 1)),
    (r"objective\.(window|max|new)_frames", whole(0, FRAMES)),
    (r"objective\.gan\.((generator|critic)_weight|r[12]_sigma)", positive()),
    (r"objective\.gan\.r[12]_weight", real(0.0)),
    # the optimisers
    (r"optim\..*\.(lr|eps)", positive()),
    (r"optim\..*\.b[12]", real(0.0, 1.0, below=True)),
    (r"optim\..*\.(weight_decay|clip|adam_lr)", real(0.0)),
    (r"optim\..*\.decay_fraction", SHARE),
    (r"optim\..*\.warmup", whole(0)),
    (r"optim\..*\.accumulate", whole(1)),
    (r"ema\..*\.decay", real(0.0, 1.0, below=True)),
    (r"ema\..*\.start", whole(0)),
    # the samples
    (r"sampler\.(steps|first_steps)", STEPS),
    (r"sampler\.shift", SHIFT),
    (r"sampler\.guidance", GUIDANCE),
]

# What each verb reads, by the words of its command line.
RULES: dict[str, Rules] = {
    "train": [("steps", whole(1)), *EXPERIMENT],
    "plan": [
        ("--fit", whole(0)),
        ("--(frames|text)", whole(1, 65536)),
        ("--(height|width)", whole(1, SIDE)),
        *EXPERIMENT,
    ],
    "precompute": [
        ("frames", whole(1, 65536)),
        ("height|width", whole(1, SIDE)),
        ("fps", FPS),
        ("max_crop", SHARE),
        ("latent_shape", whole(1, 65536, length=4)),
        ("encode_frames", whole(0)),
        ("batch_size|workers", whole(1)),
        *PARTS,
        *EXPERIMENT,
    ],
    "generate": [
        ("seeds?", SEED),
        ("videos|batch", whole(1)),
        ("frames|given_frames", whole(0, FRAMES)),
        ("height|width|tile", whole(0, SIDE)),
        ("window|sink", whole(-1, FRAMES)),
        (r"expect\.block_frames", whole(0)),
        (r"sampler\.(steps|first_steps)", STEPS),
        (r"sampler\.solver_steps", whole(0, LEVELS)),
        (r"sampler\.shift", SHIFT_OR_OWN),
        (r"sampler\.guidance", GUIDANCE),
        ("strength", real(-1.0, 1.0)),
        (r"high_noise\.boundary", real(0.0, 1.0)),
        (r"high_noise\.guidance", GUIDANCE),
        ("fps", FPS),
        ("scale", whole(1, SIDE)),
    ],
    "serve": [
        ("fps", FPS),
        ("port", whole(0, 65535)),
        ("sessions", whole(1, 4096)),
        ("devices", whole(0, 4096)),
        ("snapshots|seek_blocks", whole(0, 4096)),
        ("(idle|resume)_seconds", positive(1e6)),
    ],
    "play": [
        ("seed", SEED),
        ("blocks|scale", whole(1, 1_000_000)),
    ],
    "bench": [
        ("seed", whole(0, 2**31 - 1)),
        ("batch|batches", whole(1, 1_000_000)),
        ("text_rows|block_frames", whole(1, 65536)),
        ("frames", whole(0, FRAMES)),
        ("height|width", whole(0, SIDE)),
        ("window|sink", whole(-1, FRAMES)),
        (r"sampler\.(steps|first_steps)", STEPS),
        (r"sampler\.solver_steps", whole(0, LEVELS)),
        (r"sampler\.shift", SHIFT_OR_OWN),
        (r"sampler\.guidance", GUIDANCE),
    ],
    "evaluate": [
        ("seed", whole(0)),
        ("clips|batch", whole(1)),
        ("kept", whole(0)),
        ("frames|block|first_block", whole(0, FRAMES)),
        ("fps", replace(FPS, zero=True)),
        ("workers", whole(0, 1024)),
    ],
    "export": [("clips", whole(1))],
    "profile_heads": [
        ("seed", SEED),
        ("videos|batch|recent", whole(1)),
        ("frames", whole(0, FRAMES)),
        ("sink", whole(0, FRAMES)),
        ("levels", STEPS),
        ("threshold|periodicity", SHARE),
        ("between", real(0.0)),
    ],
    "compare": [
        ("--seed", SEED),
        ("--tolerance", real(0.0)),
        ("frames|text_length", whole(1, 65536)),
        ("height|width", whole(1, SIDE)),
        ("steps", STEPS),
    ],
    "convert": [
        ("latents", whole(0, 65536, length=3)),
        ("max_shard_gb", positive()),
        *((rf"experiment\.({pattern})", allowed) for pattern, allowed in EXPERIMENT),
    ],
    "quickstart": [("seed", SEED), (r"budgets\..*", whole(1))],
    "study injectivity": [
        ("seeds|collisions", whole(0)),
        ("frames|videos", whole(2)),
        ("pasts|ahead|dmd_at", whole(1)),
        ("futures", whole(10)),
        ("futures_seed", SEED),
        ("levels", positive(1.0)),
        (r"budget\.(.*_steps|batch|pool|width)", whole(1)),
        (r"budget\.cd_levels", whole(2, LEVELS)),
        (r"budget\.(dmd_)?lr", positive()),
    ],
    "study ablation": [("seeds", whole(1))],
    "study uncertain": [
        (r"seeds|pasts|budget\..*|exact\.pasts", whole(1)),
        ("first", whole(0)),
        (r"futures|exact\.(noises|again)", whole(2)),
        (r"paths\.turn", real(0.05, 1.0)),
        (r"paths\.(videos|steps|batch|pool|solver_steps)", whole(2)),
        (r"exact\.turn", real(0.0, 1.0)),
        (r"exact\.frames", whole(1)),
    ],
}


def check_settings(verb: str, settings: Mapping[str, Any]) -> None:
    """Raises UserError for numbers that a verb cannot use.

    Args:
      verb: as it stands in `RULES`.
      settings: the config's values by their dotted keys, and the verb's flags as "--fit". For keys without a rule, as
        a user's own config may have them, and for a config that trains nothing where a stage's is needed, which is
        reported elsewhere, only NaN and infinities are refused.

    Raises:
      UserError: one of them is out of its range, or two do not go together.
    """
    for name, value in settings.items():
        numbers = [n for n in (value if isinstance(value, tuple) else (value,)) if type(n) in (int, float)]
        allowed = rule_of(verb, name) if verb not in ("train", "plan") or "stage" in settings else None
        if fault := _fault(value, numbers, allowed or real()):
            raise UserError(f"{name if name.startswith('--') else f'--config.{name}'}={value!r}: {fault}")
    for beside in TOGETHER.get(verb, ()):
        if conflict := beside(settings):
            raise UserError(conflict)


def _fault(value: Any, numbers: Sequence[float], allowed: Range) -> str:
    if allowed.length and (not isinstance(value, tuple) or len(numbers) != allowed.length):
        return f"give {allowed.length} numbers"
    if allowed.whole and any(isinstance(n, float) for n in numbers):
        return f"use a whole number, {allowed}"
    if all(map(allowed.holds, numbers)):
        return ""
    if allowed.low == TINY and 0 < min(numbers) < TINY:
        return "use more; that is 0 in float32"
    most = f", at most {_plain(allowed.high)}" if allowed.high == INT32 and max(numbers) > INT32 else ""
    return f"use {allowed}{most}"


def rule_of(verb: str, name: str) -> Range | None:
    """The range of a setting; None if the table has none."""
    rules = RULES.get(verb, ())
    return next((allowed for pattern, allowed in rules if re.fullmatch(pattern, name)), None)


# ---- numbers beside each other


def _divides(settings: Mapping[str, Any], key: str, by: Sequence[str]) -> str:
    if not {key, *by} <= settings.keys():
        return ""
    parts = math.prod(settings[name] for name in by)
    if settings[key] % parts == 0:
        return ""
    return f"--config.{key}={settings[key]}: must divide by {' * '.join(by)} = {parts}"


def _batch_parts(settings: Mapping[str, Any]) -> str:
    """Microbatches of every device."""
    mesh = ("mesh.data", "mesh.fsdp")
    roles = sorted(key for key in settings if re.fullmatch(r"optim\..*\.accumulate", key))
    faults = (_divides(settings, "data.batch_size", (*mesh, role)) for role in roles)
    return next(filter(None, faults), "")


def _toy_clips(settings: Mapping[str, Any]) -> str:
    """A toy dataset has exactly the requested number of clips."""
    if settings.get("data.source") != "shapes" or settings.get("data.clips", 1) > 0:
        return ""
    return "--config.data.clips=0: use 1 or more"


def _budget(settings: Mapping[str, Any]) -> str:
    """Problems that a quickstart would otherwise meet after hours of training."""
    name = f"budgets.{settings['budget']}"
    pairs, clips, evaluation = (settings.get(f"{name}.{key}", 1) for key in ("pairs", "clips", "evaluation"))
    if pairs > clips:
        return f"--config.{name}.pairs={pairs}: use {name}.clips={clips} or fewer"
    if evaluation > EVALUATED and evaluation % EVALUATED:
        return f"--config.{name}.evaluation={evaluation}: use up to {EVALUATED}, or a multiple of it"
    return ""


def _exported_clips(settings: Mapping[str, Any]) -> str:
    clips = settings["clips"]
    return f"--config.clips={clips}: use a multiple of {EVALUATED}" if clips % EVALUATED else ""


EVALUATED = 60  # clips at a time, in a quickstart and of an exported model
TOGETHER: dict[str, list[Callable[[Mapping[str, Any]], str]]] = {
    "train": [_batch_parts, _toy_clips],
    "precompute": [_toy_clips],
    "evaluate": [lambda settings: _divides(settings, "clips", ("batch",))],
    "export": [_exported_clips],
    "quickstart": [_budget],
}
