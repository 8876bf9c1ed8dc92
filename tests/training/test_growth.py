"""A diverging loss: no good checkpoint is lost to it, and a run resumes from the good one."""

import re

import numpy as np
import pytest

from cfjax.training.checkpoint import ASIDE, CheckpointStore
from cfjax.training.growth import CALM, ENOUGH, WINDOW, LossWatch
from cfjax.training.loop import GrownLoss
from tests.training.toy import Counted, arrays, run


def watched(losses, factor: float = 1000.0) -> LossWatch:
    watch = LossWatch(factor)
    for step, loss in enumerate(losses):
        watch.add(step, "student", float(loss))
    return watch


def test_a_thousandfold_loss_is_reported_with_its_median_and_forgotten_when_it_is_calm():
    calm = [0.5] * ENOUGH
    assert watched(calm).grown() == "" and watched([*calm, 499.0]).grown() == ""
    message = "the loss of role 'student' was 501 at step 20, its running median 0.5"
    assert watched([*calm, 501.0]).grown() == watched([*calm, -501.0]).grown().replace("-", "") == message
    assert watched([*calm, 501.0, *calm[1:CALM]]).grown() == message
    assert watched([*calm, 501.0, *calm[:CALM]]).grown() == ""
    assert watched([*calm, *[1e5] * WINDOW]).grown()  # what is beyond the bound does not move it
    assert watched([*calm, 501.0], factor=0.0).grown() == "" and watched([*calm, 6.0], factor=10.0).grown()


@pytest.mark.parametrize(
    "losses",
    [
        np.random.default_rng(0).standard_normal(2000),  # a generator's, about zero
        np.random.default_rng(0).standard_cauchy(2000) * 1e-2,  # heavy tails near zero
        [*[0.0] * 50, *[0.9] * 50],  # both scores begin as one network
        [*np.geomspace(1e3, 1e-7, 500), 0.5],  # converged, then a hard batch
        np.geomspace(1e-6, 1e6, 2000),  # slow: its median follows
        [1e9] * (ENOUGH - 1),  # no past yet
    ],
)
def test_losses_that_may_be(losses):
    assert watched(losses).grown() == ""


def test_the_past_is_kept():
    first, second = watched([0.5] * ENOUGH), LossWatch(1000.0)
    second.set_state(first.get_state())
    second.add(ENOUGH, "student", 501.0)
    assert second.grown()
    assert len(watched([0.1] * 1000).get_state()["student"]) == WINDOW


class Exploding(Counted):
    """Targets a thousandfold from a position on."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self._first = first

    def __next__(self):
        position, batch = self.position, super().__next__()
        return {**batch, "y_BD": batch["y_BD"] * (1e4 if position >= self._first else 1.0)}


def test_a_run_whose_loss_explodes_keeps_its_good_checkpoints_and_goes_on_from_them(tmp_path, capsys):
    with pytest.raises(GrownLoss, match=r"role '\w+' was .* goes on from that of step 40, with a lower") as caught:
        run(tmp_path / "run", 70, data=Exploding(52), save_every=10)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    message = [line for line in capsys.readouterr().out.splitlines() if ASIDE in line]
    assert len(message) == 1 and re.search(r"step 4\d, its running median", message[0])
    for folder, steps in (("checkpoints", [30, 40]), (ASIDE, [70])):
        store = CheckpointStore(tmp_path / "run", folder=folder)
        assert store.steps() == steps
        store.close()
    resumed, whole = run(tmp_path / "run", 70), run(tmp_path / "whole", 70)
    for name, value in arrays(whole).items():
        np.testing.assert_array_equal(value, arrays(resumed)[name], err_msg=name)


def test_a_run_may_save_whatever_the_loss(tmp_path):
    run(tmp_path, 50, data=Exploding(40), save_every=10, loss_growth=0.0)
    assert not (tmp_path / ASIDE).exists()
