"""Keys of every verb's own configs; see `core.keys`. What several verbs read alike is written once."""

from cfjax.core.key import Key
from cfjax.core.keys_experiment import ATTENTION, MEMORY, SAMPLER_STEPS

DTYPES = ("", "float32", "bfloat16")
RUN = Key("run", "Run directory (trained or converted), or a shipped model such as toy_teacher.", "folder")
EMA = Key("ema", "Whether averaged weights are taken, where the run keeps them.")
WORLD = Key("world", "Folder of the Wan world; '' is beside the run, or the recorded one.", "folder")
PROGRESS = Key("progress", "Whether progress bars are shown.")
PRECISION = Key("precision", "Of the network's matrix products; '' is the run's own.", "", DTYPES)
ATTEND = Key("attention", "The implementation of attention; '' is the run's own.", "", ("", *ATTENTION))
STORAGE = Key("storage", "What weights rest in; '' is as they are multiplied.", "", (*DTYPES, "int8"))
DECODER_PRECISION = Key("decoder_precision", "Of the decoder's products; '' is as recorded.", "", DTYPES)
WINDOW = Key("window", "Latent frames that stay visible; 0 is all, -1 the run's own.", "latent frames")
SINK = Key("sink", "First frames that stay visible inside the window; -1 is the run's own.", "latent frames")
FIRST_ALONE = Key("independent_first_frame", "Whether the first latent frame is a block of its own.")
SAMPLER = (
    Key(
        r"sampler\.kind",
        "few_step, or rolling: blocks denoised together (docs/memory.md); '' is the run's.",
        "",
        ("", "few_step", "rolling"),
    ),
    Key(r"sampler\.steps", SAMPLER_STEPS.partition(";")[0] + "; () is the run's own."),
    Key(r"sampler\.first_steps", "Few-step: timesteps of the first generated block; () is the run's own."),
    Key(r"sampler\.solver", "Many-step: the ODE solver; '' is the run's own.", "", ("", "unipc", "euler", "heun")),
    Key(r"sampler\.solver_steps", "Many-step: steps of the solver; 0 is the run's own.", "steps"),
    Key(r"sampler\.guidance", "Many-step: guidance, neg + w (pos - neg); -1 is the run's own."),
    Key(r"sampler\.shift", "Timestep shift of the noise levels; 0 is the run's own."),
)
CHOICE = Key("caption_choice", "Which of several captions in a row: first, longest, or the name of one.")
ENCODING = Key("encoding", "Of tables and texts that are not UTF-8, as gbk, cp1252 or shift_jis.")
FIT = Key("fit", "Whether other shapes are scaled and cut, or stretched.", "", ("cover", "stretch"))
FPS = Key("fps", "Frames per second of what is read and written.", "frames/s")
TEXT_CACHE = "Folder of captions that are already encoded"

