"""Finding a world, and opening it by the kind in its `world.json`."""

from pathlib import Path

from cfjax.core.errors import UserError
from cfjax.core.paths import is_folder, path_of
from cfjax.core.schema import checked, load_json, table
from cfjax.models.codec import Codec
from cfjax.training.checkpoint import FOLDER
from cfjax.worlds.toy import ToyWorld
from cfjax.worlds.wan import WanWorld, load_codec
from cfjax.worlds.world import RECORD, World, WorldParts


def candidate_world_paths(run: str | Path, recorded: str) -> list[Path]:
    """Paths where a run's world may be: the recorded one (relative or absolute), or beside the run."""
    candidates = [path_of(run) / recorded, path_of(recorded)] if recorded else []
    return [*candidates, path_of(run) / "world"]


def find_world(run: str | Path, recorded: str) -> Path | None:
    """The folder of a run's world, of either kind; None if there is none, as of a run whose config makes its own."""
    return next((place for place in candidate_world_paths(run, recorded) if (place / RECORD).is_file()), None)


def is_wan_world(path: str | Path, *, key: str = "world") -> bool:
    """Whether the world there is Wan's; the toy's record has no kind.

    Raises:
      UserError: there is none, or its record cannot be read.
    """
    file = path_of(path) / RECORD
    try:
        return "kind" in checked(table({}), load_json(file), file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: no world here ({error}); make one with cfjax convert, or name another with --config.{key}"
        ) from None


def open_world(path: str | Path, parts: WorldParts = WorldParts(), *, key: str = "world") -> World:
    """The world at `path`: the toy's, or Wan's with the requested parts.

    Args:
      key: of the config, that the message names.

    Raises:
      UserError: there is none, or it is broken.
    """
    if not is_wan_world(path, key=key):
        return ToyWorld.load(path)
    return WanWorld.load(
        path,
        decoder=parts.decoder,
        decoder_precision=parts.decoder_precision,
        with_text=parts.with_text,
        text_cache=parts.text_cache,
    )


def open_decoder(path: str | Path, *, key: str = "world") -> Codec:
    """The fastest decoder of a world: the tiny one of a Wan world if it has one, else its VAE; the toy's codec.

    Raises:
      UserError: see `open_world`.
    """
    if not is_wan_world(path, key=key):
        return ToyWorld.load(path).codec
    return load_codec(path, "tiny_vae" if is_folder(path_of(path) / "tiny_vae" / FOLDER) else "vae")
