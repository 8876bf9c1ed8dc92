"""One client's stream on the server: what was asked of it, what it may make next, what it has made.

Two threads meet here. The server's loop calls what is under "the loop"; the device's thread, which alone touches the
session, calls what is under "the device". Messages go one way through a queue, blocks the other way through `deliver`.
"""

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import numpy as np

from cfjax.core.errors import UserError
from cfjax.evaluation.video import to_uint8
from cfjax.memory.names import memory_name
from cfjax.rollout.session import Session
from cfjax.rollout.session_state import Made, Prompt, Snapshot
from cfjax.serving.items import Block, Item, Opened
from cfjax.serving.protocol import (
    Action,
    Change,
    ChangePrompt,
    Fork,
    Format,
    Message,
    Open,
    Pause,
    Refused,
    Restore,
    Resume,
    Seek,
    TakeSnapshot,
    message_text,
)
from cfjax.serving.served import Limits, Served

WAITING = 256  # messages that are not carried out yet; blocks are short, so this is a client at fault


@dataclass
class _Pace:
    """When the next block may be begun."""

    fps: float
    due: float = field(default_factory=time.perf_counter)

    def made(self, frames: int, now: float) -> None:
        """A block was begun. What was lost while the client or the device was slow is not made up for."""
        if self.fps:
            self.due = max(self.due, now - frames / self.fps) + frames / self.fps


