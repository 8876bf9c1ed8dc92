"""Motion of a clip by classical optical flow: OpenCV's DIS (Kroeger et al., arXiv 1603.03590), preset FAST.

VBench runs RAFT, whose weights it needs; its frame sampling and its threshold (vbench/dynamic_degree.py) are kept, so
that `dynamic_degree` here is that rule on another flow, and not the published number.
"""

import math

import numpy as np

from cfjax.evaluation.opencv import opencv

SAMPLED = 8  # frames per second that VBench looks at
FASTEST = 0.05  # of the pixels, whose mean motion decides
THRESHOLD = 6.0  # px on a short side of 256
NEEDED = 4  # of 16 frames
GRID = 16  # px between the points that the camera's motion is fitted to
SMALLEST = 16  # px a side of frames that have a flow: two of DIS's windows
NEAR = 1.5  # px that a point may be from the fit and still follow the camera


class FlowMeter:
    """Dynamic degree, motion smoothness and the camera's motion; three luma frames are kept.

    A clip of less than 16 px a side has none of them.

    Args:
      fps: of the clip.
    """

    def __init__(self, fps: float) -> None:
        cv2 = opencv()
        self._fps, self.interval = fps, max(1, round(fps / SAMPLED))
        self._dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        self._count = 0
        self._sampled: np.ndarray | None = None  # the last sampled frame, uint8
        self._even: tuple[np.ndarray, np.ndarray] | None = None  # the last frame of even number, float32 and uint8
        self._middle: np.ndarray | None = None  # and the one of odd number after it
        self._grid: np.ndarray | None = None
        self._fastest: list[float] = []  # px of each sampled pair
        self._camera: list[dict[str, float]] = []
        self._errors: list[float] = []
        self._side = 0

    def add(self, luma_HW: np.ndarray) -> None:
        """Takes the luma of the next frame, float32, 0 to 255."""
        if min(luma_HW.shape) < SMALLEST:
            return
        number, self._count = self._count, self._count + 1
        self._side = min(luma_HW.shape)
        byte = opencv().convertScaleAbs(luma_HW)
        shared = None
        if number % self.interval == 0:
            if self._sampled is not None:
                flow = self._dis.calc(self._sampled, byte, None)
                self._pair(flow)
                shared = flow if self.interval == 2 else None
            self._sampled = byte
        if number % 2:
            self._middle = luma_HW
            return
        if self._even is not None and self._middle is not None:
            start, start_byte = self._even
            flow = self._dis.calc(start_byte, byte, None) if shared is None else shared
            self._errors.append(self._middle_error(start, self._middle, luma_HW, flow))
        self._even = luma_HW, byte

    def _pixels(self, height: int, width: int) -> np.ndarray:
        """The coordinates (x, y) of every pixel, [H, W, 2]."""
        if self._grid is None:
            rows, columns = np.mgrid[:height, :width].astype(np.float32)
            self._grid = np.stack([columns, rows], -1)
        return self._grid

    def _middle_error(self, a: np.ndarray, middle: np.ndarray, b: np.ndarray, flow: np.ndarray) -> float:
        """Mean |difference| of a frame from its two neighbours, each moved half of the way."""
        cv2 = opencv()
        place, half = self._pixels(*a.shape), flow * np.float32(0.5)
        linear, edge = cv2.INTER_LINEAR, cv2.BORDER_REPLICATE
        moved = cv2.remap(a, place - half, None, linear, borderMode=edge)
        moved = moved + cv2.remap(b, place + half, None, linear, borderMode=edge)
        return float(cv2.norm(moved * np.float32(0.5), middle, cv2.NORM_L1)) / middle.size

    def _pair(self, flow_HW2: np.ndarray) -> None:
        """Measures the flow between two sampled frames."""
        cv2 = opencv()
        length = cv2.magnitude(flow_HW2[..., 0], flow_HW2[..., 1]).ravel()
        cut = max(1, int(length.size * FASTEST))
        self._fastest.append(float(np.partition(length, -cut)[-cut:].mean()))
        mean = float(length.mean()) / self.interval
        self._camera.append({"flow": mean, **camera_motion(flow_HW2, self.interval, self._fps)})

    def values(self) -> dict[str, float]:
        """The clip's numbers; NaN for a clip that is too short."""
        pairs = len(self._fastest)
        out = {"dynamic_degree": math.nan, "motion_smoothness": math.nan, "flow": math.nan, "flow_fastest": math.nan}
        out |= dict.fromkeys(CAMERA, math.nan)
        if self._errors:
            out["motion_smoothness"] = (255.0 - float(np.mean(self._errors))) / 255.0
        if pairs:
            out["dynamic_degree"] = float(is_dynamic(self._fastest, self._side, pairs + 1))
            out["flow_fastest"] = float(np.mean(self._fastest)) / self.interval
            out |= {name: float(np.mean([pair[name] for pair in self._camera])) for name in self._camera[0]}
        return out

    def camera(self) -> np.ndarray:
        """The camera's motion from each sampled frame to the next, [pairs, 4]: pan, tilt, zoom and roll."""
        return np.array([[pair[name] for name in MOVES] for pair in self._camera]).reshape(-1, len(MOVES))


MOVES = ("pan", "tilt", "zoom", "roll")
CAMERA = (*MOVES, "camera_speed", "camera_share", "object_flow")


def is_dynamic(fastest: list[float], side: int, frames: int) -> bool:
    """VBench's rule: enough of the sampled pairs move by more than the threshold.

    Args:
      fastest: mean motion of the fastest 5 % of the pixels of each pair, px.
      side: the frames' shorter side, px.  frames: how many were sampled.
    """
    moving = sum(motion > THRESHOLD * side / 256 for motion in fastest)
    return moving >= round(NEEDED * frames / 16)


def camera_motion(flow_HW2: np.ndarray, interval: int, fps: float) -> dict[str, float]:
    """The affine motion that most of a frame follows (RANSAC over a grid of points), per frame or per second.

    Args:
      interval: frames between the two pictures.

    Returns:
      pan and tilt, px a frame that the picture's centre moves right and down; zoom, the logarithm of its growth a
      second; roll, degrees a second, clockwise; camera_speed, length of (pan, tilt); camera_share, share of the points
      that follow the fit; object_flow, mean px a frame that points move otherwise. Nothing moves where no fit is found.
    """
    height, width = flow_HW2.shape[:2]
    rows = np.arange(min(GRID, height) // 2, height, GRID)
    columns = np.arange(min(GRID, width) // 2, width, GRID)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    moves = flow_HW2[y, x].reshape(-1, 2).astype(np.float64)
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    points = np.stack([x.ravel(), y.ravel()], 1) - centre
    fit = None
    if len(points) >= 3:
        fit, _ = opencv().estimateAffine2D(points, points + moves, ransacReprojThreshold=NEAR)
    if fit is None:
        fit = np.array([[1.0, 0, 0], [0, 1.0, 0]])
    (a, b, right), (c, d, down) = fit
    apart = np.linalg.norm(points @ fit[:, :2].T + fit[:, 2] - points - moves, axis=1)
    rate = fps / interval
    return {
        "pan": float(right) / interval,
        "tilt": float(down) / interval,
        "zoom": 0.5 * math.log(max(abs(a * d - b * c), 1e-9)) * rate,
        "roll": math.degrees(math.atan2(c - b, a + d)) * rate,
        "camera_speed": math.hypot(right, down) / interval,
        "camera_share": float((apart <= NEAR).mean()),
        "object_flow": float(apart.mean()) / interval,
    }
