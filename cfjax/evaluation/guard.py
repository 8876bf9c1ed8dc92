"""Guard rails: a few metrics of sampled clips that detect freezing, over-saturation, drift, blur and low diversity.

No weights are needed: every number is a classical statistic of decoded pixels, so the same function judges the toy,
real Wan samples and real clips. Normal values depend on the data; a run is therefore compared with a `Baseline`: real
clips of its data if there are any, else its own first samples.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cfjax.core.errors import UserError
from cfjax.evaluation.video import check_uint8, pick_frames, to_uint8

_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # ITU-R BT.709, on gamma-encoded RGB
_FROZEN = 0.25  # grey levels of 255: a step with less mean change is a still picture
_THUMBNAIL = 64  # px: widest side that seeds and prompts are compared at
_THUMBNAIL_FRAMES = 16

Values = Mapping[str, float]


def seams(spans: Sequence[tuple[int, int]], time: int) -> np.ndarray:
    """Steps between pixel frames that cross from one block into the next; step p leads from frame p to p + 1.

    Args:
      spans: latent frames [start, stop) of each block.  time: pixel frames per latent frame after the first.
    """
    return np.array([time * (start - 1) for start, _ in spans[1:]], int)


def frame_series(video_PHWC: np.ndarray) -> dict[str, np.ndarray]:
    """luma, saturation, clipped, contrast, sharpness of each frame [P]; difference of each step [P - 1].

    One frame at a time: a clip of 81 frames of 480 x 832 would be 0.4 GB as float32.
    """
    out: dict[str, list[float]] = {
        name: [] for name in ("luma", "saturation", "clipped", "contrast", "sharpness", "difference")
    }
    before: np.ndarray | None = None
    for frame in video_PHWC:
        red, green, blue = (np.ascontiguousarray(frame[..., i]) for i in range(3))  # planes: three times as fast
        luma = (_LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue) / np.float32(255.0)
        high = np.maximum(np.maximum(red, green), blue)
        low = np.minimum(np.minimum(red, green), blue)
        out["luma"].append(float(luma.mean()))
        out["saturation"].append(float(((high - low) / np.maximum(high, 1).astype(np.float32)).mean()))
        out["clipped"].append(float(((frame == 0) | (frame == 255)).mean()))
        out["contrast"].append(float(luma.std()))
        inner = luma[1:-1, 1:-1]
        laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * inner
        out["sharpness"].append(float(laplacian.std()) if laplacian.size else math.nan)
        if before is not None:
            out["difference"].append(_distance(frame, before))
        before = frame
    return {name: np.array(series) for name, series in out.items()}


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of two frames, grey levels of 255."""
    return float((np.maximum(a, b) - np.minimum(a, b)).mean())


def _drift(series_P: np.ndarray) -> float:
    """Change from the first to the last frame of the least-squares line through a series."""
    count = len(series_P)
    if count < 2:
        return math.nan
    return float(np.polyfit(np.arange(count) / (count - 1), series_P, 1)[0])


