"""The latent dataset on disk: whole or absent, and exactly what was encoded."""

import hashlib
import json
import resource
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cfjax.core.errors import Temporary, UserError
from cfjax.data.latents import LatentDataset
from cfjax.data.precompute import LatentWriter, digest, precompute
from cfjax.data.shapes import ShapesConfig, ShapesSource

CONFIG = ShapesConfig()
SHAPE = (3, 2, 2, 4)


class MeanCodec:
    """A codec of 8x8 means, enough to see what was encoded."""

    def encode(self, video_BPHWC: jax.Array) -> jax.Array:
        b, p, h, w, c = video_BPHWC.shape
        return jnp.mean(video_BPHWC.reshape(b, p, h // 8, 8, w // 8, 8, c), axis=(3, 5))

    def describe(self) -> dict:
        return {"name": "mean"}


def encode_captions(captions):
    return np.stack([np.full((2, 3), len(caption), np.float32) for caption in captions])


def make(path, source, **kwargs):
    options = {"text_encoder": {"name": "length"}, "batch_size": 4, "progress": False} | kwargs
    return precompute(source, MeanCodec(), options.pop("encode_captions", encode_captions), path, **options)


def test_dataset_holds_every_record_caption_and_factor(tmp_path):
    source = ShapesSource(CONFIG, 3, 10)
    dataset = LatentDataset(make(tmp_path / "set", source))
    assert len(dataset) == 10 and dataset.latent_shape == (12, 4, 4, 3) and dataset.trajectory_points == 0
    codec = MeanCodec()
    for i in range(10):
        item = source[i]
        expected = np.asarray(codec.encode(jnp.asarray(item["video_PHWC"])[None]))[0]
        np.testing.assert_allclose(dataset[i]["latents_FHWC"], expected, atol=1e-3)
        assert dataset.caption(i) == item["caption"]
        np.testing.assert_array_equal(dataset[i]["text_SE"], encode_captions([item["caption"]])[0])
        np.testing.assert_array_equal(dataset.factors()["centres"][i], item["factors"]["centres"])
    np.testing.assert_array_equal(dataset.negative_text_SE, np.zeros((2, 3)))
    assert len(set(dataset.captions)) == len(dataset.captions)


def test_manifest_shows_where_the_data_come_from(tmp_path):
    make(tmp_path / "set", ShapesSource(CONFIG, 3, 4))
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["codec"] == {"name": "mean"} and manifest["text_encoder"] == {"name": "length"}
    assert ShapesConfig.from_json(manifest["source"]["config"]) == CONFIG and manifest["source"]["seed"] == 3
    assert manifest["source_sha256"] == digest(manifest["source"])


def test_a_crash_in_the_middle_leaves_nothing(tmp_path):
    class Breaking(ShapesSource):
        def __getitem__(self, index):
            if index == 7:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "set", Breaking(CONFIG, 0, 10))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_text_encoder_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="text encoder"):
        make(tmp_path / "set", ShapesSource(CONFIG, 0, 4), encode_captions=lambda names: np.zeros((1, 3)))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_dataset_is_kept_unless_overwrite_is_passed(tmp_path):
    make(tmp_path / "set", ShapesSource(CONFIG, 0, 4))
    with pytest.raises(UserError, match="already exists"):
        make(tmp_path / "set", ShapesSource(CONFIG, 0, 6))
    assert len(LatentDataset(tmp_path / "set")) == 4
    make(tmp_path / "set", ShapesSource(CONFIG, 0, 6), overwrite=True)
    assert len(LatentDataset(tmp_path / "set")) == 6
    assert [entry.name for entry in tmp_path.iterdir()] == ["set"]


def test_overwrite_never_touches_a_folder_that_is_no_dataset(tmp_path):
    (tmp_path / "thesis").mkdir()
    with pytest.raises(UserError, match="not a latent dataset"):
        make(tmp_path / "thesis", ShapesSource(CONFIG, 0, 4), overwrite=True)


def fill(path, *, ids=(0, 1), latents=None, trajectory=None, text=True, **kwargs):
    latents = np.ones((2, *SHAPE)) if latents is None else latents
    with LatentWriter(path, records=2, latent_shape=SHAPE, **kwargs) as writer:
        writer.append(latents, np.array(ids), trajectory)
        if text:
            writer.write_text(["a", "b"], np.zeros((2, 5, 6)), np.zeros((5, 6)))


def test_ode_sets_carry_trajectories(tmp_path):
    trajectory = np.arange(2 * 5 * np.prod(SHAPE)).reshape(2, 5, *SHAPE) / 64
    fill(tmp_path / "ode", trajectory=trajectory, trajectory_points=5, dtype="float32")
    dataset = LatentDataset(tmp_path / "ode")
    assert dataset.trajectory_points == 5 and dataset.factors() == {}
    np.testing.assert_array_equal(dataset[1]["trajectory_JFHWC"], trajectory[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": np.ones((1, *SHAPE)), "ids": (0,)}, "1 of 2 records"),
        ({"latents": np.ones((3, *SHAPE)), "ids": (0, 1, 1)}, "more than the announced"),
        ({"latents": np.ones((2, 3, 2, 2, 5))}, "latents"),
        ({"latents": np.full((2, *SHAPE), 1e6)}, "not finite"),
        ({"ids": (0, 2)}, "caption_id"),
        ({"text": False}, "no text"),
        ({"trajectory": np.ones((2, 5, *SHAPE))}, "trajectory"),
        ({"trajectory_points": 5}, "trajectory"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_misfits_are_refused_and_leave_nothing(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        fill(tmp_path / "set", **change)
    assert list(tmp_path.iterdir()) == []


def test_a_digest_is_that_of_the_text_without_the_text_in_memory():
    values = {"b": ["ein", "größer\n", {"y": 1.5, "x": None}], "a": [True, [1, 2]], "prompts": ["a prompt"] * 100_000}
    expected = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    tracemalloc.start()
    try:
        assert digest(values) == expected
        assert tracemalloc.get_traced_memory()[1] < 100_000  # the text has 1,200,000 characters
    finally:
        tracemalloc.stop()


def test_a_full_disk_is_reported_before_a_mapped_file_is_written_to(tmp_path):
    """Beyond what there is room for, writing to a map would end the process; nothing is left of the attempt."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(Temporary, match=r"set: no room for latents\.npy .*is the disk full"):
            LatentWriter(tmp_path / "set", records=10_000, latent_shape=SHAPE).__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    with LatentWriter(tmp_path / "set", records=1, latent_shape=SHAPE) as writer:
        assert all(file.stat().st_blocks * 512 >= file.stat().st_size for file in writer._partial.glob("*.npy"))
        writer.append(np.ones((1, *SHAPE)), np.zeros(1, np.int32))
        writer.write_text(["a"], np.ones((1, 2, 3)), np.ones((2, 3)))