GENERATE = (
    RUN, EMA, WORLD, PRECISION, ATTEND, DECODER_PRECISION, WINDOW, SINK, FIRST_ALONE, *SAMPLER, CHOICE, ENCODING, FIT,
    FPS, PROGRESS,
    Key("lora", "LoRA files merged into the network: FILE[:WEIGHT][|FILE[:WEIGHT]...] (docs/wan.md)."),
    Key(r"high_noise\.run", "Wan2.2-A14B: the run for noise levels of boundary and above; '' is none.", "folder"),
    Key(r"high_noise\.boundary", "The noise level from which that run denoises.", "sigma"),
    Key(r"high_noise\.guidance", "Guidance of that run; -1 is the sampler's own."),
    Key("decoder", "Which of the world's decoders.", "", ("vae", "tiny_vae")),
    STORAGE,
    Key(r"expect\.stage", "The stage that the run has to be of; '' is any."),
    Key(r"expect\.block_frames", "The block size that the run has to have; 0 is any.", "latent frames"),
    Key("prompt", "What to show; several prompts have a | between them."),
    Key("prompts", "Instead: a file with a row per request, .txt, .csv, .jsonl, .parquet ... (docs/data.md)."),
    Key("prompt_column", "Column of that file; '' is known by its name."),
    Key("timeline", 'Instead: prompts over time, as "a[5s] | b[10s#]", or a file of them (docs/memory.md).'),
    Key("negative_prompt", "What guidance leads away from; '' is the world's own."),
    Key("actions", "Keys that are held, KEYS*FRAMES, ..., as right*6, up+left*3; '' is none (docs/actions.md)."),
    Key("videos", "Videos of each prompt, of consecutive seeds.", "videos"),
    Key("seed", "Seed of a prompt's first video."),
    Key("seeds", "Seeds of all its videos, in place of seed and videos; () is none."),
    Key("image", "Picture that the videos begin with.", "file"),
    Key("video", "Video, or latents (.safetensors, .npz), to go on from.", "file"),
    Key("given_frames", "Frames of it that are kept; 0 is whole blocks, at most half.", "latent frames"),
    Key("strength", "Video to video: the noise level that `video` is brought to; -1 is to go on from it.", "sigma"),
    Key("height", "Height of the videos; 0 is what the run was trained on.", "pixels"),
    Key("width", "Width of the videos; 0 is what the run was trained on.", "pixels"),
    Key("frames", "Frames of a video in all, given ones included; 0 is what the run was trained on.", "pixel frames"),
    Key("memory", f"{MEMORY}; '' is the run's own.", "policy"),
    Key("fused_commit", "Whether a block's first pass also commits the block before it.", "", ("auto", "on", "off")),
    Key("batch", "Videos that are made at a time.", "videos"),
    Key("tile", "Frames are decoded in tiles of this side; 0 is whole frames.", "pixels"),
    Key("text_cache", f"{TEXT_CACHE}; '' is none."),
    Key("scale", "Each pixel becomes a square of this side in the mp4.", "pixels"),
    Key("save_latents", "Whether latents are written beside the videos."),
    Key("overwrite", "Whether files that are in the way are replaced."),
    Key("resume", "Whether finished videos of the same settings are kept, and the rest made."),
)  # fmt: skip

PRESETS = ("toy", "wan_mini", "wan_1_3b", "wan_14b", "wan_i2v_14b", "wan_2_2_i2v_14b", "wan_2_2_5b")

BENCH = (
    RUN._replace(text="Run directory or shipped model; '' is random weights of preset."), EMA, WORLD, ATTEND,
    DECODER_PRECISION, WINDOW, SINK, FIRST_ALONE, *SAMPLER,
    Key("preset", "Sizes of random weights.", "", PRESETS),
    Key("precision", "Of the network's matrix products; '' is the run's or the preset's.", "", DTYPES),
    STORAGE,
    Key("decoder", "'' is the run's world's, the VAE or the toy's.", "", ("", "vae", "tiny_vae", "toy", "none")),
    Key("text", "Whether the text encoder is timed too."),
    Key("prompt", "The prompt that is encoded."),
    Key("text_rows", "Text rows of a prompt, with random weights.", "rows"),
    Key("frames", "Length of a video; 0 is the run's, or the toy's.", "pixel frames"),
    Key("height", "Height of a video; 0 is the run's, or the toy's.", "pixels"),
    Key("width", "Width of a video; 0 is the run's, or the toy's.", "pixels"),
    Key("block_frames", "Frames of a block, with random weights.", "latent frames"),
    Key("memory", f"{MEMORY}; '' is the run's, or everything.", "policy"),
    Key("batch", "Videos at a time.", "videos"),
    Key("batches", "Batches that are timed after the first; rounds of a comparison.", "batches"),
    Key("seed", "Seed of weights and noise."),
)  # fmt: skip

