"""Golden numbers of the PyTorch reference (its section 3 and quirks Q1 to Q3), and laws of tables and lookups."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from cfjax.core.errors import UserError
from cfjax.flow import schedule

T5, T8, T48 = schedule.sigma_table(1000, 5.0), schedule.sigma_table(1000, 8.0), schedule.sigma_table(48, 5.0)

# fmt: off
T48_GOLDEN = [
    1000, 995.7627, 991.3793, 986.8421, 982.1428, 977.2728, 972.2222, 966.9811, 961.5385, 955.8824, 950.0, 943.8776,
    937.5, 930.8511, 923.9130, 916.6667, 909.0909, 901.1627, 892.8571, 884.1463, 875.0, 865.3846, 855.2631, 844.5945,
    833.3333, 821.4286, 808.8235, 795.4546, 781.2501, 766.1290, 750.0, 732.7587, 714.2856, 694.4444, 673.0770, 650.0,
    625.0, 597.8260, 568.1819, 535.7143, 500.0, 460.5263, 416.6667, 367.6471, 312.5, 250.0, 178.5714, 96.1538,
]
UNIPC_TIMESTEPS = [
    999, 995, 991, 987, 982, 978, 973, 968, 963, 957, 952, 946, 940, 934, 927, 920, 913, 906, 898, 890, 882, 873, 863,
    854, 843, 833, 821, 809, 796, 783, 768, 753, 737, 720, 701, 681, 660, 636, 611, 584, 555, 522, 487, 448, 405, 356,
    302, 241, 172, 92,
]
# fmt: on


@pytest.mark.parametrize(
    ("table", "first", "last"),
    [
        (T5, [1000, 999.79980, 999.59943], [14.82214, 9.92064, 4.98008]),
        (T8, [1000, 999.87487, 999.74957], [23.50636, 15.77909, 7.94439]),
        (T48, [1000, 995.7627, 991.3793], [250.0, 178.5714, 96.1538]),
    ],
)
def test_table_ends(table, first, last):
    assert table.dtype == np.float32 and table[0] == 1.0
    np.testing.assert_allclose(1000 * table[:3], first, atol=5e-5)
    np.testing.assert_allclose(1000 * table[-3:], last, atol=5e-5)
    assert (np.diff(table) < 0).all() and table[-1] > 0


def test_table_48_in_full():
    np.testing.assert_allclose(1000 * T48, T48_GOLDEN, atol=6e-5)


@pytest.mark.parametrize(("num_steps", "shift"), [(1000, 5.0), (1000, 8.0), (48, 5.0), (7, 3.0), (1, 5.0)])
def test_tables_equal_torch_float32_bit_for_bit(num_steps, shift):
    u = torch.linspace(1.0, 0.0, num_steps + 1)[:-1]
    expected = shift * u / (1 + (shift - 1) * u)
    np.testing.assert_array_equal(schedule.sigma_table(num_steps, shift), expected.numpy())


def test_nearest_takes_the_first_on_ties_and_clamps_at_the_ends():
    table = np.array([1.0, 0.75, 0.5, 0.25], np.float32)
    indices = jax.jit(lambda s: schedule.nearest(table, s))(jnp.array([[1.0, 0.875, 0.625], [0.374, 0.0, 0.5]]))
    np.testing.assert_array_equal(indices, [[0, 0, 1], [3, 3, 2]])
    assert schedule.nearest(table, 0.75).shape == ()


def test_lookup_finds_every_entry_and_sends_zero_to_the_last():
    np.testing.assert_array_equal(schedule.nearest(T5, T5), np.arange(1000))
    np.testing.assert_array_equal(schedule.lookup(T5, T5), T5)
    np.testing.assert_allclose(schedule.lookup(T5, 0.0), 0.00498008, atol=5e-9)
    np.testing.assert_allclose(schedule.lookup(T8, 0.0), 0.00794439, atol=5e-9)


def test_warped_steps():
    steps = schedule.warp_steps()
    np.testing.assert_array_equal(np.float32(1000) * steps, np.float32([1000.0, 937.5, 833.33331, 625.0]))
    np.testing.assert_array_equal(schedule.nearest(T5, steps), [0, 250, 500, 750])
    np.testing.assert_array_equal(schedule.warp_steps((1000, 500)), steps[[0, 2]])
    np.testing.assert_array_equal(schedule.warp_steps((1000, 0)), [1.0, 0.0])
    np.testing.assert_array_equal(steps, T48[[0, 12, 24, 36]])
    shift_8 = np.float32(1000) * schedule.warp_steps(shift=8.0)
    np.testing.assert_array_equal(shift_8, np.float32([1000.0, 960.0, 888.88892, 727.27277]))


def test_bsmntw_weights():
    w = schedule.bsmntw(T5)
    indices = [0, 1, 100, 250, 500, 750, 833, 900, 950, 999]
    golden = [0.0, 0.001281, 0.139075, 0.397952, 1.024862, 1.914043, 2.076400, 1.865346, 1.250779, 0.031879]
    np.testing.assert_allclose(w[indices], golden, atol=1e-6)
    assert w.argmax() == 833
    np.testing.assert_allclose(1000 * T5[833], 500.5995, atol=1e-4)
    np.testing.assert_allclose(w.sum(), 1000.0, rtol=1e-6)
    sigma_BF = jnp.asarray(T5[[[0, 250], [833, 999]]])
    np.testing.assert_array_equal(schedule.bsmntw_weight(sigma_BF, T5), w[[[0, 250], [833, 999]]])


def test_q1_bf16_timesteps_collapse_to_294_levels():
    rounded = jax.jit(schedule.round_timestep_bf16)(T5)
    timestep = (np.float32(1000) * T5).astype(ml_dtypes.bfloat16).astype(np.float32)
    # XLA may multiply by the inverse instead: 1.2e-7, a last bit
    np.testing.assert_allclose(rounded, timestep / np.float32(1000), rtol=2e-7)
    conditioning = jax.jit(lambda sigma: 1000.0 * schedule.round_timestep_bf16(sigma))(T5)
    assert np.count_nonzero(np.asarray(conditioning) != timestep) <= 3  # the reference's timestep itself
    levels = np.asarray(schedule.lookup(T5, rounded))
    assert len(np.unique(levels)) == 294
    np.testing.assert_allclose(np.abs(levels - T5).max(), 0.00247, atol=5e-6)
    assert (np.asarray(rounded) == 1.0).sum() == 10  # 1 % of draws get weight 0


def test_q2_consistency_steps_in_bf16():
    true = T48[:-1] - T48[1:]
    gap = np.asarray(jax.jit(schedule.gap_bf16)(T48[:-1], T48[1:]))
    ratio = gap / true
    np.testing.assert_allclose([ratio.min(), ratio.max()], [0.60, 1.64], atol=0.005)
    np.testing.assert_allclose(gap[[0, 12, 4]], [0.0040, 0.0040, 0.0080], atol=2e-5)
    np.testing.assert_allclose(true[[0, 12, 4]], [0.00424, 0.00665, 0.00487], atol=5e-6)


def test_score_levels_and_q3_ratio_of_tables():
    sigma = jax.jit(lambda u: schedule.score_sigma(u, 5.0, 0.02, 0.98))(jnp.arange(1000) / 1000)
    assert (np.asarray(sigma) == np.float32(0.98)).sum() == 92
    assert (np.asarray(sigma) == np.float32(0.02)).sum() == 5
    s8, s5 = np.asarray(schedule.lookup(T8, sigma)), np.asarray(schedule.lookup(T5, sigma))
    ratio = s8 / s5
    np.testing.assert_allclose([s8[0], s5[0]], [0.02351, 0.01969], atol=5e-6)
    np.testing.assert_allclose([ratio.min(), ratio.max()], [0.914, 1.194], atol=5e-4)
    np.testing.assert_allclose(np.abs(ratio - 1).mean(), 0.0024, atol=5e-5)
    assert (np.abs(ratio - 1) > 0.01).sum() == 34


def test_unipc_grid():
    sigmas, timesteps = schedule.unipc_grid(50, 5.0)
    assert sigmas.dtype == np.float32 and sigmas.shape == (51,)
    np.testing.assert_allclose(sigmas[[0, 1, 49, 50]], [0.99979985, 0.99573237, 0.09250685, 0.0], atol=1e-8)
    np.testing.assert_array_equal(timesteps, UNIPC_TIMESTEPS)


@pytest.mark.parametrize("broken", [lambda: schedule.sigma_table(0, 5.0), lambda: schedule.unipc_grid(50, 0.0)])
def test_impossible_schedules(broken):
    with pytest.raises(UserError, match=r"num_steps=0|shift=0\.0"):
        broken()


@pytest.mark.parametrize("steps", [(), (1001,), (999.5,), (-1,)])
def test_impossible_step_lists(steps):
    with pytest.raises(UserError, match="denoising steps"):
        schedule.warp_steps(steps)