def measure_clip(video_PHWC: np.ndarray, seams_G: np.ndarray | None = None) -> dict[str, float]:
    """Numbers of one clip [P, H, W, 3], uint8 or float in [-1, 1] (turned into bytes as videos are written).

    motion              mean absolute difference of successive frames, grey levels of 255
    frozen              fraction of steps whose difference is below 0.25 grey levels
    travel              mean absolute difference of the last and the first frame over motion: 1 for a still picture that
                        flickers or has grain, up to P - 1 for steady motion
    temporal_flickering (255 - motion) / 255, as VBench defines it (arXiv 2311.17982); near 1 is a still picture
    luma                mean BT.709 luma of gamma-encoded RGB, 0 to 1
    saturation          mean HSV saturation (max - min) / max, 0 to 1; 0 for black
    clipped             fraction of values at 0 or 255
    contrast            standard deviation of luma in a frame (RMS contrast, Peli 1990)
    sharpness           standard deviation of luma's 4-neighbour Laplacian (the root of Pech-Pacheco's focus measure)
    {luma, saturation, contrast, sharpness}_drift
                        change of that from the first to the last frame, by a least-squares line, in its unit
    seam                mean difference of the steps `seams_G` between blocks over that of the others (flicker of a
                        rolling cache; 1 is none)

    A number that the clip has not (a drift of one frame, a seam without blocks or without motion) is NaN.

    Raises:
      UserError: the array is no such clip, or holds NaN.
    """
    array = np.asarray(video_PHWC)
    frames = check_uint8(array if array.dtype == np.uint8 else to_uint8(array), "PHWC", "guard")
    series = frame_series(frames)
    step = series.pop("difference")
    motion = float(step.mean()) if len(step) else math.nan
    out = {
        "motion": motion,
        "frozen": float((step < _FROZEN).mean()) if len(step) else math.nan,
        "travel": _distance(frames[-1], frames[0]) / motion if motion > 0 else math.nan,
        "temporal_flickering": (255.0 - motion) / 255.0,
        **{name: float(values.mean()) for name, values in series.items()},
    }
    for name in ("luma", "saturation", "contrast", "sharpness"):
        out[f"{name}_drift"] = _drift(series[name])
    out["seam"] = math.nan
    at_seam = np.isin(np.arange(len(step)), [] if seams_G is None else seams_G)
    if at_seam.any() and not at_seam.all() and (inside := float(step[~at_seam].mean())) > 0:
        out["seam"] = float(step[at_seam].mean()) / inside
    return out


