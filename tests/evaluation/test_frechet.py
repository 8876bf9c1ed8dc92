"""FVD: the distance against SciPy's matrix root, and a whole folder through a small TorchScript network."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.linalg import sqrtm

from cfjax.evaluation.clip_folders import RESULT
from cfjax.evaluation.clip_source import SourceClip, reading
from cfjax.evaluation.clip_summary import VIDEOS
from cfjax.evaluation.frechet import frechet_distance
from tests.evaluation.test_scorers import evaluate, system

torch = pytest.importorskip("torch")


def by_root(a: np.ndarray, b: np.ndarray) -> float:
    """As public code has it: SciPy's square root of the product of covariances."""
    gap, (s, t) = a.mean(0) - b.mean(0), (np.cov(x, rowvar=False) for x in (a, b))
    return float(gap @ gap + np.trace(s + t - 2 * sqrtm(s @ t).real))


@pytest.mark.parametrize("counts", [(200, 300), (33, 500), (400, 32)])
def test_the_distance_is_scipys(counts):
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(32, 32))
    a, b = rng.normal(size=(counts[0], 32)), rng.normal(size=(counts[1], 32)) @ mix + 0.3
    ours, theirs = frechet_distance(a, b), by_root(a, b)
    print(f"{counts}: {ours:.4f}, {abs(ours - theirs) / theirs:.1e} from SciPy's")
    assert ours == pytest.approx(theirs, rel=2e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_fewer_clips_than_features_have_the_exact_distance():
    """Of singular covariances: in the plane in which all clips lie it is that of full ones."""
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.normal(size=(100, 4)))[0].T
    a, b = rng.normal(size=(9, 4)), rng.normal(size=(7, 4)) * 2 + 1
    assert frechet_distance(a @ basis, b @ basis) == pytest.approx(by_root(a, b), rel=1e-11)
    x, y = np.array([[0.0], [2.0]]), np.array([[1.0], [7.0]])  # (mean gap)^2 + (difference of deviations)^2
    assert frechet_distance(x, y) == pytest.approx(9 + (math.sqrt(2) - math.sqrt(18)) ** 2)


class Small(torch.nn.Module):
    """Called as I3D's TorchScript is."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv3d(3, 6, (3, 8, 8), (2, 8, 8))

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        assert not rescale and not resize and return_features and x.shape[3] == 224 and x.shape[4] == 224
        return torch.relu(self.layer(x)).mean((2, 3, 4))


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> tuple[Small, Path]:
    torch.manual_seed(0)
    made, file = Small().eval(), tmp_path_factory.mktemp("network") / "i3d_torchscript.pt"
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and what public networks come in
        torch.jit.script(made).save(str(file))
    return made, file


def features(made: Small, folder: Path) -> np.ndarray:
    """As public code prepares whole clips."""
    out = []
    for file in sorted(folder.glob("*.mp4")):
        with reading(SourceClip(file.name, file)) as opened:
            video = torch.from_numpy(np.stack([np.array(frame) for frame in opened.frames])).permute(3, 0, 1, 2) / 255
        height, width = video.shape[2:]
        size = (224, math.ceil(width * 224 / height)) if height < width else (math.ceil(height * 224 / width), 224)
        video = torch.nn.functional.interpolate(video, size=size, mode="bilinear", align_corners=False)
        top, left = (size[0] - 224) // 2, (size[1] - 224) // 2
        video = (video[:, :, top : top + 224, left : left + 224] - 0.5) * 2
        with torch.no_grad():
            out.append(made(video[None], False, False, True).numpy())
    return np.concatenate(out)


def test_a_folder_against_another_one(network, tmp_path, capsys):
    made, file = network
    ours = system(tmp_path / "ours", {f"{name}-0": n for n, name in enumerate("abc")}, length=10)
    theirs = system(tmp_path / "theirs", {"a-0": 9, "x-0": 12, "y-0": 17, "z-0": 20}, length=10)
    short = system(tmp_path / "short", {"a-0": 3}, length=4)
    (short / "a-0.mp4").rename(ours / "d-0.mp4")
    keys = {"videos": ours, "against": theirs, "scorers__fvd__weights": file}
    assert evaluate(tmp_path / "w", "fvd", **keys) == 0
    (ours / "d-0.mp4").unlink()
    output = capsys.readouterr().out
    record = json.loads((tmp_path / "w" / VIDEOS).read_text())["scorers"]["fvd"]
    expected = by_root(*(features(made, folder).astype(np.float64) for folder in (ours, theirs)))
    print(f"FVD {expected:.3e}, {abs(record['folder']['fvd'] / expected - 1):.1e} from public code's steps")
    assert record["folder"]["fvd"] == pytest.approx(expected, rel=1e-4)
    assert (record["clips"], record["against"]) == (3, 4) and "of 3 clips against 4" in output
    assert "fvd: d-0.mp4 (clips): too short: 4 frames, and its network takes 10 or more" in output
    kept = (tmp_path / "w" / "scorers" / "fvd" / "against" / "z-0.mp4.json").stat().st_mtime_ns
    assert evaluate(tmp_path / "w", "fvd", **keys) == 0
    assert (tmp_path / "w" / "scorers" / "fvd" / "against" / "z-0.mp4.json").stat().st_mtime_ns == kept
    assert evaluate(tmp_path / "c", compare=f"{tmp_path / 'w'},{tmp_path / 'w'}") == 0
    number = record["folder"]["fvd"]
    assert json.loads((tmp_path / "c" / RESULT).read_text())["folders"] == {"fvd": {"a": number, "b": number}}
    assert "of whole folders: one number a side, without a test" in capsys.readouterr().out
    assert evaluate(tmp_path / "c", "fvd", videos=ours, scorers__fvd__weights=file) == 2
    assert "fvd compares with a reference: give --config.against=FOLDER" in capsys.readouterr().err
