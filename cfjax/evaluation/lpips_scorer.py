"""LPIPS (Zhang et al. 2018) frame by frame against a reference, by the package `lpips`.

The package has the weights of its linear layers; those of the network below them, torchvision's AlexNet, VGG-16 or
SqueezeNet, it would download. Here they are read from a file, torchvision's own.
"""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.paths import one_line
from cfjax.data.pictures import Unusable
from cfjax.evaluation.scorers import ScoredClip, ScorerSettings
from cfjax.evaluation.torch_part import device_of, torch_of

FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}
OPTIONS = {"net": "alex"}
PACKAGES = ("lpips", "torchvision", "torch")
BATCH = 8  # pairs of frames at a time


class LpipsScorer:
    """See `evaluation.scorers.ClipScorer`."""

    needs = frozenset({"reference"})

    def __init__(self, settings: ScorerSettings) -> None:
        self.name = settings.name
        net = settings.chosen(OPTIONS)["net"]
        if net not in FILES:
            raise UserError(f"{settings.key('options')}: net={net} is none of {', '.join(FILES)}")
        self._torch = torch_of(settings)
        try:
            import lpips
        except ImportError as error:
            raise UserError(
                f"lpips cannot be imported ({one_line(error)}); pip install lpips==0.1.4 torchvision, the torchvision "
                f"of the installed torch {self._torch.__version__}"
            ) from None
        self.version = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
        self._file = settings.weight_path(
            f"torchvision's {FILES[net]}, which torchvision.models.{_MODELS[net]}(weights='DEFAULT') downloads to "
            "~/.cache/torch/hub/checkpoints"
        )
        self._device = device_of(self._torch, settings)
        with warnings.catch_warnings():  # it calls torchvision by names of before
            warnings.simplefilter("ignore")
            network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        self._load(network, settings)
        self._network: Any = network.eval().to(self._device)

    def _load(self, network: Any, settings: ScorerSettings) -> None:
        """Puts torchvision's `features.N.*` in place of the random values, `sliceK.N.*` of the package's network.

        Raises:
          UserError: the file is of another network.
        """
        torch, key = self._torch, f"{settings.key('weights')}={self._file}"
        try:
            stored = torch.load(str(self._file), map_location="cpu", weights_only=True)
            stored = {name: x for name, x in stored.items() if name.startswith("features.")}
        except Exception as error:
            raise UserError(f"{key}: no weights of torchvision ({one_line(error)[:200]})") from None
        with torch.no_grad():
            for name, parameter in network.net.named_parameters():
                source = stored.get(f"features.{name.partition('.')[2]}")
                if source is None or source.shape != parameter.shape:
                    raise UserError(f"{key}: has no {name.partition('.')[2]} of its network; choose options='net=...'")
                parameter.copy_(source)

    def weights(self) -> Sequence[Path]:
        """The file of the network below; the linear layers are the package's, of its version."""
        return [self._file]

    def close(self) -> None:
        """Lets the network go."""
        self._network = None

    def score(self, clip: ScoredClip) -> Mapping[str, float]:
        """The mean over the frames that both have. Raises Unusable for frames of another size."""
        found: list[float] = []
        pairs = zip(clip.frames(), clip.reference_frames(), strict=False)
        while batch := list(itertools.islice(((np.array(a), np.array(b)) for a, b in pairs), BATCH)):
            a, b = batch[0]
            if a.shape != b.shape:
                raise Unusable(f"the reference has {b.shape[1]} x {b.shape[0]}, not {a.shape[1]} x {a.shape[0]} pixels")
            ours, theirs = (self._inputs([pair[side] for pair in batch]) for side in (0, 1))
            with self._torch.no_grad():
                found += self._network(ours, theirs).flatten().tolist()
        if not found:
            raise Unusable("no frame in common with the reference")
        return {"": float(np.mean(found))}

    def _inputs(self, frames: Sequence[np.ndarray]) -> Any:
        """float32 [B, 3, H, W] in [-1, 1]."""
        video = self._torch.from_numpy(np.stack(frames)).to(self._device)
        return video.permute(0, 3, 1, 2).float() / 127.5 - 1


_MODELS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def make(settings: ScorerSettings) -> LpipsScorer:
    """The entry point `lpips`."""
    return LpipsScorer(settings)
