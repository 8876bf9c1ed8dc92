"""Pixels to latents, and what is said when they do not divide."""

import pytest

from cfjax.core.errors import UserError
from cfjax.nn.visibility import Blocks
from cfjax.rollout.sizes import default_given, latent_sizes

WAN = {"stride": (4, 8, 8), "patch": (2, 2)}
CHUNK, FRAME, IMAGE = Blocks(3), Blocks(1), Blocks(3, independent_first_frame=True)


@pytest.mark.parametrize(
    ("frames", "height", "width", "blocks", "given", "latents"),
    [
        (81, 480, 832, CHUNK, 0, (21, 60, 104)),
        (81, 832, 480, FRAME, 1, (21, 104, 60)),
        (81, 480, 832, CHUNK, 9, (21, 60, 104)),
        (85, 720, 1280, IMAGE, 1, (22, 90, 160)),
        (85, 720, 1280, IMAGE, 0, (22, 90, 160)),
        (5, 16, 16, None, 0, (2, 2, 2)),
    ],
)
def test_wans_sizes(frames, height, width, blocks, given, latents):
    sizes = latent_sizes(frames, height, width, blocks=blocks, given=given, **WAN)
    assert (sizes.frames, sizes.height, sizes.width) == latents
    assert sizes.generated == latents[0] - given and sizes.pixels() == (frames, height, width)


def test_the_toys_frames_are_latent_frames():
    assert latent_sizes(12, 32, 32, stride=(1, 8, 8), patch=(2, 2), blocks=CHUNK).frames == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 490}, "height=490: needs a multiple of 16 pixels; use 480 or 496"),
        ({"width": 7}, "width=7: needs a multiple of 16 pixels; use 16"),
        ({"frames": 80}, "frames=80: blocks of 3 latent frames at 4 pixel frames each do not make it; use 69 or 81"),
        ({"frames": 77}, "use 69 or 81"),
        ({"frames": 1}, "use 9"),
        ({"frames": 33, "given": 9}, "9 given latent frames and blocks of 3 .* use 45"),
        ({"frames": 47, "blocks": None}, "frames=47: 1 .* use 45 or 49"),
        ({"frames": 81, "blocks": IMAGE, "given": 1}, "use 73 or 85"),
    ],
)
def test_sizes_that_do_not_divide_are_reported_with_the_nearest_that_do(change, message):
    asked = {"frames": 81, "height": 480, "width": 832, "blocks": CHUNK, **change}
    with pytest.raises(UserError, match=message):
        latent_sizes(**asked, **WAN)


def test_a_video_goes_on_from_whole_blocks_at_most_half_of_it():
    assert default_given(100, 21, CHUNK) == 9
    assert default_given(5, 21, CHUNK) == 3
    assert default_given(100, 22, IMAGE) == 10
    assert default_given(1, 22, IMAGE) == 1
    with pytest.raises(UserError, match="2 latent frames to go on from, with 21 in all: needs 3 or more"):
        default_given(2, 21, CHUNK)
