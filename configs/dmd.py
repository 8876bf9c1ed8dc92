"""Stage 3: asymmetric DMD with self-rollout (paper section 3.3).

    cfjax train --config=configs/dmd.py --workdir=runs/dmd                    chunk-wise, 4 steps, 14B real score
    cfjax train --config=configs/dmd.py:framewise --workdir=runs/dmd
    cfjax train --config=configs/dmd.py:framewise,2step --workdir=runs/dmd    4 steps for the first block, then 2
    cfjax train --config=configs/dmd.py:toy --workdir=runs/toy/dmd
    cfjax train --config=configs/dmd.py:from_ar --workdir=runs/ar_dmd         no few-step initialisation
    cfjax train --config=configs/dmd.py:from_cd --workdir=runs/cd_dmd         from stage 2b: Causal Forcing++
    cfjax train --config=configs/dmd.py:sid --workdir=runs/sid                SiD instead of DMD
    cfjax train --config=configs/dmd.py:gan --workdir=runs/gan                a GAN on the critic's features; on clips
    cfjax train --config=configs/dmd.py:causvid --workdir=runs/causvid        noised real clips instead of self-rollout
    cfjax train --config=configs/dmd.py:bidirectional --workdir=runs/few      a few-step bidirectional student
    cfjax train --config=configs/dmd.py:long --workdir=runs/long              rollouts of 21 to 27 latent frames
    cfjax train --config=configs/dmd.py:rolling --workdir=runs/rolling        half of them by windows: Rolling Forcing
    cfjax train --config=configs/dmd.py:streaming --workdir=runs/streaming    one rollout of 240 frames, over updates
    cfjax train --config=configs/dmd.py:toy,from_cd,actions --workdir=runs/toy_steered/dmd  steered by arrow keys
    cfjax plan --config=configs/dmd.py --topology=v5p:4x4x4 --config.mesh.fsdp=16 --config.mesh.context=4

Numbers of the PyTorch reference: student lr 2e-6, critic 4e-7, betas (0, 0.999), one student update in five
iterations, guidance 3 in the "dmd" convention, EMA 0.99 from iteration 200. Its quirks that change numbers are keys of
`objective`: context_noise 0.00498 (Q4), kv_gradient "straight_through" (Q6), score_table_shift 8 (Q3).
One exit step is drawn for all blocks of a rollout, as in the reference; objective.same_exit=False draws one for each.
`--config.reference=True` sets them, the two guidances, the scores' levels and the EMA, in the toy too.

`from_cd` starts from the average that runs/cd keeps (configs/consistency.py), not from the weights that it trains, as
the reference's stage 3 does: its CD checkpoints hold nothing else. Such a checkpoint converted holds it as the network
itself: --config.roles.student.init_ema=False. With asymmetric distillation: --config.roles.student.init=runs/acd.

The 14B real score is stored in bfloat16 (with float32's numbers, since it computes in bfloat16). With less memory:
--config.roles.real_score.storage=int8, --config.roles.real_score.offload=True (its matrices in host memory), or both.

`long` is for students that generate more than the scores can see: each update rolls out a drawn number of blocks, up to
`objective.max_frames`, and the scores get the last `objective.window_frames`, whose first latent is re-encoded by the
codec of the dataset's world (objective.codec_world, if the dataset does not name it). The PyTorch reference's numbers
for it: 3000 steps at batch 8, lr 1.5e-6; attention reaches back 21 frames. The student generates long videos with
`cfjax generate --config.frames=...`.

`rolling` is `long` for students that denoise several blocks together (Rolling Forcing, docs/memory.md): a share
`objective.rolling` of the rollouts is made by windows of as many blocks as there are steps, each at another level, and
so is what the student generates (sampler.kind="rolling"). Attention reaches back 21 frames, the first block among them;
in rollouts block by block that stays at its own position. The toy's windows are of two steps: four, and the first
block, are more than the 12 frames that its scores know; the miniature's too.

`streaming` is LongLive's streaming long tuning: every update, the student's or the critic's, adds a chunk to one
rollout, which ends at `objective.max_frames` latent frames; then another begins. The first chunk is
`objective.window_frames` long, later ones add `objective.new_frames` or more; the scores see the last window, the
losses count what is new. Once in a rollout the prompt becomes another clip's (objective.switch_prompts). It starts from
a student of stage 3 (runs/dmd), attends to 12 frames, 3 of them sink, and generates so too. The rollout is in the
checkpoint. LongLive trains LoRA weights at 1e-5 and 2e-6; here all weights train, at stage 3's rates.
`--config.blocks.memory=NAME` (window and sink 0) has the student remember by another policy, in every variant that
rolls out (docs/memory.md).

`gan` has no real score: a classifier on the critic's features discriminates the batch's clips from the student's videos
(objective.gan: weights, relativistic, R1 and R2; roles.critic.branch: the layers it reads). With AdamW the weights of
the two losses matter only together with R1 and R2.

`python launch/sweep.py run --config=configs/dmd.py:toy --workdir=runs/sweeps/dmd` sweeps over the student's rate and
the critic updates per student update, which decide the balance of the two networks: four runs.

Toy recipe: faster rates, and guidance 1, because the toy's captions are followed already and 3 over-saturates.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from cfjax.experiment import presets

FULL = (1000, 750, 500, 250)
FEW = {"2step": (1000, 500), "1step": (1000,)}
# Switches of which one is enough.
APART = (
    ("toy", "mini"),
    ("long", "causvid"), ("long", "bidirectional"), ("sid", "gan"), ("2step", "1step"),
    ("rolling", "long"), ("rolling", "causvid"), ("rolling", "bidirectional"), ("rolling", "streaming"),
    ("long", "streaming"), ("streaming", "causvid"), ("streaming", "bidirectional"), ("streaming", "sid"),
    ("streaming", "gan"), ("streaming", "from_ar"), ("streaming", "from_cd"),
    ("from_ar", "from_cd", "causvid", "bidirectional"),  # each says what the student starts from
    ("framewise", "bidirectional"),
    *((switch, other) for switch in presets.STEERED for other in ("long", "rolling", "streaming", "gan", "mini")),
)  # fmt: skip


class Size(NamedTuple):
    """Latent frames: that the scores were trained on; of the longest rollout of `long` and of `streaming`; that one
    update of `streaming` adds, and that its student attends to.
    """

    window: int
    long: int
    streaming: int
    new: int
    attended: int


SIZES = {"toy": Size(12, 18, 48, 9, 9), "mini": Size(9, 15, 21, 6, 6), "": Size(21, 27, 240, 18, 12)}


def size_of(words: list[str]) -> Size:
    """Those of the toy, the miniature or Wan."""
    return next((SIZES[word] for word in words if word in SIZES), SIZES[""])


def get_config(arg: str = ""):
    """`toy`, `mini`, `framewise`, `2step`, `1step`, `long`, `rolling`, `streaming`, `from_ar`, `from_cd`, `sid`,
    `gan`, `causvid`, `bidirectional`; `actions`, `action_attention`: the toy steered by keys.
    """
    variants = ("from_ar", "from_cd", "sid", "gan", "causvid", "bidirectional")
    longer = ("long", "rolling", "streaming")
    words = presets.switches(arg, "toy", "mini", "framewise", *FEW, *longer, *variants, *presets.STEERED)
    for alternatives in APART:
        presets.one_of(words, *alternatives)
    toy, streaming, long = "toy" in words, "streaming" in words, "long" in words or "rolling" in words
    window = size_of(words).window
    c = presets.experiment("dmd", steps=600 if toy else 3000 if long or streaming else 1000)
    c.roles = roles(words)
    c.data = presets.toy_data() if toy else presets.wan_data("data/wan")
    c.log_every = 10 if toy else 50
    c.blocks = presets.blocks("framewise" in words)
    c.blocks.memory = ""  # what the student remembers while it rolls out, in place of window and sink: docs/memory.md
    if long:
        c.blocks.window = window
        c.data.batch_size = c.data.batch_size if toy else 8
    if "rolling" in words:
        c.blocks.sink = c.blocks.frames
    if streaming:
        c.blocks.window, c.blocks.sink = size_of(words).attended, 3
    if "bidirectional" in words:  # one block of all frames sees everything, and so does its sampler
        c.blocks.frames = window
    c.objective = objective(words, window)
    c.cadence.student = 5
    c.optim.student = presets.toy_adam(2e-4) if toy else presets.optimizer(1.5e-6 if long else 2e-6)
    c.optim.critic = presets.toy_adam(4e-4) if toy else presets.optimizer(4e-7)
    c.ema.student = presets.ema(0.95 if toy else 0.99, 0 if toy else 200)
    c.sampler = presets.few_step(c.objective.steps, c.objective.first_steps)
    if "rolling" in words:
        c.sampler.kind = "rolling"
    return presets.steered(presets.mini(c) if "mini" in words else c, words)


def roles(words: list[str]) -> ConfigDict:
    """The student, the critic, and (without `gan`) the real score; what each starts from."""
    toy = "toy" in words
    runs, base = ("runs/toy", "toy") if toy else ("runs", "wan_1_3b")
    teacher = {"init": "toy_teacher" if toy else "checkpoints/wan_1_3b", "stages": ("bidirectional",)}
    if any(word in presets.STEERED for word in words):  # scores that know the keys
        teacher |= {"init": f"{runs}/teacher", "init_ema": True}
    c = ConfigDict()
    c.student = presets.role(base, init=f"{runs}/ode", init_ema=toy, stages=("ode_regression",))
    if "from_ar" in words:
        c.student.update({"init": f"{runs}/ar", "init_stages": ("ar_diffusion",)})
    if "from_cd" in words:  # the average, at Wan's scale too
        c.student.update({"init": f"{runs}/cd", "init_ema": True, "init_stages": ("consistency",)})
    if "streaming" in words:  # a student that makes videos of one window
        c.student.update({"init": f"{runs}/dmd", "init_ema": True, "init_stages": ("dmd",)})
    if "causvid" in words:  # its initialisation is the bidirectional teacher's
        c.student.init = f"{runs}/sf_ode"
    if "bidirectional" in words:
        c.student = presets.role(base, **teacher)
    c.critic = presets.role(base, **teacher)
    if "gan" in words:
        c.critic.branch = presets.branch(0 if toy else 8192)
    elif toy:
        c.real_score = presets.role(base, **teacher)
    else:
        c.real_score = presets.role("wan_14b", **{**teacher, "init": "checkpoints/wan_14b"}, storage="bfloat16")
    return c


def objective(words: list[str], window: int) -> ConfigDict:
    """How the student generates, and how its videos become a gradient."""
    toy, rolling, streaming = (word in words for word in ("toy", "rolling", "streaming"))
    size, small = size_of(words), bool({"toy", "mini"} & set(words))
    long = rolling or "long" in words
    steps = next((FEW[word] for word in words if word in FEW), FEW["2step"] if small and rolling else FULL)
    one_list = steps == FULL or {"bidirectional", "causvid", "rolling"} & set(words)  # one block, no rollout, a window
    values = {
        "matching": next((word for word in words if word in ("sid", "gan")), "dmd"),
        "sid_alpha": 1.0,
        "student_input": "noised_data" if "causvid" in words else "self_rollout",
        "forcing": "diffusion",
        "steps": steps,
        "first_steps": () if one_list else FULL,
        "shift": 5.0,
        "context_noise": 0.0,
        "kv_gradient": "detached",
        "same_exit": True,
        "rolling": 0.5 if rolling else 0.0,  # the share of rollouts by windows of blocks
        "save_activations": False,  # exit steps keep what their gradient needs: less time, memory as under full remat
        "real_guidance": 1.0 if toy else 3.0,
        "fake_guidance": 0.0,
        "score_shift": 5.0,
        "score_min": 0.02,
        "score_max": 0.98,
        "score_table_shift": 0.0,
        "window_frames": window if long or streaming else 0,
        "max_frames": size.long if long else size.streaming if streaming else 0,
        "new_frames": size.new if streaming else 0,  # that an update adds to the rollout; 0: none goes on
        "switch_prompts": streaming,  # once in a rollout
        "codec_world": "",
        "codec_decoder": "vae",
    }
    return ConfigDict({**values, **({"gan": presets.game()} if "gan" in words else {})})


def get_hyper(hyper, arg: str = ""):
    """Student rate, this recipe's and twice as much, x iterations per student update (the critic learns in each)."""
    lr = get_config(arg).optim.student.lr
    return hyper.product(
        [hyper.sweep("config.optim.student.lr", [lr, 2 * lr]), hyper.sweep("config.cadence.student", [2, 5])]
    )
