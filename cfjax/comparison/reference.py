"""A user's clone of the PyTorch reference, imported in place and patched at run time to run on a CPU.

Works on clones of Causal-Forcing and of its ancestor Self-Forcing. Nothing of a clone is copied, and nothing in it is
changed on disk: CUDA-only imports are stubbed in `sys.modules`, flash and flex attention become dense attention in the
tensors' own dtype, and the sizes that the code hard-codes (1560 tokens per frame, 30 layers, 12 heads of 128, a window
of 32760 tokens: quirk Q14) are set on the instances. Random draws are taken from a list that the caller gives (Q36).
"""

import contextlib
import importlib
import io
import random
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers.models.modeling_utils  # noqa: F401  (the clone's base classes; must load before anything is patched)
import numpy as np
import torch
import torch.nn.attention.flex_attention
import torch.utils.checkpoint

from cfjax.core.errors import UserError
from cfjax.models.wan import WanConfig

# The clone's own packages. Their names are general ones, so they live in `sys.modules` only while a clone is open.
OWN = ("wan", "utils", "model", "pipeline", "demo_utils")
# Packages whose __init__ imports what a CPU machine lacks, or what no check needs: opened as bare folders.
BARE = ("wan", "wan.modules", "wan.utils", "utils", "model", "demo_utils")
MUST_HOLD = ("wan/modules/causal_model.py", "wan/modules/model.py", "utils/wan_wrapper.py", "utils/scheduler.py")
QUERY_CHUNK = 1024  # masked attention is computed for so many queries at a time: memory stays linear in the keys


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_lens: torch.Tensor | None = None, **_: Any
) -> torch.Tensor:
    """Flash attention's signature on [B, T, N, K] tensors; keys past `k_lens` are not seen. In the tensors' dtype."""
    mask = None
    if k_lens is not None and bool((k_lens < k.shape[1]).any()):
        mask = (torch.arange(k.shape[1])[None] < k_lens[:, None])[:, None, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).contiguous()


def masked_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_mask: Any) -> torch.Tensor:
    """Flex attention's signature on [B, N, T, K] tensors, under the clone's own mask rule."""
    keys = torch.arange(key.shape[2])[None]
    outputs = []
    for start in range(0, query.shape[2], QUERY_CHUNK):
        part = query[:, :, start : start + QUERY_CHUNK]
        queries = torch.arange(start, start + part.shape[2])[:, None]
        mask = block_mask.mask_mod(0, 0, queries, keys)
        outputs.append(torch.nn.functional.scaled_dot_product_attention(part, key, value, attn_mask=mask))
    return torch.cat(outputs, dim=2)


def keep_rule(rule: Callable[..., torch.Tensor], **_: Any) -> types.SimpleNamespace:
    """In place of flex attention's mask builder: the rule is enough for `masked_attention`."""
    return types.SimpleNamespace(mask_mod=rule)


class _Bf16Times:
    """`torch` as a module of the clone sees it, with bfloat16 kept for timesteps (`ones`) and float32 elsewhere.

    Consistency distillation casts everything to bfloat16 by name (quirk Q30); its timesteps' rounding (quirk Q2) is
    what a float32 comparison must keep, or `keep` is False.
    """

    bfloat16 = torch.float32

    def __init__(self, keep: bool = True) -> None:
        self._times = torch.bfloat16 if keep else torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def ones(self, *size: Any, **kwargs: Any) -> torch.Tensor:
        if "dtype" in kwargs:
            kwargs["dtype"] = self._times
        return torch.ones(*size, **kwargs)


