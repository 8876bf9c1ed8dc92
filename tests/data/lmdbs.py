"""LMDBs in the PyTorch reference's layout, key by key, as its own script writes them: torch's [F, C, H, W], fp16."""

from collections.abc import Sequence
from pathlib import Path

import lmdb
import numpy as np


def write_lmdb(path: Path, rows: np.ndarray, prompts: Sequence[str], *, shape: str | None = None) -> Path:
    """Rows [N, J, F, C, H, W] or [N, F, C, H, W]; `shape` replaces what latents_shape says."""
    path.mkdir(parents=True, exist_ok=True)
    env = lmdb.open(str(path), map_size=1 << 24)
    with env.begin(write=True) as transaction:
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            transaction.put(f"latents_{i}_data".encode(), row.astype("<f2").tobytes())
            transaction.put(f"prompts_{i}_data".encode(), prompt.encode())
        transaction.put(b"latents_shape", (shape or " ".join(map(str, rows.shape))).encode())
        transaction.put(b"prompts_shape", str(len(prompts)).encode())
    env.close()
    return path


def damage(path: Path, key: str, value: bytes | None) -> None:
    """Replaces one value, or deletes it."""
    env = lmdb.open(str(path), map_size=1 << 24)
    with env.begin(write=True) as transaction:
        if value is None:
            transaction.delete(key.encode())
        else:
            transaction.put(key.encode(), value)
    env.close()


def rows_of(count: int, entries: int, seed: int = 0) -> np.ndarray:
    """Random [N, J, F=3, C=16, H=4, W=4] in fp16."""
    shape = (count, entries, 3, 16, 4, 4)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)
