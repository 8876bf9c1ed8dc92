"""LoRA through peft: the same weights and adapters, merged, beside the network, differentiated, and written.

peft adapts diffusers' network (`twins.dit_twin`) and saves the adapter; ours reads that folder as any user's. The other
way round, peft reads a folder of ours into linear layers that bear the original release's names.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model

from cfjax.comparison.case import Case, have
from cfjax.comparison.diffusers import FLOW, GRADIENT, call_twin
from cfjax.comparison.report import Check, Row, compare_arrays, compare_named
from cfjax.comparison.twins import dit_twin, from_torch, to_torch
from cfjax.conversion.lora import merged, open_loras
from cfjax.conversion.lora_apart import adapter_of
from cfjax.conversion.lora_write import lora_tensors, write_lora
from cfjax.conversion.rules import export_plan, their_names
from cfjax.conversion.wan import DIFFUSERS, ORIGINAL, abstract_wan, export_wan
from cfjax.core.lazy import as_lazy
from cfjax.core.tree import map_named, named_leaves
from cfjax.models.lora import Lora, LoraConfig, abstract_lora, attach, scaled
from cfjax.models.lora import merged as merged_network
from cfjax.models.wan import Wan, WanConfig, embed_text

MERGED = 1e-6  # allowed of W + s B A, whose products may be summed in another order
RANK, ALPHA = 4, 6
SIGMA_B = (0.9375, 0.25)
# What an adapter's settings can say, in peft's words.
FORMS: dict[str, dict[str, Any]] = {
    "alpha / rank": {},
    "rank-stabilised": {"use_rslora": True},
    "own ranks and alphas": {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"ffn.net.2": 3}},
}
# Linear layers of diffusers' blocks, as peft finds them by the ends of their names.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def _adapted(case: Case, model: Wan, **settings: Any) -> PeftModel:
    """diffusers' network with random adapters in peft's hands."""
    config = PeftConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, **settings)
    adapted = get_peft_model(dit_twin(model.config, export_wan(model)), config)
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            noise = case.normal(name, *parameter.shape) * np.float32(parameter.shape[1] ** -0.5)
            parameter.data = torch.tensor(noise)
    return adapted


def _their_merge(adapted: PeftModel, base: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors that peft's merge changed, by the network's own names."""
    state = {name: x.numpy() for name, x in adapted.merge_and_unload().state_dict().items()}
    return {name: x for name, x in state.items() if not np.array_equal(x, base[name])}


def _merge_row(what: str, ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], case: Case) -> Row:
    equal = sum(np.array_equal(ours[name], x) for name, x in theirs.items())
    note = f"{equal} of {len(theirs)} tensors bit for bit"
    own = {name: ours[name] for name in theirs}
    return compare_named("merge", what, own, theirs, tolerance=case.bound(MERGED), note=note)


def check_merge(case: Case) -> Iterator[Row]:
    """W + s B A of every adapted layer, and of all others nothing."""
    model = have("dit", case.dit)
    base = export_wan(model)
    for form, settings in FORMS.items():
        with TemporaryDirectory() as folder:
            adapted = _adapted(case, model, **settings)
            adapted.save_pretrained(folder, save_embedding_layers=False)
            arrays = merged(as_lazy(named_leaves(model)), model.config, open_loras(folder))
            ours = {name: x.read() for name, x in export_plan(DIFFUSERS, arrays, model.config).items()}
        theirs = _their_merge(adapted, base)
        untouched = [name for name in ours.keys() - theirs.keys() if not np.array_equal(ours[name], base[name])]
        assert not untouched, untouched
        yield _merge_row(form, ours, theirs, case)


def _trained(case: Case, model: Wan) -> tuple[PeftModel, Lora]:
    """The same adapters in peft's hands and in ours, as both train them: s stands beside A and B."""
    adapted = _adapted(case, model)
    with TemporaryDirectory() as folder:
        adapted.save_pretrained(folder, save_embedding_layers=False)
        within = adapter_of(open_loras(folder), model.config)  # s is within its B
    settings = LoraConfig(RANK, float(ALPHA), "blocks")
    return adapted, replace(scaled(within, 1 / settings.factor), settings=settings)


def _inputs(case: Case, config: WanConfig) -> tuple[np.ndarray, np.ndarray]:
    latents = case.normal("latents", len(SIGMA_B), case.frames, case.height, case.width, config.in_dim)
    return latents, case.normal("text", len(SIGMA_B), case.text_length, config.text_dim)


