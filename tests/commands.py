"""Commands of the toy world as tests give them: two steps on a few short clips."""

from pathlib import Path

from cfjax.__main__ import main

ROOT = Path(__file__).parents[1]


def cfjax(verb: str, config: str, workdir: Path | str, **keys: object) -> int:
    """Runs one command; `a__b=1` is --config.a.b=1."""
    overrides = [f"--config.{name.replace('__', '.')}={value}" for name, value in keys.items()]
    return main([verb, f"--config={ROOT}/configs/{config}", f"--workdir={workdir}", *overrides])


def tiny_data(root: Path) -> dict[str, object]:
    return {
        "data__path": root / "data",
        "data__assets": "",
        "data__clips": 64,
        "data__batch_size": 4,
        "data__shapes__frames": 6,
        "progress": False,
    }


def tiny(root: Path, trained: str = "student") -> dict[str, object]:
    """Two steps on six frames; nothing is sampled, which would only take longer to compile."""
    quiet = {"sample_clips": 0, "guard__enabled": False}
    return {**tiny_data(root), "steps": 2, "log_every": 1, **quiet, f"roles__{trained}__remat": "none"}
