"""`--config.reference=True`: a stage as the PyTorch reference runs it, in the toy too."""

import math
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from cfjax.core.cli import keys_of
from cfjax.core.console import say
from cfjax.core.errors import UserError
from cfjax.experiment.presets import NEVER
from cfjax.flow.schedule import sigma_table

# Per stage, what the switch sets: the quirks that change numbers and the reference's own numbers of the loss and of the
# averaged weights. Networks, data, blocks, step lists, optimisers, cadence and sampler stay the config's. The reference
# has no stage "bidirectional"; the rounding of timesteps there is stage 1's. An average that starts never is a copy.
REFERENCE: dict[str, dict[str, Any]] = {
    "bidirectional": {"objective.bf16_timesteps": True},  # Q1
    "ar_diffusion": {
        "objective.bf16_timesteps": True,  # Q1
        "objective.text_dropout": 0.0,  # Q19
        "objective.weighting": "bsmntw",
        "ema.student.start": NEVER,  # Q11
    },
    "ode_pairs": {"objective.guidance": 6.0},  # Q8
    "ode_regression": {"ema.student.start": NEVER},
    "consistency": {
        "objective.bf16_timesteps": True,  # Q2
        "objective.boundary": False,  # Q23
        "objective.guidance": 3.0,  # Q8
        "ema.student.decay": 0.99,  # Q11
        "ema.student.start": 0,
    },
    "dmd": {
        "objective.context_noise": lambda c: float(sigma_table(1000, c.objective.shift)[-1]),  # Q4
        "objective.kv_gradient": "straight_through",  # Q6
        "objective.same_exit": True,
        "objective.score_table_shift": 8.0,  # Q3
        "objective.real_guidance": 3.0,
        "objective.fake_guidance": 0.0,
        "objective.score_shift": 5.0,
        "objective.score_min": 0.02,
        "objective.score_max": 0.98,
        "ema.student.decay": 0.99,  # Q11
        "ema.student.start": 200,
    },
}


def unused_keys(c: ConfigDict) -> set[str]:
    """Keys of a stage's objective that its other keys turn off: a GAN has no scores to guide, noised clips no cache."""
    if c.stage != "dmd":
        return set()
    names: list[str] = []
    if c.objective.matching == "gan":
        names += ["real_guidance", "fake_guidance"]
    if c.objective.student_input == "noised_data":
        names += ["context_noise", "kv_gradient", "same_exit", "save_activations", "rolling"]
    return {f"objective.{name}" for name in names}


def apply_reference(c: ConfigDict, given: Collection[str] = ()) -> ConfigDict:
    """`c`, or if `c.reference` is set a copy with the stage's keys of REFERENCE; logs a line for each change.

    Args:
      given: keys that the command line set (`core.cli.given_keys`).

    Raises:
      UserError: one of them asks for another number than the reference's.
    """
    if not c.reference:
        return c
    out, known, skipped, changes = c.copy_and_resolve_references(), keys_of(c), unused_keys(c), []
    for key, value in REFERENCE.get(c.stage, {}).items():
        if key not in known or key in skipped:
            continue
        value, old = value(c) if callable(value) else value, known[key]
        near = isinstance(value, float) and math.isclose(old, value, rel_tol=1e-4)  # 0.00498, as one writes it
        if key in given and old != value and not near:
            raise UserError(f"--config.{key}={old}: --config.reference=True sets it to {value}; leave one of them out")
        if old != value:
            changes.append(f"{key} {old} -> {value:.6g}" if isinstance(value, float) else f"{key} {old} -> {value}")
            out.update_from_flattened_dict({key: value})
    say("reference: " + (", ".join(changes) or "this config has all of its numbers already"))
    return out