PRECOMPUTE = (
    CHOICE, ENCODING, FIT, PROGRESS,
    Key("fps", "Rate at which clips are sampled.", "frames/s"),
    Key("source", "Folder of clips, an LMDB (or a folder of them), or a file of prompts.", "file or folder"),
    Key("captions", "Table of the clips' captions; '' is captions.* or metadata.* in the folder.", "file"),
    Key("file_column", "Column of the clips' names; '' is known by its name."),
    Key("caption_column", "Column of the captions; '' is known by its name."),
    Key("parts", "Whether clips are cut out of their files by the table's column timestamp."),
    Key("world", "Folder of the Wan world that encodes.", "folder"),
    Key("output", "Folder of the new dataset; '' is beside an LMDB.", "folder"),
    Key("frames", "Length of a clip: 1 and a multiple of 4.", "pixel frames"),
    Key("height", "Height of a clip.", "pixels"),
    Key("width", "Width of a clip.", "pixels"),
    Key("max_crop", "The part of a picture that `cover` may cut off; clips that need more are left out."),
    Key("upscale", "Whether clips that are smaller are enlarged; otherwise they are left out."),
    Key("ground_truth", "Whether an LMDB's last entry is the clean clip; False: the ODE's end, as in CausVid."),
    Key(
        "pictures",
        "Whether a clip's first frame and grey ones after it are encoded too, for image-to-video networks.",
    ),
    Key("copy_latents", "Whether an LMDB's latents are copied; otherwise they are read where they are."),
    Key("lmdb", "Where the LMDB of a set was moved to, for --check and --merge.", "file"),
    Key("latent_shape", "F, H, W, C of the latents that stage 3 generates from prompts."),
    Key("dtype", "How latents are stored.", "", ("float16", "float32")),
    Key("text_dtype", "How text rows are stored.", "", ("bfloat16", "float32")),
    Key("encode_frames", "Frames that the VAE encodes at a time; 0 is the whole clip.", "latent frames"),
    Key("text_cache", f"{TEXT_CACHE}; '' is text_cache beside the world.", "folder"),
    Key("batch_size", "Clips that are encoded at a time.", "clips"),
    Key("part_items", "Records of a part, what a killed job may lose; 0 is 64, and more in large sets.", "records"),
    Key("workers", "Threads that read and decode clips.", "threads"),
    Key("shard", "This process's number among those that share the job; -1 is JAX's."),
    Key("shards", "How many processes share the job; 0 is JAX's.", "processes"),
)  # fmt: skip

CONVERT = (
    PROGRESS,
    Key("source", "Wan release, diffusers folder, checkpoint, single file or run directory.", "file or folder"),
    Key("to", "What is written: a run directory, or files for others.", "",
        ("orbax", "pt", "safetensors", "diffusers", "peft", "lora")),
    Key("parts", "Some of dit, vae, text_encoder, tiny_vae, image_encoder; '' is all there are that `to` is for."),
    Key("key", "Entry of a .pt (generator, generator_ema, critic); '' is all, or generator, or else the average."),
    Key("world", "Folder of a converted world, where the source has no VAE and text encoder.", "folder"),
    Key("latents", "Frames, height and width of the latents that the model is made for; 0 is the release's."),
    Key("lora", "LoRA files merged into the transformer: FILE[:WEIGHT][|FILE[:WEIGHT]...] (docs/wan.md)."),
    Key("dequantize", "What fp8, int8 and GGUF weights become.", "", ("float32", "bfloat16", "float16")),
    Key("unscaled", "Whether fp8 weights without scales are a plain cast, not a file that lost its scales."),
    Key("max_shard_gb", "Largest file of safetensors written.", "GB"),
    Key("overwrite", "Whether files that are in the way are replaced."),
)  # fmt: skip

COMPARE = (
    RUN._replace(text="Run directory or shipped teacher; '' is the world's parts, or random weights."), EMA,
    Key("world", "Folder of the run's Wan world; '' is where the run says.", "folder"),
    Key("role", "Which of the run's networks."),
    Key("random", "Sizes of random weights.", "", ("toy", "full", "ti2v_toy", "ti2v", "i2v_toy", "i2v")),
    Key("frames", "Length of the test inputs.", "latent frames"),
    Key("height", "Height of the test inputs.", "pixels"),
    Key("width", "Width of the test inputs.", "pixels"),
    Key("text_length", "Text rows of the test inputs.", "rows"),
    Key("steps", "Steps of the many-step sampler that is compared.", "steps"),
)  # fmt: skip

