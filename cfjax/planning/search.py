"""Which machines and meshes to try, smallest first, for a batch and networks of some numbers of heads."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cfjax.core.sharding import mesh_choices
from cfjax.core.topology import Topology, parse_topology, shapes_of


@dataclass(frozen=True)
class Candidate:
    """A machine, its mesh, microbatches per update; `share`: its activations over those of the plan that led to it."""

    topology: str
    mesh: dict[str, int]
    accumulate: int
    share: float = 1.0


def candidates(
    first: Topology, mesh: Mapping[str, int], accumulate: int, batch: int, heads: Sequence[int]
) -> Iterator[Candidate]:
    """Machines of `first`'s chip, smallest first, each with the meshes of `core.sharding.mesh_choices`.

    Activations follow the samples at once per device: batch / (devices x microbatches).
    """
    at_once = first.devices * accumulate
    for shape in shapes_of(first.chip):
        topology = parse_topology(f"{first.chip.name}:{shape}")
        for sizes, parts in mesh_choices(topology.devices, batch, heads):
            if (topology.name, sizes, parts) != (first.name, dict(mesh), accumulate):
                yield Candidate(topology.name, sizes, parts, at_once / (topology.devices * parts))


def overrides(candidate: Candidate, roles: Iterable[str]) -> str:
    """The command line's words for a candidate."""
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in candidate.mesh.items() if size > 1]
    return " ".join([*sizes, *(f"--config.optim.{role}.accumulate={candidate.accumulate}" for role in roles)])
