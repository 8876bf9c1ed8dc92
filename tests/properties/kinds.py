"""Miniature files of every kind that cfjax reads, how each may be damaged, and the public reader that must notice.

A kind's reader gives what the file means as plain values, which are right if they equal the whole file's, or if they
are `sane`: what such a file could have said, as when one letter of a caption is another.
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.properties.mutations import Mutate, bits, json_file, json_lines, safetensors

LARGEST = 1e7  # no number of a miniature is meant to be beyond, unless the whole file's is


@dataclass(frozen=True)
class Kind:
    """One file of a folder.

    Attributes:
      make: writes the folder.  file: the one that is damaged, within it.
      read: of the folder, what the file says; raises as cfjax does.
      damage: how.  sane: whether another value than the whole file's could have been meant, given that one.
      slow: a reader that takes a second.
    """

    make: Callable[[Path], Any]
    file: str
    read: Callable[[Path], Any]
    damage: Mutate
    sane: Callable[[Any, Any], bool]
    slow: bool = False


# ---- values


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, types and arrays' bits included."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def alike(one: Any, whole: Any) -> bool:
    """Whether a value has the shape of the whole file's: types, keys and lengths; numbers finite and not absurd."""
    if isinstance(one, np.ndarray) and isinstance(whole, np.ndarray):
        plain = np.issubdtype(one.dtype, np.integer) or bool(np.isfinite(one.astype(np.float32)).all())
        return one.dtype == whole.dtype and one.shape == whole.shape and plain
    if isinstance(one, bool) or isinstance(whole, bool):
        return type(one) is type(whole)
    if isinstance(whole, int | float) and isinstance(one, int | float):
        signs = one >= 0 or whole < 0
        return signs and (isinstance(one, int) or math.isfinite(one)) and abs(one) <= max(LARGEST, abs(whole))
    if type(one) is not type(whole):
        return False
    if isinstance(one, dict):
        return one.keys() >= whole.keys() and all(alike(one[key], whole[key]) for key in whole)
    if isinstance(one, list | tuple):
        return len(one) == len(whole) and all(map(alike, one, whole))
    return not isinstance(one, str) or _is_text(one)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def plain(value: Any) -> Any:
    """Dataclasses as dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


# ---- weights


def _release(folder: Path, shards: int = 1) -> None:
    from tests import synthetic

    synthetic.write_config(folder)
    synthetic.save_safetensors(folder, "diffusion_pytorch_model", synthetic.dit_weights(), shards)


def _read_release(path: Path) -> Any:
    from cfjax.conversion.sources import open_source
    from tests import synthetic

    assumed = {**synthetic.DIT, "eps": 1e-6} if path.suffix == ".pt" else None
    found = open_source(path, parts=["dit"], assumed=assumed).found
    return [
        (each.role, plain(each.network.config), {name: x.read() for name, x in each.network.arrays.items()})
        for each in found
    ]


def _checkpoint(folder: Path) -> None:
    from tests import synthetic

    synthetic.write_causal_forcing_pt(folder / "model.pt")


def _gguf(folder: Path) -> None:
    from gguf import GGMLQuantizationType, quants

    from tests import synthetic
    from tests.conversion.repacked import is_matrix, save_gguf

    tensors = {}
    for name, x in synthetic.dit_weights(dim=128, ffn_dim=32, num_heads=1, num_layers=1).items():
        eight = is_matrix(name, x)
        raw = quants.quantize(x, GGMLQuantizationType.Q8_0) if eight else x
        tensors[name] = ("Q8_0" if eight else "F32", x.shape, raw.tobytes())
    save_gguf(folder / "x.gguf", tensors, {"general.architecture": "wan"})


def _float8(folder: Path) -> None:
    from tests import synthetic
    from tests.conversion.repacked import save_raw, scaled

    synthetic.write_config(folder)
    save_raw(folder / "x.safetensors", scaled(synthetic.dit_weights(), "comfy")[0])


def _distributed(folder: Path) -> None:
    from tests import synthetic
    from tests.conversion.repacked import save_distributed

    save_distributed(folder, synthetic.as_torch(synthetic.dit_weights(dim=128, num_heads=1, num_layers=1)))


def _taehv(folder: Path) -> None:
    from tests import synthetic

    synthetic.write_taehv(folder / "taew2_1.pth")


def _clip(folder: Path) -> None:
    from tests import synthetic

    synthetic.save_pt(folder / "clip.pth", synthetic.as_torch(synthetic.clip_weights()))


def _clip_folder(folder: Path) -> None:
    """transformers' layout."""
    from safetensors.numpy import save_file

    from cfjax.conversion.sources import open_source

    _clip(folder)
    network = open_source(folder / "clip.pth").found[0].network
    arrays = {name: np.ascontiguousarray(x.read()) for name, x in network.exported("diffusers").items()}
    (folder / "clip.pth").unlink()
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(network.about("diffusers")))


