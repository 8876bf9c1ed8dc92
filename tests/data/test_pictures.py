"""Pictures as people have them become 8-bit RGB by their own range, upright, on white; or say why they cannot."""

import io

import numpy as np
import pytest
from PIL import Image

from cfjax.data.pictures import Unusable, over_white, read_picture

RAMP = np.tile(np.linspace(0, 255, 64).round().astype(np.uint8), (16, 1))
COLOURS = np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8)

FILES = {
    "grey.png": (Image.fromarray(RAMP), 0),
    "grey16.png": (Image.fromarray(RAMP.astype(np.uint16) * 257), 0),
    "grey16.tiff": (Image.fromarray(RAMP.astype(np.uint16) * 257), 0),
    "between16.png": (Image.fromarray(RAMP.astype(np.uint16) * 257 + np.uint16(100) * (RAMP < 255)), 0),
    "float.tiff": (Image.fromarray(RAMP.astype(np.float32) / 255), 0),
    "palette.png": (Image.fromarray(RAMP).convert("RGB").quantize(64), 1),
    "bilevel.png": (Image.fromarray(np.where(RAMP > 127, 255, 0).astype(np.uint8)).convert("1"), 127),
    "cmyk.jpg": (Image.fromarray(RAMP).convert("CMYK"), 2),
    "grey.webp": (Image.fromarray(RAMP), 4),
    "opaque.png": (Image.fromarray(RAMP).convert("RGBA"), 0),
}


@pytest.mark.parametrize("name", FILES)
def test_a_ramp_is_the_same_ramp_in_every_kind_of_file(tmp_path, name):
    image, most = FILES[name]
    image.save(tmp_path / name, **({"quality": 100} if name.endswith(("jpg", "webp")) else {}))
    shown = read_picture(tmp_path / name)
    error = np.abs(shown.astype(int) - RAMP[..., None]).max()
    print(f"{name}: largest error {error} of 255")
    assert shown.dtype == np.uint8 and shown.shape == (16, 64, 3) and error <= most


def test_transparent_parts_show_white(tmp_path):
    """Not the colour that happens to be stored there, whether by an alpha channel or by a palette."""
    pixels = np.dstack([COLOURS, np.zeros((16, 24), np.uint8)])
    pixels[:, 12:, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    shown = read_picture(tmp_path / "a.png")
    assert (shown[:, :12] == 255).all()
    np.testing.assert_array_equal(shown[:, 12:], COLOURS[:, 12:])
    palette = Image.fromarray(RAMP).convert("P")
    palette.save(tmp_path / "b.png", transparency=0)
    np.testing.assert_array_equal(read_picture(tmp_path / "b.png")[0, [0, 63]], [[255] * 3, [255] * 3])
    half = over_white(np.full((1, 1, 4), (0, 100, 200, 51), np.uint8))
    np.testing.assert_array_equal(half[0, 0], np.array([0, 100, 200]) * 0.2 + 255 * 0.8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_phones_orientation_is_obeyed(tmp_path, orientation):
    """Exif 2.32, 4.6.4: which edge of the picture row 0 and column 0 are."""
    turns = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x, -1),
        7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
        8: np.rot90,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(COLOURS).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), turns[orientation](COLOURS))


def test_the_first_of_a_phones_two_pictures_is_the_picture(tmp_path):
    Image.fromarray(RAMP).save(
        tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.fromarray(255 - RAMP)], quality=100
    )
    assert np.abs(read_picture(tmp_path / "a.jpg").astype(int) - RAMP[..., None]).max() <= 2


def cut(image: Image.Image, kind: str, part: float = 0.5) -> bytes:
    image.save(out := io.BytesIO(), kind)
    return out.getvalue()[: int(len(out.getvalue()) * part)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no picture at all", "unreadable"),
        (b"", "unreadable"),
        (cut(Image.fromarray(COLOURS), "JPEG"), "(?i)unreadable: .*truncated"),
        (cut(Image.fromarray(COLOURS), "PNG"), "unreadable"),
        (cut(Image.fromarray(COLOURS), "WEBP"), "unreadable"),
        (cut(Image.fromarray(RAMP.astype(np.float32)), "TIFF", 1), "unknown range: floats from 0 to 255"),
        (cut(Image.fromarray(RAMP.astype(np.float32) * np.nan), "TIFF", 1), "unknown range: floats from nan"),
        (cut(Image.fromarray(RAMP.astype(np.int32) * 1000), "TIFF", 1), "32 bits, 0 to 255000; save it with 8 or 16"),
    ],
)
def test_what_cannot_be_shown_is_reported(tmp_path, content, message):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(Unusable, match=message):
        read_picture(tmp_path / "a")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_an_animation_is_not_one_picture(tmp_path, kind):
    more = [Image.fromarray(255 - COLOURS)]
    Image.fromarray(COLOURS).save(tmp_path / "a", kind, save_all=True, append_images=more)
    with pytest.raises(Unusable, match="an animation of 2 frames; save one of them, or give it as a video"):
        read_picture(tmp_path / "a")
