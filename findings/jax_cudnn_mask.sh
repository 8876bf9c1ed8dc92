#!/usr/bin/env bash
# JAX 0.10.2: cuDNN attention refuses a mask over keys, [1, 1, 1, S], though masks are said to broadcast.
#
# Known: https://github.com/jax-ml/jax/issues/28974, open, and as it was in 0.11.2.
# The other implementation takes it. So a program that masks keys the short way runs on a CPU and fails on a GPU; a
# prefix of keys can be had by key_value_seq_lengths, any other mask by broadcasting it over the queries first. The check
# is made while tracing, before anything needs a GPU: only the question which cuDNN is installed is answered here.
# Output seen: "over keys: ValueError: Bias must have same seq length as QKV, got 1 and 256; over queries too: taken".
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2
cat >"$folder/run.py" <<'PY'
import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo

fused_attention_stablehlo.check_cudnn_version = lambda: 91000
x = jax.ShapeDtypeStruct((1, 256, 2, 128), jnp.bfloat16)


def seen(rows, implementation):
    def attend(q, k, v, mask):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)

    try:
        jax.eval_shape(attend, x, x, x, jax.ShapeDtypeStruct((1, 1, rows, 256), bool))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


assert seen(1, "xla") == "taken"
print(f"over keys: {seen(1, 'cudnn')}; over queries too: {seen(256, 'cudnn')}")
PY
seen="$(JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/run.py" 2>/dev/null)"
echo "$seen"
[ "$seen" = "over keys: ValueError: Bias must have same seq length as QKV, got 1 and 256; over queries too: taken" ]