EVALUATE = (
    RUN, EMA,
    Key("clips", "Videos that are measured (`:switch`: sessions of each mode).", "videos"),
    Key("kept", "Videos that are stored.", "videos"),
    Key("batch", "Videos that are made at a time.", "videos"),
    Key("seed", "Seed of the noise, and of the captions that are drawn."),
    Key("evaluations", "`:table`: a glob pattern of folders that hold an evaluation."),
    Key("frames", "Length of a long video or session; 0 is ten times, or twice, that of training.", "latent frames"),
    Key("memories", "`:long`: memory policies with a | between them (docs/memory.md)."),
    Key("memory", "`:switch`: the sessions' memory policy.", "policy"),
    Key("prompts", "`:switch`: two prompts, A|B; beside videos or compare: the clips' list, FILE or FILE|EXTENDED."),
    Key("modes", "`:switch`: what happens to the past there: some of recache|keep|cut."),
    Key("videos", "Instead of a run: a folder of clips, of any system, that is measured.", "folder"),
    Key("against", "References of the same names as `videos`.", "folder"),
    Key("compare", "Two folders, of clips or of what `videos` wrote, that are compared."),
    Key("metrics", "Groups of metrics.", "", ("flickering", "frames", "motion")),
    Key("block", "Frames that were generated together, for seams; 0 is unknown.", "pixel frames"),
    Key("first_block", "Frames of the first block; 0 is as the others.", "pixel frames"),
    Key("fps", "In place of the files' rate; 0 is the files'.", "frames/s"),
    Key("workers", "Clips measured at a time; 0 is one a core.", "processes"),
    Key("score", "Scorers that run on the clips: lpips, fvd, vbench, vbench_long, visionreward, hpsv3, or your own."),
    Key(r"scorers\.\w+\.weights", "The scorer's weights.", "file or folder"),
    Key(r"scorers\.\w+\.python", "Interpreter of the environment with its package; '' is this one.", "file"),
    Key(r"scorers\.\w+\.device", "Where it runs; '' is cuda where torch has it.", "", ("", "cpu", "cuda")),
    Key(r"scorers\.\w+\.options", "Its own settings: NAME=VALUE with a | between them (docs/evaluate.md)."),
    Key("vbench", "Instead: VBench's own results, a folder of *_eval_results.json or one of them.", "folder"),
)  # fmt: skip

EXPORT = (
    Key("run", "Run directory whose averaged weights are written.", "folder"),
    Key("clips", "Videos of the evaluation that is recorded.", "videos"),
    Key("note", "Free text for the record, such as the machine and the duration."),
)

PROFILE_HEADS = (
    RUN, EMA, WORLD, PRECISION,
    Key("prompt", "What the videos show; several prompts have a | between them."),
    Key("prompts", "Instead: a file with a row per request (docs/data.md)."),
    Key("videos", "Videos of each prompt.", "videos"),
    Key("seed", "Seed of a prompt's first video."),
    Key("latents", "Instead of making videos: a file that `generate --config.save_latents=True` wrote.", "file"),
    Key("frames", "Length of a video; 0 is what the run was trained on.", "pixel frames"),
    Key("levels", "How many of the sampler's noise levels are measured.", "levels"),
    Key("sink", "First key frames that are not counted.", "latent frames"),
    Key("recent", "Last key frames that count as recent, the block's own included.", "latent frames"),
    Key("threshold", "The share of attention to recent frames from which a head is called static."),
    Key("batch", "Videos at a time.", "videos"),
    Key("periodicity", "The share of a head's variation in one period from which it is a wave."),
    Key("between", "Attention between sink and recent frames, of uniform attention's, below which a head is a veil."),
)  # fmt: skip