def _read_only(folder: Path) -> Any:
    from cfjax.conversion.sources import open_source

    (found,) = open_source(folder).found
    return plain(found.network.config), {name: x.read() for name, x in found.network.arrays.items()}


def _lora(folder: Path) -> None:
    """peft's folder, alpha in its config; the network below is the release's."""
    from safetensors.numpy import save_file

    from tests import synthetic

    rng, state = np.random.default_rng(0), {}
    for module in ("self_attn.q", "ffn.0"):
        out, into = synthetic.dit_shapes(**synthetic.DIT, text_dim=synthetic.TEXT_DIM)[f"blocks.1.{module}.weight"]
        name = f"base_model.model.blocks.1.{module}"
        state[f"{name}.lora_A.weight"] = rng.standard_normal((4, into)).astype(np.float32)
        state[f"{name}.lora_B.weight"] = rng.standard_normal((out, 4)).astype(np.float32)
    save_file(state, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"ffn.0": 2}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def _read_merged(folder: Path) -> Any:
    from cfjax.conversion.lora import open_loras, with_loras
    from cfjax.conversion.sources import open_source

    network = with_loras(open_source(_other_release()).found[0].network, open_loras(str(folder)))
    return {name: x.read() for name, x in network.exported("original").items() if "blocks.1" in name}


@cache
def _other_release() -> Path:
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="cfjax-properties-"))
    _release(folder)
    return folder


# ---- worlds and runs


def _toy(folder: Path) -> None:
    from cfjax.worlds.assets import ASSETS

    shutil.copytree(ASSETS / "toy_teacher", folder, dirs_exist_ok=True)


def _read_world(folder: Path) -> Any:
    from cfjax.worlds.toy import ToyWorld

    world = ToyWorld.load(folder)
    arrays = (np.asarray(world.codec.mean), np.asarray(world.codec.basis))
    return plain(world.shapes), arrays, world.encode_prompts(["a red circle moving left"])


def _sane_world(one: Any, whole: Any) -> bool:
    """Words, factors and speeds of another world; what it is made of has the same sizes."""
    return alike(list(one[1:]), list(whole[1:])) and one[0].keys() == whole[0].keys()


@cache
def _converted() -> Path:
    """A converted release: run directory and world."""
    import tempfile

    from cfjax.convert import main
    from tests import synthetic

    root = Path(tempfile.mkdtemp(prefix="cfjax-properties-"))
    synthetic.write_wan_folder(root / "release", shards=1)
    main([f"--config.source={root}/release", f"--workdir={root}/run", "--config.progress=False"])
    return root / "run"


def _run(folder: Path) -> None:
    shutil.copytree(_converted(), folder, dirs_exist_ok=True)


def _open_run(folder: Path) -> Any:
    from cfjax.experiment.runs import open_run
    from cfjax.worlds.world import WorldParts

    run = open_run(str(folder), with_model=False, parts=WorldParts(with_text=False))
    return {
        "stage": run.stage,
        "step": run.step,
        "network": plain(run.model.config),
        "sampler": plain(run.sampler),
        "blocks": plain(run.blocks),
        "latent_shape": list(run.latent_shape),
    }


def _read_wan(folder: Path) -> Any:
    from cfjax.worlds.wan import WanWorld

    world = WanWorld.load(folder / "world", with_text=False)
    return {"length": world.text_length, "width": world.text_width, "negative": world.negative_prompt}


# ---- record sets


def _records(folder: Path) -> None:
    from tests.data.test_records import Numbers, make

    make(folder, Numbers(10))


def _read_records(folder: Path) -> Any:
    """As training does."""
    from cfjax.data.sets import open_dataset
    from cfjax.data.tolerant import TolerantDataset

    dataset = TolerantDataset(open_dataset(folder / "set" if (folder / "set").exists() else folder), 0.0)
    rows = [dataset[i] for i in range(len(dataset))]
    return [(row["latents_FHWC"], row["text_SE"], dataset.caption(i)) for i, row in enumerate(rows)], np.asarray(
        dataset.negative_text_SE
    )


