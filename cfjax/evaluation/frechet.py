"""Fréchet video distance (Unterthiner et al. 2018) between two folders, with a feature network given as TorchScript.

The network is the I3D that public code shares as `i3d_torchscript.pt`, called as StyleGAN-V does
(`src/metrics/frechet_video_distance.py`): clips in [-1, 1], the shorter side resized to 224 (bilinear), the middle cut
out, `rescale=False, resize=False, return_features=True`, features [B, 400] in front of the softmax.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.paths import one_line
from cfjax.data.pictures import Unusable
from cfjax.evaluation.scorers import ScoredClip, ScorerSettings
from cfjax.evaluation.torch_part import device_of, torch_of

SIDE = 224  # px
LEAST = 10  # frames that I3D takes
OPTIONS = {"frames": "0"}  # first frames of a clip that count; 0 is all
HOW = "the I3D of StyleGAN-V as TorchScript, i3d_torchscript.pt (docs/evaluate.md)"


def frechet_distance(a_NC: np.ndarray, b_NC: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two sets of features, S with N - 1.

    With the centred features as A^T A = S_a and B^T B = S_b, the trace of the root is the sum of the singular values
    of A B^T: exact in float64 for singular S too, as when there are fewer clips than features, where a matrix square
    root loses digits.

    Raises:
      ValueError: fewer than two rows, or rows of different lengths.
    """
    if a_NC.ndim != 2 or b_NC.ndim != 2 or a_NC.shape[1] != b_NC.shape[1] or min(len(a_NC), len(b_NC)) < 2:
        raise ValueError(f"needs [N, C] and [M, C] with two rows or more, got {a_NC.shape} and {b_NC.shape}")
    centred = list[np.ndarray]()
    for x_NC in (a_NC, b_NC):
        x_NC = x_NC.astype(np.float64)
        x_NC = (x_NC - x_NC.mean(0)) / math.sqrt(len(x_NC) - 1)
        centred.append(np.asarray(np.linalg.qr(x_NC, mode="r")) if len(x_NC) > x_NC.shape[1] else x_NC)
    gap_C = a_NC.mean(0, dtype=np.float64) - b_NC.mean(0, dtype=np.float64)
    spread = sum(float((x_NC**2).sum()) for x_NC in centred)
    root = float(np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum())
    return float(gap_C @ gap_C) + spread - 2 * root


class FrechetScorer:
    """See `evaluation.scorers.SetScorer`."""

    needs = frozenset({"reference"})

    def __init__(self, settings: ScorerSettings) -> None:
        self.name = settings.name
        options = settings.chosen(OPTIONS)
        if not options["frames"].isdigit():
            raise UserError(f"{settings.key('options')}: frames={options['frames']} is no number of frames")
        self._most = int(options["frames"])
        self._torch = torch_of(settings)
        self.version = f"torch {self._torch.__version__.partition('+')[0]}"
        self._file = settings.weight_path(HOW)
        self._device = device_of(self._torch, settings)
        try:
            with warnings.catch_warnings():  # TorchScript is deprecated, and what public networks come in
                warnings.simplefilter("ignore")
                self._network: Any = self._torch.jit.load(str(self._file), map_location=self._device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            reason = one_line(error)[:200]
            raise UserError(f"{settings.key('weights')}={self._file}: no TorchScript ({reason}); {HOW}") from None

    def weights(self) -> Sequence[Path]:
        """The network's file."""
        return [self._file]

    def close(self) -> None:
        """Lets the network go."""
        self._network = None

    def features(self, clip: ScoredClip) -> np.ndarray:
        """[1, C] of a clip. Raises Unusable for a clip of fewer than ten frames."""
        torch = self._torch
        kept = []
        for number, frame_HWC in enumerate(clip.frames()):
            if self._most and number >= self._most:
                break
            kept.append(self._resized(frame_HWC))
        if len(kept) < LEAST:
            raise Unusable(f"too short: {len(kept)} frames, and its network takes {LEAST} or more")
        video_BCPHW = torch.stack(kept, 1)[None]
        try:
            with torch.no_grad():
                found = self._network(video_BCPHW, rescale=False, resize=False, return_features=True)
            return np.asarray(found.float().cpu().numpy(), np.float64).reshape(1, -1)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._file}: does not take a clip {tuple(video_BCPHW.shape)} with rescale, resize and "
                f"return_features ({one_line(error)[-200:]}); {HOW}"
            ) from None

    def _resized(self, frame_HWC: np.ndarray) -> Any:
        """float32 [3, 224, 224] in [-1, 1]."""
        torch = self._torch
        picture = torch.from_numpy(np.array(frame_HWC)).to(self._device).permute(2, 0, 1).float()[None] / 255
        height, width = frame_HWC.shape[:2]
        scale = SIDE / min(height, width)
        size = (SIDE, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), SIDE)
        picture = torch.nn.functional.interpolate(picture, size=size, mode="bilinear", align_corners=False)[0]
        top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
        return (picture[:, top : top + SIDE, left : left + SIDE] - 0.5) * 2

    def distance(self, features_NC: np.ndarray, reference_NC: np.ndarray) -> Mapping[str, float]:
        """The distance. Raises UserError for folders of one clip."""
        try:
            return {"": frechet_distance(features_NC, reference_NC)}
        except ValueError as error:
            raise UserError(f"scorer {self.name}: two clips or more on each side: {error}") from None


def make(settings: ScorerSettings) -> FrechetScorer:
    """The entry point `fvd`."""
    return FrechetScorer(settings)
