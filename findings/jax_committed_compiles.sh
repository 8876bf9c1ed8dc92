#!/usr/bin/env bash
# JAX 0.10.2 on a single device: a jitted update that is given weights on a device (as a checkpoint's reader or
# jax.device_put(x, device) leaves them) and fresh zeros (jnp.zeros, an optimiser's init) is compiled a second time when
# it gets its own outputs.
#
# Which arguments are committed to a device is part of what a compiled program is looked up by, and is lowered with it;
# outputs are all committed as soon as one argument is. Nothing is traced again, so a counter in the function or
# jax_explain_cache_misses tells nothing: both programs have their own entries in the persistent cache too. One
# jax.device_put(leaf, leaf.sharding) over the whole state, before the first call, leaves one program.
# Output seen: "traces 1, compilations 2; of a committed state 1".
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 optax==0.2.6
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

tx = optax.adam(1e-3)
counts = {"traces": 0, "compilations": 0}


def listen(event, seconds, *, fun_name="", **_):
    counts["compilations"] += event.endswith("backend_compile_duration") and fun_name == "jit(update)"


jax.monitoring.register_event_duration_secs_listener(listen)


@jax.jit
def update(params, opt):
    counts["traces"] += 1
    grads = jax.grad(lambda w: jnp.sum(w**2))(params)
    deltas, opt = tx.update(grads, opt)
    return optax.apply_updates(params, deltas), opt


def run(place):
    counts.update(traces=0, compilations=0)
    update.clear_cache()
    params = jax.device_put(np.ones(3, np.float32), jax.devices()[0])
    state = place((params, tx.init(params)))
    for _ in range(3):
        state = update(*state)
    return dict(counts)


mixed = run(lambda state: state)
committed = run(lambda state: jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), state))
print(
    f"traces {mixed['traces']}, compilations {mixed['compilations']}; of a committed state {committed['compilations']}"
)
sys.exit((mixed, committed["compilations"]) != ({"traces": 1, "compilations": 2}, 1))
PY
