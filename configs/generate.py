"""Generate videos from a run that was trained here or converted, streamed block by block where its sampler is causal.

    cfjax generate --config.prompt="a red circle moving left" --config.run=runs/quickstart/dmd --workdir=runs/videos
    cfjax generate --config=configs/generate.py:wan --config.run=checkpoints/causal_forcing --config.prompt="A surfer"
    ... --config.image=photo.jpg --config.independent_first_frame=True            image to video, chunk-wise
    ... --config.video=clip.mp4 --config.given_frames=9 --config.frames=81        the video's end, and 12 latents more
    ... --config.video=clip.mp4 --config.strength=0.6                             the video changed by the prompt
    ... --config.frames=321 --config.window=21 --config.sink=3                    a longer video, constant memory
    ... --config.frames=321 --config.memory=longlive_infinity                     the same by a policy (docs/memory.md)

    ... --config.timeline="a red circle moving left[3s] | a blue square moving up"  the prompt changes on the way
    ... --config.prompts=requests.jsonl --config.videos=5 --config.resume=True    a video set; resumable

Everything possible is checked before weights are read: all errors of a prompt file are in one line. Writes one mp4
per video, contact_sheet.png (beyond 100 videos contact_sheet_001.png ..., a page per hundred), settings.json (settings,
versions, device, the list of all videos; first, and with timings at the end) and videos.jsonl (a line per finished
video). Files that are there already are not replaced unless overwrite=True. resume=True keeps the videos that are
finished and still asked for (same prompt, seed, picture's content; settings must be those of settings.json) and makes
the rest; with overwrite=True too, files that are in the way of the rest are replaced. docs/wan.md has the rules.
"""

from typing import Any

from ml_collections import ConfigDict

from cfjax.experiment import presets


def get_config(arg: str = ""):
    """`wan`: 480 x 832 pixels, 81 frames, 16 per second; `wan_2_2` (TI2V-5B): 704 x 1280, 121, 24 per second.

    `mini`: 64 x 96, 33 frames; `toy` (the default): the moving-shapes world.
    """
    words = presets.switches(arg, "toy", "wan", "wan_2_2", "mini")
    presets.one_of(words, "toy", "mini", "wan_2_2")
    presets.one_of(words, "wan", "wan_2_2")
    video, wan = _video(words), bool({"wan", "wan_2_2", "mini"} & set(words))
    return ConfigDict(
        {
            # the model
            "run": video["run"],
            "ema": True,  # averaged weights, when the run keeps them
            "lora": "",  # merged into the run's network: FILE[:WEIGHT][|FILE[:WEIGHT]...] (docs/wan.md)
            "high_noise": _high_noise(),
            "world": "",  # a Wan world's folder; "": beside the run
            "decoder": "vae",  # or tiny_vae
            "decoder_precision": "",  # float32, bfloat16 (the reference's); "": as recorded
            "precision": "",  # of the network's matrix products: float32, bfloat16; "": the run's own
            "attention": "",  # auto, xla, cudnn; "": the run's own
            "storage": "",  # what weights rest in: float32, bfloat16, int8 (half of bfloat16); "": as multiplied
            "expect": ConfigDict({"stage": "", "block_frames": 0}),  # what the run has to be
            # what to make
            "prompt": "A cat surfs on a wave at sunset" if wan else "a red circle moving left",  # several: a | b
            "prompts": "",  # or a file with a row per request: .txt, .csv, .tsv, .jsonl, .json, .parquet (docs/data.md)
            "prompt_column": "",  # of that file; "": known by its name; when it is named, other columns are passed over
            "caption_choice": "",  # of several prompts in a row: first, longest, or the name of one
            "encoding": "",  # of that file, if it is not UTF-8: gbk, cp1252 ...
            "timeline": "",  # instead: prompts over time, "a[5s] | b[10s#]", or a .jsonl or .json file (docs/memory.md)
            "negative_prompt": "",  # "": the world's own
            "actions": "",  # of a run that can be steered: keys held for so many latent frames, "right*6, up+left*3"
            "videos": 1 if wan else 4,  # of each prompt
            "seed": 0,  # of a prompt's first video
            "seeds": (),  # of all its videos, in place of seed and videos
            "image": "",  # begin with this picture
            "video": "",  # go on from this video's end, or from these latents (.safetensors, .npz)
            "given_frames": 0,  # latent frames to go on from; 0: whole blocks, at most half of the result
            "strength": -1.0,  # video to video: the noise level that `video` is brought to, 0 to 1; -1: go on from it
            "fit": "cover",  # or stretch, as `inference.py` of the reference
            **{side: video[side] for side in ("height", "width")},  # pixels; 0: what the run was trained on
            "frames": video["frames"],  # pixel frames in all, given ones included
            # how
            "sampler": _sampler(),
            "memory": "",  # what is remembered: full, infinity_rope, ema_sink ... (docs/memory.md); "": the run's
            "window": -1,  # latent frames that stay visible; 0: all; -1: the run's own
            "sink": -1,  # first frames that stay visible inside the window
            "independent_first_frame": False,  # the first latent frame is a block of its own
            "fused_commit": "auto",  # a few-step block's first pass commits the block before it: on, off; auto
            "batch": 1 if wan else 8,  # videos at a time
            "tile": 0,  # decode in tiles of so many pixels; 0: whole frames, block by block
            "text_cache": "",  # a folder of text embeddings; the text encoder is read for what it lacks
            "fps": video["fps"],  # of what is read and written
            "scale": 1 if wan else 8,
            "save_latents": False,
            "overwrite": False,  # replace what is there
            "resume": False,  # go on with what is there
            "progress": True,
        }
    )


def _video(words: list[str]) -> dict[str, Any]:
    """The run and its videos' size and rate; 0: what the run was trained on."""
    if "wan_2_2" in words:
        return {"run": "checkpoints/wan_2_2_5b", "frames": 121, "height": 704, "width": 1280, "fps": 24.0}
    wan = {"run": "checkpoints/causal_forcing", "fps": 16.0}
    if "mini" in words:
        return {**wan, **presets.MINI_VIDEO}
    if "wan" in words:
        return {**wan, "frames": 81, "height": 480, "width": 832}
    return {"run": "runs/quickstart/dmd", "frames": 0, "height": 0, "width": 0, "fps": 8.0}


def _high_noise() -> ConfigDict:
    """Wan2.2-A14B's second expert: the run for noise levels of `boundary` and above; `run` then has those below.

    0.875 is text to video's, as released; `guidance` -1: the sampler's own.
    """
    return ConfigDict({"run": "", "boundary": 0.875, "guidance": -1.0})


def _sampler() -> ConfigDict:
    """What is changed of the run's sampler."""
    return ConfigDict(
        {
            "kind": "",  # few_step, or rolling: blocks denoised together (docs/memory.md); "": the run's own
            "steps": (),  # few-step: timesteps; (): the run's own
            "first_steps": (),  # of the first generated block
            "solver": "",  # many-step: unipc, euler, heun; "": the run's own
            "solver_steps": 0,
            "guidance": -1.0,
            "shift": 0.0,
        }
    )
