"""The metrics of a clip by name: unit, meaning, source. docs/evaluate.md has the formulas."""

from collections.abc import Iterable
from dataclasses import dataclass

FLICKERING, FRAMES, MOTION = "flickering", "frames", "motion"
GROUPS = (FLICKERING, FRAMES, MOTION)


@dataclass(frozen=True)
class Metric:
    """A number of a clip.

    Attributes:
      digits: behind the point, as it is printed.
      size: with a sign that a comparison leaves away, as a drift up is no better than one down.
      compared: whether two systems are compared by it.
    """

    name: str
    title: str
    unit: str
    help: str
    digits: int = 3
    size: bool = False
    compared: bool = True


_DRIFTING = ("luma", "saturation", "contrast", "sharpness")
METRICS = (
    Metric("temporal_flickering", "Temporal flickering", "", "VBench's formula on all clips; 1 is a still picture", 4),
    Metric("dynamic_degree", "Dynamic degree, DIS", "share", "VBench's sampling and threshold on DIS optical flow", 3),
    Metric("flow", "Flow", "px/frame", "mean length of the optical flow (DIS)", 2),
    Metric("flow_fastest", "Flow, fastest 5 %", "px/frame", "the same over the fastest 5 % of the pixels", 2),
    Metric("object_flow", "Flow beside the camera's", "px/frame", "what the global affine motion leaves", 2),
    Metric("camera_speed", "Camera", "px/frame", "length of the global motion of the picture's centre", 2),
    Metric("camera_share", "Camera, share", "share", "part of the picture that follows the global motion", 3),
    Metric("pan", "Pan", "px/frame", "global motion to the right", 2, compared=False),
    Metric("tilt", "Tilt", "px/frame", "global motion down", 2, compared=False),
    Metric("zoom", "Zoom", "1/s", "logarithm of the global growth per second", 3, compared=False),
    Metric("roll", "Roll", "deg/s", "global turn, clockwise", 2, compared=False),
    Metric("motion_smoothness", "Motion smoothness, DIS", "", "odd frames against neighbours warped by DIS", 4),
    Metric("seam", "Seam", "ratio", "change from block to block over that within blocks; 1 is none", 2),
    Metric("seam_luma", "Seam, luma", "ratio", "the same of mean luma", 2),
    *(Metric(name, name.capitalize(), "0 to 1", f"mean {name}", 3) for name in _DRIFTING),
    *(
        Metric(f"{name}_drift", f"Drift, {name}", "1/s", f"slope of {name} over the clip", 4, size=True)
        for name in _DRIFTING
    ),
    Metric("frozen", "Frozen", "share", "steps that change less than 0.25 of 255 levels", 3),
    Metric("longest_freeze", "Longest freeze", "s", "the longest run of them", 2),
    Metric("loop", "Loop", "share", "clips that come round again", 3),
    Metric("loop_period", "Loop, period", "s", "of those that do", 2, compared=False),
    Metric("psnr", "PSNR", "dB", "against the reference", 2),
    Metric("ssim", "SSIM", "", "against the reference, luma", 4),
    Metric("ms_ssim", "MS-SSIM", "", "against the reference, luma", 4),
    Metric("action_fidelity", "Action fidelity", "", "correlation of camera motion with the recorded actions", 3),
    Metric("action_sign", "Action, direction", "share", "asked moves whose direction is right", 3),
)
BY_NAME = {metric.name: metric for metric in METRICS}


_SCORED = {
    "lpips": "LPIPS against the reference, mean over frames; 0 is equal",
    "visionreward": "VisionReward's weighted answers",
    "visionreward.instruction_following": "mean answer, yes 1 and no -1, to its questions that quote the prompt",
    "hpsv3": "HPSv3's reward, mean over frames",
}


def metric_of(name: str) -> Metric:
    """A metric of the table, or one of a scorer: its name, SCORER or SCORER.NUMBER, is all that is known of it."""
    if name in BY_NAME:
        return BY_NAME[name]
    scorer, _, own = name.partition(".")
    return Metric(name, name, "", _SCORED.get(name, f"{own or 'the number'} of scorer {scorer}"), 4)


def metrics_of(names: Iterable[str]) -> tuple[Metric, ...]:
    """The metrics of these names: the table's in its order, then those of scorers by name."""
    given = set(names)
    return tuple(m for m in METRICS if m.name in given) + tuple(map(metric_of, sorted(given - BY_NAME.keys())))


def known_groups(names: tuple[str, ...]) -> str:
    """What is wrong with a choice of groups; "" for nothing."""
    unknown = [name for name in names if name not in GROUPS]
    return f"metrics={','.join(names)}: {unknown[0]} is none of {', '.join(GROUPS)}" if unknown else ""
