"""Which files of a folder are weights: releases, pipelines' folders, what trainers save, caches.

Trainers': accelerate's `save_state` (`accelerate/checkpointing.py`: optimizer.bin, scheduler.bin, random_states_0.pkl
beside the weights), DeepSpeed's (`deepspeed/runtime/engine.py`: latest, mp_rank_00_model_states.pt with the network
under `module`, zero_pp_rank_* with pieces of it), transformers' Trainer (training_args.bin).
"""

import re
from pathlib import Path

from cfjax.conversion.dcp import is_distributed
from cfjax.conversion.files import read_index, shards_of
from cfjax.conversion.weight_file import GGUF, INDEX, PICKLES, SAFETENSORS
from cfjax.core.errors import UserError
from cfjax.core.inside import NAME, inside, resolved_inside

PIPELINE, SNAPSHOTS, LATEST = "model_index.json", "snapshots", "latest"
APPLE = "._"  # macOS's second files, on disks of other systems
# What trainers save beside weights, and folders of it.
BESIDE = re.compile(
    r"(optimizer|optim|scheduler|lr_scheduler|sampler|dl_state_dict|scaler|random_states|rng_state|training_args"
    r"|trainer_state|custom_checkpoint|ema_config)([_.\d-].*)?"
)
PARTITIONED = re.compile(r"(bf16_|fp16_)?zero_pp_rank_\d+_mp_rank_\d+_(model|optim)_states\.pt")
MODULE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
ONE_FILE = "make one file of it where it was written: python zero_to_fp32.py FOLDER model.pt"


def files_of(folder: Path) -> list[Path]:
    """Files directly in a folder, less macOS's second files."""
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith(APPLE))


def weight_files(folder: Path) -> list[Path]:
    """Indices, what no index covers, pickles and GGUF files, directly in a folder; or a distributed checkpoint, itself.

    Raises:
      UserError: an index is broken, or only pieces of a network are there, which DeepSpeed can join.
    """
    if is_distributed(folder):
        return [folder]
    names = [file.name for file in files_of(folder)]
    if any(PARTITIONED.fullmatch(name) or MODULE.fullmatch(name) for name in names):
        return [folder / _deepspeed(folder, names)]
    indices = [name for name in names if any(name.endswith(f"{kind}{INDEX}") for kind in (SAFETENSORS, *PICKLES))]
    covered = {shard for name in indices for shard in read_index(folder / name)["weight_map"].values()}
    alone = [name for name in names if name not in covered and not BESIDE.fullmatch(name)]
    others = {name for one in alone if (shards := shards_of(folder / one)) for name in shards[1] if name > one}
    alone = [name for name in alone if name not in others]  # the first of a set without an index opens all
    single = [name for name in alone if name.endswith(SAFETENSORS)]
    return [folder / name for name in [*indices, *single, *(name for name in alone if name.endswith((*PICKLES, GGUF)))]]


def _deepspeed(folder: Path, names: list[str]) -> str:
    """The file with the whole network.

    Raises:
      UserError: there is none.
    """
    whole = [name for name in names if MODULE.fullmatch(name)]
    if len(whole) > 1:
        raise UserError(f"{folder}: DeepSpeed's pieces of a network ({', '.join(whole[:2])} ...); {ONE_FILE}")
    if not whole:
        raise UserError(f"{folder}: DeepSpeed's ZeRO pieces (zero_pp_rank_*), no whole network; {ONE_FILE}")
    return whole[0]


def of_deepspeed(file: Path, sizes: list[int]) -> str:
    """What DeepSpeed's file of a network is, "" for any other.

    Args:
      sizes: of its tensors.

    Raises:
      UserError: they are elsewhere (ZeRO stage 3).
    """
    if not MODULE.fullmatch(file.name):
        return ""
    if 0 in sizes:
        raise UserError(f"{file}: DeepSpeed's ZeRO stage 3: its tensors are in zero_pp_rank_* files; {ONE_FILE}")
    return "DeepSpeed's weights as it computes with them; zero_to_fp32.py would make one file of its float32 ones"


def opened(folder: Path) -> Path:
    """The folder itself, or the one in it that holds the weights: a cache's snapshot, DeepSpeed's latest step, FSDP's.

    Raises:
      UserError: there are several.
    """
    if (folder / PIPELINE).exists() or weight_files(folder):
        return folder
    if (folder / SNAPSHOTS).is_dir():
        return _only(folder, [one for one in (folder / SNAPSHOTS).iterdir() if one.is_dir()])
    if (folder / LATEST).is_file():
        with (folder / LATEST).open(encoding="utf-8", errors="replace") as file:
            step = inside(folder, file.read(NAME + 1).strip(), folder / LATEST)
        if not step.is_dir():
            raise UserError(f"{step}: no such folder, but {LATEST} names it; copy it there, or name another step's")
        return step
    below = [one for one in folder.iterdir() if one.is_dir() and not BESIDE.fullmatch(one.name)]
    return _only(folder, [one for one in below if (one / PIPELINE).exists() or weight_files(one)])


def _only(folder: Path, found: list[Path]) -> Path:
    if len(found) > 1:
        some = ", ".join(sorted(one.relative_to(folder).as_posix() for one in found)[:3])
        raise UserError(f"{folder}: several folders of weights in it ({some}); name one of them")
    return resolved_inside(found[0], folder) if found else folder