SERVE = (
    RUN, EMA, WORLD, PRECISION, ATTEND, DECODER_PRECISION, FPS,
    Key("decoder", "Which of the world's decoders.", "", ("vae", "tiny_vae")),
    Key("text_cache", f"{TEXT_CACHE}; '' is none."),
    Key("memories", "Memory policies that clients can choose from (docs/memory.md); the first is the default."),
    Key("prompts", "Prompts that the page offers."),
    Key("host", "Address to listen at; others than this machine's need a token."),
    Key("port", "Port to listen at; 0 is a free one."),
    Key("token", "What clients have to know; '' is nothing."),
    Key("origins", "Pages of other hosts that may connect, as https://example.com."),
    Key("sessions", "Sessions at a time.", "sessions"),
    Key("devices", "Devices that sessions are spread over, at most; 0 is all; a CPU counts as so many.", "devices"),
    Key("together", "Whether sessions go through a device together."),
    Key("snapshots", "Snapshots of a session; each holds a cache on the device.", "snapshots"),
    Key("seek_blocks", "Blocks that a session can go back; each holds a cache.", "blocks"),
    Key("idle_seconds", "A session without a message ends after so long.", "seconds"),
    Key("resume_seconds", "A lost socket can come back for so long.", "seconds"),
)  # fmt: skip
PLAY = (
    Key("url", "Address of the server."),
    Key("token", "What the server asks for; '' is nothing."),
    Key("prompt", "What to show; several, one after another, have a | between them."),
    Key("mode", "What happens to the past when the prompt changes.", "", ("recache", "keep", "cut")),
    Key("seed", "Seed of the stream."),
    Key("memory", "One of the server's policies; '' is its first.", "policy"),
    Key("blocks", "Blocks that are asked for.", "blocks"),
    Key("scale", "Each pixel becomes a square of this side in the mp4.", "pixels"),
    Key("overwrite", "Whether a video that is there is replaced."),
)
QUICKSTART = (
    Key("recipe", "Which stages are trained; set by the switch."),
    Key("layout", "Switches that every stage gets (framewise, 2step, 1step); set by the switch."),
    Key("stages", "The stages of the recipe: verb, config, budget and what each starts from; set by the switch."),
    Key(r"titles\..*", "What the report calls a network; set by the switch."),
    Key("streams", "Whether long videos and prompt switches of the student are measured."),
    Key("budget", "Which of budgets.", "", ("default", "short", "long", "tiny")),
    Key("teacher", "Exported model that the recipe starts from."),
    Key("seed", "Seed of every stage."),
    Key("guard", "Whether stages sample while they train, and report a collapse."),
    Key(r"budgets\.\w+\.clips", "Clips of the dataset.", "clips"),
    Key(r"budgets\.\w+\.pairs", "ODE pairs.", "clips"),
    Key(r"budgets\.\w+\.evaluation", "Videos of each evaluation.", "videos"),
    Key(r"budgets\.\w+\.batch", "Clips of a batch of every stage; the config's own where it is not given.", "clips"),
    Key(r"budgets\.\w+\.streams", "Long videos, and sessions of each mode.", "videos"),
    Key(r"budgets\.\w+\.(ar|ode|cd|dmd)", "Iterations of that stage.", "iterations"),
)

