"""Official scorers in the environment that has their package, which need not be cfjax's: requests in, numbers out.

    python score.py

Each line of standard input is a JSON object, `{"do": "probe" | "open" | "score", ...}`, and each is answered by one
line on what was standard output, `{"gives": ...}` or `{"error": "..."}`. What packages print goes to standard error.
It runs on Python 3.8, with nothing but the standard library and the package that is asked for.
"""

import contextlib
import importlib
import json
import os
import re
import sys
import traceback
from importlib.metadata import PackageNotFoundError, version


def versions_of(packages):
    """The versions of those packages that are installed, and that of Python."""
    found = {"python": "%d.%d.%d" % sys.version_info[:3]}  # noqa: UP031
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def probe(request):
    """Versions of packages, and why one of the modules cannot be imported; "" where they can."""
    reason = ""
    for module in request["modules"]:
        try:
            importlib.import_module(module)
        except Exception as error:
            reason = "%s: %s: %s" % (module, type(error).__name__, error)  # noqa: UP031
            break
    return {"versions": versions_of(request["packages"]), "reason": reason}


def torch_device(asked):
    """`asked`, or cuda where torch has it."""
    import torch

    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


class VisionReward:
    """Yes or no to each question about a video: VisionReward's `inference-video.py`.

    Of an answer the first token alone is read there, so that no more are generated here.
    """

    def __init__(self, request):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = torch_device(request["device"])
        modern = self.device == "cuda" and torch.cuda.get_device_capability()[0] >= 8
        self.dtype = torch.bfloat16 if modern else torch.float16 if self.device == "cuda" else torch.float32
        self.tokenizer = AutoTokenizer.from_pretrained(request["weights"], trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(request["weights"], torch_dtype=self.dtype, trust_remote_code=True)
        self.model = model.eval().to(self.device)
        self.pad = request["pad_token"]

    def score(self, request):
        """The words of the answers."""
        import numpy
        import torch

        video = torch.from_numpy(numpy.load(request["frames"])).permute(3, 0, 1, 2)
        answers = []
        for query in request["queries"]:
            made = self.model.build_conversation_input_ids(
                tokenizer=self.tokenizer, query=query, images=[video], history=[], template_version="chat"
            )
            names = ("input_ids", "token_type_ids", "attention_mask")
            inputs = {name: made[name].unsqueeze(0).to(self.device) for name in names}
            inputs["images"] = [[made["images"][0].to(self.device).to(self.dtype)]]
            with torch.no_grad():
                said = self.model.generate(**inputs, max_new_tokens=1, do_sample=False, pad_token_id=self.pad)
            answers.append(self.tokenizer.decode(said[:, inputs["input_ids"].shape[1]][0]))
        return {"answers": answers}


class HPSv3:
    """Rewards of pictures by the package `hpsv3`: of its two outputs the first, the mean."""

    def __init__(self, request):
        from hpsv3 import HPSv3RewardInferencer

        config = request["config"]
        if request["base"]:
            config = self.based(config, request["base"], request["output"])
        self.inferencer = HPSv3RewardInferencer(
            config_path=config or None, checkpoint_path=request["weights"],
            device=torch_device(request["device"]),
        )  # fmt: skip

    @staticmethod
    def based(config, base, output):
        """A copy of the config, the package's own by default, with the network below read from a folder."""
        import hpsv3

        source = config or os.path.join(os.path.dirname(str(hpsv3.__file__)), "config", "HPSv3_7B.yaml")
        with open(source, encoding="utf-8") as file:
            text = file.read()
        line = "model_name_or_path: %s" % json.dumps(base)  # noqa: UP031
        text, count = re.subn(r"model_name_or_path:.*", lambda found: line, text)
        if not count:
            raise ValueError("%s: has no model_name_or_path" % source)  # noqa: UP031
        target = os.path.join(output, "HPSv3_7B.yaml")
        with open(target, "w", encoding="utf-8") as file:
            file.write(text)
        return target

    def score(self, request):
        """A reward for each picture."""
        import torch

        with torch.no_grad():
            paths = request["pictures"]
            rewards = self.inferencer.reward(prompts=[request["prompt"]] * len(paths), image_paths=paths)
        return {"rewards": [float(reward[0]) for reward in rewards]}


class VBench:
    """One dimension at a time by the package's own `evaluate`, which writes NAME_eval_results.json."""

    def __init__(self, request):
        import torch

        module = importlib.import_module(request["module"])
        made = getattr(module, request["class"])
        self.folder = os.path.dirname(os.path.abspath(str(module.__file__)))
        info = request["info"] or os.path.join(self.folder, "VBench_full_info.json")
        self.vbench = made(torch.device(torch_device(request["device"])), info, request["output"])

    def score(self, request):
        """The name of the file."""
        more = {
            key: os.path.join(self.folder, value[1]) if isinstance(value, list) else value
            for key, value in request["arguments"].items()
        }
        self.vbench.evaluate(
            videos_path=request["videos"], name=request["name"], prompt_list=request["prompts"],
            dimension_list=[request["dimension"]], local=True, read_frame=False, mode=request["mode"], **more,
        )  # fmt: skip
        return {"file": request["name"] + "_eval_results.json"}


KINDS = {"visionreward": VisionReward, "hpsv3": HPSv3, "vbench": VBench}


def answer(request, opened):
    """What a request gives; `opened` keeps the scorer from one to the next."""
    if request["do"] == "probe":
        return probe(request)
    if request["do"] == "open":
        opened["scorer"] = KINDS[request["kind"]](request)
        return {}
    return opened["scorer"].score(request)


def main():
    """Answers until the input ends."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]  # this file is no package's module
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    opened: dict = {}
    for line in sys.stdin:
        try:
            reply = {"gives": answer(json.loads(line), opened)}
        except BaseException as error:  # of packages that exit, too
            traceback.print_exc()
            reply = {"error": "%s: %s" % (type(error).__name__, error)}  # noqa: UP031
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
