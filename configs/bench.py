"""How fast videos stream: a run, or a network of a preset's sizes with random weights (speed does not depend on them).

    cfjax bench                                                             the toy's sizes, in seconds
    cfjax bench --config=configs/bench.py:wan,framewise --config.decoder=tiny_vae
    cfjax bench --config.run=checkpoints/causal_forcing --config.text=True
    cfjax bench --against=reference --reference_dir=Causal-Forcing          the same work on both sides, in turn
    cfjax bench --against=diffusers

Streams a batch of videos cold (with compiling), then warm ones, and prints a table: frames/s with and without the
decoder, time to the first frames, p50, p95 and p99 of a block, network passes, FLOPs executed and needed, share of the
roofline, memory. All of it is in WORKDIR/bench.json, the table in bench.md.
"""

from ml_collections import ConfigDict

from cfjax.experiment import presets


def get_config(arg: str = ""):
    """`wan`: Wan 1.3B in bfloat16, 480 x 832 pixels, 81 frames; `mini`: a
    miniature of 64 x 96; `toy` (the default); `framewise`: blocks of one."""
    words = presets.switches(arg, "toy", "wan", "mini", "framewise")
    presets.one_of(words, "toy", "wan")
    presets.one_of(words, "toy", "mini")
    mini = "mini" in words
    wan = mini or "wan" in words
    frames, height, width = presets.MINI_VIDEO.values() if mini else (81, 480, 832) if wan else (0, 0, 0)
    return ConfigDict(
        {
            # the network
            "run": "",  # a run directory or a shipped model; "": random weights of `preset`
            "ema": True,
            "world": "",  # the run's Wan world; "": beside it
            "preset": presets.MINI if mini else "wan_1_3b" if wan else "toy",  # or wan_14b, wan_2_2_5b ...
            "precision": "",  # of its matrix products: float32, bfloat16; "": the run's or the preset's
            "storage": "",  # what weights rest in: float32, bfloat16, int8; "": as they are multiplied
            "attention": "",  # auto, xla, cudnn ...; "": the run's or the preset's
            # before and after it
            "decoder": "",  # vae, tiny_vae, toy, or none; "": the run's world's, the VAE or the toy's
            "decoder_precision": "",
            "text": False,  # time the text encoder too
            "prompt": "A cat surfs on a wave at sunset" if wan else "a red circle moving left",
            "text_rows": 512 if wan else 8,  # of a prompt, with random weights
            # what is made
            "frames": frames,  # pixel frames; 0: the run's, or the toy's
            "height": height,
            "width": width,
            "block_frames": 1 if "framewise" in words else 3,  # latent frames of a block, with random weights
            "memory": "",  # what is remembered, by name (docs/memory.md); "": the run's, all
            "window": -1,  # latent frames that stay visible; 0: all; -1: the run's, all
            "sink": -1,
            "independent_first_frame": False,
            "sampler": ConfigDict(
                {
                    "kind": "",  # few_step, rolling; "": the run's, or few_step
                    "steps": (),  # few-step: timesteps; (): the run's, or 1000, 750, 500, 250
                    "first_steps": (),
                    "solver": "",  # many-step
                    "solver_steps": 0,
                    "guidance": -1.0,
                    "shift": 0.0,
                }
            ),
            "batch": 1,  # videos at a time
            "batches": 5,  # warm ones; rounds of a comparison
            "seed": 0,
        }
    )
