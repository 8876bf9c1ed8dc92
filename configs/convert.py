r"""Other people's weights into a run directory, and back out.

    cfjax convert --config.source=Wan2.1-T2V-1.3B --workdir=checkpoints/wan_1_3b
    cfjax convert --config=configs/convert.py:dmd --config.source=causal_forcing.pt \
        --config.world=checkpoints/wan_1_3b/world --workdir=checkpoints/causal_forcing
    cfjax convert --config.source=taew2_1.pth --workdir=checkpoints/wan_1_3b                add the tiny decoder
    cfjax convert --config=configs/convert.py:dmd --config.source=longlive_base.pt --config.lora=lora.pt \
        --config.world=checkpoints/wan_1_3b/world --workdir=checkpoints/longlive            a LoRA merged in
    cfjax convert --config.source=runs/dmd --config.to=pt --workdir=exported                for the PyTorch reference
    cfjax convert --config.source=runs/dmd --config.to=diffusers --workdir=exported

A source is a Wan release, a diffusers folder, one file of either (.safetensors, .gguf, .pt, .pth, .bin, an
.index.json), TAEHV's taew2_1, a training checkpoint of Causal Forcing, Self Forcing or CausVid, a folder of accelerate,
DeepSpeed or torch.distributed.checkpoint, or a run directory of cfjax. What a bare
checkpoint was trained for is not written in it: the switches say so, and are recorded, so that generate and train can
refuse what does not fit.
"""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from cfjax.experiment import presets

STAGES = ("bidirectional", "ar_diffusion", "ode_regression", "consistency", "dmd")


def get_config(arg: str = ""):
    """The stage that the weights come from, such as `dmd`, and that stage's own switches.

    Stages are "bidirectional" (the default: Wan itself), "ar_diffusion", "ode_regression", "consistency" and "dmd".
    Their switches are those of configs/STAGE.py: "framewise", and for dmd "2step" or "1step", say how to sample; `mini`
    is for the miniature releases of tests/synthetic.py.
    """
    words = [word for word in arg.split(",") if word]
    stage = next((word for word in words if word in STAGES), STAGES[0])
    return ConfigDict(
        {
            "source": "",  # folder or file
            "to": "orbax",  # a run directory; or pt, safetensors, diffusers
            "parts": "",  # some of dit,vae,text_encoder,tiny_vae,image_encoder; "": all there are that `to` is for
            "key": "",  # entry of a .pt: generator, generator_ema, critic; "": all, generator or else the average first
            "world": "",  # folder of a converted world, where the source has no VAE and text encoder
            # frames, height, width that it is made for; 0: those of 81 frames of 480 x 832 (TI2V-5B: 121 of 704 x 1280)
            "latents": presets.MINI_LATENTS if "mini" in words else (0, 0, 0),
            "lora": "",  # merged into the transformer: FILE[:WEIGHT][|FILE[:WEIGHT]...] (docs/wan.md)
            "dequantize": "float32",  # what fp8, int8 and GGUF weights become; or bfloat16, float16
            "unscaled": False,  # fp8 weights without scales are a plain cast, not a file that lost its scales
            "max_shard_gb": 5.0,  # of safetensors written
            "overwrite": False,
            "progress": True,
            "experiment": _experiment(stage, [word for word in words if word != stage]),
        }
    )


def _experiment(stage: str, words: list[str]) -> ConfigDict:
    """What configs/STAGE.py makes of the other switches."""
    spec = importlib.util.spec_from_file_location(f"config_{stage}", Path(__file__).with_name(f"{stage}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(",".join(words))
