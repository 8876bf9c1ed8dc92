"""Writes umt5_original.npz: text rows of the original release's own umT5 encoder on the miniature weights.

    python tests/golden/record_umt5.py --reference_dir=CLONE

CLONE is a clone of Wan-Video/Wan2.1 or thu-ml/Causal-Forcing, of which `wan/modules/t5.py` is run as it is, on CPU.
"""

import argparse
import importlib
import sys
import types
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests import synthetic

VOCAB, LENGTH = 64, 140
OUT = Path(__file__).with_name("umt5_original.npz")


def original_encoder(reference_dir: str) -> torch.nn.Module:
    """The clone's encoder at the miniature's size."""
    torch.cuda.current_device = lambda: 0  # only a default argument that is not used asks for it
    package = types.ModuleType("wan_modules")  # the modules without the package's __init__, which needs CUDA
    package.__path__ = [str(Path(reference_dir) / "wan" / "modules")]
    sys.modules[package.__name__] = package
    module = importlib.import_module("wan_modules.t5")
    return module.umt5_xxl(
        encoder_only=True, vocab_size=VOCAB, dim=synthetic.TEXT_DIM, dim_attn=synthetic.TEXT_DIM,
        dim_ffn=synthetic.TEXT_FFN, num_heads=synthetic.TEXT_HEADS, encoder_layers=synthetic.TEXT_LAYERS,
        decoder_layers=synthetic.TEXT_LAYERS,
    ).eval()  # fmt: skip


def main() -> None:
    """Records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference_dir", required=True)
    torch.set_num_threads(1)
    encoder = original_encoder(parser.parse_args().reference_dir)
    encoder.load_state_dict(synthetic.as_torch(synthetic.t5_weights(VOCAB)), strict=True)
    mask_BS = np.arange(LENGTH) < np.array([LENGTH, 50])[:, None]
    ids_BS = np.where(mask_BS, np.random.default_rng(0).integers(2, VOCAB, mask_BS.shape), 0).astype(np.int32)
    with torch.no_grad():
        text_BSE = encoder(torch.from_numpy(ids_BS).long(), torch.from_numpy(mask_BS).long()).numpy()
    text_BSE[~mask_BS] = 0.0
    np.savez_compressed(OUT, ids_BS=ids_BS, mask_BS=mask_BS, text_BSE=text_BSE[:, ::9])


if __name__ == "__main__":
    main()
