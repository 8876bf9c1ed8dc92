"""How near a clip is to a reference, frame by frame: PSNR, SSIM and MS-SSIM.

PSNR      10 log10(255^2 / MSE) over all pixels and channels of a frame, at most 100 dB; the mean over frames
SSIM      Wang et al. 2004 on BT.709 luma: Gaussian window of 11 x 11 and deviation 1.5, K = (0.01, 0.03), windows
          that lie wholly in the frame (scikit-image's `structural_similarity(gaussian_weights=True, sigma=1.5,
          use_sample_covariance=False)`, which takes thirty times as long)
MS-SSIM   Wang et al. 2003: five scales, each half of the one before (means of 2 x 2 pixels)
"""

import math

import numpy as np

from cfjax.evaluation.opencv import opencv

WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of MS-SSIM's scales
WINDOW, DEVIATION = 11, 1.5
MOST_DB = 100.0
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


class ReferenceMeter:
    """Collects the three over frames; one frame of each clip is in memory."""

    def __init__(self) -> None:
        self._psnr: list[float] = []
        self._ssim: list[float] = []
        self._ms_ssim: list[float] = []

    def add(self, frame_HWC: np.ndarray, luma_HW: np.ndarray, other_HWC: np.ndarray, other_luma_HW: np.ndarray) -> None:
        """Takes a frame and the reference's, uint8 RGB and their luma of 0 to 255."""
        self._psnr.append(psnr(frame_HWC, other_HWC))
        ssim, ms_ssim = similarities(luma_HW, other_luma_HW)
        self._ssim.append(ssim)
        self._ms_ssim.append(ms_ssim)

    def values(self) -> dict[str, float]:
        """Means over the frames."""
        found = {"psnr": self._psnr, "ssim": self._ssim, "ms_ssim": self._ms_ssim}
        return {name: float(np.mean(series)) if series else math.nan for name, series in found.items()}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of two uint8 frames, dB."""
    cv2 = opencv()
    square = float(cv2.norm(a, b, cv2.NORM_L2SQR)) / a.size
    return MOST_DB if square == 0 else min(MOST_DB, 10 * math.log10(255.0**2 / square))


def similarities(a_HW: np.ndarray, b_HW: np.ndarray) -> tuple[float, float]:
    """SSIM and MS-SSIM of two float32 pictures, 0 to 255.

    NaN where a picture is too small: 11 px a side, and 176 for the five scales.
    """
    cv2 = opencv()
    if min(a_HW.shape) < WINDOW:
        return math.nan, math.nan
    whole, structure = _ssim(a_HW, b_HW)
    if min(a_HW.shape) < WINDOW * 2 ** (len(WEIGHTS) - 1):
        return whole, math.nan
    product, last = 1.0, whole
    for scale, weight in enumerate(WEIGHTS):
        product *= max(last if scale == len(WEIGHTS) - 1 else structure, 0.0) ** weight
        if scale < len(WEIGHTS) - 1:
            height, width = (size // 2 for size in a_HW.shape)
            a_HW, b_HW = (
                cv2.resize(x[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
                for x in (a_HW, b_HW)
            )
            last, structure = _ssim(a_HW, b_HW)
    return whole, product


def _ssim(a_HW: np.ndarray, b_HW: np.ndarray) -> tuple[float, float]:
    """Means of the SSIM map, and of its part for contrast and structure."""
    mean_a, mean_b = _blur(a_HW), _blur(b_HW)
    square_a, square_b, product = mean_a * mean_a, mean_b * mean_b, mean_a * mean_b
    spread = _blur(a_HW * a_HW) + _blur(b_HW * b_HW) - square_a - square_b
    structure = (2 * (_blur(a_HW * b_HW) - product) + C2) / (spread + C2)
    whole = (2 * product + C1) / (square_a + square_b + C1) * structure
    return float(whole.mean(dtype=np.float64)), float(structure.mean(dtype=np.float64))


def _blur(picture_HW: np.ndarray) -> np.ndarray:
    """Gaussian means of the windows that lie in the picture."""
    edge = WINDOW // 2
    blurred: np.ndarray = opencv().GaussianBlur(picture_HW, (WINDOW, WINDOW), DEVIATION)
    return blurred[edge:-edge, edge:-edge]
