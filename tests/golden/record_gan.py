"""Records what the PyTorch reference's GAN losses and classifier give on a miniature, into tests/golden/gan.npz.

    git clone https://github.com/thu-ml/Causal-Forcing
    python tests/golden/record_gan.py --reference_dir=Causal-Forcing

Its `GAN` class is run as it is on the CPU, with 30 layers, whose depths it hard-codes, of 24 channels, and with the
student's video given in place of a rollout. It runs in float64: a bias of the last layer cancels in the relativistic
loss, and its gradient would be float32's rounding alone. Where a loss has R1 it has R2 too: without, the reference does
not run (quirk Q24). Weights, inputs and draws are functions of their names; of parameter gradients each parameter's
norm is kept, and two projections of it.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import torch

from cfjax.comparison.probe import to_torch
from cfjax.comparison.reference import Reference, Sizes, fit, load_strictly, open_reference
from cfjax.conversion.rules import SAME, TRANSPOSED, Rule, save_named
from cfjax.conversion.wan import ORIGINAL
from cfjax.core.tree import map_named, named_leaves
from cfjax.flow.schedule import score_sigma
from cfjax.models.discriminator import BranchConfig, Discriminator
from cfjax.models.wan import WanConfig
from cfjax.objectives.gan import GanConfig
from tests.golden.record_reference import summary
from tests.golden.record_taehv import draw

FILE = Path(__file__).with_name("gan.npz")
CONFIG = WanConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=30, in_dim=4, out_dim=4, text_dim=8, freq_dim=16)
BRANCH_FFN, NUM_CLASS, TAPS = 40, 2, 3
SHAPE, TEXT_ROWS = (2, 3, 4, 6, CONFIG.in_dim), 5
SCORE_K = (150, 700)  # of the two clips: levels 0.469 and 0.921
# The branch, in the names of the reference's wrapper.
BRANCH = (
    Rule("branch/registers", "_register_tokens.register_tokens", SAME),
    Rule("branch/norm_registers/scale", "_register_tokens.rms_norm.weight", SAME),
    Rule("branch/blocks/norm3/scale", "_gan_ca_blocks.{layer}.norm3.weight", SAME),
    Rule("branch/blocks/norm3/bias", "_gan_ca_blocks.{layer}.norm3.bias", SAME),
    Rule("branch/blocks/cross_attn/([qkvo])/kernel", r"_gan_ca_blocks.{layer}.cross_attn.\1.weight", TRANSPOSED),
    Rule("branch/blocks/cross_attn/([qkvo])/bias", r"_gan_ca_blocks.{layer}.cross_attn.\1.bias", SAME),
    Rule("branch/blocks/cross_attn/(norm_[qk])/scale", r"_gan_ca_blocks.{layer}.cross_attn.\1.weight", SAME),
    Rule("branch/blocks/ffn/up/kernel", "_gan_ca_blocks.{layer}.ffn.0.weight", TRANSPOSED),
    Rule("branch/blocks/ffn/up/bias", "_gan_ca_blocks.{layer}.ffn.0.bias", SAME),
    Rule("branch/blocks/ffn/down/kernel", "_gan_ca_blocks.{layer}.ffn.2.weight", TRANSPOSED),
    Rule("branch/blocks/ffn/down/bias", "_gan_ca_blocks.{layer}.ffn.2.bias", SAME),
    Rule("branch/norm/scale", "_cls_pred_branch.0.weight", SAME),
    Rule("branch/norm/bias", "_cls_pred_branch.0.bias", SAME),
    Rule("branch/classifier/up/kernel", "_cls_pred_branch.1.weight", TRANSPOSED),
    Rule("branch/classifier/up/bias", "_cls_pred_branch.1.bias", SAME),
    Rule("branch/classifier/down/kernel", "_cls_pred_branch.3.weight", TRANSPOSED),
    Rule("branch/classifier/down/bias", "_cls_pred_branch.3.bias", SAME),
)


@dataclass(frozen=True)
class Game:
    """One recorded loss: whose, its weights, whether the classifier sees the time embedding."""

    which: str  # "generator" or "critic"
    gan: GanConfig
    time_embedding: bool

    @property
    def branch(self) -> BranchConfig:
        return BranchConfig(ffn_dim=BRANCH_FFN, num_class=NUM_CLASS, time_embedding=self.time_embedding)


# Long steps: differences over the usual 0.01 would cost float32 two of the digits that are compared.
_REGULAR = GanConfig(critic_weight=0.5, r1_weight=0.3, r2_weight=0.7, r1_sigma=0.5, r2_sigma=0.25)
GAMES = {
    "generator": Game("generator", GanConfig(generator_weight=0.5), time_embedding=False),
    "generator, relativistic": Game("generator", GanConfig(generator_weight=0.5, relativistic=True), True),
    "critic": Game("critic", _REGULAR, time_embedding=True),
    "critic, relativistic": Game("critic", replace(_REGULAR, relativistic=True), False),
}


def _array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A random parameter, by its name: kernels keep the scale of what they multiply, scales are near 1."""
    noise = draw(name, shape)
    if name.endswith("kernel"):
        return noise / np.float32(np.sqrt(shape[-2]))
    return 1.0 + 0.2 * noise if name.endswith("scale") else 0.2 * noise


