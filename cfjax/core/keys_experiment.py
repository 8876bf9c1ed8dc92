"""Keys of the stages' configs (`cfjax train`, `plan`, `precompute` of ODE pairs); see `core.keys`."""

from cfjax.core.key import Key

ATTENTION = ("auto", "xla", "cudnn", "splash", "splash_interpreted", "chunked", "per_head")
SAMPLER_STEPS = "Few-step: timesteps of a block, the noisiest first; many-step: the number of solver steps."
MEMORY = "What is remembered, by the name of a policy (docs/memory.md)"

_RUN = (
    Key("stage", "The stage of the pipeline that this config trains; fixed by the file."),
    Key("seed", "Seed of everything random: weights, noise, the order of the data."),
    Key("steps", "Iterations; each updates the roles whose cadence says so.", "iterations"),
    Key("accept_changes", "Resume although a key that changes what the run learns has changed (docs/pods.md)."),
    Key("reference", "The PyTorch reference's quirks and numbers for this stage (docs/compare.md)."),
    Key("log_every", "How often losses and speed are noted.", "iterations"),
    Key("save_every", "How often a checkpoint is written; the last iteration is always saved.", "iterations"),
    Key("keep", "How many checkpoints are kept.", "checkpoints"),
    Key("checksums", "Whether a checkpoint's files get checksums, which are compared whenever it is read."),
    Key("loss_growth", "A loss beyond so many times its running median is saved aside; 0 is never.", "times"),
    Key("sample_every", "How often videos are sampled while training; 0 is at the end alone.", "iterations"),
    Key(
        "sample_clips",
        "The toy: videos of held-out captions, besides the guard's; 0 is none.",
        "videos",
    ),
    Key("progress", "Whether progress bars are shown."),
    Key("profile", "Iterations to write an XProf trace of to workdir/profile, as 100:105; '' is none."),
    Key("stall_seconds", "A run in which no iteration ends for so long ends itself; 0 is never.", "seconds"),
    Key("mesh.data", "Devices that each hold all weights and take a part of the batch.", "devices"),
    Key("mesh.fsdp", "Devices that share the weights and the batch between them.", "devices"),
    Key("mesh.context", "Devices that share the tokens of a video between them.", "devices"),
    Key("mesh.tensor", "Devices that share each matrix and the attention heads between them.", "devices"),
    Key("guard.enabled", "Whether samples are compared with real clips, and a collapse is reported."),
    Key("guard.prompts", "Prompts that the guard samples.", "prompts"),
    Key("guard.seeds", "Seeds of each of them.", "seeds"),
    Key("guard.world", "Folder of the Wan world that decodes the samples; '' is the dataset's own."),
    Key(r"cadence\.\w+", "The role is updated once in so many iterations; others in each.", "iterations"),
)

_DATA = (
    Key(r"data\.path", "Folder that holds the dataset (and the toy's world)."),
    Key(r"data\.name", "The dataset's folder inside data.path, as `cfjax precompute` wrote it."),
    Key(r"data\.source", "Where clips come from: the dataset, or the toy's moving shapes.", "", ("", "shapes")),
    Key(r"data\.assets", "Exported model whose toy world is used, such as toy_teacher; '' makes a new one."),
    Key(r"data\.clips", "Clips of the toy dataset that are rendered on first use.", "clips"),
    Key(r"data\.batch_size", "Clips of an iteration, of all devices together.", "clips"),
    Key(r"data\.max_corrupt", "The share of records that may be broken: each is reported, and replaced by another."),
    Key(r"data\.reversed_name", "Dataset of the captions of the clips played backwards, for BAgger."),
    Key(r"data\.lmdb", "Where the LMDB with a set's latents was moved to; '' is where it was, or beside the set."),
    Key(r"data\.ground_truth", "Whether the last state of ODE pairs is the clean clip; False: the ODE's end."),
    Key(r"data\.channels", "Latent channels of the toy.", "channels"),
    Key(r"data\.text_length", "Text rows of a toy caption.", "rows"),
    Key(r"data\.shapes\.size", "Height and width of the toy's videos.", "pixels"),
    Key(r"data\.shapes\.frames", "Length of the toy's clips; a latent frame is one frame.", "frames"),
    Key(r"data\.shapes\.shapes", "Shapes of the toy world.", "", ("circle", "square", "triangle", "star", "ring")),
    Key(
        r"data\.shapes\.colours",
        "Colours of the toy world.",
        "",
        ("red", "green", "blue", "yellow", "magenta", "cyan", "white", "orange"),
    ),
    Key(
        r"data\.shapes\.directions",
        "Directions of the toy world.",
        "",
        ("left", "right", "up", "down", "up-left", "up-right", "down-left", "down-right"),
    ),
    Key(r"data\.shapes\.speed", "Least and greatest speed of a shape.", "pixels per frame"),
    Key(r"data\.shapes\.radius", "Least and greatest radius of a shape.", "pixels"),
    Key(r"data\.shapes\.branching", "Chance that a shape turns by 90 degrees past the first third of its clip."),
    Key(r"data\.shapes\.bounces", "Whether shapes bounce off the edges; otherwise their whole path is inside."),
)

