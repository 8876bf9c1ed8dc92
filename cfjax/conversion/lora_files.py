"""LoRA files as others save them: which tensor of the transformer each of their tensors changes, and by what factor.

A pair changes a weight W [out, in] by s B A, with A [rank, in], B [out, rank] and s = alpha / rank, or
alpha / sqrt(rank) where it is rank-stabilised (arXiv 2106.09685, 2312.03732); a difference is added as it is:

    MODULE.lora_A.weight, .lora_B.weight          peft (`utils/save_and_load.py`), with `.default` while it trains;
                                                  diffusers (`loaders/lora_pipeline.py`, `WanLoraLoaderMixin`)
    MODULE.lora_down.weight, .lora_up, .alpha     the originals' (`diffusion_model.` before every name): lightx2v's
                                                  `tools/extract/lora_extractor.py`
    lora_unet_blocks_0_self_attn_q.lora_down ...  kohya's (musubi-tuner `networks/lora_wan.py`)
    MODULE.diff, .diff_b, .diff_m                 differences of a weight, a bias, a modulation: lightx2v's
                                                  `lora_extractor.py`, `_generate_lora_diff_key`
    MODULE.lora_B.bias                            peft's `lora_bias`, times s too
    MODULE_lora.up.weight, MODULE.lora.up.weight  older diffusers (as in lightx2v `utils/lora_loader.py`)

MODULE is named as in the original release or in diffusers, behind any prefix. LongLive's second file
(`trainer/distillation.py`, `Trainer.save`) is a .pt with peft's names under `generator_lora` and `critic_lora`, without
alpha. Where a file says none, s is 1, as in diffusers (`utils/peft_utils.py`, `get_peft_kwargs`), lightx2v
(`LoRALoader.apply_lora`) and kohya's. peft's adapter_config.json beside the file and diffusers' `lora_adapter_metadata`
in it say alpha and rank-stabilised scaling.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cfjax.conversion.files import read_weights
from cfjax.conversion.folders import weight_files
from cfjax.conversion.foreign import ADAPTER
from cfjax.conversion.prefixes import CRITICS, FROZEN
from cfjax.conversion.weight_file import SAFETENSORS, Arrays, listed, read_json, short
from cfjax.core.console import counted
from cfjax.core.errors import UserError
from cfjax.core.inside import resolved_inside
from cfjax.core.limits import AXIS, JSON_BYTES
from cfjax.core.schema import anything, checked, each_of, either, flag, number, one_of, parse_json, table, text, whole

CONFIG, METADATA = "adapter_config.json", "lora_adapter_metadata"
# A folder's file, the first that is there: peft's, diffusers'.
IN_FOLDER = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
_ADAPTER_NAME = r"(?:\.(?!weight$|bias$)[\w-]+)?"  # peft's, "default" as a rule
# Names of tensors (regex, its first group the module) -> which part it is.
PARTS = (
    (rf"(.+)\.lora_(?:B|up){_ADAPTER_NAME}\.bias", "bias"),
    (rf"(.+)\.lora_(?:A|down){_ADAPTER_NAME}(?:\.weight)?", "down"),
    (rf"(.+)\.lora_(?:B|up){_ADAPTER_NAME}(?:\.weight)?", "up"),
    (r"(.+?)(?:_lora|\.lora|\.lora_linear_layer)\.down\.weight", "down"),
    (r"(.+?)(?:_lora|\.lora|\.lora_linear_layer)\.up\.weight", "up"),
    (r"(.+)\.alpha", "alpha"),
    (r"(.+)\.diff", "diff"),
    (r"(.+)\.diff_b", "diff_b"),
    (r"(.+)\.diff_m", "diff_m"),
)
# What is read by no formula of ours, and what it is.
UNREAD = (
    (r"(.*\.)?(dora_scale|lora_magnitude_vector.*)", "DoRA, which also scales every output"),
    (r"(.*\.)?(lora_mid(\..*)?|hada_w\d_[ab].*|lokr_w\d.*|oft_.*)", "a LyCORIS adapter, which is no product of two"),
    (r"(.*\.)?lora_embedding_[AB].*", "of an embedding, which the transformer has not"),
    (r"(.*\.)?base_layer\..*", "a weight of the network below; save the adapter alone (get_peft_model_state_dict)"),
    (r"(.*\.)?(set_weight|reshape_weight)", "a replacement of a weight, not a change"),
)
_NAME = re.compile(r"[\w.]+")  # of patterns of adapter_config.json: plain ends of modules' names
_ALPHA = number(0, 1e6, above=True)
_NOTHING = one_of(None, False)
# What changes the formula. Keys that say what was trained (target_modules ...) are the file's names too.
_SETTINGS = table(
    {"r": whole(1, AXIS), "lora_alpha": _ALPHA},
    {
        "peft_type": one_of("LORA"),
        "use_rslora": either(flag, one_of(None)),
        "rank_pattern": either(each_of(whole(1, AXIS)), one_of(None)),
        "alpha_pattern": either(each_of(_ALPHA), one_of(None)),
        **dict.fromkeys(("use_dora", "use_qalora", "fan_in_fan_out", "layer_replication"), _NOTHING),
        "alora_invocation_tokens": _NOTHING,
        "base_model_name_or_path": either(text(4096), anything),
    },
)


@dataclass(frozen=True)
class Scaling:
    """What a file says of the factor s.

    Attributes:
      alpha: None where it says nothing.  rank: None likewise.
      patterns: ends of modules' names -> their own alpha, their own rank.
      stabilised: alpha / sqrt(rank), not alpha / rank.
    """

    alpha: float | None = None
    rank: int | None = None
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    stabilised: bool = False

    def factor(self, module: str, rank: int, alpha: float | None) -> float:
        """s of a module.

        Args:
          module: its name in the file.  rank: of its matrices.
          alpha: the module's own, in the file; None if it has none.

        Raises:
          UserError: the rank is not what the settings say.
        """
        stated = _by_end(self.ranks, module, self.rank)
        if stated is not None and stated != rank:
            raise UserError(f"{module} is of rank {rank}, {CONFIG} says {stated}; they do not belong together")
        if alpha is None:
            alpha = _by_end(self.alphas, module, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / math.sqrt(rank) if self.stabilised else alpha / rank


def _by_end(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The value of the first pattern that a module's name ends in (peft `utils/other.py`, `get_pattern_key`)."""
    return next((value for end, value in patterns.items() if f".{module}".endswith(f".{end}")), otherwise)