def _value(model: Wan, latents: np.ndarray, text: np.ndarray) -> jax.Array:
    """The flow with one noise level per sample."""
    sigma_BF = jnp.broadcast_to(jnp.asarray(SIGMA_B)[:, None], latents.shape[:2])
    return model(jnp.asarray(latents), sigma_BF, embed_text(model, jnp.asarray(text)))


def check_apart(case: Case) -> list[Row]:
    """The flow with adapters beside the weights, and the gradient of a random linear function of it for all A and B."""
    model = have("dit", case.dit)
    latents, text = _inputs(case, model.config)
    weight = case.normal("weight", *latents.shape)
    adapted, lora = _trained(case, model)

    @jax.jit
    def flow_and_gradients(lora: Lora, model: Wan) -> tuple[jax.Array, Lora]:
        def value(lora: Lora) -> tuple[jax.Array, jax.Array]:
            flow = _value(attach(model, lora), latents, text)
            return jnp.sum(flow * weight), flow

        (_, flow), gradients = jax.value_and_grad(value, has_aux=True)(lora)
        return flow, gradients

    flow, gradients = flow_and_gradients(lora, model)
    theirs = call_twin(adapted, latents, 1000 * np.array(SIGMA_B, np.float32), text)
    (theirs * to_torch(weight)).sum().backward()
    ours = lora_tensors(as_lazy(named_leaves(gradients)), model.config)
    names = _in_diffusers(model.config)
    pairs = {f"{names[module]}.{half}": x for module, pair in ours.items() for half, x in zip("AB", pair, strict=True)}
    grads = {_half(name): p.grad.numpy() for name, p in adapted.named_parameters() if p.grad is not None}
    allowed = case.bound(GRADIENT)
    return [
        compare_arrays("apart", "flow", flow, from_torch(theirs), tolerance=case.bound(FLOW)),
        compare_named("apart", "gradients of all A and B", pairs, grads, tolerance=allowed),
    ]


def _half(name: str) -> str:
    """peft's name of a parameter without what peft adds: "blocks.0.attn1.to_q.A"."""
    module, _, half = name.removeprefix("base_model.model.").partition(".lora_")
    return f"{module}.{half[0]}"


def _in_diffusers(config: WanConfig) -> dict[str, str]:
    """Modules as the original release names them -> as diffusers does."""
    template = named_leaves(abstract_wan(config))
    both = (their_names(table, template) for table in (ORIGINAL, DIFFUSERS))
    return {own.rpartition(".")[0]: other.rpartition(".")[0] for own, other in zip(*both, strict=True)}


def _linears(weights: Mapping[str, np.ndarray]) -> torch.nn.Module:
    """Linear layers alone, with these weights [out, in] by their dotted names."""
    root = torch.nn.Module()
    for name, weight in weights.items():
        *path, last = name.removesuffix(".weight").split(".")
        parent = root
        for word in path:
            if word not in parent._modules:
                parent.add_module(word, torch.nn.Module())
            parent = parent.get_submodule(word)
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = torch.tensor(weight)
        parent.add_module(last, layer)
    return root


def check_written(case: Case) -> Row:
    """A folder of ours, merged by peft, against our own merge."""
    model, settings = have("dit", case.dit), LoraConfig(RANK, float(ALPHA), "blocks")
    template = abstract_lora(model.config, settings)
    lora = map_named(lambda name, x: jnp.asarray(case.normal(name, *x.shape) * x.shape[-2] ** -0.5), template)
    tensors = lora_tensors(as_lazy(named_leaves(lora)), model.config)
    base, ours = (export_wan(network, ORIGINAL) for network in (model, merged_network(model, lora)))
    names = [f"{module}.weight" for module in tensors]
    with TemporaryDirectory() as folder:
        write_lora("peft", Path(folder), tensors, settings, "")
        adapted = PeftModel.from_pretrained(_linears({name: base[name] for name in names}), folder)
    theirs = {name: x.numpy() for name, x in adapted.merge_and_unload().state_dict().items()}
    own = {name: ours[name] for name in names}
    return compare_named("written", "merged by peft", own, theirs, tolerance=case.bound(MERGED))


CHECKS: dict[str, Check[Case]] = {
    "merge": check_merge,
    "apart": check_apart,
    "written": lambda case: [check_written(case)],
}