PRESETS = ("wan_1_3b", "wan_14b", "wan_i2v_14b", "wan_2_2_i2v_14b", "wan_2_2_5b", "wan_mini", "toy")

_NETWORKS = (
    Key(r"blocks\.frames", "Frames that are denoised together.", "latent frames"),
    Key(r"blocks\.independent_first_frame", "Whether the first latent frame is a block of its own."),
    Key(r"blocks\.window", "How far attention reaches back, the block included; 0 is everything.", "latent frames"),
    Key(r"blocks\.sink", "First frames that stay visible inside the window.", "latent frames"),
    Key(r"blocks\.memory", f"{MEMORY} while the student rolls out; '' is window and sink.", "policy"),
    Key(r"roles\.\w+\.preset", "Sizes of the network.", "", PRESETS),
    Key(r"roles\.\w+\.remat", "What the backward pass computes again, not keeps.", "", ("none", "full", "dots")),
    Key(r"roles\.\w+\.precision", "Of the matrix products.", "", ("float32", "bfloat16")),
    Key(r"roles\.\w+\.attention", "The implementation of attention.", "", ATTENTION),
    Key(r"roles\.\w+\.storage", "How a frozen role's weights are held.", "", ("float32", "bfloat16", "int8")),
    Key(r"roles\.\w+\.offload", "Whether a frozen role's matrices wait in host memory, copied layer by layer."),
    Key(r"roles\.\w+\.init", "Run directory or shipped model that it starts from; '' is random weights."),
    Key(r"roles\.\w+\.init_role", "Which role of that run."),
    Key(r"roles\.\w+\.init_ema", "Whether that role's averaged weights are taken."),
    Key(
        r"roles\.\w+\.init_stages",
        "Stages whose checkpoints are accepted; () is any.",
        "",
        ("bidirectional", "ar_diffusion", "ode_regression", "consistency", "dmd"),
    ),
    Key(r"roles\.\w+\.lora\.rank", "Rank of adapters trained in place of the weights; 0 is none (docs/training.md)."),
    Key(r"roles\.\w+\.lora\.alpha", "The adapters' scale is alpha / rank; 0 is the rank."),
    Key(r"roles\.\w+\.lora\.targets", "Which linear layers get adapters.", "", ("attention", "blocks", "all")),
    Key(r"roles\.\w+\.branch\.layers", "Layers that the GAN's classifier reads, from 0; () is the reference's depths."),
    Key(r"roles\.\w+\.branch\.ffn_dim", "Width of the classifier's blocks; 0 is the network's.", "channels"),
    Key(r"roles\.\w+\.branch\.num_class", "Logits per clip.", "logits"),
    Key(r"roles\.\w+\.branch\.time_embedding", "Whether the time embedding is classified too."),
    Key(r"ema\.\w+\.decay", "Decay of the role's averaged weights per iteration."),
    Key(r"ema\.\w+\.start", "Until then the average is a copy of the weights.", "iterations"),
)

