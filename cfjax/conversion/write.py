"""Weight files that other code loads: safetensors (sharded with an index where large) and torch pickles, streamed."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cfjax.conversion.pickles import torch_module
from cfjax.conversion.weight_file import INDEX, SAFETENSORS
from cfjax.core.lazy import LazyArray
from cfjax.core.tensor_files import save_tensors


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON in UTF-8, keys sorted."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(folder: Path, stem: str, arrays: Mapping[str, LazyArray], max_bytes: float) -> None:
    """`stem.safetensors`, or shards of at most `max_bytes` (or one array) with an index, as diffusers reads them.

    Memory holds one shard.
    """
    shards = list(_shards(arrays, max_bytes))
    where: dict[str, str] = {}
    for i, shard in enumerate(shards):
        name = f"{stem}{SAFETENSORS}" if len(shards) == 1 else f"{stem}-{i + 1:05d}-of-{len(shards):05d}{SAFETENSORS}"
        save_tensors(folder / name, {key: x.read() for key, x in shard.items()}, {"format": "pt"})
        where |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(x.nbytes for x in arrays.values())
        write_json(folder / f"{stem}{SAFETENSORS}{INDEX}", {"metadata": {"total_size": total}, "weight_map": where})


def _shards(arrays: Mapping[str, LazyArray], max_bytes: float) -> Iterator[dict[str, LazyArray]]:
    shard: dict[str, LazyArray] = {}
    for name, array in arrays.items():
        if shard and sum(x.nbytes for x in shard.values()) + array.nbytes > max_bytes:
            yield shard
            shard = {}
        shard[name] = array
    yield shard


def write_pickle(path: Path, arrays: Mapping[str, LazyArray] | Mapping[str, Mapping[str, LazyArray]]) -> None:
    """torch.save of a state dict, or of a dict of state dicts.

    Arrays pass one by one through files beside `path` that torch maps: memory holds one of them, the disk all twice.
    """
    torch = torch_module(path)
    scratch = path.with_name(f".{path.name}.arrays")
    scratch.mkdir()
    counter = iter(range(1_000_000_000))

    def tensor(array: LazyArray) -> Any:
        dtype = getattr(torch, array.dtype.name)
        if not array.size:
            return torch.empty(array.shape, dtype=dtype)
        file = scratch / str(next(counter))
        data = np.asarray(array.read(), order="C")
        (data.view(np.int16) if data.dtype == ml_dtypes.bfloat16 else data).tofile(file)
        return torch.from_file(str(file), size=array.size, dtype=dtype).view(array.shape)

    def state(content: Mapping[str, Any]) -> dict[str, Any]:
        return {key: tensor(x) if isinstance(x, LazyArray) else state(x) for key, x in content.items()}

    try:
        torch.save(state(arrays), path)
    finally:
        shutil.rmtree(scratch)