def _go_on(folder: Path) -> Any:
    """The same command again: what is left to make, what was left out."""
    from tests.data.test_records import writer

    out = writer(folder, 10)
    return {"todo": out.todo(), "skipped": plain(out.skipped())}


def _listed(folder: Path) -> None:
    _other_clips(folder, [("a.mp4", "a cat"), ("b.mp4", "a dog"), ("c.mp4", "größer")], "one")


def _other_clips(folder: Path, listing: list[tuple[str, str]], digest: str) -> None:
    from cfjax.data.parts import SetWriter
    from tests.data.test_records import LAYOUT

    SetWriter(folder, items=3, part_items=1, layout=LAYOUT, job={"clips": digest}, description={}, listing=listing)


def _read_listing(folder: Path) -> Any:
    """What another listing of clips is refused with."""
    from cfjax.core.errors import UserError

    try:
        _other_clips(folder, [("a.mp4", "a cat"), ("b.mp4", "a cow"), ("d.mp4", "größer")], "another")
    except UserError as error:
        return str(error)
    return None


def _is_message(one: Any, whole: Any) -> bool:
    """Names in it may be any."""
    return isinstance(one, str)


def _sane_job(one: Any, whole: Any) -> bool:
    """A part that counts as not there is made again."""
    return set(one["todo"]) <= {0, 1, 2} and all(alike(skip, whole["skipped"][0]) for skip in one["skipped"])


def _clips(folder: Path) -> None:
    from cfjax.data.precompute import LatentWriter

    latents = np.arange(5, dtype=np.float32)[:, None, None, None, None] * np.ones((1, 2, 2, 2, 3))
    with LatentWriter(folder / "set", records=5, latent_shape=(2, 2, 2, 3)) as out:
        out.append(latents, np.arange(5) % 3)
        out.write_text(["a", "b", "c"], np.arange(3)[:, None, None] * np.ones((1, 4, 5)), -np.ones((4, 5)))


def _pairs(folder: Path) -> None:
    from tests.data.lmdbs import rows_of, write_lmdb

    write_lmdb(folder / "pairs", rows_of(3, 5), ["a", "b", "c"])


def _read_lmdb(folder: Path) -> Any:
    from cfjax.data.lmdb_rows import LmdbRows

    rows = LmdbRows(folder / "pairs")
    return len(rows), rows.latent_shape, rows.trajectory_points


def _cached_text(folder: Path) -> None:
    from cfjax.models.text_cache import TextCache

    TextCache(folder, "encoder", 6).put_many(["a cat"], np.ones((1, 6, 4), np.float32))
    (entry,) = (file for file in folder.rglob("*") if file.is_file())
    shutil.copy(entry, folder / "entry")


def _read_text(folder: Path) -> Any:
    from cfjax.models.text_cache import TextCache

    cache = TextCache(folder, "encoder", 6)
    shutil.copy(folder / "entry", cache.path("a cat"))
    return cache.get("a cat")


# ---- what a user hands over

ROWS = [{"prompt": f"a {word} moves, then stops", "seed": i} for i, word in enumerate(("cat", "größer dog", "一只猫"))]


def _prompts(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        file = folder / name
        texts = [str(row["prompt"]) for row in ROWS]
        if file.suffix == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(ROWS), file)
        elif file.suffix == ".txt":
            file.write_text("\n".join(texts) + "\n", encoding="utf-8")
        elif file.suffix in (".csv", ".tsv"):
            mark = "," if file.suffix == ".csv" else "\t"
            lines = [mark.join((f'"{row["prompt"]}"', str(row["seed"]))) for row in ROWS]
            file.write_text("\n".join([f"prompt{mark}seed", *lines]) + "\n", encoding="utf-8")
        elif file.suffix == ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        else:
            file.write_text(json.dumps(ROWS), encoding="utf-8")

    return make


def _read_prompts(folder: Path) -> Any:
    from cfjax.data.requests import read_requests

    (file,) = folder.iterdir()
    return [(request.prompt, request.seed) for request in read_requests("", str(file))]


def _sane_prompts(one: Any, whole: Any) -> bool:
    """Other words are other prompts, as long as they are words."""
    return 0 < len(one) <= 20 and all(text.strip() and _is_text(text) and 0 <= seed < 2**32 for text, seed in one)


