"""What a stage trains on: `c.data` as values, the dataset opened, and held against what the stage asks of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cfjax.core.console import counted, say
from cfjax.core.errors import UserError
from cfjax.core.once import make_once
from cfjax.core.paths import local_path
from cfjax.data.latents import ClipDataset
from cfjax.data.precompute import precompute
from cfjax.data.reversed import encoded, joined
from cfjax.data.sets import open_dataset, without_ground_truth
from cfjax.data.shapes import ShapesConfig
from cfjax.data.steered import SteeringConfig
from cfjax.data.tolerant import TolerantDataset
from cfjax.experiment.record import thawed
from cfjax.objectives.ode_regression import METHODS, METHODS_FOR
from cfjax.worlds.toy import SplitSource, ToyWorld, check_split, open_toy_world
from cfjax.worlds.world import RECORD


@dataclass(frozen=True)
class Shapes:
    """The shapes of one sample: latents (F, H, W, C) and text rows (S, E); whether it has its picture's latents too."""

    latents: tuple[int, int, int, int]
    text: tuple[int, int]
    pictures: bool = False

    @property
    def channels(self) -> int:
        """Latent channels."""
        return self.latents[-1]

    @property
    def text_width(self) -> int:
        """Width of the text rows."""
        return self.text[-1]


@dataclass(frozen=True)
class Data:
    """What a stage trains on: the dataset, and the world it was made in (None for precomputed Wan latents)."""

    dataset: ClipDataset
    world: ToyWorld | None

    @property
    def shapes(self) -> Shapes:
        """The shapes of one sample."""
        pictures = bool(self.dataset.manifest.get("layout", {}).get("pictures", False))
        return Shapes(self.dataset.latent_shape, self.dataset.text_shape, pictures)


@dataclass(frozen=True)
class ToySource:
    """The toy world of a config: where it is, and what it is made of if it is not there yet."""

    path: str
    assets: str
    channels: int
    text_length: int
    shapes: ShapesConfig

    def world(self, *, keep: bool = True) -> ToyWorld:
        """The world, made on first use; `keep`: and written to `path`.

        Raises:
          UserError: the one that is there, or the one of `assets`, is not what the config describes; nothing is written
            then. Or of a new one all captions would be trained on, or none.
        """
        path = data_root(self.path) / "world"
        made = partial(
            open_toy_world,
            path,
            assets=self.assets,
            shapes=self.shapes,
            channels=self.channels,
            text_length=self.text_length,
        )
        there = (path / RECORD).exists()
        if not there and not self.assets:
            check_split(self.shapes)
            return made(keep=keep)
        world = made(keep=False)
        if other := self._difference(world):
            if there:
                raise UserError(f"{path} was made with {other}; choose another --config.data.path")
            raise UserError(
                f"data.assets={self.assets!r} is a world with {other}; train a teacher of your own in it "
                "(configs/bidirectional.py:toy, with the same keys), and start from that: docs/training.md"
            )
        return made(keep=True) if keep and not there else world

    def _difference(self, world: ToyWorld) -> str:
        """The first key in which a world is not what the config describes, "KEY=its, not ours"; or ""."""
        theirs, ours = world.shapes.to_json(), self.shapes.to_json()
        pairs = {f"data.shapes.{name}": (theirs[name], ours[name]) for name in ours}
        pairs["data.channels"] = (world.codec.latent_channels, self.channels)
        pairs["data.text_length"] = (world.text_length, self.text_length)
        return next((f"{key}={its!r}, not {own!r}" for key, (its, own) in pairs.items() if its != own), "")


