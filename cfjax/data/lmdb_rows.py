"""The PyTorch reference's LMDB datasets (`utils/create_lmdb_iterative.py`): clean latents, and ODE trajectories.

Keys: `latents_shape` "N J F C H W" (or "N F C H W"), `prompts_shape`, `latents_<i>_data` (fp16, little-endian),
`prompts_<i>_data` (UTF-8). A row of several entries is a trajectory: the student's noise levels from pure noise down,
the ODE's end, and in Causal Forcing's own sets the clean clip. A set may be split into a folder of LMDBs.
"""

import hashlib
import math
from pathlib import Path

import numpy as np
from einops import rearrange

from cfjax.core.errors import UserError
from cfjax.core.limits import LATENT_NUMBERS, STATES
from cfjax.data.lmdb_files import DATA, LmdbFiles, lmdb_files
from cfjax.data.readers import BrokenRecord

SAMPLED_ROWS, SAMPLED_BYTES = 64, 4096  # of an LMDB, what `LmdbRows.fingerprint` reads


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
            raise UserError(f"{path}: no LMDB here (no {DATA} in it or in a folder under it)")
        self._values = LmdbFiles()
        shapes = {file: self._shape(file, "latents") for file in files}
        for file, shape in shapes.items():
            self._check_shape(file, shape)
        self._shards = [(file, shape[0] if shape else 0) for file, shape in shapes.items()]
        self._ends = np.cumsum([rows for _, rows in self._shards])
        entries = {self._entry_shape(file, shape, fallback_shape) for file, shape in shapes.items()}
        if len(entries) != 1:
            raise UserError(f"{path}: its LMDBs hold rows of different shapes: {sorted(entries)}")
        self.entries, frames, channels, height, width = entries.pop()
        self.latent_shape = (frames, height, width, channels)
        levels = self.entries - 1 if ground_truth else self.entries
        self.trajectory_points = levels if self.entries > 1 else 0

    def _shape(self, file: Path, name: str) -> tuple[int, ...]:
        """What `<name>_shape` says. Raises UserError when it is absent or no list of numbers."""
        value = self._values.get(file, f"{name}_shape")
        try:
            assert value is not None
            return tuple(map(int, value.decode().split()))
        except (AssertionError, ValueError):
            raise UserError(f"{file}: no key {name}_shape; is this a latent LMDB?") from None

    def _check_shape(self, file: Path, shape: tuple[int, ...]) -> None:
        """Raises UserError for a shape of more rows than the file has keys, or of sizes that no row has."""
        rows, keys = shape[0] if shape else 0, self._values.count(file)
        if not 0 <= rows <= keys:
            raise UserError(f"{file}: latents_shape says {rows} rows, and there are {keys} keys; copy it again")
        if any(size < 1 for size in shape[1:]) or math.prod(shape[1:]) > STATES * LATENT_NUMBERS:
            raise UserError(f"{file}: latents_shape is {shape}; sizes must be 1 or more, and fit into memory")

    def _entry_shape(
        self, file: Path, shape: tuple[int, ...], wanted: tuple[int, int, int, int] | None
    ) -> tuple[int, int, int, int, int]:
        """(entries, F, C, H, W) of a row."""
        if len(shape) == 6:
            return shape[1], shape[2], shape[3], shape[4], shape[5]
        if len(shape) == 5:
            return 1, shape[1], shape[2], shape[3], shape[4]
        row = self._values.get(file, "latents_0_data") or b""
        if wanted is None:
            raise UserError(f"{file}: latents_shape is {shape}, without a row's shape; give latent_shape")
        if len(wanted) != 4 or min(wanted) < 1:
            raise UserError(f"latent_shape={wanted}: give (F, H, W, C), each 1 or more")
        entries, rest = divmod(len(row), 2 * math.prod(wanted))
        if rest or not entries:
            raise UserError(f"{file}: a row of {len(row)} bytes is no fp16 latent of latent_shape={wanted}")
        frames, height, width, channels = wanted
        return entries, frames, channels, height, width

    def __len__(self) -> int:
        return int(self._ends[-1])

    def locate(self, index: int) -> tuple[Path, int]:
        """The LMDB of row `index`, and the row's number in it. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        file, rows = self._shards[number]
        return file, int(index - (self._ends[number] - rows))

    def caption(self, index: int) -> str:
        """The prompt of a row. Raises BrokenRecord when it is absent or no UTF-8, UserError when the file fails."""
        file, row = self.locate(index)
        value = self._values.get(file, f"prompts_{row}_data")
        if value is None:
            raise BrokenRecord(f"{file}, row {row}: no prompt")
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise BrokenRecord(f"{file}, row {row}: the prompt is no UTF-8") from None

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """float16 `latents` [F, H, W, C] and, of an ODE set, `trajectory` [J, F, H, W, C].

        Raises:
          BrokenRecord: the row is absent or of another size.
          UserError: the file cannot be read.
        """
        file, row = self.locate(index)
        value = self._values.get(file, f"latents_{row}_data")
        frames, height, width, channels = self.latent_shape
        wanted = 2 * self.entries * frames * height * width * channels
        if value is None or len(value) != wanted:
            found = "no latents" if value is None else f"{len(value)} bytes of latents instead of {wanted}"
            raise BrokenRecord(f"{file}, row {row}: {found}")
        flat = np.frombuffer(value, "<f2").reshape(self.entries, frames, channels, height, width)
        entries = rearrange(flat, "j f c h w -> j f h w c")
        out = {"latents": entries[-1]}
        if self.trajectory_points:
            out["trajectory"] = entries[: self.trajectory_points]
        return out

    def fingerprint(self) -> str:
        """16 hex digits from the shapes and from rows spread over the set: a hash of the content, whatever the path.

        Each of at most SAMPLED_ROWS rows gives its prompt and the first SAMPLED_BYTES of its latents.

        Raises:
          UserError: a file cannot be read.
        """
        hashed = hashlib.sha256(repr((len(self), self.entries, *self.latent_shape)).encode())
        for index in sorted({int(i) for i in np.linspace(0, len(self) - 1, SAMPLED_ROWS)} if len(self) else ()):
            file, row = self.locate(index)
            for key, at_most in ((f"prompts_{row}_data", None), (f"latents_{row}_data", SAMPLED_BYTES)):
                value = self._values.get(file, key, at_most=at_most)
                hashed.update(b"-" if value is None else b"%d:" % len(value) + value)
        return hashed.hexdigest()[:16]
