"""Which machines and meshes to try, smallest first, for a batch and networks of some numbers of heads."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cfjax.core.topology import Topology, parse_topology, shapes_of


@dataclass(frozen=True)
class Candidate:
    """A machine, its mesh, microbatches per update; `share`: its activations over those of the plan that led to it."""

    topology: str
    mesh: dict[str, int]
    accumulate: int
    share: float = 1.0


def _powers(limit: int) -> Iterator[int]:
    size = 1
    while size <= limit:
        yield size
        size *= 2


def meshes(devices: int, batch: int, heads: Sequence[int]) -> Iterator[tuple[dict[str, int], int]]:
    """(mesh, accumulate) that use all devices with one sample per microbatch and place, most samples at once first.

    Tokens and heads are cut by 1 to 16 together, heads by 4 at most where their number divides.
    """
    for cut in _powers(devices):
        fsdp = devices // cut
        if fsdp * cut != devices or batch % fsdp or cut > 16:
            continue
        for tensor in _powers(min(cut, 4)):
            if all(number % tensor == 0 for number in heads):
                yield {"data": 1, "fsdp": fsdp, "context": cut // tensor, "tensor": tensor}, batch // fsdp


def candidates(
    first: Topology, mesh: Mapping[str, int], accumulate: int, batch: int, heads: Sequence[int]
) -> Iterator[Candidate]:
    """Machines of `first`'s chip, smallest first, each with the meshes of `meshes`."""

    def samples(sizes: Mapping[str, int], parts: int) -> float:
        """Samples' worth of activations on a device."""
        return batch / (sizes["data"] * sizes["fsdp"] * parts * sizes["context"] * sizes["tensor"])

    for shape in shapes_of(first.chip):
        topology = parse_topology(f"{first.chip.name}:{shape}")
        for sizes, parts in meshes(topology.devices, batch, heads):
            if (topology.name, sizes, parts) != (first.name, dict(mesh), accumulate):
                share = samples(sizes, parts) / samples(mesh, accumulate)
                yield Candidate(topology.name, sizes, parts, share)


def overrides(candidate: Candidate, roles: Iterable[str]) -> str:
    """The command line's words for a candidate."""
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in candidate.mesh.items() if size > 1]
    return " ".join([*sizes, *(f"--config.optim.{role}.accumulate={candidate.accumulate}" for role in roles)])
