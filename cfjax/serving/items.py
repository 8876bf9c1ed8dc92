"""What comes out of a stream on its way to a client: blocks, messages, the end."""

import time
from dataclasses import dataclass

import numpy as np

from cfjax.rollout.session_state import Prompt
from cfjax.serving.pictures import encode_frame
from cfjax.serving.protocol import Format, Refused, error_text, message_text, pack_frame, prompt_json


@dataclass
class Block:
    """A block.

    Attributes:
      index: in the stream.  position: in the video.  frames_PHWC: uint8.
      queue_ms, denoise_ms, decode_ms, encode_ms: what it took.
      changed: when the newest message arrived that it is the first to follow (of `time.perf_counter`); None: none.
      pictures: the frames as they are sent; None before they are encoded.
    """

    index: int
    position: int
    frames_PHWC: np.ndarray
    format: Format
    prompt: Prompt
    keys: tuple[str, ...] | None
    queue_ms: float
    denoise_ms: float
    decode_ms: float
    cache_bytes: int
    changed: float | None
    encode_ms: float = 0.0
    pictures: list[bytes] | None = None

    def encode(self) -> list[bytes]:
        """The binary messages; made once."""
        if self.pictures is None:
            begun, last = time.perf_counter(), len(self.frames_PHWC) - 1
            self.pictures = [
                pack_frame(self.index, n, encode_frame(frame, self.format), last=n == last)
                for n, frame in enumerate(self.frames_PHWC)
            ]
            self.encode_ms = 1000 * (time.perf_counter() - begun)
        return self.pictures

    def text(self) -> str:
        """The text message before them, at the moment when it is sent."""
        changed, now = self.changed, time.perf_counter()
        ms = {"queue": self.queue_ms, "denoise": self.denoise_ms, "decode": self.decode_ms, "encode": self.encode_ms}
        return message_text(
            "block",
            index=self.index,
            position=self.position,
            frames=len(self.frames_PHWC),
            format=self.format,
            prompt_applied=prompt_json(self.prompt),
            ms={name: round(value, 3) for name, value in ms.items()},
            cache_bytes=self.cache_bytes,
            lag_ms=None if changed is None else round(1000 * (now - changed), 3),
            **({} if self.keys is None else {"keys": list(self.keys)}),
        )


@dataclass(frozen=True)
class Opened:
    """The session is there. `resumed`: for a socket that came back."""

    resumed: bool = False


@dataclass(frozen=True)
class Ended:
    """Nothing follows. `reason`: as `closed` says it; `code`: of the socket's close."""

    reason: str
    code: int = 1000


Item = str | Refused | Block | Opened | Ended  # a str is a text message


def text_of(item: str | Refused) -> str:
    """A text message as it is sent."""
    return item if isinstance(item, str) else error_text(item)
