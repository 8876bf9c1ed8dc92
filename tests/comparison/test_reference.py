"""`cfjax compare --against=reference`: cfjax against what the reference's own code gave, and how a clone is opened.

The clone itself is not needed: `tests/golden/record_reference.py` kept its results.
"""

import math
import random
import sys

import numpy as np
import pytest
import torch

from cfjax.__main__ import main
from cfjax.comparison.probe import NotInReference, Probe, Subject
from cfjax.comparison.reference import dense_attention, masked_attention, open_reference
from cfjax.core.errors import UserError
from tests.golden.record_reference import FOLDER, RECORDED, key, probes, subject, summary

GOLDEN = {name: np.load(FOLDER / f"{name}.npz") for name in RECORDED}
VALUE, GRADIENT = 1e-5, 1e-4  # measured: 3e-6 and 4e-6; a user's weights are allowed ten times as much
ALL = [(name, *pair) for name in RECORDED for pair in probes(name)]
SLOW = (
    "AR diffusion, noised past",
    "CausVid critic, diffusion forcing, blocks of 7",
    "CausVid generator, teacher forcing, blocks of 7",
    "DMD generator, blocks of 1, 2 steps, first block 4",
    "DMD generator, blocks of 7, exit at step 1, score level 0.98",
    *(
        f"{which}, blocks of 7, {what}"
        for which in ("DMD generator", "critic")
        for what in ("without the quirks", "the end of 28 frames")
    ),
)


def case(name: str, probe: Probe, made: Subject):
    marks = [pytest.mark.slow] if probe.what in SLOW else []
    return pytest.param(name, probe, made, marks=marks, id=f"{name}: {key(probe).replace('|', ' ')}")


@pytest.mark.parametrize(("recording", "probe", "made"), [case(*one) for one in ALL])
def test_cfjax_gives_what_the_reference_gave(recording, probe, made):
    ours = summary(probe.run_ours(made))
    prefix = f"{key(probe)}|"
    theirs = {name.removeprefix(prefix): x for name, x in GOLDEN[recording].items() if name.startswith(prefix)}
    assert ours.keys() == theirs.keys()
    for name, theirs_x in theirs.items():
        if name == "gradients":
            norms = np.maximum(theirs_x[:, :1], 1e-3 * theirs_x[:, 0].max())
            worst, tolerance = np.max(np.abs(ours[name] - theirs_x) / norms), GRADIENT
        else:
            worst = np.max(np.abs(ours[name].astype(np.float64) - theirs_x)) / np.max(np.abs(theirs_x))
            tolerance = min(probe.tolerance, VALUE)
        print(f"{probe.part} {probe.what} {name}: {worst:.1e}")
        assert worst <= tolerance, name


@pytest.mark.parametrize("recording", RECORDED)
def test_every_recorded_array_is_compared(recording):
    known = {key(probe) for probe, _ in probes(recording)}
    assert known == {name.rsplit("|", 1)[0] for name in GOLDEN[recording]}


def test_recordings_are_not_trivial():
    """A saturated video or a vanishing gradient would agree with anything."""
    golden = GOLDEN["causal_forcing"]
    assert np.mean(np.abs(golden["vae||decode"]) == 1.0) < 0.5
    for name, x in golden.items():
        if name.endswith("gradients"):
            assert np.mean(x[:, 0] > 1e-3 * x[:, 0].max()) > 0.8, name
    assert golden["window|frames seen, blocks of 1, window 3, sink 0|"].sum() == 1 + 2 + 3 * 4


def made_of(results: dict, **more) -> Probe:
    return Probe("part", "what", lambda _: results, lambda _, __: results, **more)


def test_a_difference_is_a_failing_row_that_names_the_layer():
    ours = {"": np.ones(4), "layer/blocks.0": np.ones(3), "layer/blocks.1": np.ones(3), "grad/w": np.ones(2)}
    probe = made_of(ours)
    assert all(row.ok for row in probe.rows(subject("forward"), ours, ours))
    theirs = {**ours, "layer/blocks.1": np.full(3, 1.01), "grad/w": np.full(2, 1.01)}
    value, gradient = probe.rows(subject("forward"), ours, theirs)
    assert (value.ok, value.first_divergent_layer) == (False, "blocks.1")
    assert not gradient.ok and "w" in gradient.note


def test_what_a_clone_lacks_is_said_and_does_not_fail():
    def absent(*_):
        raise NotInReference("not in this clone")

    (row,) = Probe("part", "what", lambda _: {}, absent).compare(None, subject("forward"))
    assert row.ok and row.note == "not in this clone" and math.isnan(row.max_rel)