INITS = ("causal_ode", "bi_ode", "bi_ode_cp", "causal_cd", "asym_cd_cp", "asym_cd", "ar_diff")
INJECTIVITY = (
    Key("seeds", "Repetitions with data, networks and noise of their own; 0 is what needs no training.", "seeds"),
    Key("frames", "Length of the toy law's videos.", "frames"),
    Key("pasts", "Pasts of each probe.", "pasts"),
    Key("futures", "Futures of each past.", "futures"),
    Key("futures_seed", "Seed of these, the same in every repetition."),
    Key("levels", "Noise levels of the probes, on the solver's grid.", "sigma"),
    Key("collisions", "Futures that are drawn again per frame, in search of collisions.", "futures"),
    Key("videos", "Generated and real videos of a measurement.", "videos"),
    Key("inits", "Initialisations that are trained.", "", INITS),
    Key("ahead", "Teachers that see so many future frames are trained too.", "frames"),
    Key("forcing", "Whether teacher and diffusion forcing are compared too."),
    Key("dmd", "Initialisations that go on with DMD.", "", INITS),
    Key("dmd_at", "Iterations of DMD at which they are measured.", "iterations"),
    Key(r"budget\.ar_steps", "Updates of stage 1, and of DMD's critic before it meets a student.", "updates"),
    Key(r"budget\.ode_steps", "Updates of ODE regression.", "updates"),
    Key(r"budget\.cd_steps", "Updates of consistency distillation.", "updates"),
    Key(r"budget\.batch", "Videos of an update.", "videos"),
    Key(r"budget\.pool", "Different videos in all.", "videos"),
    Key(r"budget\.lr", "Peak learning rate; it falls by a cosine."),
    Key(r"budget\.dmd_lr", "DMD's learning rate, constant."),
    Key(r"budget\.solver_steps", "Euler steps of the ODE pairs.", "steps"),
    Key(r"budget\.cd_levels", "Levels of consistency distillation.", "levels"),
    Key(r"budget\.width", "Width of the networks' hidden layers.", "channels"),
)
ABLATION = (
    Key("seeds", "How many seeds each recipe is trained with.", "seeds"),
    Key("budget", "Which of the budgets of configs/quickstart.py.", "", ("default", "short", "long", "tiny")),
    Key("teacher", "Exported model that the recipes start from."),
    Key("recipes", "Recipes of configs/quickstart.py; the others are compared with the first."),
    Key("forcings", "Recipes of stage 1 alone, compared with the first recipe's AR teacher."),
)
UNCERTAIN = (
    Key("seeds", "How many seeds each cell is trained with.", "seeds"),
    Key("teacher", "Exported bidirectional model of a world with turns that the recipes start from."),
    Key("recipes", "Recipes of configs/quickstart.py, the paper's Table 2."),
    Key("first", "So many of these are trained first, with all seeds.", "recipes"),
    Key("layouts", "Blocks of three latent frames, and of one.", "", ("chunkwise", "framewise")),
    Key("dmd", "Whether every cell goes on with DMD."),
    Key("pasts", "Clean pasts that every network goes on from.", "pasts"),
    Key("futures", "Videos of each of them.", "videos"),
    Key(r"budget\.clips", "Clips of the dataset.", "clips"),
    Key(r"budget\.pairs", "ODE pairs.", "clips"),
    Key(r"budget\.solver_steps", "Euler steps of an ODE pair: a multiple of four.", "steps"),
    Key(r"budget\.(ar|ode|cd|dmd)", "Iterations of that stage.", "iterations"),
    Key(r"paths\.turn", "Exact teachers: chances of a turn; the first one is tested."),
    Key(r"paths\.inits", "Exact teachers: initialisations that are trained.", "", INITS),
    Key(r"paths\.videos", "Exact teachers: generated and real paths of a measurement.", "videos"),
    Key(r"paths\.steps", "Exact teachers: updates of every stage.", "updates"),
    Key(r"paths\.batch", "Exact teachers: paths of an update.", "videos"),
    Key(r"paths\.pool", "Exact teachers: different paths in all.", "videos"),
    Key(r"paths\.solver_steps", "Exact teachers: Euler steps of an ODE pair: a multiple of four.", "steps"),
    Key(r"exact\.pasts", "Pasts of the exact part.", "pasts"),
    Key(r"exact\.noises", "Draws of a block's own noise.", "draws"),
    Key(r"exact\.again", "Draws of the noise behind it, for each.", "draws"),
    Key(r"exact\.turn", "Chances of a turn."),
    Key(r"exact\.frames", "Frames of a block, from the first that can show a turn.", "frames"),
)

VERBS = {
    "generate": GENERATE,
    "serve": SERVE,
    "play": PLAY,
    "bench": BENCH,
    "precompute": PRECOMPUTE,
    "convert": CONVERT,
    "compare": COMPARE,
    "evaluate": EVALUATE,
    "export": EXPORT,
    "profile_heads": PROFILE_HEADS,
    "quickstart": QUICKSTART,
    "study injectivity": INJECTIVITY,
    "study ablation": ABLATION,
    "study uncertain": UNCERTAIN,
}