@dataclass
class Live:
    """See the module.

    Attributes:
      id: known to this client alone.
      deliver: takes what comes out, from either thread.
      wake: tells the device's thread that there is something to do.
      attached: whether a client is there; without one no block is made.
      ended: whether nothing may be made of it any more.
      kept, sent: the loop's: blocks that were not acknowledged, for a socket that comes back; the last one that was
        sent whole.
    """

    served: Served
    limits: Limits
    deliver: Callable[["Live", Item], None]
    wake: Callable[[], None]
    id: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    format: Format = "jpeg"
    attached: bool = True
    ended: bool = False
    kept: deque[Block] = field(default_factory=deque)
    sent: int = -1
    last_step: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._messages: deque[tuple[Message, float]] = deque()
        self._unacked: deque[int] = deque()
        self._session: Session | None = None
        self._next = 0
        self._paused = False
        self._pace = _Pace(self.served.fps)
        self._free_since = time.perf_counter()
        self._changed: float | None = None
        self._starts: deque[tuple[int, Snapshot]] = deque(maxlen=self.limits.seek_blocks)
        self._snapshots: dict[str, Snapshot] = {}
        self._keys: tuple[str, ...] = ()
        self._actions: list[tuple[int, tuple[str, ...], float]] = []

    # ---- the loop

    def post(self, message: Message) -> None:
        """A message to be carried out before the next block.

        Raises:
          Refused: too many of them wait.
        """
        if len(self._messages) >= WAITING:
            raise Refused(
                "too_many_messages", f"{WAITING} messages wait for the next block: send fewer", retryable=True
            )
        self._messages.append((message, time.perf_counter()))
        self.wake()

    def ack(self, block: int) -> None:
        """This block and all before it have arrived.

        Raises:
          Refused: it was not sent yet: memory would grow for a client that acknowledges and does not read.
        """
        if block > self.sent:
            raise Refused("invalid_value", f"ack: block {block} was not sent yet")
        with self._lock:
            full = len(self._unacked) >= self.limits.queue
            while self._unacked and self._unacked[0] <= block:
                self._unacked.popleft()
            while self.kept and self.kept[0].index <= block:
                self.kept.popleft()
            if full and len(self._unacked) < self.limits.queue:
                self._free_since = time.perf_counter()
        self.wake()

    @property
    def next_block(self) -> int:
        """The index of the next block that is made."""
        return self._next

    @property
    def unacked(self) -> int:
        """Blocks that were made and not acknowledged."""
        return len(self._unacked)

    @property
    def fps(self) -> float:
        """At which frames are to be shown."""
        return self._pace.fps or self.served.fps

    def settings(self) -> dict[str, object]:
        """What `ready` says of the session as it is now."""
        session = self._session
        assert session is not None
        state = session.state
        return {"memory": memory_name(state.memory), "seed": state.seed, "format": self.format, "fps": self.fps}

    # ---- the device

    def carry_out(self) -> None:
        """Everything that was asked since the last block, in its order."""
        while self._messages and not self.ended:
            message, arrived = self._messages.popleft()
            try:
                self._carry_out(message, arrived)
            except UserError as error:
                refused = error if isinstance(error, Refused) else Refused("invalid_value", str(error))
                self.deliver(self, refused)

    def ready(self, now: float) -> bool:
        """Whether its next block can be made."""
        return self._could() and now >= self._pace.due

    def due(self) -> float | None:
        """When its next block can be made, unless something happens before; None: not without that."""
        return self._pace.due if self._could() else None

    def _could(self) -> bool:
        waits = self._session is None or self._paused or self.ended or not self.attached
        # In this order: what came before an `ack` is carried out before the block that this allows.
        return not waits and len(self._unacked) < self.limits.queue and not self._messages

    @property
    def session(self) -> Session:
        """The session of an open stream."""
        assert self._session is not None
        return self._session

    @property
    def open_session(self) -> Session | None:
        """The session, if there is one."""
        return self._session

    def begin(self) -> None:
        """Before a block is made: its beginning is kept, the keys of now hold."""
        if self.limits.seek_blocks:
            self._starts.append((self._next, self.session.snapshot()))
        while self._actions and self._actions[0][0] <= self._next:
            _, self._keys, arrived = self._actions.pop(0)
            self._changed = arrived
        if self.served.steer is not None:
            self.served.steer(self.session, self._keys)

    def finish(self, made: Made, begun: float) -> None:
        """After a block was made.

        Args:
          begun: when, of `time.perf_counter`.

        Raises:
          UserError: its pixels are NaN.
        """
        could = max(self._free_since, self._pace.due)
        frames = to_uint8(made.video_BPHWC)[0]
        self._pace.made(len(frames), begun)
        self._free_since = self.last_step = time.perf_counter()
        ms = (1000 * max(begun - could, 0.0), 1000 * made.network_s, 1000 * made.decode_s)
        self._put(made.index, frames, made.prompt, ms)

    def _put(self, position: int, frames: np.ndarray, prompt: Prompt, ms: tuple[float, float, float]) -> None:
        keys = self._keys if self.served.actions else None
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.session.state.cache))
        block = Block(self._next, position, frames, self.format, prompt, keys, *ms, size, self._changed)
        self._changed = None
        with self._lock:
            self._unacked.append(self._next)
            self._next += 1
        self.deliver(self, block)

    def close(self) -> None:
        """Lets go of all memory."""
        self.ended = True
        if self._session is not None:
            self._session.close()
        self._session = None
        self._snapshots.clear()
        self._starts.clear()
        self._messages.clear()

    # ---- messages

    def _carry_out(self, message: Message, arrived: float) -> None:
        if isinstance(message, Open):
            return self._open(message)
        if self._session is None:
            raise Refused("not_open", "the session is not open yet: open comes first")
        if isinstance(message, TakeSnapshot):
            return self._take_snapshot()
        if isinstance(message, Action):
            return self._act(message, arrived)
        if isinstance(message, Change):
            return self._change(message, arrived)
        what = self._course(message)
        if not isinstance(message, Pause | Resume):
            self._changed = arrived
        self._applied(what)

    def _course(self, message: Message) -> str:
        """Carries out what changes how the stream goes on; says what it was."""
        if isinstance(message, Pause | Resume):
            self._paused = isinstance(message, Pause)
            self._free_since = time.perf_counter()
            return "pause" if self._paused else "resume"
        if isinstance(message, ChangePrompt):
            self.session.set_prompt(message.value(), message.mode, message.blend_blocks, message.blend)
            return "prompt"
        if isinstance(message, Seek):
            self.session.restore(self._start(message.block))
            return "seek"
        assert isinstance(message, Restore | Fork)
        if message.id not in self._snapshots:
            raise Refused("unknown_id", f"id={message.id!r}: this session has no such snapshot")
        self.session.restore(self._snapshots[message.id])
        if isinstance(message, Restore):
            return "restore"
        self._session = self.session.fork(message.seed)
        return "fork"

    def _open(self, asked: Open) -> None:
        if self._session is not None:
            raise Refused("already_open", "this session is open: close it first, or use another socket")
        session = self._session = self.served.open(asked)
        self.format, self._free_since = asked.format, time.perf_counter()
        self._pace = _Pace(self.served.fps if asked.fps is None else asked.fps)
        self.deliver(self, Opened())
        if session.given_video_BPHWC is not None:
            self._put(0, to_uint8(session.given_video_BPHWC)[0], asked.prompt, (0.0, 0.0, 0.0))

    def _take_snapshot(self) -> None:
        if len(self._snapshots) >= self.limits.snapshots:
            raise Refused("limit", f"a session holds at most {self.limits.snapshots} snapshots")
        name = secrets.token_urlsafe(9)
        self._snapshots[name] = self.session.snapshot()
        self.deliver(self, message_text("snapshot", id=name, at_block=self._next))

    def _start(self, block: int) -> Snapshot:
        held = dict(self._starts)
        if block not in held:
            known = ", ".join(map(str, held)) or "none"
            raise Refused("unknown_id", f"block {block} is not held: the stream can go to {known}")
        return held[block]

    def _act(self, message: Action, arrived: float) -> None:
        keys = self.served.actions
        if not keys:
            raise Refused("unsupported", "action: this model cannot be steered")
        if unknown := [key for key in message.keys if key not in keys]:
            raise Refused("invalid_value", f"keys: {unknown[0]!r} is none; this model has {', '.join(keys)}")
        at = self._next if message.at is None else max(message.at, self._next)
        if len(self._actions) >= WAITING:
            raise Refused("limit", f"{WAITING} actions wait for their blocks")
        self._actions.append((at, tuple(message.keys), arrived))
        self._actions.sort(key=lambda action: action[0])
        self._applied("action", at)

    def _change(self, message: Change, arrived: float) -> None:
        """All of it or nothing."""
        if message.memory:
            self.session.set_memory(self.served.check_memory(message.memory))
            self._changed = arrived
            self._applied("memory")
        if message.fps is not None:
            self._pace = _Pace(message.fps)
            self._applied("fps")
        if message.format is not None:
            self.format = message.format
            self._applied("format")

    def _applied(self, what: str, at_block: int | None = None) -> None:
        self.deliver(self, message_text("applied", what=what, at_block=self._next if at_block is None else at_block))