_OPTIM = (
    Key(
        r"optim\.\w+\.name",
        "The optimiser; Muon is for the blocks' matrices alone.",
        "",
        ("adamw", "muon"),
    ),
    Key(r"optim\.\w+\.lr", "Peak learning rate, reached after the warm-up."),
    Key(r"optim\.\w+\.adam_lr", "With Muon, the peak rate of what Adam takes; 0 is lr."),
    Key(r"optim\.\w+\.b1", "Adam's decay of the first moment."),
    Key(r"optim\.\w+\.b2", "Adam's decay of the second moment."),
    Key(r"optim\.\w+\.eps", "Added to the root of the second moment."),
    Key(r"optim\.\w+\.weight_decay", "Decoupled: lr * weight_decay * weight is taken off in each update."),
    Key(r"optim\.\w+\.clip", "Bound on the gradient's global norm; 0 is none."),
    Key(
        r"optim\.\w+\.schedule",
        "The rate after the warm-up: constant, to 0 by a cosine, or a plateau with a linear end (wsd).",
        "",
        ("constant", "cosine", "wsd"),
    ),
    Key(r"optim\.\w+\.warmup", "Updates in which the rate rises from 0.", "updates of the role"),
    Key(r"optim\.\w+\.decay_fraction", "The part of the updates in which wsd falls to 0."),
    Key(r"optim\.\w+\.accumulate", "Microbatches of an update: less memory, the same batch.", "microbatches"),
)

_OBJECTIVE = (
    Key(r"objective\.shift", "Timestep shift of the noise levels that are trained at; 5 is Wan's at 480p."),
    Key(
        r"objective\.weighting",
        "Weight of a noise level in the loss: bell-shaped (bsmntw), none, or the clean video's error (x0).",
        "",
        ("bsmntw", "uniform", "x0"),
    ),
    Key(r"objective\.text_dropout", "Chance that a clip's caption becomes the negative prompt, for guidance."),
    Key(
        r"objective\.image_start",
        "Chance that a clip's first latent frame is given: clean, at level 0, without loss (Wan2.2-TI2V-5B).",
    ),
    Key(r"objective\.bf16_timesteps", "Whether timesteps are rounded to bfloat16, as the reference does (Q1, Q2)."),
    Key(
        r"objective\.forcing",
        "What a noisy block sees of its past: clean blocks (teacher) or noisy ones (diffusion).",
        "",
        ("teacher", "diffusion"),
    ),
    Key(
        r"objective\.noise_augmentation",
        "Noise on the clean past, from this index of the table up (more is less noise); 0 is none.",
    ),
    Key(
        r"objective\.history",
        "The past under teacher forcing: real clips, or the network's own prediction, in a pass or re-made from noise.",
        "",
        ("clean", "direct", "resampled"),
    ),
    Key(r"objective\.history_shift", "Shift of the levels that a resampled past is re-made from."),
    Key(r"objective\.history_steps", "Euler steps that re-make it.", "steps"),
    Key(r"objective\.bagger", "Chance that an update learns from the network's rollouts played backwards; 0 is off."),
    Key(r"objective\.bagger_prefix", "The part of such a clip that is given, and has no loss."),
    Key(r"objective\.bagger_steps", "UniPC steps of these rollouts.", "steps"),
    Key(r"objective\.bagger_guidance", "Guidance of these rollouts."),
    Key(r"objective\.bagger_pixels", "Whether they are reversed as pixels, through the codec, or as latents."),
    Key(r"objective\.codec_world", "Folder of the Wan world whose codec is used; '' is the dataset's."),
    Key(r"objective\.codec_decoder", "Which of that world's decoders.", "", ("vae", "tiny_vae")),
    Key(r"objective\.boundary", "Whether the last interval is trained too, which the reference skips (Q23)."),
    Key(r"objective\.teacher", "What the teacher of the distillation sees.", "", ("causal", "bidirectional")),
    Key(r"objective\.solver_steps", "Steps of the teacher's ODE solver, over the whole range of noise.", "steps"),
    Key(r"objective\.guidance", "Guidance of the teacher: neg + w (pos - neg)."),
    Key(r"objective\.steps", "The student's noise levels, as integer timesteps before the shift, the noisiest first."),
    Key(r"objective\.first_steps", "Levels of a video's first block; () is the same ones."),
    Key(
        r"objective\.method",
        "How pairs are solved: all blocks at once, block by block, or by a bidirectional teacher.",
        "",
        ("full", "cached", "bidirectional"),
    ),
    Key(r"objective\.levels_per", "Whether a noise level is drawn per clip or per block.", "", ("clip", "block")),
    Key(
        r"objective\.past",
        "What the student sees of the past: the clean clip, the ODE's end point, or noisy blocks.",
        "",
        ("clip", "endpoint", "noisy"),
    ),
    Key(r"objective\.matching", "What the student's videos are moved by.", "", ("dmd", "sid", "gan")),
    Key(r"objective\.sid_alpha", "Weight of the correction in SiD's loss."),
    Key(
        r"objective\.student_input",
        "What the student denoises in training: its own rollouts, or noised real clips (CausVid).",
        "",
        ("self_rollout", "noised_data"),
    ),
    Key(r"objective\.context_noise", "Noise level at which a finished block is committed (Q4)."),
    Key(
        r"objective\.kv_gradient",
        "Whether later blocks send gradient into earlier keys and values (Q6).",
        "",
        ("detached", "straight_through"),
    ),
    Key(r"objective\.same_exit", "Whether all blocks of a rollout have one exit step, or each draws its own."),
    Key(r"objective\.rolling", "The share of rollouts by windows of blocks (docs/memory.md)."),
    Key(r"objective\.save_activations", "Whether exit steps keep what their gradient needs: less time, more memory."),
    Key(r"objective\.real_guidance", "Guidance of the real score: pos + w (pos - neg); 0 is none."),
    Key(r"objective\.fake_guidance", "Guidance of the fake score, likewise."),
    Key(r"objective\.score_shift", "Shift of the level at which the scores are compared."),
    Key(r"objective\.score_min", "Least such level.", "sigma"),
    Key(r"objective\.score_max", "Greatest such level.", "sigma"),
    Key(r"objective\.score_table_shift", "Shift of the table that converts flows (Q3: 8); 0 is exact levels."),
    Key(r"objective\.window_frames", "Frames of a long rollout that the scores see; 0 is all.", "latent frames"),
    Key(r"objective\.max_frames", "Longest rollout; 0 is the dataset's clips.", "latent frames"),
    Key(r"objective\.new_frames", "Frames that an update adds to one rollout; 0: each begins anew.", "latent frames"),
    Key(r"objective\.switch_prompts", "Whether the prompt changes once in such a rollout."),
    Key(r"objective\.gan\.generator_weight", "Weight of the student's GAN loss."),
    Key(r"objective\.gan\.critic_weight", "Weight of the critic's GAN loss."),
    Key(r"objective\.gan\.r[12]_weight", "Weight of the critic's squared slope at real (r1) or generated (r2) clips."),
    Key(r"objective\.gan\.r[12]_sigma", "Standard deviation of the step along which that slope is measured."),
    Key(r"objective\.gan\.relativistic", "Whether logits of a real and a generated clip are compared with each other."),
)