@dataclass(frozen=True)
class DataSource:
    """`c.data`, and what the stage asks of it.

    Attributes:
      source: "shapes" for the toy's clips, made on first use; "" for a dataset made by `cfjax precompute`.
      reversed_name, lmdb, ground_truth, max_corrupt: see `presets.wan_data`.
      toy: of the toy's clips; None for others.
      clips_needed: whether the stage needs latents, not prompts alone.
      trajectory_points: states per clip that ODE regression asks for; 0 is none.
      steering: of the toy's clips; None: they move by themselves.
      action_keys: of networks that are told which are held; 0: none is.
      caption_encoder_needed: whether captions are made while training, so that their text rows are not in the dataset.
      config: the experiment's config as plain values, to compare ODE pairs with.
    """

    path: str
    name: str
    source: str
    batch_size: int
    reversed_name: str
    lmdb: str
    ground_truth: bool
    max_corrupt: float
    clips: int
    toy: ToySource | None
    clips_needed: bool
    trajectory_points: int
    caption_encoder_needed: bool
    config: Mapping[str, Any]
    steering: SteeringConfig | None = None
    action_keys: int = 0

    def open(self) -> Data:
        """The dataset `path`/`name`; the toy's clips and world are made on first use.

        Raises:
          UserError: nothing there and no source to make it from, it was made in another world, or it is not what the
            stage needs.
        """
        root = data_root(self.path)
        if not self.source:
            dataset = self._suitable(open_dataset(root / self.name, lmdb=self.lmdb))
            if self.reversed_name:
                dataset = joined(dataset, open_dataset(root / self.reversed_name))
            return Data(dataset, None)
        if self.toy is None:
            raise UserError(f"data.source={self.source!r}: use 'shapes', or '' for a dataset made by cfjax precompute")
        return self._open_toy(root, self.toy.world())

    def _open_toy(self, root: Path, world: ToyWorld) -> Data:
        name = self.name
        if name == "clips":
            source = SplitSource(world.shapes, 0, self.clips, steering=self.steering)
            about = {"name": world.text_name, "length": world.text_length, "width": world.text_width}
            record = {**about, "world": world.fingerprint()}
            encoders = (world.codec, world.encode_prompts)
            make_once(root / name, lambda: precompute(source, *encoders, root / name, text_encoder=record))
        dataset = self._suitable(open_dataset(root / name, lmdb=self.lmdb))
        made_in = dataset.manifest.get("text_encoder", {}).get("world")
        if made_in != world.fingerprint():
            raise UserError(f"{root / name} was made in another world than {root / 'world'}; remove it and run again")
        steered_by = dataset.manifest.get("source", {}).get("steering")
        if name == "clips" and steered_by != (self.steering and self.steering.to_json()):
            raise UserError(f"{root / name} was made with data.steering={steered_by}; choose another data.path")
        if name == "clips" and len(dataset) != self.clips:
            raise UserError(
                f"{root / name} holds {counted(len(dataset), 'clip')}, not data.clips={self.clips}; remove it to "
                "make it again"
            )
        if self.caption_encoder_needed:
            dataset = encoded(dataset, world.encode_prompts)
        return Data(dataset, world)

    def _suitable(self, dataset: ClipDataset) -> ClipDataset:
        """The dataset, if the stage can train on it; up to `max_corrupt` of its records may be broken.

        Raises:
          UserError: prompts alone where clips are needed; for ODE regression, no trajectories, or pairs of other
            settings.
        """
        if self.clips_needed and not dataset.has_latents:
            stage = self.config["stage"]
            raise UserError(f"{dataset.path} holds prompts alone; stage {stage} needs clips: choose another data.name")
        if self.action_keys and action_keys_of(dataset) != self.action_keys:
            raise UserError(
                f"{dataset.path} holds {counted(action_keys_of(dataset), 'key')} per frame, the networks are told of "
                f"{self.action_keys}: choose another data.path"
            )
        if self.trajectory_points:
            if not self.ground_truth:
                dataset = without_ground_truth(dataset)
            self._check_points(dataset)
            _check_pairs(self.config, dataset)
        return TolerantDataset(dataset, self.max_corrupt, say) if self.max_corrupt else dataset

    def _check_points(self, dataset: ClipDataset) -> None:
        """Raises UserError for trajectories that the objective cannot regress on, with a fix."""
        points, wanted = dataset.trajectory_points, self.trajectory_points
        if points == wanted:
            return
        fix = "make pairs with configs/ode_pairs.py"
        if points and points + 1 == wanted and self.ground_truth:
            fix = (
                "if these are pairs without clean clips (Self Forcing's, CausVid's), --config.data.ground_truth=False "
                f"takes what stands for the clip as the ODE's end; otherwise {fix}"
            )
        if points == wanted + 1 and not self.ground_truth:
            fix = "they hold clean clips: leave out --config.data.ground_truth=False"
        raise UserError(
            f"{dataset.path} has {counted(points, 'state')} per clip; ODE regression needs the {wanted - 1} levels of "
            f"objective.steps and the end: {fix}"
        )


