"""VisionReward and HPSv3, in the environment that has their packages (`evaluation.outside`).

VisionReward (`THUDM/VisionReward`, `inference-video.py`) asks a video-language model yes-or-no questions and takes the
mean of weight * (1 for "yes", else -1). HPSv3 (`MizzenAI/HPSv3`, package `hpsv3`) rewards pictures for a prompt: here
frames of a clip, spread evenly, and their mean.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cfjax.core.errors import UserError
from cfjax.core.limits import CAPTION
from cfjax.core.paths import one_line
from cfjax.core.schema import checked, load_bytes, load_json, number, several
from cfjax.data.pictures import Unusable
from cfjax.data.tables import decode
from cfjax.evaluation.outside import Outside, check_version
from cfjax.evaluation.scorer_runs import weight_files
from cfjax.evaluation.scorers import ScoredClip, ScorerSettings
from cfjax.evaluation.video import spread, write_png

PROMPT = "[[prompt]]"  # in a question
MOST_SECONDS = 24  # frames of a video, one a second
PAD_TOKEN = 128002  # of its tokenizer, as its script has it
HPSV3 = "1.0.0"  # the version whose interface and numbers are meant
_MODEL = "VisionReward-Video's folder (THUDM/VisionReward-Video on Hugging Face: hf download ... --local-dir FOLDER)"
_CLONE = "of a clone of THUDM/VisionReward"
_ENVIRONMENT = "make an environment with {} by {}"


def frames_a_second(count: int, fps: float) -> list[int]:
    """The frames nearest to each full second, 24 at most: VisionReward's `load_video` with its strategy "chat"."""
    times = np.arange(count) / fps
    return [int(np.abs(times - second).argmin()) for second in range(round(float(times[-1])) + 1)][:MOST_SECONDS]


def read_questions(questions: str, weights: str, key: str) -> tuple[list[str], np.ndarray]:
    """The questions of a text file, one a line, and the weights of a JSON list.

    Raises:
      UserError: no such files, or they do not belong together.
    """
    where = f"{key}='questions=FILE|weight=FILE'"
    if not questions or not weights:
        raise UserError(
            f"{where} is missing: VisionReward_Video/VisionReward_video_qa_select.txt and weight.json {_CLONE}"
        )
    try:
        lines = decode(load_bytes(Path(questions), CAPTION * 10)).splitlines()
        factors = checked(several(number(-1e6, 1e6), 1), load_json(Path(weights)), weights)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {one_line(error)}") from None
    asked = [line.strip() for line in lines if line.strip()]
    if len(asked) != len(factors):
        raise UserError(f"{questions} has {len(asked)} questions, and {weights} {len(factors)} weights; give a pair")
    return asked, np.array(factors, float)


class VisionRewardScorer:
    """See `evaluation.scorers.ClipScorer`."""

    needs = frozenset({"prompt"})

    def __init__(self, settings: ScorerSettings) -> None:
        self.name, self._settings = settings.name, settings
        options = settings.chosen({"questions": "", "weight": ""})
        self._questions, self._factors = read_questions(
            options["questions"], options["weight"], settings.key("options")
        )
        self._files = [Path(options["questions"]), Path(options["weight"])]
        self._folder = settings.weight_path(_MODEL)
        if not (self._folder / "config.json").is_file():
            raise UserError(f"{settings.key('weights')}={self._folder}: has no config.json; {_MODEL}")
        self._outside = Outside(settings)
        how = _ENVIRONMENT.format("transformers 4.42.4 and torch", f"pip install -r requirements.txt {_CLONE}")
        found = self._outside.versions(("torch", "transformers"), ("torch", "transformers"), how)
        self.version = f"transformers {found.get('transformers', '')}, torch {found.get('torch', '').split('+')[0]}"
        self._opened = False

    def weights(self) -> Sequence[Path]:
        """The model's files, the questions and their weights."""
        return [*weight_files(self._folder), *self._files]

    def close(self) -> None:
        """Ends the process."""
        self._outside.close()

    def score(self, clip: ScoredClip) -> Mapping[str, float]:
        """The weighted mean; instruction_following, the mean answer to the questions that quote the prompt."""
        if not self._opened:
            self._outside.ask(
                do="open", kind="visionreward", weights=str(self._folder.absolute()), device=self._settings.device,
                pad_token=PAD_TOKEN,
            )  # fmt: skip
            self._opened = True
        file = self._settings.folder / "frames.npy"
        np.save(file, self._frames(clip))
        try:
            queries = [question.replace(PROMPT, clip.prompt) for question in self._questions]
            said = self._outside.ask(do="score", frames=str(file.absolute()), queries=queries)["answers"]
        finally:
            file.unlink(missing_ok=True)
        if not {"yes", "no"} & set(said):
            raise UserError(f"scorer {self.name}: it answers {said[0]!r:.60}, neither yes nor no; is this its model?")
        answers = np.array([1.0 if word == "yes" else -1.0 for word in said])
        values = {"": float((answers * self._factors).mean())}
        about = [PROMPT in question for question in self._questions]
        return values | ({"instruction_following": float(answers[about].mean())} if any(about) else {})

    @staticmethod
    def _frames(clip: ScoredClip) -> np.ndarray:
        """uint8 [T, H, W, 3]; of all frames those are kept that may be the nearest to a second."""
        fps = clip.rate()
        near = set(frames_a_second(math.ceil((MOST_SECONDS + 1) * fps) + 1, fps))
        kept: dict[int, np.ndarray] = {}
        count, last = 0, np.zeros(0)
        for frame in clip.frames():
            if count in near:
                kept[count] = np.array(frame)
            count, last = count + 1, frame
        kept[count - 1] = np.array(last)
        return np.stack([kept[number] for number in frames_a_second(count, fps)])


