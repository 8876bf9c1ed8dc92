"""A 14B transformer in scaled float8, converted to bfloat16: how much memory that owns, and how long it takes.

    python benchmarks/large_files.py FOLDER        29 GB come out; the source is a file with holes

The tensors have the sizes and names of Wan2.1-T2V-14B; their numbers are zeros, so the disk keeps little of them, and
the times are those of reading, widening and writing, not of a disk. Writes benchmarks/results/large_files.json.
"""

import json
import struct
import sys
import time
from math import prod
from pathlib import Path

from measure import parser, write

sys.path.insert(0, str(Path(__file__).parents[1]))

from cfjax.core.console import say
from tests import synthetic
from tests.conversion.peak_memory import convert, peak

SIZES = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 40}
REST = {"freq_dim": 256, "in_dim": 16, "out_dim": 16, "text_dim": 4096}


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether such files have it in eight bits."""
    return len(shape) == 2 and name.endswith("weight")


def write_float8(path: Path, shapes: synthetic.Shapes) -> int:
    """wan2.1_t2v_14B_fp8_scaled.safetensors as ComfyUI has it, zeros as holes; returns its bytes."""
    header, start = {}, 0
    for name, shape in shapes.items():
        entries = [(name, "F8_E4M3" if is_matrix(name, shape) else "F32", shape)]
        if is_matrix(name, shape):
            entries.append((f"{name.removesuffix('.weight')}.scale_weight", "F32", (1,)))
        for entry, dtype, size in entries:
            stop = start + prod(size) * (1 if dtype == "F8_E4M3" else 4)
            header[entry] = {"dtype": dtype, "shape": list(size), "data_offsets": [start, stop]}
            start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + start)
    return path.stat().st_size


def main() -> None:
    """Measures and writes the table."""
    command = parser(__doc__, "large_files.json")
    command.add_argument("folder", type=Path, help="a new one, for the file and the run")
    options = command.parse_args()
    shapes = synthetic.dit_shapes(**SIZES, **REST)
    options.folder.mkdir(parents=True)
    source = options.folder / "wan2.1_t2v_14B_fp8_scaled.safetensors"
    size, begun = write_float8(source, shapes), time.perf_counter()
    owned = peak(lambda: convert(source, options.folder / "run", dequantize="bfloat16"))
    row = {
        "case": "float8 to bfloat16",
        "parameters": sum(map(prod, shapes.values())),
        "source_bytes": size,
        "peak_owned_bytes": owned,
        "largest_array_bytes": 2 * SIZES["num_layers"] * SIZES["dim"] * SIZES["ffn_dim"],
        "seconds": round(time.perf_counter() - begun, 1),
    }
    write(options.out, [row])
    say(json.dumps(row))


if __name__ == "__main__":
    main()
