"""FLOPs and collectives of programs whose counts are known in closed form."""

import jax
import jax.numpy as jnp
import pytest

from cfjax.core.sharding import make_mesh
from cfjax.planning.collectives import Traffic, collectives
from cfjax.planning.flops import count_flops
from cfjax.planning.programs import kernels


def loop(x: jax.Array, w_LDD: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w_LDD)[0]


def test_flops_of_a_scan_its_gradient_and_its_recomputation():
    x, w = jnp.zeros((4, 16)), jnp.zeros((5, 16, 16))
    product = 2 * 4 * 16 * 16
    assert count_flops(loop, x, w) == 5 * product
    assert count_flops(jax.grad(lambda w: loop(x, w).sum()), w) == pytest.approx((5 * 3) * product, rel=0.07)
    remat = lambda x, w: jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w) @ w, None)), x, w)[0]
    plain, again = (count_flops(jax.grad(lambda w, f=f: f(x, w).sum()), w) for f in (loop, remat))
    assert again == pytest.approx(5 * product * (2 * 3 + 1), rel=0.07) and plain < again


def test_a_loop_of_unknown_length_has_the_given_trip_count():
    """By the scope around it, also inside another; one without a known scope runs once."""

    def fn(n, x):
        once = jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)

        def outer(_, x):
            with jax.named_scope("inner"):
                return jax.lax.fori_loop(0, n, lambda _, x: x @ x, x @ x)

        with jax.named_scope("outer"):
            return jax.lax.fori_loop(0, n, outer, once)

    trip_counts = {"outer": 3.0, "inner": 1.5}
    assert count_flops(fn, jnp.int32(3), jnp.zeros((8, 8)), trip_counts=trip_counts) == (1 + 3 * (1 + 1.5)) * 2 * 8**3


def test_a_costlier_branch_counts_by_its_frequency():
    """By the last scope around it, in gradients too; always, where nothing is known."""

    def fn(x, w):
        def step(x, taken):
            with jax.named_scope("sometimes"):
                return jax.lax.cond(taken, lambda x: x @ w @ w, lambda x: x @ w, x), None

        return jax.lax.scan(step, x, jnp.arange(4) % 2 == 0)[0]

    x, product = jnp.zeros((8, 8)), 2 * 8**3
    assert count_flops(fn, x, x) == 4 * 2 * product
    assert count_flops(fn, x, x, trip_counts={"sometimes": 0.5, "other": 9.0}) == 4 * 1.5 * product
    assert count_flops(jax.grad(lambda x: fn(x, x).sum()), x, trip_counts={"sometimes": 0.5}) == 3 * 4 * 1.5 * product


def test_a_convolution():
    x, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert count_flops(conv, x, kernel) == 2 * (2 * 8 * 8 * 5) * 9 * 3


def test_collectives_of_a_sharded_loop():
    """Weights cut over fsdp: the loop gathers every layer's [16, 16] float32; the loss is reduced once."""
    mesh = make_mesh(fsdp=8)
    place = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))

    def step(x, w):
        return jnp.sum(jax.lax.scan(lambda x, w: (x @ jax.lax.with_sharding_constraint(w, place()), None), x, w)[0])

    shapes = [
        jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=place("fsdp")),
        jax.ShapeDtypeStruct((5, 16, 16), jnp.float32, sharding=place(None, "fsdp")),
    ]
    found = collectives(jax.jit(step).lower(*shapes).compile().as_text())
    assert found["all-gather"] == Traffic(5, 5 * 16 * 16 * 4)
    assert found["all-reduce"] == Traffic(1, 4)


TPU_TEXT = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %rs = bf16[2,4]{1,0} reduce-scatter(bf16[8,4]{1,0} %x), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
  %start = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%rs), replica_groups=[1,4]<=[4], dimensions={0}
  %done = bf16[8,4]{1,0} all-gather-done(%start)
}

%all-reduce-scatter.1 (a: f32[8,4]) -> f32[2,4] {
  %sum = f32[8,4]{1,0} all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %own = f32[2,4]{1,0} dynamic-slice(%sum, %i, %zero), dynamic_slice_sizes={2,4}
}

%counted (p: (s32[], bf16[8,4])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i, %five), direction=LT
}

%cond (p: (s32[], bf16[8,4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %known = (s32[], bf16[8,4]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"30"}}
  %open = (s32[], bf16[8,4]) while(%t), condition=%cond, body=%body, metadata={op_name="jit(f)/rollout/while"}
  %tpu = (s32[], bf16[8,4]) while(%t), condition=%counted, body=%body, metadata={op_name="jit(f)/while"}
  %rs = f32[2,4]{1,0} reduce-scatter(%y), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  %axes = f32[2,4]{1,0} reduce-scatter(%y), replica_groups=mesh['a'=1,'b'=4] {'b'}, dimensions={0}, to_apply=%add
  %fused = f32[2,4]{1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_trips_starts_and_scattered_parts():
    """As the compilers write them: loops of noted, readable and unknown length, starts, groups by lists and by axes."""
    found = collectives(TPU_TEXT, trip_counts={"rollout": 1.5})
    assert found["all-gather"] == Traffic(36.5, 36.5 * 8 * 4 * 2)
    assert found["reduce-scatter"] == Traffic(36.5 + 3, 36.5 * 8 * 4 * 2 + 3 * (8 * 4 * 4))
    assert "all-reduce" not in found


def test_collectives_of_a_branch_count_by_its_frequency():
    branches = "branch_computations={%none, %body}"
    line = f'  %c = f32[2] conditional(%p), {branches}, metadata={{op_name="jit(f)/some/cond"}}'
    text = TPU_TEXT.replace("  %known =", f"{line}\n  %known =")
    runs = [collectives(text, trip_counts={"rollout": 1.5, "some": share})["all-gather"].runs for share in (0.0, 0.25)]
    assert runs == [36.5, 36.75] and collectives(text, trip_counts={"rollout": 1.5})["all-gather"].runs == 37.5


def test_kernels_are_named_by_the_models_scopes():
    """JAX's own words for loops and branches are left out."""
    stack = "jit(update)/jvp(critic_loss)/self_rollout/while/body/branch_1_fun/commit_block/self_attention"
    text = f'metadata={{op_name="{stack}/splash_mha_fwd/pallas_call"}}'
    assert kernels(text) == ("critic_loss/self_rollout/commit_block/self_attention/splash_mha_fwd",)
