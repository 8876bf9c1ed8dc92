"""Settings that are allowed but probably unintended: a one-line note each when a run starts."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from cfjax.core.console import counted
from cfjax.experiment.build import Experiment
from cfjax.models.wan import PRESETS
from cfjax.rollout.generate import FewStep


def idle_devices(mesh: Mesh | None, devices: Sequence[jax.Device]) -> str:
    """One line when accelerators of this process would have nothing to do; "" when not."""
    count = len(devices)
    if count == 1 or devices[0].platform == "cpu" or mesh is not None:
        return ""
    return f"note: the mesh has size 1 and {count} devices are here; --config.mesh.fsdp={count} uses them all"


def differing_levels(e: Experiment) -> str:
    """One line when a few-step student would sample at other levels than it is trained at; "" when not."""
    objective, sampler = e.config["objective"], e.config["sampler"]
    keys = [key for key in ("steps", "first_steps", "shift") if key in objective and isinstance(e.sampler, FewStep)]
    trained, sampled = ({key: part[key] for key in keys} for part in (objective, sampler))
    if trained == sampled:
        return ""
    return f"note: objective trains at {trained}, but sampler (samples while training, cfjax generate) has {sampled}"


def idle_windows(e: Experiment, clip_frames: int) -> list[str]:
    """Notes on a window longer than any video, and on scores that see more frames than a clip has."""
    shown, rolled = (e.config["objective"].get(key, 0) for key in ("window_frames", "max_frames"))
    frames, out = rolled or clip_frames, []
    if e.blocks.window > frames:
        out.append(f"note: blocks.window={e.blocks.window} hides nothing: training videos have {frames} latent frames")
    if shown > clip_frames:
        out.append(
            f"note: objective.window_frames={shown} shows the scores more than the dataset's clips of {clip_frames} "
            "latent frames; it should be what they were trained on"
        )
    return out


def other_sizes(e: Experiment) -> list[str]:
    """Notes on networks that are not of their preset's sizes, because they start from weights of other sizes."""
    return [
        f"note: roles.{name}.init={role.init!r} has {counted(role.base.num_layers, 'layer')} of width {role.base.dim}, "
        f"which holds: not roles.{name}.preset={role.preset!r}"
        for name, role in e.networks.items()
        if role.preset in PRESETS and (role.base.num_layers, role.base.dim) != _depth_and_width(role.preset)
    ]


def _depth_and_width(name: str) -> tuple[int, int]:
    return PRESETS[name].num_layers, PRESETS[name].dim
