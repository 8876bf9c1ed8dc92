"""Data in: video clips, an LMDB of the PyTorch reference, or prompts; encoded once, before training.

A folder of clips with captions, 81 frames of 480 x 832 at 16 frames per second:

    cfjax precompute --config=configs/precompute.py --config.source=FOLDER
        --config.world=checkpoints/wan_1_3b/world --config.output=data/wan/clips

Captions are in captions.csv, .jsonl (columns file, caption) or .json ({file: caption}) in the folder, in a table that
`captions` names, or in NAME.txt beside NAME.mp4. What cannot be used is skipped, and report.json says why.

An LMDB, or a folder of them (clean latents or ODE pairs). Its latents stay where they are unless `copy_latents` is set,
only the prompts are encoded; without `output` they go beside it, and training opens the LMDB by its own path. Pairs
without clean clips (Self Forcing's, CausVid's) take `ground_truth=False` here, or `data.ground_truth=False` to train.

    cfjax precompute --config=configs/precompute.py --config.source=dataset/clean_data
    cfjax train --config=configs/ar_diffusion.py --config.data.path=dataset --config.data.name=clean_data
        --workdir=runs/ar

Prompts, one per line, are all that stage 3 needs:

    cfjax precompute --config=configs/precompute.py --config.source=prompts.txt --config.output=data/wan/prompts
    cfjax train --config=configs/dmd.py --config.data.name=prompts --workdir=runs/dmd

A job that was stopped is resumed by the same command. Several processes share a job when each is given its `shard` of
`shards`; under jax.distributed that is the default. Checking every record of any dataset:

    cfjax precompute --check=data/wan/clips

Merging sets, or writing a single one in parts of another size (docs/data.md):

    cfjax precompute --merge=data/wan/clips,data/wan/more --config.output=data/wan/all
"""

from ml_collections import ConfigDict

from cfjax.experiment import presets


def get_config(arg: str = ""):
    """`mini`: 33 frames of 64 x 96 pixels.

    Sizes of Wan2.1 at 480p; fit and max_crop say how other shapes are made to fit, see cfjax.data.video.
    """
    mini = "mini" in presets.switches(arg, "mini")
    frames, height, width = presets.MINI_VIDEO.values() if mini else (81, 480, 832)
    latents = presets.MINI_LATENTS if mini else (21, 60, 104)
    return ConfigDict(
        {
            "source": "",
            "captions": "",  # table of the clips' captions; "": captions.* or metadata.* in the folder, if there is one
            "file_column": "",  # columns of a table; "": known by their names
            "caption_column": "",
            "caption_choice": "",  # of several captions: first, longest, or the name of one
            "encoding": "",  # of tables and texts that are not UTF-8: gbk, cp1252, shift_jis ...
            "parts": False,  # take clips out of their files by the table's column timestamp (Panda-70M, Koala-36M)
            "world": "checkpoints/wan_1_3b/world",
            "output": "",
            "frames": frames,
            "height": height,
            "width": width,
            "fps": 16.0,
            "fit": "cover",
            "max_crop": 0.5,
            "upscale": False,
            "ground_truth": True,  # an LMDB's last entry is the clean clip; False: the ODE's end, as in CausVid
            "pictures": False,  # encode each clip's first frame before grey too, for image-to-video networks
            "copy_latents": False,
            "lmdb": "",  # of --check and --merge: where the LMDB of a set was moved to
            "latent_shape": (*latents, 16),  # F, H, W, C that stage 3 generates from prompts
            "dtype": "float16",
            "text_dtype": "bfloat16",
            "encode_frames": 4,  # latent frames that the VAE makes at a time; 0 is the whole clip at once
            "text_cache": "",  # folder of captions already encoded; "" is text_cache beside the world
            "batch_size": 1,
            "part_items": 0,  # what a killed job may lose; 0 is 64, and more where that would be over 1,024 parts
            "workers": 2,
            "shard": -1,
            "shards": 0,
            "progress": True,
        }
    )
