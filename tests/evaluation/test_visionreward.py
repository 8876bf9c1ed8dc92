"""VisionReward's questions through a small network in its model's layout, read by transformers in its own process."""

import json
from pathlib import Path

import numpy as np
import pytest

from cfjax.evaluation.clip_source import SourceClip, reading
from cfjax.evaluation.clip_summary import VIDEOS, load_scored
from tests.evaluation.test_scorers import CLIPS, evaluate, system

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

QUESTIONS = [
    'Does it meet all of "[[prompt]]"?',
    "Is the light good?",
    'Does it meet some of "[[prompt]]"?',
    "Is it still?",
]
WEIGHT = [0.5, 0.25, 1.0, 0.125]
WORDS = ["no", "yes", "?", '"', "a", "cat", "dog", "very", "small", "Is", "it", "the", "good", "light", "still", "of"]
MODEL = """
import torch
from transformers import PretrainedConfig, PreTrainedModel


class TinyConfig(PretrainedConfig):
    model_type = "tiny_reward"


class TinyReward(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(4, 2)
        self.post_init()

    def build_conversation_input_ids(self, tokenizer, query, images, history, template_version):
        assert template_version == "chat" and not history
        ids = torch.tensor(tokenizer.encode(query))
        return {"input_ids": ids, "token_type_ids": ids * 0, "attention_mask": ids * 0 + 1, "images": [images[0] / 255]}

    def generate(self, input_ids, token_type_ids, attention_mask, images, **settings):
        assert settings == {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 128002}
        seen = torch.cat([images[0][0].mean((1, 2, 3)), torch.tensor([input_ids.shape[1] / 10])])
        return torch.cat([input_ids, self.layer(seen).argmax().reshape(1, 1)], 1)
"""


def write_model(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """A model's folder; returns the layer's weight and bias."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir()
    (folder / "modeling_tiny.py").write_text(MODEL)
    names = {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModelForCausalLM": "modeling_tiny.TinyReward"}
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny_reward", "auto_map": names}))
    layer = {
        "layer.weight": np.array([[0, 0, 0, 0], [0.2, -0.1, 0.1, 1]], "f4"),  # yes to long questions and bright videos
        "layer.bias": np.array([0, -1.05], "f4"),
    }
    save_file(layer, folder / "model.safetensors", metadata={"format": "pt"})
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*WORDS, "[UNK]"])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return layer["layer.weight"], layer["layer.bias"]


def words_of(text: str) -> int:
    """As the tokenizer counts them."""
    import re

    return len(re.findall(r"\w+|[^\w\s]+", text))


@pytest.mark.slow
def test_questions_are_asked_and_weighed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))  # where the model's code is copied to
    weight, bias = write_model(tmp_path / "model")
    (tmp_path / "questions.txt").write_text("\n".join(QUESTIONS))
    (tmp_path / "weight.json").write_text(json.dumps(WEIGHT))
    videos = system(tmp_path / "v", CLIPS, length=14)
    files = f"questions={tmp_path / 'questions.txt'}|weight={tmp_path / 'weight.json'}"
    keys = {
        "videos": videos,
        "scorers__visionreward__weights": tmp_path / "model",
        "scorers__visionreward__device": "cpu",
    }
    assert evaluate(tmp_path / "w", "visionreward", **keys, scorers__visionreward__options=files) == 0
    capsys.readouterr()
    answered = set()
    scored = load_scored(tmp_path / "w")
    for score, identity in zip(scored.scores, scored.identity, strict=True):
        with reading(SourceClip(score.file, videos / score.file)) as opened:
            frames = np.stack([np.array(frame) for frame in opened.frames])[[0, 8, 13]]  # 14 frames at 8 a second
        mean = frames.astype("f4").mean((0, 1, 2)) / 255
        answers = []
        for question in QUESTIONS:
            seen = np.append(mean, words_of(question.replace("[[prompt]]", identity.prompt)) / 10)
            answers.append(2 * int((weight @ seen + bias).argmax()) - 1)
        answered |= set(answers)
        assert score.values["visionreward"] == pytest.approx(np.mean(np.array(answers) * WEIGHT), abs=1e-12)
        assert score.values["visionreward.instruction_following"] == np.mean([answers[0], answers[2]])
    assert answered == {-1, 1}
    weights = json.loads((tmp_path / "w" / VIDEOS).read_text())["scorers"]["visionreward"]["weights"]
    assert {"model.safetensors", "modeling_tiny.py", "questions.txt", "weight.json"} <= weights.keys()
    (tmp_path / "weight.json").write_text("[1]")
    assert evaluate(tmp_path / "w", "visionreward", **keys, scorers__visionreward__options=files) == 2
    assert "has 4 questions, and " in capsys.readouterr().err
