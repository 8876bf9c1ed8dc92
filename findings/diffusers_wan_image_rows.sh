#!/usr/bin/env bash
# diffusers 0.42.1, WanTransformer3DModel of image to video: below 512 rows of text, it takes picture for text.
#
# Networks with image_dim attend to a picture's features and to the text's rows separately, and add the results. The
# attention is given both in one array, and takes the last 512 rows for the text, however many there are: of 257 rows of
# a picture and 400 of a text, 112 rows of the picture go through the text's keys and values. encoder_hidden_states may
# have any length in networks without image_dim; here nothing says that it may not, and nothing fails.
# Output seen: "512 rows of text: 0.0e+00 from both attended to separately", "400 rows of text: 1.6e-01".
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 diffusers==0.42.1 transformers==5.24.0
"$folder/venv/bin/python" - <<'PY'
import sys

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

torch.manual_seed(0)
PICTURE, WIDTH = 257, 32
sizes = {"added_kv_proj_dim": WIDTH, "cross_attention_dim_head": 16}
attention = WanAttention(WIDTH, 2, 16, processor=WanAttnProcessor(), **sizes)


def separately(tokens, picture, text):
    heads = lambda x: x.unflatten(2, (2, 16)).transpose(1, 2)
    q = heads(attention.norm_q(attention.to_q(tokens)))
    told = heads(attention.norm_k(attention.to_k(text))), heads(attention.to_v(text))
    shown = heads(attention.norm_added_k(attention.add_k_proj(picture))), heads(attention.add_v_proj(picture))
    both = sum(torch.nn.functional.scaled_dot_product_attention(q, *kv) for kv in (told, shown))
    return attention.to_out[0](both.transpose(1, 2).flatten(2))


apart = {}
with torch.no_grad():
    for rows in (512, 400):
        tokens, picture, text = (torch.randn(1, n, WIDTH) for n in (8, PICTURE, rows))
        expected = separately(tokens, picture, text)
        got = attention(tokens, torch.cat([picture, text], dim=1))
        apart[rows] = float((got - expected).norm() / expected.norm())
        print(f"{rows} rows of text: {apart[rows]:.1e}" + " from both attended to separately" * (rows == 512))
sys.exit(not (apart[512] < 1e-5 and apart[400] > 1e-2))
PY
