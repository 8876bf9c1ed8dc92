"""What a server counts, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cfjax.serving.items import Block

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self.opened = Counter("cfjax_sessions_opened", "sessions that were opened", registry=registry)
        self.ended = Counter("cfjax_sessions_ended", "sessions that ended", ["reason"], registry=registry)
        self.messages = Counter("cfjax_messages", "messages of clients that were taken", ["type"], registry=registry)
        self.errors = Counter("cfjax_errors", "error messages to clients", ["code"], registry=registry)
        self.refused = Counter("cfjax_refused", "requests refused before the upgrade", ["status"], registry=registry)
        self.lost = Counter("cfjax_sockets_lost", "sockets that went without a close", registry=registry)
        self.blocks = Counter("cfjax_blocks", "blocks that were sent", registry=registry)
        self.frames = Counter("cfjax_frames", "frames that were sent", registry=registry)
        self.bytes = Counter("cfjax_frame_bytes", "bytes of frames that were sent", registry=registry)
        self.phase = Histogram(
            "cfjax_block_seconds", "of a block, by phase", ["phase"], registry=registry, buckets=SECONDS
        )
        self.lag = Histogram(
            "cfjax_lag_seconds", "from a message to the block that follows it", registry=registry, buckets=SECONDS
        )
        self.step = Histogram(
            "cfjax_step_seconds", "of the device, for blocks made together", registry=registry, buckets=SECONDS
        )
        self.batch = Histogram(
            "cfjax_step_sessions", "sessions whose blocks were made together", registry=registry, buckets=(1, 2, 4, 8)
        )

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A number that is asked for when it is read."""
        self._gauges[name] = Gauge(f"cfjax_{name}", about, registry=self.registry)
        self._gauges[name].set_function(value)

    def stepped(self, sessions: int, seconds: float) -> None:
        """Blocks were made together."""
        self.step.observe(seconds)
        self.batch.observe(sessions)

    def sent(self, block: Block, size: int, lag: float | None) -> None:
        """A block was sent, of so many bytes."""
        self.blocks.inc()
        self.frames.inc(len(block.frames_PHWC))
        self.bytes.inc(size)
        for name in ("queue", "denoise", "decode", "encode"):
            self.phase.labels(name).observe(getattr(block, f"{name}_ms") / 1000)
        if lag is not None:
            self.lag.observe(lag)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