class NoEncoder(torch.nn.Module):
    """Replaces the clone's text encoder or VAE. As a text encoder, returns the rows it was given."""

    def __init__(self, rows: Mapping[str, torch.Tensor] | None = None):
        super().__init__()
        self.rows = dict(rows or {})

    def forward(self, text_prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": torch.cat([self.rows[prompt] for prompt in text_prompts])}

    def decode_to_pixel(self, latents: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        return latents


@dataclass(frozen=True)
class Sizes:
    """Sizes that the reference hard-codes.

    Attributes:
      config: of the network.
      tokens_per_frame, frames, text_rows: 1560, 21 and 512 there.
      block_frames: frames per block.
      window, sink: local attention in frames; 0 is none.
    """

    config: WanConfig
    tokens_per_frame: int
    frames: int
    text_rows: int
    block_frames: int = 1
    window: int = 0
    sink: int = 0

    @property
    def cache_tokens(self) -> int:
        """Tokens that a self-attention cache holds."""
        return self.tokens_per_frame * (self.window or self.frames)


@dataclass
class Reference:
    """An open clone.

    Attributes:
      root: its folder.
      name: "Causal-Forcing" or "Self-Forcing", by its files.
    """

    root: Path
    name: str

    def module(self, name: str) -> Any:
        """One of the clone's modules by dotted name; its output while importing is suppressed."""
        with self.quiet():
            return importlib.import_module(name)

    def has(self, path: str) -> bool:
        """Whether the clone holds a file."""
        return (self.root / path).exists()

    def wrapper(self, weights: Mapping[str, np.ndarray], sizes: Sizes, *, causal: bool, shift: float = 5.0) -> Any:
        """`WanDiffusionWrapper` around a network of the given weights, in float32, causal or bidirectional.

        Args:
          weights: in the original layout; loaded strictly.
          shift: timestep shift of the wrapper's own table (the reference's score networks have 8, quirk Q3).
        """
        self.pretend_pretrained(sizes)
        local = {"local_attn_size": sizes.window or -1, "sink_size": sizes.sink} if causal else {}
        with self.quiet():
            made = self.module("utils.wan_wrapper").WanDiffusionWrapper(timestep_shift=shift, is_causal=causal, **local)
        return fit(made, weights, sizes)

    def pretend_pretrained(self, sizes: Sizes) -> None:
        """`from_pretrained` makes a fresh network of these sizes instead of reading `wan_models/`."""
        fields = ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "text_dim", "freq_dim", "eps")
        kwargs = {name: getattr(sizes.config, name) for name in fields}
        kwargs |= {"patch_size": (1, *sizes.config.patch), "text_len": sizes.text_rows}

        def fresh(cls: Callable[..., Any], _: str, **local: int) -> Any:
            with uninitialised():
                return cls(**kwargs, **local)

        for name, network in (("wan.modules.causal_model", "CausalWanModel"), ("wan.modules.model", "WanModel")):
            getattr(self.module(name), network).from_pretrained = classmethod(fresh)

    def without_encoders(self, *names: str, rows: Mapping[str, torch.Tensor] | None = None) -> None:
        """Text encoder and VAE constructors of these modules return a `NoEncoder`."""
        for name in names:
            module = self.module(name)
            for attribute in ("WanTextEncoder", "WanVAEWrapper"):
                if hasattr(module, attribute):
                    setattr(module, attribute, lambda *_, **__: NoEncoder(rows))

    def float32_with_bf16_times(self, name: str, *, keep: bool = True) -> Any:
        """A module of the clone whose bfloat16 casts are float32, its timesteps excepted if these are to `keep`."""
        module = self.module(name)
        module.torch = _Bf16Times(keep)
        return module

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Drops what the clone prints and its progress bars."""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield

    @contextlib.contextmanager
    def draws(self, *values: Any) -> Iterator[None]:
        """Random numbers of the code inside, in the order in which it asks for them; every one must be used.

        Raises:
          RuntimeError: the code drew something of another shape, or more, or less than was given.
        """
        queue = list(values)

        def take(shape: Sequence[int] | None, what: str) -> Any:
            if not queue:
                raise RuntimeError(f"the reference drew {what} of shape {shape} which nothing was recorded for")
            value = queue.pop(0)
            if shape is not None and tuple(value.shape) != tuple(shape):
                raise RuntimeError(f"the reference drew {what} of shape {tuple(shape)}, recorded {tuple(value.shape)}")
            return value

        def randint(*args: Any, size: Any = None, **_: Any) -> torch.Tensor:
            return take(size if size is not None else args[2], "randint").clone()

        patches = (
            mock.patch.object(torch, "randn", lambda *s, **_: take(_sizes(s), "randn")),
            mock.patch.object(torch, "randn_like", lambda x, **_: take(x.shape, "randn_like")),
            mock.patch.object(torch, "randint", randint),
            mock.patch.object(random, "randrange", lambda *_: take(None, "randrange")),
        )
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            stack.enter_context(self.quiet())
            yield
        if queue:
            raise RuntimeError(f"the reference left {len(queue)} recorded draws unused")


def _patch_attention(reference: Reference) -> None:
    """Dense attention for flash and flex attention, wherever the clone has taken them by name."""
    for name in ("wan.modules.attention", "wan.modules.model", "wan.modules.causal_model"):
        module = reference.module(name)
        for attribute in ("attention", "flash_attention"):
            if hasattr(module, attribute):
                setattr(module, attribute, dense_attention)
    causal = reference.module("wan.modules.causal_model")
    vars(causal).update(flex_attention=masked_attention, create_block_mask=keep_rule)


def _sizes(args: Sequence[Any]) -> tuple[int, ...]:
    return tuple(args[0]) if len(args) == 1 and not isinstance(args[0], int) else tuple(args)


def zero_caches(sizes: Sizes, batch: int, dtype: torch.dtype = torch.float32) -> tuple[list[dict], list[dict]]:
    """The reference's empty self- and cross-attention caches, of these sizes."""
    heads = (sizes.config.num_heads, sizes.config.head_dim)
    zeros = lambda n: torch.zeros(batch, n, *heads, dtype=dtype)
    index = lambda: torch.zeros(1, dtype=torch.long)
    layers, n = range(sizes.config.num_layers), sizes.cache_tokens
    own = [{"k": zeros(n), "v": zeros(n), "global_end_index": index(), "local_end_index": index()} for _ in layers]
    text = [{"k": zeros(sizes.text_rows), "v": zeros(sizes.text_rows), "is_init": False} for _ in layers]
    return own, text


def fit(wrapper: Any, weights: Mapping[str, np.ndarray], sizes: Sizes) -> Any:
    """A `WanDiffusionWrapper` with these weights and sizes in place of its own."""
    load_strictly(wrapper.model, weights)
    wrapper.seq_len = sizes.tokens_per_frame * sizes.frames
    if not wrapper.uniform_timestep:
        wrapper.model.num_frame_per_block = sizes.block_frames
        for block in wrapper.model.blocks:
            block.self_attn.max_attention_size = sizes.cache_tokens
    return wrapper


def _tensor(array: Any) -> torch.Tensor:
    """Float32, in the array's own memory where that may be written to."""
    array = np.asarray(array).astype(np.float32, copy=False)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def load_strictly(module: torch.nn.Module, weights: Mapping[str, np.ndarray]) -> None:
    """Puts arrays in place of a torch module's parameters; every name must fit, both ways."""
    module.load_state_dict({name: _tensor(x) for name, x in weights.items()}, strict=True, assign=True)


@contextlib.contextmanager
def uninitialised() -> Iterator[None]:
    """Networks made inside do not fill their large parameters, which are replaced anyway: no time, and no memory."""
    with contextlib.ExitStack() as stack:
        for layer in (torch.nn.Linear, torch.nn.Conv3d, torch.nn.Conv2d, torch.nn.Embedding):
            stack.enter_context(mock.patch.object(layer, "reset_parameters", lambda _: None))
        for name in ("xavier_uniform_", "normal_", "zeros_", "ones_"):
            stack.enter_context(mock.patch.object(torch.nn.init, name, lambda tensor, *_, **__: tensor))
        yield


def check_clone(reference_dir: str | Path) -> Path:
    """The clone's folder.

    Raises:
      UserError: no such folder, or something else is in it.
    """
    root = Path(reference_dir).expanduser().resolve()
    if not root.is_dir():
        raise UserError(
            f"--reference_dir={reference_dir}: no such folder; clone thu-ml/Causal-Forcing or guandeh17/Self-Forcing"
        )
    missing = [path for path in MUST_HOLD if not (root / path).is_file()]
    if missing:
        raise UserError(
            f"--reference_dir={reference_dir}: holds no {missing[0]}; give a clone of Causal-Forcing or Self-Forcing"
        )
    return root


def _bare(name: str, folder: Path) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    return module


def _stubs(root: Path) -> dict[str, Any]:
    """Modules to have in place before the clone imports anything; None makes an import fail as if not installed."""
    stubs: dict[str, Any] = {name: _bare(name, root / name.replace(".", "/")) for name in BARE}
    memory = types.ModuleType("demo_utils.memory")
    for name in ("get_cuda_free_memory_gb", "DynamicSwapInstaller", "move_model_to_device_with_memory_preservation"):
        setattr(memory, name, None)
    memory.gpu = torch.device("cpu")  # type: ignore[attr-defined]
    return stubs | {"demo_utils.memory": memory, "flash_attn": None, "flash_attn_interface": None}


@contextlib.contextmanager
def _modules(root: Path) -> Iterator[None]:
    """Stubs in place of what the clone cannot import; afterwards `sys.modules` is as before under these names."""
    stubs = _stubs(root)

    def taken() -> dict[str, Any]:
        return {m: module for m, module in sys.modules.items() if m.split(".")[0] in OWN or m in stubs}

    before = taken()
    for name in before:
        del sys.modules[name]
    sys.modules.update(stubs)
    try:
        yield
    finally:
        for name in taken():
            del sys.modules[name]
        sys.modules.update(before)


@contextlib.contextmanager
def open_reference(reference_dir: str | Path) -> Iterator[Reference]:
    """Opens a clone; its modules can be imported, and its code run, only inside.

    Raises:
      UserError: the folder is missing, is not a clone, or does not import.
    """
    root = check_clone(reference_dir)
    name = "Causal-Forcing" if (root / "model/naive_consistency.py").is_file() else "Self-Forcing"
    same: Callable[..., Any] = lambda value, *_, **__: value
    patches = (
        mock.patch.object(sys, "path", [str(root), *sys.path]),
        mock.patch.object(sys, "dont_write_bytecode", True),
        mock.patch.object(torch, "compile", same),
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        mock.patch.object(torch.Tensor, "cuda", same),
        mock.patch.object(torch.distributed, "broadcast", lambda *_, **__: None),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(_modules(root))
        for patch in patches:
            stack.enter_context(patch)
        reference = Reference(root, name)
        try:
            _patch_attention(reference)
            reference.module("utils.wan_wrapper")
        except ImportError as error:
            raise UserError(f"--reference_dir={root}: the clone does not import: {error}") from error
        yield reference