def _latents(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from safetensors.numpy import save_file

        array = np.random.default_rng(0).standard_normal((3, 4, 4, 16)).astype(np.float32)
        np.savez(folder / name, latents=array) if name.endswith("z") else save_file({"latents": array}, folder / name)

    return make


def _read_latents(folder: Path) -> Any:
    from cfjax.data.requests import read_latents

    (file,) = folder.iterdir()
    return read_latents(file)


def _sane_latents(one: Any, whole: Any) -> bool:
    """Another file may have other sizes."""
    return one.dtype == np.float32 and one.ndim == 4 and one.size <= whole.size and bool(np.isfinite(one).all())


def _picture(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from PIL import Image

        pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)

    return make


def _read_picture(folder: Path) -> Any:
    from cfjax.data.requests import read_image

    (file,) = folder.iterdir()
    return read_image(file, 16, 32)


def _video(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from tests.data.videos import write_video

        write_video(folder / name, 12)

    return make


def _read_video(folder: Path) -> Any:
    from cfjax.data.requests import read_video_end

    (file,) = folder.iterdir()
    return read_video_end(file, 5, 16, 32, 16.0)


def _sane_pixels(one: Any, whole: Any) -> bool:
    return one.shape == whole.shape and one.dtype == whole.dtype and bool((abs(one) <= 1).all())


def _tokenizer(*left_out: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        from tests.tiny_tokenizer import write_tokenizer

        write_tokenizer(folder)
        for name in left_out:
            (folder / name).unlink()

    return make


def _read_ids(folder: Path) -> Any:
    from cfjax.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    ids, mask = tokenizer.encode(["A red circle moves", "größer 50%"], 24)
    return np.asarray(ids), np.asarray(mask), tokenizer.vocab_size


def _sane_ids(one: Any, whole: Any) -> bool:
    ids, mask, size = one
    shapes = ids.shape == whole[0].shape and mask.shape == whole[1].shape
    return shapes and 0 < size <= 10_000_000 and bool(((ids >= 0) & (ids < size)).all())


# ---- what cfjax writes for itself


def _video_set(folder: Path) -> None:
    from cfjax.data.requests import Request
    from tests.evaluation.test_video_set import Killed, go_on

    with suppress(Killed):
        go_on(folder, [Request(f"a {word}", 0) for word in ("cat", "dog", "cow")], stop=2)


def _look(folder: Path) -> Any:
    from cfjax.evaluation.video_set import check_same, read_set
    from tests.evaluation.test_video_set import SET

    found = read_set(folder, resume=True)
    if found.asked:
        check_same(found, SET, ("sampler", "blocks"))
    return {"asked": plain(found.asked), "done": plain(found.done)}


def _sane_set(one: Any, whole: Any) -> bool:
    """Fewer are taken for finished: they are made again. A seed is any of 32 bits; files are asked for their bytes."""

    def of_a_video(video: dict[str, Any], sample: dict[str, Any]) -> bool:
        sizes = {key: video[key] for key in ("bytes", "latents") if key in video}
        sound = all(size is None or size > 0 for size in sizes.values()) and 0 <= video["seed"] < 2**32
        return sound and alike({**video, "seed": 0, **{key: sample[key] for key in sizes}}, sample)

    sample = next(iter(whole["done"].values()))
    asked = all(of_a_video(video, whole["asked"][0]) for video in one["asked"])
    return asked and len(one["done"]) <= 3 and all(of_a_video(video, sample) for video in one["done"].values())


def _evaluation(folder: Path) -> None:
    from cfjax.evaluate import save_evaluation

    summary = {"all_correct": 0.5, "step": 1.2, "jerkiness": 0.6, "residual": 0.01}
    result = {"stage": "dmd", "step": 5, "summary": summary, "network_calls": 20, "frames_per_second": 90.0}
    save_evaluation(folder / "dmd", {**result, "captions": ["a"], "videos": np.zeros((1, 2, 4, 4, 3), np.uint8)})


def _gather(folder: Path) -> Any:
    from cfjax.evaluation.tables import gather, summarise_seeds

    return plain(summarise_seeds(gather(f"{folder}/*")["dmd"]))


def _sane_table(one: Any, whole: Any) -> bool:
    """A number more or less in a table is a column more or less."""
    return all(isinstance(row["mean"], float | int) and math.isfinite(row["mean"]) for row in one.values())


def _vbench(folder: Path) -> None:
    """As `VBench.evaluate` writes its results, of two dimensions."""
    rows = [{"video_path": "a-0.mp4", "video_results": 0.5}]
    content = {"color": [0.5, rows], "imaging_quality": [0.68, rows]}
    (folder / "model_eval_results.json").write_text(json.dumps(content, indent=4))


def _read_vbench(folder: Path) -> Any:
    from cfjax.evaluation.vbench_total import read_results

    return read_results(str(folder))


def _sane_vbench(one: Any, whole: Any) -> bool:
    """Another score, or one fewer."""
    return set(one) <= set(whole) and all(0 <= score <= 1 for score in one.values())


class Mini:
    """A scorer: how bright a clip is."""

    name, version, needs = "mini", "1", frozenset()

    def __init__(self, settings: Any) -> None:
        self.path = Path(settings.weights)

    def weights(self) -> list[Path]:
        return [self.path]

    def close(self) -> None:
        pass

    def score(self, clip: Any) -> dict[str, float]:
        return {"": float(np.mean([frame.mean() for frame in clip.frames()]))}


def _scored(folder: Path) -> None:
    _frames(folder)
    (folder / "mini.bin").write_bytes(b"weights")
    _read_scored(folder)


def _read_scored(folder: Path) -> Any:
    from cfjax.evaluation.clip_source import find_source_clips
    from cfjax.evaluation.scorer_runs import ScorerJob, run_scorers
    from cfjax.evaluation.scorers import BUILT_IN, ScoredClip, ScorerSettings

    clips = [ScoredClip(clip, "a cat") for clip in find_source_clips(folder / "videos", "videos")]
    with mock.patch.dict(BUILT_IN, mini="tests.properties.kinds:Mini"):
        asked = [ScorerSettings("mini", str(folder / "mini.bin"))]
        (found,) = run_scorers(asked, ScorerJob(clips, (), folder / "work"))
    return plain(found)


def _sane_scored(one: Any, whole: Any) -> bool:
    """Another number or fewer, another fault; a hash is one that was kept."""
    numbers = [x for values in one["clips"].values() for x in values.values()]
    return all(math.isfinite(x) for x in numbers) and one["weights"].keys() == whole["weights"].keys()


def _vbench_list(folder: Path) -> None:
    rows = [{"prompt_en": "a cat", "dimension": ["color", "scene"]}, {"prompt_en": "a dog", "dimension": ["color"]}]
    (folder / "VBench_full_info.json").write_text(json.dumps(rows, indent=4))


def _read_vbench_list(folder: Path) -> Any:
    from cfjax.evaluation.prompt_lists import read_prompt_list

    found = read_prompt_list(str(folder / "VBench_full_info.json"))
    return list(found.prompts), [list(names) for names in found.dimensions]


def _sane_list(one: Any, whole: Any) -> bool:
    """Other words; the list's hash tells them apart."""
    return 0 < len(one[0]) <= 20 and all(text.strip() and _is_text(text) for text in one[0])


def _questions(folder: Path) -> None:
    (folder / "questions.txt").write_text('Does it meet "[[prompt]]"?\nIs the light good?\n')
    (folder / "weight.json").write_text("[0.5, 0.25]")


def _read_asked(folder: Path) -> Any:
    from cfjax.evaluation.reward_scorers import read_questions

    asked, weights = read_questions(str(folder / "questions.txt"), str(folder / "weight.json"), "key")
    return asked, weights.tolist()


def _sane_asked(one: Any, whole: Any) -> bool:
    """Other words or weights; files' hashes tell them apart."""
    return len(one[0]) == len(one[1]) and all(map(math.isfinite, one[1])) and all(map(_is_text, one[0]))


def _frames(folder: Path) -> None:
    """A clip of three pictures."""
    from cfjax.evaluation.video import write_png

    for number in range(3):
        write_png(folder / "videos" / f"{number}.png", np.full((4, 4, 3), 40 * number, np.uint8))


def _measured(folder: Path) -> None:
    from cfjax.evaluation.clip_folders import score_folder
    from cfjax.evaluation.clip_score import Settings

    _frames(folder)
    score_folder(str(folder / "videos"), "", Settings(("flickering",), fps=8.0), folder / "work", workers=1)


def _read_record(folder: Path) -> Any:
    from cfjax.evaluation.clip_score import Settings, score_clips
    from cfjax.evaluation.clip_source import find_source_clips

    clips = find_source_clips(folder / "videos", "videos")
    return plain(score_clips(clips, {}, Settings(("flickering",), fps=8.0), folder / "work", workers=1)[0])


def _read_measured(folder: Path) -> Any:
    from cfjax.evaluation.clip_summary import load_scored

    found = load_scored(folder / "work")
    return plain(found.scores[0]), plain(found.identity)


def _sane_score(one: Any, whole: Any) -> bool:
    """Another number, or one fewer."""
    score, listed = one if isinstance(one, tuple) else (one, [{"seed": 0}])
    values = all(isinstance(x, float | int) and math.isfinite(x) for x in score["values"].values())
    return values and score["frames"] >= 0 and all(identity["seed"] >= -1 for identity in listed)


def _as_whole(one: Any, whole: Any) -> bool:
    """Nothing but what was written, or nothing."""
    return one is None


WEIGHTS = "diffusion_pytorch_model.safetensors"
# ---- tables of heads


def _heads(folder: Path) -> None:
    from cfjax.memory.profile import heads_record, labels_text
    from tests.tiny import CONFIG

    mass = np.random.default_rng(0).dirichlet(np.ones(6), (CONFIG.num_layers, CONFIG.num_heads))
    about = {"sink": 1, "recent": 2, "threshold": 0.4}
    (folder / "heads.json").write_text(json.dumps(heads_record("a run", CONFIG, mass, about), indent=1))
    (folder / "labels.csv").write_text(labels_text(np.array([[1, -1, 2], [-1, 1, 1]])))


def _read_heads(folder: Path) -> Any:
    from cfjax.memory.profile import read_heads

    found = read_heads(str(folder / "heads.json"))
    return plain(found.static_LN), found.head_dim, found.run


def _read_labels(folder: Path) -> Any:
    from cfjax.memory.profile import read_labels

    return plain(read_labels(str(folder / "labels.csv")).label_LN)


def _sane_labels(one: Any, whole: Any) -> bool:
    """A table of perhaps another network, which is refused where the network is known."""
    return len({len(row) for row in one}) == 1 and {label for row in one for label in row} <= {-1, 1, 2}


KINDS: dict[str, Kind] = {
    "weights, safetensors": Kind(_release, WEIGHTS, _read_release, safetensors, alike),
    "weights, index": Kind(
        lambda folder: _release(folder, 2), f"{WEIGHTS}.index.json", _read_release, json_file, alike
    ),
    "weights, config.json": Kind(_release, "config.json", _read_release, json_file, alike),
    "weights, .pt": Kind(_checkpoint, "model.pt", lambda folder: _read_release(folder / "model.pt"), bits, alike),
    "weights, GGUF": Kind(_gguf, "x.gguf", _read_release, bits, alike),
    "weights, float8": Kind(_float8, "x.safetensors", _read_release, safetensors, alike),
    "LoRA": Kind(_lora, "adapter_model.safetensors", _read_merged, safetensors, alike),
    "LoRA, adapter_config.json": Kind(_lora, "adapter_config.json", _read_merged, json_file, alike),
    "weights, distributed": Kind(_distributed, ".metadata", _read_release, bits, alike),
    "weights, tiny decoder": Kind(_taehv, "taew2_1.pth", _read_only, bits, alike),
    "weights, CLIP": Kind(_clip, "clip.pth", _read_only, bits, alike),
    "CLIP config.json": Kind(_clip_folder, "config.json", _read_only, json_file, alike),
    "toy world.json": Kind(_toy, "world.json", _read_world, json_file, _sane_world),
    "toy codec": Kind(_toy, "codec.safetensors", _read_world, safetensors, _sane_world),
    "toy text_encoder.json": Kind(_toy, "text_encoder.json", _read_world, json_file, _sane_world),
    "toy tokenizer.json": Kind(_toy, "tokenizer.json", _read_world, json_file, _sane_world),
    "model.json": Kind(_toy, "model.json", _open_run, json_file, alike),
    "run's record": Kind(_run, "checkpoints/0/record/metadata", _open_run, json_file, alike, slow=True),
    "Wan world.json": Kind(_run, "world/world.json", _read_wan, json_file, alike, slow=True),
    "manifest.json": Kind(_records, "manifest.json", _read_records, json_file, alike),
    "part": Kind(_records, "part-00001.array_record", _read_records, bits, alike),
    "negative_text.npy": Kind(_records, "negative_text.npy", _read_records, bits, alike),
    "part's json": Kind(_records, "part-00001.json", _go_on, json_file, _sane_job),
    "job.json": Kind(_records, "job.json", _go_on, json_file, _sane_job),
    "items.json": Kind(_listed, "items.json", _read_listing, json_file, _is_message),
    "arrays' manifest.json": Kind(_clips, "set/manifest.json", _read_records, json_file, alike),
    "arrays' captions.json": Kind(_clips, "set/captions.json", _read_records, json_file, alike),
    "arrays": Kind(_clips, "set/latents.npy", _read_records, bits, alike),
    "LMDB, cut": Kind(_pairs, "pairs/data.mdb", _read_lmdb, lambda data, rng: data[: rng.randrange(len(data))], alike),
    "clip's record": Kind(_measured, "work/clips/videos.json", _read_record, json_file, _sane_score),
    "videos.json": Kind(_measured, "work/videos.json", _read_measured, json_file, _sane_score),
    "scorer's record": Kind(_scored, "work/scorers/mini/clips/videos.json", _read_scored, json_file, _sane_scored),
    "weights.json": Kind(_scored, "work/scorers/weights.json", _read_scored, json_file, _sane_scored),
    "VBench's prompts": Kind(_vbench_list, "VBench_full_info.json", _read_vbench_list, json_file, _sane_list),
    "questions": Kind(_questions, "questions.txt", _read_asked, bits, _sane_asked),
    "questions' weights": Kind(_questions, "weight.json", _read_asked, json_file, _sane_asked),
    "VBench's results": Kind(_vbench, "model_eval_results.json", _read_vbench, json_file, _sane_vbench),
    "text cache": Kind(_cached_text, "entry", _read_text, bits, _as_whole),
    **{
        f"prompts.{end}": Kind(_prompts(f"prompts.{end}"), f"prompts.{end}", _read_prompts, how, _sane_prompts)
        for end, how in (
            *(("txt", bits), ("csv", bits), ("tsv", bits), ("parquet", bits)),
            *(("jsonl", json_lines), ("json", json_file)),
        )
    },
    "latents, npz": Kind(_latents("a.npz"), "a.npz", _read_latents, bits, _sane_latents),
    "latents, safetensors": Kind(_latents("a.safetensors"), "a.safetensors", _read_latents, safetensors, _sane_latents),
    **{
        f"picture.{end}": Kind(_picture(f"a.{end}"), f"a.{end}", _read_picture, bits, _sane_pixels)
        for end in ("png", "jpg", "webp", "gif")
    },
    **{
        f"video.{end}": Kind(_video(f"a.{end}"), f"a.{end}", _read_video, bits, _sane_pixels)
        for end in ("mp4", "webm", "avi")
    },
    "tokenizer.json": Kind(_tokenizer(), "tokenizer.json", _read_ids, json_file, _sane_ids),
    "spiece.model": Kind(_tokenizer("tokenizer.json"), "spiece.model", _read_ids, bits, _sane_ids),
    "settings.json": Kind(_video_set, "settings.json", _look, json_file, _sane_set),
    "videos.jsonl": Kind(_video_set, "videos.jsonl", _look, json_lines, _sane_set),
    "heads.json": Kind(_heads, "heads.json", _read_heads, json_file, alike),
    "labels.csv": Kind(_heads, "labels.csv", _read_labels, bits, _sane_labels),
    "evaluation.json": Kind(_evaluation, "dmd/evaluation.json", _gather, json_file, _sane_table),
}


# ---- readers that do each of the things that are told apart, for the test of the instruments


def _does(name: str) -> Kind:
    """Reads its file whole, and does otherwise once it is damaged."""

    def read(folder: Path) -> Any:
        from cfjax.core.errors import UserError

        if (folder / "file").read_bytes() == b"whole" or name == "right":
            return 1
        match name:
            case "told":
                raise UserError("file: broken")
            case "traceback":
                raise KeyError("a")
            case "over memory":
                return np.zeros(2**29)
            case "over time":
                while True:
                    pass
            case "crash":
                os._exit(3)
        return -1

    return Kind(lambda folder: (folder / "file").write_bytes(b"whole"), "file", read, lambda data, rng: b"x", same)


OUTCOMES = ("told", "right", "silent", "traceback", "over memory", "over time", "crash")
INSTRUMENTS = {f"reader: {name}": _does(name) for name in OUTCOMES}