def test_other_roles_are_near_the_student_and_not_it():
    made: Subject = subject("forward")
    student, critic = (np.asarray(made.role(name).head.kernel[...]) for name in ("student", "critic"))
    assert 0.01 < np.linalg.norm(critic - student) / np.linalg.norm(student) < 0.3


@pytest.mark.parametrize("lengths", [None, [5, 3]])
def test_dense_attention_is_softmax(lengths):
    q, k, v = (torch.randn(2, n, 2, 4, generator=torch.Generator().manual_seed(n)) for n in (4, 5, 5))
    scores = torch.einsum("btnk,bsnk->bnts", q, k) / 2.0
    if lengths:
        scores[1, :, :, 3:] = -torch.inf
    expected = torch.einsum("bnts,bsnk->btnk", scores.softmax(-1), v)
    given = None if lengths is None else torch.tensor(lengths)
    torch.testing.assert_close(dense_attention(q, k, v, k_lens=given, dtype=torch.bfloat16), expected)


def test_masked_attention_follows_the_rule_in_chunks(monkeypatch):
    monkeypatch.setattr("cfjax.comparison.reference.QUERY_CHUNK", 3)
    q, k, v = (torch.randn(1, 2, 7, 4, generator=torch.Generator().manual_seed(n)) for n in range(3))
    rule = type("Rule", (), {"mask_mod": staticmethod(lambda b, h, query, key: key <= query)})
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(masked_attention(q, k, v, rule), expected)


CLONE = {
    "wan/modules/attention.py": "def attention(q, k, v): raise AssertionError\nflash_attention = attention\n",
    "wan/modules/model.py": "from wan.modules.attention import flash_attention\n",
    "wan/modules/causal_model.py": "from wan.modules.attention import attention\nimport torch\n"
    "def draws(): return torch.randn(2, 1), torch.randint(0, 9, [3])\n",
    "wan/__init__.py": "raise ImportError('needs a GPU')\n",
    "utils/wan_wrapper.py": "print('loading')\n",
    "utils/scheduler.py": "",
}


@pytest.fixture
def clone(tmp_path):
    """A folder with the outline of a clone."""
    for name, text in CLONE.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path


def test_a_clone_is_opened_without_its_packages_and_leaves_nothing_behind(clone, capsys):
    other = sys.modules["utils"] = type(sys)("utils")
    try:
        with open_reference(clone) as reference:
            assert reference.name == "Self-Forcing"
            causal = reference.module("wan.modules.causal_model")
            assert causal.attention is dense_attention and causal.flex_attention is masked_attention
            assert torch.ones(1).cuda().device.type == "cpu"
        assert sys.modules["utils"] is other and not [m for m in sys.modules if m.startswith("wan")]
        assert str(clone) not in sys.path and "flash_attn" not in sys.modules
    finally:
        del sys.modules["utils"]
    assert not capsys.readouterr().out
    assert not list(clone.rglob("__pycache__"))


def test_random_draws_are_the_given_ones_in_order_and_all_of_them(clone):
    noise, index = torch.zeros(2, 1), torch.tensor([4, 5, 6])
    real = torch.randn, torch.randint, random.randrange
    with open_reference(clone) as reference:
        code = reference.module("wan.modules.causal_model")
        with reference.draws(noise, index):
            drawn = code.draws()
        assert drawn[0] is noise and drawn[1].tolist() == [4, 5, 6]
        for given, message in (
            ((noise,), "nothing was recorded"),
            ((noise.T, index), "recorded"),
            ((noise, index, 1), "unused"),
        ):
            with pytest.raises(RuntimeError, match=message), reference.draws(*given):
                code.draws()
    assert (torch.randn, torch.randint, random.randrange) == real


def test_a_clone_that_does_not_import_is_one_line(clone):
    (clone / "utils/wan_wrapper.py").write_text("import surely_not_installed\n")
    with (
        pytest.raises(UserError, match="does not import: No module named 'surely_not_installed'"),
        open_reference(clone),
    ):
        pass
    assert "wan" not in sys.modules


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_wrong_reference_dir_is_one_clear_line(folder, tmp_path, capsys):
    code = main(["compare", "--against=reference", f"--reference_dir={tmp_path / folder}", f"--workdir={tmp_path}/out"])
    error = capsys.readouterr().err
    assert code == 2 and "--reference_dir=" in error and "Causal-Forcing" in error
    assert len(error.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
