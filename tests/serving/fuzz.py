"""Messages as hypothesis makes them from the schema: right ones, nearly right ones, and anything."""

import json
from typing import Any

from hypothesis import strategies as st

from cfjax.serving.protocol import MESSAGES, schema

PROMPTS = st.sampled_from(
    ["a red circle moving left", "a blue square moving up", "a red dog", "", "\u2028", "x" * 5000]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
# Values that are right, or nearly so, by the key that they belong to
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "version": st.sampled_from([1, 1.0, 2, "1"]),
    "prompt": PROMPTS,
    "prompts": st.lists(st.fixed_dictionaries({"text": PROMPTS, "weight": st.floats(-1, 4)}), max_size=10),
    "seed": st.integers(-1, 2**32),
    "sampler": st.text(max_size=5),
    "memory": st.sampled_from(["infinity_rope", "infinity_rope(window=4)", "window(window=1000000000)", "full", ""]),
    "fps": st.floats(-1, 1001, allow_nan=False),
    "image": st.sampled_from(["", "A" * 40, "!" * 40, "iVBORw0KGgoAAAANSUhEUg=="]),
    "format": st.sampled_from(["jpeg", "webp", "png", "raw", "gif", 1]),
    "session": st.text("abcdefABCDEF_-", min_size=4, max_size=40),
    "id": st.text("abcdefABCDEF_-", min_size=4, max_size=40),
    "after": st.integers(-2, 5),
    "mode": st.sampled_from(["recache", "keep", "cut", "melt"]),
    "blend_blocks": st.integers(-1, 4),
    "blend": st.sampled_from(["linear", "slerp", "mix"]),
    "keys": st.lists(st.sampled_from(["ArrowLeft", "ArrowUp", "", "x" * 50]), max_size=20),
    "at": st.integers(-1, 2**32),
    "block": st.integers(-1, 2**33),
}


@st.composite
def messages(draw: st.DrawFn) -> str:
    """The text of a message."""
    chance = draw(st.integers(0, 9))
    if chance == 0:
        return draw(st.text(max_size=60))
    if chance == 1:
        return json.dumps(draw(ANYTHING))
    kind = draw(st.sampled_from([*MESSAGES, "start", 7, None]))
    known = schema()["$defs"].get(f"client_{kind}", {"properties": {"type": {}}})
    keys = [key for key in known["properties"] if key != "type"]
    needed = [key for key in known.get("required", []) if key != "type"]
    chosen = draw(st.sets(st.sampled_from(keys)) if keys else st.just(set()))
    if chance > 3:
        chosen |= set(needed)
    value = {"type": kind, **{key: draw(VALUES[key] if chance > 2 else ANYTHING) for key in sorted(chosen)}}
    if chance == 3:
        value[draw(st.text(max_size=8))] = draw(ANYTHING)
    text = json.dumps(value)
    cut = draw(st.integers(0, 30))
    return text[: draw(st.integers(0, len(text)))] if cut == 0 else text
