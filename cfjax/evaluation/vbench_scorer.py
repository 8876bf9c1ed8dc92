"""VBench and VBench-Long by their own code, one dimension at a time, in the environment that has them.

Clips are linked into a folder under the names that VBench reads, and what it writes, NAME_eval_results.json, stays
there: `--config.vbench` sums it up as well. Weights are the files of its cache folder; none is downloaded.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cfjax.core.errors import UserError
from cfjax.core.limits import LIST_BYTES
from cfjax.core.paths import write_atomically
from cfjax.core.schema import load_json
from cfjax.evaluation.outside import Outside, check_version
from cfjax.evaluation.scorer_runs import weight_sums
from cfjax.evaluation.scorers import FolderScores, ScoredClip, ScorerSettings
from cfjax.evaluation.vbench_total import DIMENSIONS, QUALITY, summary

VBENCH = "0.1.5"  # the version whose interface and numbers are meant
SEEDS = 5  # videos of a prompt that it reads in its standard mode
_DINO = "dino_model"
_CLIP, _GRIT = ("clip_model/ViT-B-32.pt",), ("grit_model/grit_b_densecap_objectdet.pth",)
_VICLIP = ("ViCLIP/ViClip-InternVid-10M-FLT.pth", "ViCLIP/bpe_simple_vocab_16e6.txt.gz")
# Of each dimension the files of VBench's cache folder, `vbench/utils.py::init_submodules` with local=True.
FILES: dict[str, tuple[str, ...]] = {
    "subject_consistency": (f"{_DINO}/dino_vitbase16_pretrain.pth", f"{_DINO}/facebookresearch_dino_main/hubconf.py"),
    "background_consistency": _CLIP,
    "temporal_flickering": (),
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "aesthetic_quality": ("clip_model/ViT-L-14.pt", "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "object_class": _GRIT,
    "multiple_objects": _GRIT,
    "human_action": ("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",),
    "color": _GRIT,
    "spatial_relationship": _GRIT,
    "scene": ("caption_model/tag2text_swin_14m.pth",),
    "appearance_style": _CLIP,
    "temporal_style": _VICLIP,
    "overall_consistency": _VICLIP,
}  # fmt: skip
ANY_PROMPT = (*QUALITY, "temporal_style", "overall_consistency", "human_action")  # need no notes on the prompt
ANY_LONG = tuple(name for name in QUALITY if name != "temporal_flickering")
OPTIONS = {"mode": "standard", "dimensions": "", "info": "", "version": ""}
_CACHE = "VBench's cache folder, which its own commands fill: ~/.cache/vbench"
_CONFIGS = "configs"
# `vbench2_beta_long/eval_long.py` with --dev_flag off: the arguments that it passes. A list is a file of the package.
LONG_ARGUMENTS: dict[str, Any] = {
    "sb_clip2clip_feat_extractor": "dino",
    "bg_clip2clip_feat_extractor": "clip",
    "imaging_quality_preprocessing_mode": "longer",
    "clip_length_config": "clip_length_mix.yaml",
    "w_inclip": 1.0,
    "w_clip2clip": 0.0,
    "use_semantic_splitting": False,
    "slow_fast_eval_config": ["package", f"{_CONFIGS}/slow_fast_params.yaml"],
    "dev_flag": False,
    "sb_mapping_file_path": ["package", f"{_CONFIGS}/subject_mapping_table.yaml"],
    "bg_mapping_file_path": ["package", f"{_CONFIGS}/background_mapping_table.yaml"],
    "num_of_samples_per_prompt": SEEDS,
    "static_filter_flag": False,
}


class VBenchScorer:
    """See `evaluation.scorers.FolderScorer`."""

    needs = frozenset({"prompt"})

    def __init__(self, settings: ScorerSettings, *, long: bool) -> None:
        self.name, self._settings, self._long = settings.name, settings, long
        options = settings.chosen({**OPTIONS, "clone": ""} if long else OPTIONS)
        self._standard = options["mode"] == "standard"
        if options["mode"] not in ("standard", "custom"):
            raise UserError(f"{settings.key('options')}: mode={options['mode']} is none of standard, custom")
        self._dimensions = self._chosen(options["dimensions"])
        self._info = options["info"]
        if self._info and not Path(self._info).is_file():
            raise UserError(f"{settings.key('options')}: info={self._info}: no such file; VBench_full_info.json")
        self._needed = sorted({name for dimension in self._dimensions for name in FILES[dimension]})
        self._cache = settings.weight_path(_CACHE) if self._needed else Path(settings.weights or ".")
        for name in self._needed:
            if not (self._cache / name).is_file():
                raise UserError(
                    f"{settings.key('weights')}={self._cache}: has no {name}, which VBench reads; it is filled by "
                    "vbench evaluate with load_ckpt_from_local, or leave its dimensions out"
                )
        self._outside = Outside(settings, {"VBENCH_CACHE_DIR": str(self._cache.absolute())})
        module = "vbench2_beta_long" if long else "vbench"
        how = f"make an environment with it by pip install vbench=={VBENCH} (docs/evaluate.md)"
        clone = os.path.abspath(options["clone"]) if options.get("clone") else ""
        found = self._outside.versions((module,), ("vbench", "torch"), how, clone)
        check_version(settings, "vbench", found.get("vbench", ""), VBENCH, options["version"])
        self.version = f"vbench {found['vbench']}, torch {found.get('torch', '').split('+')[0]}"

    def _chosen(self, text: str) -> list[str]:
        """The dimensions in VBench's order."""
        possible = (
            list(DIMENSIONS)
            if self._standard
            else [name for name in DIMENSIONS if name in (ANY_LONG if self._long else ANY_PROMPT)]
        )
        asked = [part.strip() for part in text.split(",") if part.strip()] or possible
        if unknown := [name for name in asked if name not in possible]:
            mode = "standard" if self._standard else "custom"
            raise UserError(
                f"{self._settings.key('options')}: dimensions={text}: {unknown[0]} is none of mode={mode}'s, "
                f"{', '.join(possible)}"
            )
        return [name for name in DIMENSIONS if name in asked]

    def weights(self) -> Sequence[Path]:
        """The files of the dimensions, and the list of prompts where one is named."""
        return [self._cache / name for name in self._needed] + ([Path(self._info)] if self._info else [])

    def close(self) -> None:
        """Ends the process."""
        self._outside.close()

    def steps(self) -> int:
        """One a dimension."""
        return len(self._dimensions)

    def score_folder(self, clips: Sequence[ScoredClip], folder: Path, done: Callable[[int], Any]) -> FolderScores:
        """Every dimension whose results are not there yet."""
        links = folder / f"videos_{'standard' if self._standard else 'custom'}"
        names, faults = self._linked(clips, links)
        if not names:
            raise UserError(f"scorer {self.name}: no clip for it; {next(iter(faults.values()), 'the folder is empty')}")
        prompts = {link: clip.prompt for link, clip in names.items()} if self._mode() == "custom_input" else {}
        opened, found = False, {}
        for dimension in self._dimensions:
            made_of, note = self._made_of(dimension), folder / f"{dimension}.txt"
            same = note.is_file() and note.read_text(encoding="utf-8") == made_of
            if not same or (content := self._read(folder, dimension)) is None:
                if not opened:
                    self._open(folder)
                    opened = True
                note.unlink(missing_ok=True)
                self._outside.ask(
                    do="score", videos=str(links.absolute()), name=dimension, prompts=prompts or [],
                    dimension=dimension, mode=self._mode(), arguments=LONG_ARGUMENTS if self._long else {},
                )  # fmt: skip
                if (content := self._read(folder, dimension)) is None:
                    raise UserError(f"scorer {self.name}: it wrote no {dimension}_eval_results.json of its form")
                write_atomically(note, made_of)
            found[dimension] = content
            done(1)
        return self._gathered(found, names, faults)

    def _made_of(self, dimension: str) -> str:
        """What decides a dimension's numbers besides the clips and the version."""
        files = [self._cache / name for name in FILES[dimension]] + ([Path(self._info)] if self._info else [])
        sums = weight_sums(files, self._cache, self._settings.folder.parent / "weights.json")
        return json.dumps([self._mode(), sums])

    def _mode(self) -> str:
        if self._long:
            return "long_vbench_standard" if self._standard else "long_custom_input"
        return "vbench_standard" if self._standard else "custom_input"

    def _open(self, folder: Path) -> None:
        self._outside.ask(
            do="open", kind="vbench", module="vbench2_beta_long" if self._long else "vbench",
            info=os.path.abspath(self._info) if self._info else "", device=self._settings.device,
            output=str(folder.absolute()), **{"class": "VBenchLong" if self._long else "VBench"},
        )  # fmt: skip

    def _linked(self, clips: Sequence[ScoredClip], folder: Path) -> tuple[dict[str, ScoredClip], dict[str, str]]:
        """Clips by the names of their links, and why others have none.

        In its standard mode a name is PROMPT-0.mp4 to PROMPT-4.mp4; else names are numbers, and prompts are passed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        names: dict[str, ScoredClip] = {}
        faults, counts = {}, dict[str, int]()
        for number, clip in enumerate(sorted(clips, key=lambda one: (one.prompt, one.seed, one.name))):
            order = counts.get(clip.prompt, 0)
            link = f"{clip.prompt}-{order}.mp4" if self._standard else f"{number:06d}-0.mp4"
            if fault := self._fault(clip, link, order):
                faults[clip.name] = fault
                continue
            counts[clip.prompt] = order + 1
            names[link] = clip
            if not (folder / link).is_symlink():
                (folder / link).symlink_to(clip.source.path.absolute())
        return names, faults

    def _fault(self, clip: ScoredClip, link: str, order: int) -> str:
        if clip.source.pictures or clip.source.path.suffix.lower() != ".mp4":
            return "VBench reads mp4 alone here"
        if self._standard and order >= SEEDS:
            return f"VBench reads {SEEDS} videos of a prompt"
        if "/" in link or "\0" in link or len(link.encode()) > 250:
            return "its prompt is no file's name, by which VBench finds it"
        return ""

    def _read(self, folder: Path, dimension: str) -> Any:
        """[score, videos ...] as VBench wrote it; None where it is not there, or not whole."""
        try:
            value = load_json(folder / f"{dimension}_eval_results.json", LIST_BYTES)[dimension]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if not isinstance(value, list) or len(value) < 2 or not isinstance(value[0], int | float):
            return None
        rows = value[2 if self._long and len(value) > 2 else 1]
        return (float(value[0]), rows) if 0 <= value[0] <= 1 and isinstance(rows, list) else None

    def _gathered(
        self, found: Mapping[str, Any], names: Mapping[str, ScoredClip], faults: dict[str, str]
    ) -> FolderScores:
        clips: dict[str, dict[str, float]] = {}
        for dimension, (_, rows) in found.items():
            scale = 100.0 if dimension == "imaging_quality" else 1.0  # of single videos it gives per cent
            for row in rows:
                link = Path(str(row.get("video_path", ""))).name if isinstance(row, dict) else ""
                value = row.get("video_results") if link in names else None
                if isinstance(value, int | float):
                    clips.setdefault(names[link].name, {})[dimension] = float(value) / scale
        scores = {dimension: score for dimension, (score, _) in found.items()}
        sums = {name: value for name, value in summary(scores).items() if value is not None}
        unread = [clip.name for clip in names.values() if clip.name not in clips]
        faults |= dict.fromkeys(unread, "VBench gave no number; is its prompt one of VBench's list?")
        notes = [f"{name} {100 * value:.2f}" for name, value in {**scores, **sums}.items()]
        if self._standard and len(names) < SEEDS * len({clip.prompt for clip in names.values()}):
            notes.append(f"{len(names)} videos, fewer than {SEEDS} of each prompt: no leaderboard's number")
        return FolderScores(clips, {**scores, **sums}, faults, notes)


def make(settings: ScorerSettings) -> VBenchScorer:
    """The entry point `vbench`."""
    return VBenchScorer(settings, long=False)


def make_long(settings: ScorerSettings) -> VBenchScorer:
    """The entry point `vbench_long`."""
    return VBenchScorer(settings, long=True)
