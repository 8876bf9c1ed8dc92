"""Whole systems of weights to write: the reference's .pt, a Wan release in safetensors, a diffusers pipeline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cfjax.conversion.clip import processor_json_clip
from cfjax.conversion.folders import PIPELINE
from cfjax.conversion.kinds import KINDS
from cfjax.conversion.prefixes import PREFIX
from cfjax.conversion.sources import (
    AVERAGE,
    CRITIC,
    GENERATOR,
    TOKENIZERS,
    Found,
    Source,
    copy_tokenizer,
)
from cfjax.conversion.wan import TI2V_CHANNELS
from cfjax.conversion.write import write_json, write_pickle, write_safetensors
from cfjax.core.checksums import write_sums
from cfjax.core.errors import UserError
from cfjax.core.lazy import LazyArray
from cfjax.models.experts import takes_picture

Watch = Callable[[int], Any]
TRANSFORMER = "diffusion_pytorch_model"
# Names in a Wan release, without suffix.
VAE_2_2, TINY_2_2 = "Wan2.2_VAE", "taew2_2"
RELEASE = {
    "vae": "Wan2.1_VAE",
    "text_encoder": "models_t5_umt5-xxl-enc-bf16",
    "tiny_vae": "taew2_1",
    "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14",
}
CHECKPOINT = "model.pt"
# Folder, file stem and index entry of a pipeline's networks.
COMPONENTS = {
    "dit": ("transformer", TRANSFORMER, ["diffusers", "WanTransformer3DModel"]),
    "vae": ("vae", TRANSFORMER, ["diffusers", "AutoencoderKLWan"]),
    "text_encoder": ("text_encoder", "model", ["transformers", "UMT5EncoderModel"]),
    "image_encoder": ("image_encoder", "model", ["transformers", "CLIPVisionModel"]),
}
PROCESSOR = "image_processor"  # of pipelines with an image encoder
DIFFUSERS_VERSION = "0.35.0"


def write_target(
    kind: str, source: Source, folder: Path, *, shift: float, max_bytes: float, watch: Watch = lambda _: None
) -> int:
    """Writes all of `source` into an empty folder in the layout `kind`; returns the number of tensors written.

    Args:
      kind: "pt" (the reference's nested checkpoint beside a release's other files), "safetensors" (a release without
        pickles) or "diffusers" (a pipeline).
      shift: of the pipeline's scheduler.
      max_bytes: of one safetensors shard.
      watch: called with the number of bytes of every array read.

    Raises:
      UserError: the layout cannot hold a network, or two of a kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plans = [(found, _plan(found, "diffusers" if kind == "diffusers" else "original", watch)) for found in source.found]
    if kind == "pt":
        _write_pt(plans, folder)
    elif kind == "safetensors":
        _write_release(_single(plans, kind), folder, max_bytes)
    else:
        _write_pipeline(_single(plans, kind), folder, max_bytes)
    if source.tokenizer:
        target = folder / (TOKENIZERS[0] if kind == "diffusers" else TOKENIZERS[1])
        copy_tokenizer(source.tokenizer, target)
    if kind == "diffusers":
        _write_index(source, folder, shift)
    write_sums(folder)
    return sum(len(arrays) for _, arrays in plans)


Plans = list[tuple[Found, dict[str, LazyArray]]]


def _plan(found: Found, layout: str, watch: Watch) -> dict[str, LazyArray]:
    layouts = KINDS[found.network.kind].layouts
    if layout not in layouts:
        if layout == "diffusers":
            raise UserError(f"{found.network.kind} has no {layout} layout; leave it out with --config.parts")
        (layout,) = layouts
    return {name: x.watched(watch) for name, x in found.network.exported(layout).items()}


def _single(plans: Plans, kind: str) -> Plans:
    transformers = [found for found, _ in plans if found.network.kind == "dit"]
    if len(transformers) > 1:
        entries = ", ".join(map(entry_of, transformers))
        raise UserError(f"to={kind!r} holds one transformer, the source has {entries}; choose one by --config.key")
    return plans


def entry_of(found: Found) -> str:
    """What a training checkpoint calls a transformer."""
    return CRITIC if found.role == "critic" else AVERAGE if found.ema else GENERATOR


def _write_pt(plans: Plans, folder: Path) -> None:
    entries = {}
    for found, arrays in plans:
        if found.network.kind == "dit":
            entries[entry_of(found)] = {PREFIX + name: x for name, x in arrays.items()}
            write_json(folder / "config.json", found.network.about("original") or {})
        else:
            write_pickle(folder / f"{_release_name(found)}.pth", arrays)
    if entries:
        write_pickle(folder / CHECKPOINT, entries)


def _write_release(plans: Plans, folder: Path, max_bytes: float) -> None:
    for found, arrays in plans:
        if found.network.kind == "dit":
            write_json(folder / "config.json", found.network.about("original") or {})
        write_safetensors(folder, _release_name(found), arrays, max_bytes)


def _release_name(found: Found) -> str:
    """What a release calls the file, without suffix."""
    if found.network.kind == "vae" and found.network.config.residual:
        return VAE_2_2
    if found.network.kind == "tiny_vae" and found.network.config.patch > 1:
        return TINY_2_2
    return RELEASE.get(found.network.kind, TRANSFORMER)


def _write_pipeline(plans: Plans, folder: Path, max_bytes: float) -> None:
    for found, arrays in plans:
        name, stem, _ = COMPONENTS[found.network.kind]
        (folder / name).mkdir()
        about = {"_diffusers_version": DIFFUSERS_VERSION} if stem == TRANSFORMER else {}
        about |= found.network.about("diffusers") or {}
        if stem != TRANSFORMER:
            dtypes = {x.dtype.name for x in arrays.values()}
            about["dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
        write_json(folder / name / "config.json", about)
        write_safetensors(folder / name, stem, arrays, max_bytes)
        if found.network.kind == "image_encoder":
            (folder / PROCESSOR).mkdir()
            write_json(folder / PROCESSOR / "preprocessor_config.json", processor_json_clip(found.network.config))


def _write_index(source: Source, folder: Path, shift: float) -> None:
    """model_index.json and the scheduler: what is not there is null, as diffusers writes it."""
    here = {found.network.kind for found in source.found}
    networks = [found.network.config for found in source.found if found.network.kind == "dit"]
    pictures = "image_encoder" in here or any(map(takes_picture, networks))
    index: dict[str, Any] = {
        name: entry if kind in here else [None, None]
        for kind, (name, _, entry) in COMPONENTS.items()
        if kind != "image_encoder" or pictures
    }
    index |= {
        "_class_name": "WanPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "tokenizer": ["transformers", "T5TokenizerFast"] if source.tokenizer else [None, None],
    }
    if any(config.in_dim == TI2V_CHANNELS for config in networks):
        index["expand_timesteps"] = True  # a timestep per token
    if pictures:
        index["_class_name"] = "WanImageToVideoPipeline"
        index[PROCESSOR] = ["transformers", "CLIPImageProcessor"] if "image_encoder" in here else [None, None]
    write_json(folder / PIPELINE, index)
    (folder / "scheduler").mkdir()
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "flow_shift": shift,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    }
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