def critic(game: Game) -> Discriminator:
    """The miniature critic."""
    template = jax.eval_shape(lambda key: Discriminator(CONFIG, game.branch, key), jax.random.key(0))
    return map_named(lambda name, x: _array(name, x.shape), template)


def weights(model: Discriminator) -> dict[str, np.ndarray]:
    """A critic, or its gradient, in the names of the reference's wrapper without the network's "model."."""
    return save_named(ORIGINAL + BRANCH, named_leaves(model), CONFIG)


def inputs() -> dict[str, np.ndarray]:
    """The student's video and a batch."""
    video, clip = draw("video", SHAPE), draw("clip", SHAPE)
    return {"video": video, "latents_BFHWC": clip, "text_BSE": draw("text", (2, TEXT_ROWS, CONFIG.text_dim))}


def draws() -> dict[str, np.ndarray]:
    """Of both losses, by our names."""
    names = ("score_eps_BFHWC", "real_eps_BFHWC", "r1_eps_BFHWC", "r2_eps_BFHWC")
    level = np.asarray(score_sigma(np.array(SCORE_K) / np.float32(1000), 5.0, 0.02, 0.98))
    return {"score_sigma_B": level, **{name: draw(name, SHAPE) for name in names}}


def _network(reference: Reference, game: Game) -> Any:
    """The reference's GAN with our critic."""
    tokens = CONFIG.tokens_per_frame(*SHAPE[2:4])
    sizes = Sizes(replace(CONFIG, num_layers=30), tokens, SHAPE[1], TEXT_ROWS, block_frames=3)
    reference.pretend_pretrained(sizes)
    reference.without_encoders("model.gan", "model.base", "pipeline.causal_diffusion_inference")
    module, parts = reference.module("wan.modules.model"), reference.module("utils.wan_wrapper")
    nn, width = torch.nn, CONFIG.dim * (TAPS + game.time_embedding)

    def add_branch(wrapper: Any, **_: Any) -> None:  # in place of a method that knows one width only
        wrapper._cls_pred_branch = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, CONFIG.dim), nn.SiLU(), nn.Linear(CONFIG.dim, NUM_CLASS)
        )
        wrapper._register_tokens = module.RegisterTokens(num_registers=TAPS, dim=CONFIG.dim)
        wrapper._gan_ca_blocks = nn.ModuleList(
            [module.GanAttentionBlock(CONFIG.dim, BRANCH_FFN, CONFIG.num_heads) for _ in range(TAPS)]
        )

    parts.WanDiffusionWrapper.adding_cls_branch = add_branch
    gan = game.gan
    args = SimpleNamespace(
        model_kwargs={"timestep_shift": 5.0}, mixed_precision=False, gradient_checkpointing=False, num_class=NUM_CLASS,
        num_frame_per_block=3, num_train_timestep=1000, timestep_shift=5.0, guidance_scale=3.0, ts_schedule=False,
        denoising_loss_type="flow", concat_time_embeddings=game.time_embedding, warp_denoising_step=True, i2v=False,
        relativistic_discriminator=gan.relativistic, gan_g_weight=gan.generator_weight, gan_d_weight=gan.critic_weight,
        r1_weight=gan.r1_weight, r2_weight=gan.r2_weight, r1_sigma=gan.r1_sigma, r2_sigma=gan.r2_sigma,
    )  # fmt: skip
    with reference.quiet():
        model = reference.module("model.gan").GAN(args, torch.device("cpu"))
    named = weights(critic(game))
    own = {name: x for name, x in named.items() if not name.startswith("_")}
    fit(model.fake_score, own, sizes)
    for part in ("_cls_pred_branch", "_register_tokens", "_gan_ca_blocks"):
        prefix = f"{part}."
        theirs = {name.removeprefix(prefix): x for name, x in named.items() if name.startswith(prefix)}
        load_strictly(getattr(model.fake_score, part), theirs)
    return model.double()


