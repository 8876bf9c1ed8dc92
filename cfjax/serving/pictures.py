"""Frames to pictures that browsers show, and back; a client's picture to the frames that a video begins with."""

import base64
import binascii
import io

import numpy as np
from PIL import Image

from cfjax.core.errors import UserError
from cfjax.core.limits import PICTURE_PIXELS
from cfjax.data.pictures import ClipFormat, Unusable, fit_picture, read_picture, to_float
from cfjax.serving.protocol import Format, Refused

GIVEN = ("JPEG", "PNG", "WEBP")  # what a client's picture may be
# What Pillow is told. Speed counts: a block of pictures is compressed while the next one is made.
SAVE = {
    "jpeg": {"quality": 90, "subsampling": 0},  # colours at full size: shapes of few pixels would smear
    "webp": {"quality": 85, "method": 2},
    "png": {"compress_level": 1},
}


def encode_frame(frame_HWC: np.ndarray, kind: Format) -> bytes:
    """A uint8 frame as a picture; "raw": its bytes, row by row."""
    if kind == "raw":
        return frame_HWC.tobytes()
    out = io.BytesIO()
    Image.fromarray(frame_HWC).save(out, kind, **SAVE[kind])
    return out.getvalue()


def decode_frame(picture: bytes, kind: Format, height: int, width: int) -> np.ndarray:
    """A picture's pixels, uint8 [H, W, 3].

    Raises:
      ValueError: raw bytes of another size.
      OSError: it is no picture.
    """
    if kind == "raw":
        return np.frombuffer(picture, np.uint8).reshape(height, width, 3)
    with Image.open(io.BytesIO(picture), formats=[kind]) as opened:
        return np.asarray(opened.convert("RGB"))


def given_video(image: str, most_bytes: int, frames: int, height: int, width: int) -> np.ndarray:
    """A client's picture, in base64, as a still video_BPHWC of so many frames, float32 in [-1, 1].

    Raises:
      Refused: it is too large, or no picture that can be used.
    """
    if len(image) * 3 // 4 > most_bytes + 2:
        raise Refused("invalid_value", f"image: has more than the {most_bytes:,} bytes that it may have")
    try:
        data = base64.b64decode(image, validate=True)
        # Its header first, and by these readers alone: Pillow has others, for less common and less safe formats.
        with Image.open(io.BytesIO(data), formats=GIVEN) as opened:
            if opened.width * opened.height > PICTURE_PIXELS:
                raise Unusable(f"too large: {opened.width} x {opened.height} pixels")
        picture = read_picture(io.BytesIO(data))
        fitted = fit_picture(picture, ClipFormat(frames, height, width, max_crop=1.0, upscale=True))
    except Image.UnidentifiedImageError:  # its text holds an address in memory
        raise Refused("invalid_value", "image: this is no JPEG, PNG or WebP picture") from None
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError, Unusable) as error:
        if isinstance(error, UserError):
            raise
        raise Refused("invalid_value", f"image: {' '.join(str(error).split())}; give a JPEG, PNG or WebP") from None
    return np.repeat(to_float(fitted)[None, None], frames, axis=1)