@dataclass(frozen=True)
class LoraFile:
    """One LoRA, none of its tensors read.

    Attributes:
      path: its file.  weight: the user's factor.
      modules: module, as the file names it -> part (see `PARTS`) -> (tensor's name, tensor).
      scaling: what it says of s.
      ignored: entries of the file that are not taken, for a message.
    """

    path: Path
    weight: float
    modules: Mapping[str, Mapping[str, tuple[str, Any]]]
    scaling: Scaling = Scaling()
    ignored: tuple[str, ...] = ()


def parse_loras(asked: str, key: str = "--config.lora") -> list[tuple[str, float]]:
    """(file, weight) of every LoRA in "FILE[:WEIGHT][|FILE[:WEIGHT]...]"; a weight that is left out is 1.

    Raises:
      UserError: a file's name is missing, or a weight is not finite.
    """
    out = []
    for one in asked.split("|") if asked else ():
        file, weight = one.strip(), 1.0
        head, colon, tail = file.rpartition(":")
        if colon:
            try:
                file, weight = head, float(tail)
            except ValueError:
                file = one.strip()  # a colon of the path
        if not file:
            raise UserError(f"{key}={asked}: no file before {one!r}'s end; give FILE[:WEIGHT][|FILE[:WEIGHT]...]")
        if not abs(weight) < 1e6:
            raise UserError(f"{key}={asked}: {weight} is no weight; use a number such as 0.8")
        out.append((file, weight))
    return out


