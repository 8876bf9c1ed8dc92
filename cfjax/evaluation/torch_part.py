"""PyTorch, which scorers alone need."""

from typing import Any

from cfjax.core.errors import UserError
from cfjax.evaluation.scorers import DEVICES, ScorerSettings


def torch_of(settings: ScorerSettings) -> Any:
    """The module. Raises UserError where it is not installed."""
    if settings.python:
        raise UserError(f"{settings.key('python')}: {settings.name} runs in this environment; leave it out")
    try:
        import torch
    except ImportError:
        raise UserError(f"PyTorch is missing, which {settings.name} needs; pip install -e '.[convert]'") from None
    return torch


def device_of(torch: Any, settings: ScorerSettings) -> str:
    """Where a network runs. Raises UserError for a device that is not there."""
    if settings.device not in DEVICES:
        raise UserError(f"{settings.key('device')}={settings.device}: use cpu or cuda")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{settings.key('device')}=cuda: this machine's torch has no GPU; leave it out, or use cpu")
    return settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