_SAMPLER = (
    Key(
        r"sampler\.kind",
        "How the trained network generates.",
        "",
        ("few_step", "rolling", "many_step", "bidirectional"),
    ),
    Key(r"sampler\.steps", SAMPLER_STEPS),
    Key(r"sampler\.first_steps", "Few-step: timesteps of a video's first block; () is the same ones."),
    Key(r"sampler\.solver", "Many-step: the ODE solver.", "", ("unipc", "euler", "heun")),
    Key(r"sampler\.shift", "Timestep shift of the sampler's noise levels."),
    Key(r"sampler\.guidance", "Many-step: guidance, neg + w (pos - neg)."),
)

_PAIRS = (
    Key("pairs", "How many ODE pairs are solved.", "clips"),
    Key("output", "Folder of the pairs inside data.path."),
    Key("part_items", "Pairs of a part, what a killed job may lose; 0 is 16, and more in large sets.", "pairs"),
    Key("text_dtype", "How text rows are stored.", "", ("bfloat16", "float32")),
    Key("shard", "This process's number among those that share the job; -1 is JAX's."),
    Key("shards", "How many processes share the job; 0 is JAX's.", "processes"),
)

# Under the headings of docs/config.md.
GROUPS = {
    "The run": _RUN,
    "Data": _DATA,
    "Blocks, networks, averages": _NETWORKS,
    "Optimisers": _OPTIM,
    "Objective": _OBJECTIVE,
    "Sampler": _SAMPLER,
    "ODE pairs": _PAIRS,
}
EXPERIMENT = tuple(key for keys in GROUPS.values() for key in keys)