def read_lora(path: str | Path, weight: float = 1.0) -> LoraFile:
    """Opens a LoRA: a file of any of the forms above, or peft's or diffusers' folder. Reads names and shapes alone.

    Raises:
      UserError: there is none, it is broken, holds no LoRA, or one of a kind that is not read.
    """
    path = Path(path)
    file = _file_of(path)
    weights = read_weights(file)
    entry, ignored = _entry(weights.entries, file)
    arrays = weights.entries[entry]
    modules: dict[str, dict[str, tuple[str, Any]]] = {}
    for name, array in arrays.items():
        module, part = _part(name, file)
        if part in modules.setdefault(module, {}):
            raise UserError(f"{file}: {modules[module][part][0]} and {name} are the same part of {module}; leave one")
        modules[module][part] = name, array
    return LoraFile(file, weight, modules, _scaling(file), (*ignored, *weights.ignored))


def _file_of(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; --config.lora names a LoRA")
    if not path.is_dir():
        return path
    found = [path / name for name in IN_FOLDER if (path / name).is_file()][:1] or weight_files(path)
    if len(found) != 1:
        raise UserError(f"{path}: {len(found) or 'no'} weight files in it; name one file by --config.lora")
    return resolved_inside(found[0], path)


def _entry(entries: Mapping[str, Arrays], file: Path) -> tuple[str, list[str]]:
    """The entry of a file with the student's LoRA, and what is left out.

    Raises:
      UserError: none, or several.
    """
    loras = [name for name, arrays in entries.items() if any(map(ADAPTER.search, arrays))]
    if not loras:
        some = listed(sorted(name for arrays in entries.values() for name in arrays))
        raise UserError(f"{file}: no LoRA: tensors such as {some}; give whole networks by --config.source")
    words = {name: {*name.split("."), *(word.removesuffix("_lora") for word in name.split("."))} for name in loras}
    own = [name for name in loras if not words[name] & (CRITICS | FROZEN)]
    if len(own) != 1:
        raise UserError(f"{file}: LoRAs {', '.join(loras)}; save one of them, the student's, in a file of its own")
    return own[0], [f"{name} ({counted(len(arrays), 'tensor')})" for name, arrays in entries.items() if name != own[0]]


def _part(name: str, file: Path) -> tuple[str, str]:
    for pattern, what in UNREAD:
        if re.fullmatch(pattern, name):
            raise UserError(f"{file}: {name} is {what}; merge it with the code that made it, and convert the result")
    for pattern, part in PARTS:
        if found := re.fullmatch(pattern, name):
            return found[1], part
    raise UserError(f"{file}: {name} is no part of a LoRA, but a whole tensor or of a kind that is not read")


def _scaling(file: Path) -> Scaling:
    """What peft's config beside a file, or diffusers' metadata in it, says."""
    beside = file.with_name(CONFIG)
    if file.name.startswith("adapter_model.") and beside.is_file():
        return _settings(read_json(beside), beside)
    if file.suffix != SAFETENSORS:
        return Scaling()
    try:
        said = (safe_open(file, "np").metadata() or {}).get(METADATA, "")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: broken or cut short ({short(error)}); copy it again") from None
    if not said:
        return Scaling()
    try:
        if len(said) > JSON_BYTES:
            raise ValueError("too long")
        values = parse_json(said)
    except ValueError as error:
        raise UserError(f"{file}: its {METADATA} cannot be read ({short(error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: its {METADATA} is no JSON object")
    own = {key.removeprefix("transformer."): value for key, value in values.items() if key.startswith("transformer.")}
    return _settings(own, f"{file}: {METADATA}") if own else Scaling()


def _settings(values: Mapping[str, Any], where: object) -> Scaling:
    checked(_SETTINGS, values, where)
    alphas, ranks = (values.get(key) or {} for key in ("alpha_pattern", "rank_pattern"))
    if odd := [end for end in (*alphas, *ranks) if not _NAME.fullmatch(end)]:
        raise UserError(f"{where}: the pattern {odd[0]!r:.60} is no end of a module's name; write the names out")
    return Scaling(float(values["lora_alpha"]), values["r"], alphas, ranks, bool(values.get("use_rslora")))