def action_keys_of(dataset: ClipDataset) -> int:
    """How many keys its records say of; 0 where clips are not steered."""
    manifest = dataset.manifest
    shape = manifest.get("arrays", {}).get("actions", {}).get("shape", [0])
    return int(manifest.get("layout", {}).get("action_keys", shape[-1]))


def data_root(path: str) -> Path:
    """The folder of `data.path`.

    Raises:
      UserError: it is in a bucket.
    """
    return local_path(path, "--config.data.path", "datasets are mapped into memory")


def toy_source(c: ConfigDict) -> ToySource:
    """The toy world of `c.data`."""
    return ToySource(c.data.path, c.data.assets, c.data.channels, c.data.text_length, toy_shapes(c))


def toy_shapes(c: ConfigDict) -> ShapesConfig:
    """The factors of the toy's clips."""
    return ShapesConfig.from_json(c.data.shapes.to_dict())


def data_of(c: ConfigDict) -> DataSource:
    """`c.data` and what the stage of `c` asks of it."""
    o = c.objective
    prompts_do = c.stage == "dmd" and o.student_input == "self_rollout" and o.matching != "gan"
    return DataSource(
        path=c.data.path,
        name=c.data.name,
        source=c.data.source,
        batch_size=c.data.batch_size,
        reversed_name=c.data.reversed_name,
        lmdb=c.data.lmdb,
        ground_truth=c.data.ground_truth,
        max_corrupt=c.data.max_corrupt,
        clips=c.data.clips,
        toy=toy_source(c) if c.data.source == "shapes" else None,
        clips_needed=not prompts_do,
        trajectory_points=len(o.steps) + 1 if c.stage == "ode_regression" else 0,
        caption_encoder_needed=c.stage == "ar_diffusion" and bool(o.bagger),
        config=c.to_dict(),
        steering=SteeringConfig(**c.data.steering.to_dict()) if "steering" in c.data else None,
        action_keys=max((role.actions["keys"] for role in c.roles.values() if "actions" in role), default=0),
    )


def _check_pairs(config: Mapping[str, Any], dataset: ClipDataset) -> None:
    """Refuses ODE pairs of other settings than the config's."""
    made = dataset.manifest.get("source", {}).get("pairs")  # other people's pairs do not say
    if not made:
        return
    method, past = made["objective"]["method"], config["objective"]["past"]
    keys = ["objective.steps", "objective.shift", *pairs_layout(config, method)]
    if other := difference(made, config, keys):
        raise UserError(
            f"{dataset.path} was made with {other}; choose another data.name, or make pairs again with "
            "configs/ode_pairs.py"
        )
    wanted = METHODS_FOR.get(past, METHODS)
    if method not in wanted:
        raise UserError(
            f"{dataset.path} was made with objective.method={method!r}, but objective.past={past!r} is for pairs by "
            f"{' or '.join(map(repr, wanted))}; choose another data.name, or change objective.past"
        )


def pairs_layout(config: Mapping[str, Any], method: str) -> list[str]:
    """The keys of the block layout, for ODE pairs that depend on it: a bidirectional teacher's have no blocks."""
    return [] if method == "bidirectional" else [f"blocks.{name}" for name in config["blocks"]]


def difference(made: Mapping[str, Any], config: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The first of these dotted keys at which a config differs from a recorded one: "KEY=recorded, not own", or "".

    A key that the record does not have is no difference.
    """
    recorded, own = (thawed(values).to_dict() for values in (made, config))
    for key in keys:
        *path, name = key.split(".")
        one, other = (reduce(lambda group, step: group.get(step, {}), path, values) for values in (recorded, own))
        if name in one and one[name] != other[name]:
            return f"{key}={one[name]!r}, not {other[name]!r}"
    return ""
