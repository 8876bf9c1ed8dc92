"""The student that ships and is steered by arrow keys: small, documented, and it does as it is told."""

import json

import numpy as np

from cfjax.evaluation.steering import follow, random_keys, summary
from cfjax.experiment.runs import open_run
from cfjax.serving.served import Limits, serve_run
from cfjax.worlds.assets import ASSETS

FOLDER = ASSETS / "toy_steered"
MEMORY = "longlive_infinity"


def test_it_is_small_and_says_how_it_was_made():
    record = json.loads((FOLDER / "model.json").read_text())
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 4e6
    assert "cfjax train --config=configs/consistency.py:toy,actions" in record["note"]
    assert record["models"]["student"]["actions"]["form"] == "embedding"


def test_it_moves_as_it_is_told():
    """A small closed loop of what benchmarks/actions.py measures; keys change between blocks."""
    run = open_run("toy_steered")
    captions = ["a red circle", "a blue square moving up", "a green triangle", "a yellow circle"] * 2
    shapes, colours = [text.split()[2] for text in captions], [text.split()[1] for text in captions]
    frames, blocks = run.blocks.frames, 16
    keys = random_keys(len(captions), blocks, frames, seed=5)
    video = run.generate(captions, seed=list(range(1, 9)), frames=frames * blocks, memory=MEMORY, actions=keys)
    found = summary(follow(video, keys, shapes, run.toy.shapes, speed=1.5, block_frames=frames), shapes, colours)
    print({name: round(found[name], 3) for name in ("told", "error_px", "inside", "there")})
    assert found["told"] >= 0.6 and found["there"] >= 0.9 and found["shape_kept"] == found["colour_kept"] == 1

    session = run.session(captions[0], seed=1, memory=MEMORY)
    for block in range(3):
        session.set_actions(keys[0, frames * block])
        made = session.next()
        np.testing.assert_allclose(made.video_BPHWC[0], video[0, frames * block : frames * (block + 1)], atol=1e-3)


def test_a_server_offers_its_keys():
    served = serve_run(open_run("toy_steered"), fps=8.0, memories=[MEMORY], examples=["a red circle moving left"])
    model = served.capabilities(Limits())
    assert model["actions"] == ["left", "right", "up", "down"] and model["prompts"]["examples"] == ["a red circle"]
    assert model["prompts"]["vocabulary"]["directions"] == []
    session = served.make("a red circle", 0, MEMORY, "")
    assert served.steer is not None
    served.steer(session, ("up", "left"))
    assert session.state.held.now_A.tolist() == [1, 0, 1, 0]