def run(reference: Reference, game: Game) -> dict[str, np.ndarray]:
    """The loss, and its gradient by the student's video or by the critic's parameters."""
    model, given = _network(reference, game), inputs()
    video, clip = (to_torch(given[name]).double() for name in ("video", "latents_BFHWC"))
    video, shape = video.requires_grad_(), list(clip.shape)
    text = torch.tensor(given["text_BSE"], dtype=torch.float64)
    common = {"conditional_dict": {"prompt_embeds": text}, "unconditional_dict": {}}
    level = torch.tensor(SCORE_K)[:, None]
    eps = {name: to_torch(x).double() for name, x in draws().items() if "eps" in name}
    if game.which == "generator":
        model._run_generator = lambda **_: (video, None, None, None)
        with reference.draws(level, eps["score_eps_BFHWC"], eps["real_eps_BFHWC"]):
            loss = model.generator_loss(shape, clean_latent=clip, **common)
        loss.backward()
        return {"": loss.detach().numpy(), "video": np.moveaxis(video.grad.numpy(), -3, -1)}
    model._run_generator = lambda **_: (video.detach(), None, None, None, None)
    with reference.draws(level, eps["score_eps_BFHWC"], eps["r1_eps_BFHWC"], eps["r2_eps_BFHWC"]):
        (loss, r1, r2), _ = model.critic_loss(shape, clean_latent=None, real_image_or_video=clip, **common)
    total = loss + 0.5 * (r1 + r2)  # as the reference's trainer adds them
    total.backward()
    return {"": total.detach().numpy(), **_gradients(model.fake_score)}


def _gradients(wrapper: Any) -> dict[str, np.ndarray]:
    found = {name.removeprefix("model."): p for name, p in wrapper.named_parameters()}
    return {f"grad/{name}": (torch.zeros_like(p) if p.grad is None else p.grad).numpy() for name, p in found.items()}


def kept(results: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Results as they are kept: gradients by parameters summarised."""
    return summary(dict(results))


def main() -> None:
    """Records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference_dir", required=True)
    directory = parser.parse_args().reference_dir
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    jax.config.update("jax_platforms", "cpu")
    arrays = {}
    with open_reference(directory) as reference:
        for name, game in GAMES.items():
            arrays |= {f"{name}|{key}": x for key, x in kept(run(reference, game)).items()}
    np.savez_compressed(FILE, **arrays)
    sys.stdout.write(f"{FILE}: {len(arrays)} arrays, {FILE.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
