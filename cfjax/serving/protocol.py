"""The protocol of live streams, version 1: messages as values, checked by the schema that page and tests share.

`assets/serve/protocol.json` is that schema, docs/serving.md explains it.
"""

import functools
import json
import struct
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from jsonschema import Draft202012Validator

from cfjax.core.errors import UserError
from cfjax.core.schema import parse_json, shown
from cfjax.rollout.prompts import Blend
from cfjax.rollout.session_state import Mode, Prompt
from cfjax.worlds.assets import ASSETS

VERSION = 1
SCHEMA_FILE = ASSETS / "serve" / "protocol.json"
SUBPROTOCOL, TOKEN_SUBPROTOCOL = "cfjax.v1", "cfjax.token."
HEADER = struct.Struct(">4sIHH")  # magic, block, frame, flags
MAGIC, LAST = b"CFJX", 1
Format = Literal["jpeg", "webp", "png", "raw"]
FORMATS: tuple[Format, ...] = ("jpeg", "webp", "png", "raw")
MODES: tuple[Mode, ...] = ("recache", "keep", "cut")
BLENDS: tuple[Blend, ...] = ("linear", "slerp")
OPEN, REOPEN = "open", "reopen"  # what a socket begins with


class Refused(UserError):
    """A message that is not carried out; the stream goes on as before.

    Attributes:
      code: of the error message.  retryable: whether the same message may succeed later.
    """

    def __init__(self, code: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.code, self.retryable = code, retryable


# ---- from the client


@dataclass(frozen=True)
class Open:
    """A new session."""

    version: int
    prompt: str
    seed: int = 0
    sampler: str = ""
    memory: str = ""
    fps: float | None = None
    image: str = field(default="", repr=False)
    format: Format = "jpeg"


@dataclass(frozen=True)
class Reopen:
    """Back to a session whose socket was lost; `after`: the last block that arrived whole."""

    version: int
    session: str = field(repr=False)
    after: int = -1


@dataclass(frozen=True)
class ChangePrompt:
    """Another prompt, or several with weights."""

    prompt: str = ""
    prompts: list[dict[str, Any]] = field(default_factory=list)
    mode: Mode = "recache"
    blend_blocks: int = 0
    blend: Blend = "linear"

    def value(self) -> Prompt:
        """As `Session.set_prompt` takes it."""
        return self.prompt or [(one["text"], float(one["weight"])) for one in self.prompts]


@dataclass(frozen=True)
class Action:
    """The keys that are held from block `at` on; None: from the next one."""

    keys: list[str]
    at: int | None = None


@dataclass(frozen=True)
class Pause:
    """No further blocks."""


@dataclass(frozen=True)
class Resume:
    """Ends a pause."""


@dataclass(frozen=True)
class TakeSnapshot:
    """Keeps the stream as it is."""


@dataclass(frozen=True)
class Restore:
    """Goes on from a snapshot."""

    id: str


@dataclass(frozen=True)
class Fork:
    """Goes on from a snapshot with another seed."""

    id: str
    seed: int


@dataclass(frozen=True)
class Seek:
    """Goes on from the beginning of a block."""

    block: int


@dataclass(frozen=True)
class Change:
    """Other settings; None and "" leave one as it is."""

    memory: str = ""
    fps: float | None = None
    format: Format | None = None


@dataclass(frozen=True)
class Ack:
    """This block and all before it have arrived."""

    block: int


@dataclass(frozen=True)
class Close:
    """Ends the session."""


Message = (
    Open | Reopen | ChangePrompt | Action | Pause | Resume | TakeSnapshot | Restore | Fork | Seek | Change | Ack | Close
)
MESSAGES: dict[str, type[Message]] = {
    OPEN: Open,
    REOPEN: Reopen,
    "prompt": ChangePrompt,
    "action": Action,
    "pause": Pause,
    "resume": Resume,
    "snapshot": TakeSnapshot,
    "restore": Restore,
    "fork": Fork,
    "seek": Seek,
    "set": Change,
    "ack": Ack,
    "close": Close,
}
NAMES = {kind: name for name, kind in MESSAGES.items()}


@functools.cache
def schema() -> dict[str, Any]:
    """The schema of all messages."""
    return json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


@functools.cache
def validator(name: str) -> Draft202012Validator:
    """Of one definition, such as "client_open"."""
    return Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": schema()["$defs"]})


def parse_message(text: str, most: int) -> Message:
    """A client's message.

    Args:
      most: bytes of any message but `open`, which may hold a picture.

    Raises:
      Refused: no JSON, too long, or not as the schema says.
    """
    try:
        value = parse_json(text)
    except ValueError as error:
        raise Refused("invalid_message", f"this is no message in JSON: {error}") from None
    kind = value.get("type") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in MESSAGES:
        what = f"type is {shown(kind)}" if isinstance(value, dict) else "this is no JSON object"
        raise Refused("invalid_message", f"{what}; a message has a type, one of {', '.join(MESSAGES)}")
    if kind != OPEN and len(text.encode()) > most:
        raise Refused("invalid_message", f"{kind}: a message has at most {most:,} bytes")
    # The first fault alone: the schema bounds a list before it compares its entries with each other.
    fault = next(validator(f"client_{kind}").iter_errors(value), None)
    if fault is not None:
        raise Refused("invalid_message", f"{kind}: {_told(fault)}")
    cls = MESSAGES[kind]
    return cls(**{f.name: _whole(value[f.name], f.type) for f in fields(cls) if f.name in value})


def _whole(value: Any, kind: Any) -> Any:
    """1.0 is a whole number in JSON Schema."""
    return int(value) if isinstance(value, float) and kind in (int, int | None) else value


def _told(fault: Any) -> str:
    """One line of a schema's error; values in it are cut short."""
    place = ".".join(map(str, fault.absolute_path))
    if fault.validator == "const" and fault.absolute_path and fault.absolute_path[-1] == "version":
        return f"version is {shown(fault.instance)}; this server speaks version {VERSION}"
    if fault.validator in ("required", "additionalProperties", "unevaluatedProperties"):
        line = fault.message if len(fault.message) < 200 else f"{fault.message[:200]}..."
    else:
        allowed = json.dumps(fault.validator_value)
        allowed = allowed if len(allowed) < 120 else f"{allowed[:120]}..."
        line = f"is {shown(fault.instance)}; the schema says {fault.validator}: {allowed}"
    return f"{place} {line}" if place else line


# ---- from the server


def message_text(kind: str, **keys: Any) -> str:
    """A server's message in JSON."""
    return json.dumps({"type": kind, **keys}, separators=(",", ":"))


def error_text(error: Refused) -> str:
    """An error message."""
    return message_text("error", code=error.code, message=str(error), retryable=error.retryable)


def prompt_json(prompt: Prompt) -> Any:
    """A prompt as messages have it."""
    return prompt if isinstance(prompt, str) else [{"text": text, "weight": weight} for text, weight in prompt]


def pack_frame(block: int, frame: int, picture: bytes, *, last: bool) -> bytes:
    """A binary message."""
    return HEADER.pack(MAGIC, block % 2**32, frame, LAST if last else 0) + picture


def unpack_frame(message: bytes) -> tuple[int, int, int, bytes]:
    """(block, frame, flags, picture) of a binary message.

    Raises:
      ValueError: it is none.
    """
    if len(message) < HEADER.size or message[:4] != MAGIC:
        raise ValueError("no frame: it does not begin with CFJX and three numbers")
    _, block, frame, flags = HEADER.unpack_from(message)
    return block, frame, flags, message[HEADER.size :]