def thumbnail(video_PHWC: np.ndarray) -> np.ndarray:
    """At most 16 frames of a uint8 clip, box-averaged to at most 64 px a side; float32 grey levels."""
    frames = pick_frames(video_PHWC[None], _THUMBNAIL_FRAMES)[0]
    count, height, width, channels = frames.shape
    k = -(-max(height, width) // _THUMBNAIL)
    rows, columns = height // k, width // k
    cut = frames[:, : rows * k, : columns * k].reshape(count, rows, k, columns, k, channels)
    return cut.mean((2, 4), dtype=np.float32)


def diversity(thumbnails_BRPHWC: Sequence[Sequence[np.ndarray]]) -> dict[str, float]:
    """Diversity over seeds: distances between B prompts' R clips each, given as `thumbnail`s of one size.

    seed_distance  mean absolute difference, grey levels of 255, over pairs of one prompt's clips
    diversity      that over the mean over pairs of clips of different prompts: 0 when every seed gives one clip, about
                   1 when the prompt decides nothing. 0 too when all clips of all prompts are equal.

    NaN where there is no such pair.
    """
    same: list[float] = []
    other: list[float] = []
    flat = [(n, clip) for n, clips in enumerate(thumbnails_BRPHWC) for clip in clips]
    for i, (n, a) in enumerate(flat):
        for m, b in flat[i + 1 :]:
            (same if n == m else other).append(float(np.abs(a - b).mean()))
    within = float(np.mean(same)) if same else math.nan
    between = float(np.mean(other)) if other else math.nan
    ratio = (within / between if between > 0 else 0.0) if same and other else math.nan
    return {"seed_distance": within, "diversity": ratio}


class Collector:
    """Accumulates metrics over clips, one at a time. Keeps thumbnails only."""

    def __init__(self, seams_G: np.ndarray | None = None) -> None:
        self._seams = seams_G
        self._clips: list[dict[str, float]] = []
        self._thumbnails: dict[str, list[np.ndarray]] = {}

    def add(self, prompt: str, video_PHWC: np.ndarray) -> None:
        """Measures one clip of `prompt`. Raises UserError as `measure_clip` does."""
        array = np.asarray(video_PHWC)
        video = array if array.dtype == np.uint8 else to_uint8(array)
        self._clips.append(measure_clip(video, self._seams))
        self._thumbnails.setdefault(prompt, []).append(thumbnail(video))

    def values(self) -> dict[str, float]:
        """The means over clips, and `diversity`; metrics that are undefined are left out.

        Raises:
          UserError: no clip was added.
        """
        if not self._clips:
            raise UserError("guard: no clips to measure")
        means = {name: _mean([clip[name] for clip in self._clips]) for name in self._clips[0]}
        every = means | diversity(list(self._thumbnails.values()))
        return {name: value for name, value in every.items() if math.isfinite(value)}


def _mean(numbers: Sequence[float]) -> float:
    known = [number for number in numbers if math.isfinite(number)]
    return float(np.mean(known)) if known else math.nan


@dataclass(frozen=True)
class Sample:
    """The metrics at one step of a run."""

    step: int
    values: Values


@dataclass(frozen=True)
class Baseline:
    """Reference metrics of a run.

    Attributes:
      origin: for messages, "real clips" or "step 0".
      real: whether these are real clips; a student may well be sharper or livelier than its own first samples.
    """

    origin: str
    real: bool
    values: Values = field(default_factory=dict)


@dataclass(frozen=True)
class Thresholds:
    """Limits beyond which a metric is reported as a collapse: `*_ratio` of the baseline's value, others as differences.

    Chosen by measurement on the toy, 4 prompts with 3 seeds against real clips. Within them are the bidirectional
    teacher, an AR teacher, its CD student and DMD on top of that over 150 steps: motion 1.08 to 1.47 times the real
    clips', travel 0.74 to 0.84, saturation 0.96 to 1.07, contrast 0.85 to 1.04, sharpness 0.88 to 1.20, diversity 0.88
    to 1.22, luma and the drifts of luma and saturation within 0.007. Beyond them is DMD of the teacher itself, batch
    8, guidance 12: it over-saturates (1.55 times after 50 student updates, 1.82 after 60; guidance 1: 1.19, 1.25) and
    flickers (motion 2.8, 3.5 times; guidance 1: 2.1, 2.3). So do the seams of that AR teacher and its students (1.66 to
    1.84), whose 150 steps were too few: the directions of a quarter of its captions are followed. The collapses of
    tests/evaluation/test_guard.py are made of real clips; what is mild there (chroma 1.2 times, a blur of 0.4 px, half
    a grey level of grain) is silent.
    """

    motion_low_ratio: float = 0.5
    motion_high_ratio: float = 2.0
    frozen: float = 0.25
    travel_low_ratio: float = 0.5
    luma: float = 0.08
    luma_drift: float = 0.05
    saturation_low_ratio: float = 0.7
    saturation_high_ratio: float = 1.3
    saturation_drift: float = 0.08
    clipped: float = 0.1
    contrast_low_ratio: float = 0.6
    contrast_high_ratio: float = 1.6
    sharpness_low_ratio: float = 0.6
    sharpness_high_ratio: float = 2.0
    seam_ratio: float = 1.6
    diversity_low_ratio: float = 0.5
    diversity_low: float = 0.2


@dataclass(frozen=True)
class _Rule:
    """Metric `name` is reported when it differs from the baseline by more than `limit` (a field of Thresholds)."""

    name: str
    side: str  # "below", "above" or "away"
    limit: str
    message: str
    kind: str  # which advice
    real_only: bool = False


_RULES = (
    _Rule("motion", "below", "motion_low_ratio", "the videos freeze", "motion"),
    _Rule("motion", "above", "motion_high_ratio", "the videos flicker or jump", "motion", real_only=True),
    _Rule("frozen", "above", "frozen", "steps without any motion", "motion"),
    _Rule("travel", "below", "travel_low_ratio", "the videos flicker in place", "motion"),
    _Rule("luma", "away", "luma", "the brightness is off", "colour"),
    _Rule("luma_drift", "away", "luma_drift", "the brightness drifts within a clip", "drift"),
    _Rule("saturation", "above", "saturation_high_ratio", "the colours over-saturate", "colour"),
    _Rule("saturation", "below", "saturation_low_ratio", "the colours wash out", "colour"),
    _Rule("saturation_drift", "away", "saturation_drift", "the saturation drifts within a clip", "drift"),
    _Rule("clipped", "above", "clipped", "values hit black or full", "colour"),
    _Rule("contrast", "above", "contrast_high_ratio", "the contrast is too high", "colour"),
    _Rule("contrast", "below", "contrast_low_ratio", "the contrast is lost", "colour"),
    _Rule("sharpness", "below", "sharpness_low_ratio", "the videos blur", "blur"),
    _Rule("sharpness", "above", "sharpness_high_ratio", "grain or over-sharpening", "colour", real_only=True),
    _Rule("seam", "above", "seam_ratio", "the videos jump where blocks meet", "drift"),
    _Rule("diversity", "below", "diversity_low_ratio", "every seed gives much the same video", "diversity"),
)

# What to try, by kind, in clauses; one that names a key which the run does not read is left out.
_CRITIC = "raise cadence.student (more critic updates per student update)"
_DMD = {
    "motion": (_CRITIC, "start from a causal initialisation"),
    "colour": ("lower objective.real_guidance", "raise objective.gan.r1_weight", _CRITIC),
    "drift": (
        "lower objective.real_guidance",
        "raise objective.gan.r1_weight",
        "set objective.context_noise, so that the past is less trusted",
    ),
    "blur": ("train on", _CRITIC),
    "diversity": (
        "raise cadence.student",
        "lower optim.student.lr",
        "lower objective.real_guidance",
        "raise objective.gan.r1_weight",
    ),
}
_CONSISTENCY = {
    "motion": ("check objective.teacher=causal", "lower objective.guidance", "raise ema.student.decay"),
    "colour": ("lower objective.guidance",),
    "drift": ("lower objective.guidance", "check that blocks are those of the teacher"),
    "blur": ("train on", "set objective.boundary=True", "lower ema.student.decay"),
    "diversity": ("lower objective.guidance", "lower optim.student.lr"),
}
_OTHER = {
    "motion": ("check data and blocks.frames", "lower sampler.guidance"),
    "colour": ("lower sampler.guidance", "check the latents' normalisation"),
    "drift": ("check blocks.frames; the past that the network saw in training was cleaner than its own",),
    "blur": ("train on", "lower optim.student.lr if it has stopped improving"),
    "diversity": ("check that clips differ in data", "lower sampler.guidance"),
}
BACK = "go on from an earlier checkpoint"
_ADVICE = {"dmd": _DMD, "consistency": _CONSISTENCY}
_KEY = re.compile(r"\b(?:blocks|cadence|ema|objective|optim|sampler)(?:\.\w+)+")


def _broken(rule: _Rule, value: float, base: float, t: Thresholds) -> bool:
    limit = float(getattr(t, rule.limit))
    if rule.side == "away":
        return abs(value - base) > limit
    bound = base * limit if rule.limit.endswith("_ratio") else base + limit
    return value < bound if rule.side == "below" else value > bound


def warnings(
    now: Sample,
    baseline: Baseline,
    thresholds: Thresholds = Thresholds(),
    *,
    stage: str = "",
    keys: Collection[str] | None = None,
    earlier: bool = True,
) -> dict[str, str]:
    """A line for each sign of a collapse, by what it is: the metric, its value and the baseline's, the step, and what
    to try.

    Args:
      stage: the training stage ("dmd", "consistency" ...), whose own keys are then named.
      keys: of the config, those that the run reads, as "objective.guidance": no other is named. None: any of the stage.
      earlier: whether there is a checkpoint of an earlier step.
    """
    advice = _ADVICE.get(stage, _OTHER)
    out = {}
    for rule in _RULES:
        value, base = now.values.get(rule.name), baseline.values.get(rule.name)
        if value is None or base is None or (rule.real_only and not baseline.real):
            continue
        if _broken(rule, value, base, thresholds):
            where = f"{rule.name} {value:.3g}, {base:.3g} in {baseline.origin}"
            out[rule.message] = _line(now.step, where, rule.message, advice[rule.kind], keys, earlier)
    value = now.values.get("diversity")
    if value is not None and "diversity" not in baseline.values and value < thresholds.diversity_low:
        where = f"diversity {value:.3g}, expected {thresholds.diversity_low:g} or more"
        same = "every seed gives much the same video"
        out[same] = _line(now.step, where, same, advice["diversity"], keys, earlier)
    return out


def _line(
    step: int, where: str, message: str, fixes: Sequence[str], keys: Collection[str] | None, earlier: bool
) -> str:
    fixes = [fix for fix in fixes if keys is None or set(_KEY.findall(fix)) <= set(keys)]
    advice = [f"try: {', or '.join(fixes)}"] if fixes else []
    advice += ["or go on from an earlier checkpoint" if fixes else BACK] if earlier else []
    return "; ".join([f"step {step}: {message} ({where})", *advice])