class HpsScorer:
    """See `evaluation.scorers.ClipScorer`."""

    needs = frozenset({"prompt"})

    def __init__(self, settings: ScorerSettings) -> None:
        self.name, self._settings = settings.name, settings
        self._options = settings.chosen({"frames": "4", "base": "", "config": "", "version": ""})
        if not self._options["frames"].isdigit() or self._options["frames"] == "0":
            raise UserError(f"{settings.key('options')}: frames={self._options['frames']} is no number of frames")
        how = "HPSv3.safetensors (MizzenAI/HPSv3 on Hugging Face: hf download MizzenAI/HPSv3 HPSv3.safetensors)"
        self._file = settings.weight_path(how)
        for name in ("base", "config"):
            if self._options[name] and not Path(self._options[name]).exists():
                raise UserError(f"{settings.key('options')}: {name}={self._options[name]} is not there")
        self._outside = Outside(settings)
        how = _ENVIRONMENT.format(f"hpsv3 {HPSV3}", f"pip install hpsv3=={HPSV3}")
        found = self._outside.versions(("hpsv3",), ("hpsv3", "transformers", "torch"), how)
        check_version(settings, "hpsv3", found.get("hpsv3", ""), HPSV3, self._options["version"])
        self.version = ", ".join(f"{name} {x.split('+')[0]}" for name, x in found.items() if name != "python")
        self._opened = False

    def weights(self) -> Sequence[Path]:
        """The checkpoint, and the files of the options."""
        named = [Path(self._options[name]) for name in ("base", "config") if self._options[name]]
        return [self._file, *(file for path in named for file in weight_files(path))]

    def close(self) -> None:
        """Ends the process."""
        self._outside.close()

    def score(self, clip: ScoredClip) -> Mapping[str, float]:
        """The mean reward over the frames."""
        if not self._opened:
            config, base = (os.path.abspath(x) if (x := self._options[name]) else "" for name in ("config", "base"))
            self._outside.ask(
                do="open", kind="hpsv3", weights=str(self._file.absolute()), device=self._settings.device,
                config=config, base=base, output=str(self._settings.folder.absolute()),
            )  # fmt: skip
            self._opened = True
        if not (count := sum(1 for _ in clip.frames())):
            raise Unusable("no frame")
        wanted = set(spread(count, min(count, int(self._options["frames"]))).tolist())
        files = []
        try:
            for number, frame in enumerate(clip.frames()):
                if number in wanted:
                    files.append(self._settings.folder / f"frame_{number}.png")
                    write_png(files[-1], frame)
            pictures = [str(file.absolute()) for file in files]
            rewards = self._outside.ask(do="score", prompt=clip.prompt, pictures=pictures)["rewards"]
        finally:
            for file in files:
                file.unlink(missing_ok=True)
        return {"": float(np.mean(rewards))}


def make_visionreward(settings: ScorerSettings) -> VisionRewardScorer:
    """The entry point `visionreward`."""
    return VisionRewardScorer(settings)


def make_hpsv3(settings: ScorerSettings) -> HpsScorer:
    """The entry point `hpsv3`."""
    return HpsScorer(settings)
