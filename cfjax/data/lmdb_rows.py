"""The PyTorch reference's LMDB sets, read as they are: clean latents, and ODE trajectories with their ground truth.

Keys: `latents_shape` "N J F C H W" (or "N F C H W"), `prompts_shape`, `latents_<i>_data` (fp16, little-endian),
`prompts_<i>_data` (UTF-8). A row of several entries is a trajectory: the student's noise levels from pure noise down,
the ODE's end, and in Causal Forcing's own sets the clean clip. A set may be cut into a folder of LMDBs.
"""

import os
import threading
import weakref
from pathlib import Path
from typing import Any, ClassVar

import lmdb
import numpy as np
from einops import rearrange

from cfjax.core.errors import UserError

_DATA = "data.mdb"


def lmdb_files(path: str | Path) -> list[Path]:
    """The LMDBs that `path` is or holds, by name; empty if it is none."""
    path = Path(path)
    if path.is_file() and path.suffix in (".lmdb", ".mdb"):
        return [path]
    if (path / _DATA).is_file():
        return [path]
    return sorted(file.parent for file in path.glob(f"*/{_DATA}")) if path.is_dir() else []


def is_lmdb(path: str | Path) -> bool:
    """Whether `path` is an LMDB or a folder of them."""
    return bool(lmdb_files(path))


class _Open:
    """An open environment; LMDB allows one per file and process, so all readers of a file share it."""

    alive: ClassVar["weakref.WeakValueDictionary[tuple[Path, int], _Open]"] = weakref.WeakValueDictionary()
    lock = threading.Lock()

    def __init__(self, path: Path) -> None:
        options: dict[str, Any] = {"readonly": True, "lock": False, "readahead": False, "meminit": False}
        self.env = lmdb.open(str(path), subdir=path.is_dir(), max_readers=1024, **options)

    def __del__(self) -> None:
        if "env" in self.__dict__:
            self.env.close()

    @classmethod
    def of(cls, path: Path) -> "_Open":
        """The environment of `path` in this process (one must not cross a fork)."""
        key = (path.resolve(), os.getpid())
        with cls.lock:
            found = cls.alive.get(key)
            if found is None:
                found = cls.alive[key] = cls(path)
            return found


class _Shard:
    """One LMDB: its rows, read as bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: _Open | None = None
        self._pid = 0

    def get(self, key: str) -> bytes | None:
        """The value of a key, None if it is not there. Raises UserError when the file cannot be read."""
        try:
            if self._open is None or self._pid != os.getpid():
                self._open, self._pid = _Open.of(self.path), os.getpid()
            with self._open.env.begin() as transaction:
                return transaction.get(key.encode())
        except lmdb.Error as error:
            raise UserError(f"{self.path}: cannot read this LMDB ({error})") from None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_open": None, "_pid": 0}

    def shape(self, name: str) -> tuple[int, ...]:
        """What `<name>_shape` says. Raises UserError when it is absent or no list of numbers."""
        value = self.get(f"{name}_shape")
        try:
            assert value is not None
            return tuple(map(int, value.decode().split()))
        except (AssertionError, ValueError):
            raise UserError(f"{self.path}: no key {name}_shape; is this a latent LMDB?") from None


class LmdbRows:
    """Rows of an LMDB, or of a folder of them in the order of their names; channels last.

    Attributes:
      latent_shape: (F, H, W, C).
      trajectory_points: J, noise levels and end point of an ODE set; 0 for clean latents.

    Args:
      ground_truth: the last of several entries is the clean clip (Causal Forcing). Without it the ODE's end point,
        which is then the last entry, stands for the clip (Self Forcing and CausVid, whose pairs come from noise alone).
      fallback_shape: (F, H, W, C) where the set's own metadata lost it, which happens when the last file that it was
        made from added nothing (quirk Q32).

    Raises:
      UserError: not such an LMDB, or its shards do not fit together.
    """

    def __init__(
        self, path: str | Path, *, ground_truth: bool = True, fallback_shape: tuple[int, int, int, int] | None = None
    ) -> None:
        self.path, self.ground_truth = Path(path), ground_truth
        files = lmdb_files(path)
        if not files:
            raise UserError(f"{path}: no LMDB here (no {_DATA} in it or in a folder under it)")
        self._shards = [_Shard(file) for file in files]
        shapes = [shard.shape("latents") for shard in self._shards]
        self._rows = [shape[0] if shape else 0 for shape in shapes]
        entries = {self._entry_shape(s, shape, fallback_shape) for s, shape in zip(self._shards, shapes, strict=True)}
        if len(entries) != 1:
            raise UserError(f"{path}: its LMDBs hold rows of different shapes: {sorted(entries)}")
        self.entries, frames, channels, height, width = entries.pop()
        self.latent_shape = (frames, height, width, channels)
        levels = self.entries - 1 if ground_truth else self.entries
        self.trajectory_points = levels if self.entries > 1 else 0

    @staticmethod
    def _entry_shape(
        shard: _Shard, shape: tuple[int, ...], wanted: tuple[int, int, int, int] | None
    ) -> tuple[int, int, int, int, int]:
        """(entries, F, C, H, W) of a row."""
        if len(shape) == 6:
            return shape[1], shape[2], shape[3], shape[4], shape[5]
        if len(shape) == 5:
            return 1, shape[1], shape[2], shape[3], shape[4]
        row = shard.get("latents_0_data") or b""
        if wanted is None:
            raise UserError(f"{shard.path}: latents_shape is {shape}, without a row's shape; give latent_shape")
        entries, rest = divmod(len(row), 2 * int(np.prod(wanted)))
        if rest or not entries:
            raise UserError(f"{shard.path}: a row of {len(row)} bytes is no fp16 latent of latent_shape={wanted}")
        frames, height, width, channels = wanted
        return entries, frames, channels, height, width

    def __len__(self) -> int:
        return sum(self._rows)

    def locate(self, index: int) -> tuple[Path, int]:
        """The LMDB of row `index`, and the row's number therein."""
        shard, row = self._find(index)
        return shard.path, row

    def _find(self, index: int) -> tuple[_Shard, int]:
        for shard, rows in zip(self._shards, self._rows, strict=True):
            if index < rows:
                return shard, index
            index -= rows
        raise IndexError(index)

    def caption(self, index: int) -> str:
        """The prompt of a row. Raises UserError when it is absent or no UTF-8."""
        shard, row = self._find(index)
        value = shard.get(f"prompts_{row}_data")
        if value is None:
            raise UserError(f"{shard.path}, row {row}: no prompt")
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise UserError(f"{shard.path}, row {row}: the prompt is no UTF-8") from None

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """float16 `latents` [F, H, W, C] and, of an ODE set, `trajectory` [J, F, H, W, C].

        Raises:
          UserError: the row is absent or of another size.
        """
        shard, row = self._find(index)
        value = shard.get(f"latents_{row}_data")
        frames, height, width, channels = self.latent_shape
        wanted = 2 * self.entries * frames * height * width * channels
        if value is None or len(value) != wanted:
            found = "no latents" if value is None else f"{len(value)} bytes of latents instead of {wanted}"
            raise UserError(f"{shard.path}, row {row}: {found}")
        flat = np.frombuffer(value, "<f2").reshape(self.entries, frames, channels, height, width)
        entries = rearrange(flat, "j f c h w -> j f h w c")
        out = {"latents": entries[-1]}
        if self.trajectory_points:
            out["trajectory"] = entries[: self.trajectory_points]
        return out
