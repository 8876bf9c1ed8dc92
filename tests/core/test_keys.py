"""Every key of every shipped config has its sentence, which `--help` and docs/config.md say; typos are told the key."""

import re
from collections.abc import Iterator

import pytest
from ml_collections import ConfigDict

from benchmarks.config_page import PAGE, cell, page
from cfjax import generate
from cfjax.conversion.lora_write import FORMS
from cfjax.convert import TARGETS as FILES
from cfjax.core.cli import keys_of, parse
from cfjax.core.errors import UserError
from cfjax.core.keys import help_lines, hint_for, key_of, keys_for, kind_of, nearest_keys, values_of
from cfjax.core.reference_names import REFERENCE_NAMES
from cfjax.data import pictures, shapes
from cfjax.experiment.stage import STAGES
from cfjax.experiment.streams import DECODERS
from cfjax.flow.solvers import SOLVERS
from cfjax.models import lora, text_cache, wan, weight_storage
from cfjax.nn.attention import BACKENDS
from cfjax.objectives import history, ode_regression
from cfjax.studies.students import INITS
from cfjax.study import kind_of as study_of
from cfjax.training.optim import OPTIMIZERS, SCHEDULES
from cfjax.worlds import wan as wan_world
from tests.commands import ROOT
from tests.core.test_settings import READS, read_by, shipped

VERB_OF = {stem: verb for verb, stems in READS.items() for stem in stems if not verb.startswith("study")}


def verb_of(stem: str, c: ConfigDict) -> str:
    if stem == "study":
        return f"study {study_of(c)}"
    return VERB_OF.get(stem, stem)


def leaves(c: ConfigDict) -> dict[str, object]:
    return {key: value for key, value in keys_of(c).items() if not isinstance(value, ConfigDict)}


def every_key() -> Iterator[tuple[str, str, object]]:
    """(kind of config, key, value) of all shipped configs and their variants."""
    for (stem, _), c in shipped().items():
        found = leaves(c)
        kind = kind_of(verb_of(stem, c), found)
        yield from ((kind, name, value) for name, value in found.items())


def test_every_key_of_every_config_has_its_sentence():
    """Both ways: no key without one, and none of keys that no config has; one sentence each."""
    used = set()
    for kind, name, _ in every_key():
        key = key_of(kind, name)
        assert key, f"{kind}: {name} has no sentence: add it to cfjax/core/keys_experiment.py or keys_verbs.py"
        used.add((kind, key))
    kinds = {kind for kind, _ in used}
    for kind in kinds - {"convert"}:  # whose experiment may be any stage's
        for key in keys_for(kind):
            assert (kind, key) in used, f"{kind}: no config has {key.pattern}"
            assert re.fullmatch(r"\S.*\.", key.text) and "\n" not in key.text, key.text
            assert len(key.text) <= 120, key.text


def test_every_choice_that_is_set_is_one_of_those_named():
    for kind, name, value in every_key():
        choices = key_of(kind, name).choices
        if choices:
            assert set(value if isinstance(value, tuple) else (value,)) <= set(choices), f"{kind}: {name}={value!r}"


@pytest.mark.parametrize(
    ("kind", "name", "known"),
    [
        ("experiment", "optim.student.name", OPTIMIZERS),
        ("experiment", "optim.student.schedule", SCHEDULES),
        ("experiment", "roles.student.attention", BACKENDS),
        ("experiment", "roles.student.storage", weight_storage.STORAGES),
        ("experiment", "roles.student.preset", wan.PRESETS),
        ("experiment", "roles.student.lora.targets", lora.TARGETS),
        ("experiment", "roles.student.init_stages", STAGES),
        ("experiment", "objective.history", history.HISTORIES),
        ("experiment", "objective.method", ode_regression.METHODS),
        ("experiment", "objective.past", ode_regression.METHODS_FOR),
        ("experiment", "objective.kv_gradient", wan.KvGradient.__args__),
        ("experiment", "objective.codec_decoder", wan_world.DECODERS),
        ("experiment", "sampler.solver", SOLVERS),
        ("experiment", "data.shapes.shapes", shapes.SHAPES),
        ("experiment", "data.shapes.colours", shapes.PALETTE),
        ("experiment", "data.shapes.directions", shapes.DIRECTIONS),
        ("experiment", "text_dtype", text_cache.DTYPES),
        ("generate", "sampler.solver", ("", *SOLVERS)),
        ("generate", "attention", ("", *BACKENDS)),
        ("generate", "decoder", wan_world.DECODERS),
        ("generate", "fit", pictures.FITS),
        ("bench", "decoder", ("", *DECODERS)),
        ("bench", "storage", ("", *weight_storage.STORAGES)),
        ("convert", "to", FILES),
        ("study injectivity", "inits", INITS),
    ],
)
def test_choices_are_those_of_the_code(kind, name, known):
    assert set(key_of(kind, name).choices) == set(known)
    assert set(FORMS) < set(FILES)


@pytest.mark.parametrize(
    ("kind", "name", "value", "said"),
    [
        ("experiment", "optim.student.lr", 2e-6, "more than 0"),
        ("experiment", "mesh.fsdp", 1, "devices: 1 or more"),
        ("experiment", "optim.student.schedule", "wsd", "constant, cosine, wsd"),
        ("experiment", "roles.student.init_stages", ("dmd",), f"some of {', '.join(STAGES)}"),
        ("experiment", "objective.steps", (1000, 500), "each 1 to 1000"),
        ("experiment", "checksums", True, "True, False"),
        ("generate", "prompt", "a cat", ""),
        ("generate", "strength", -1.0, "sigma: -1 to 1"),
    ],
)
def test_what_a_key_may_be(kind, name, value, said):
    assert values_of(kind, name, value) == said


def test_help_says_what_every_key_is(capsys):
    """Name, default, choices or range, unit and sentence; of a stream's config for `cfjax plan` too."""
    for verb, argv in (("train", ["--config=configs/dmd.py:toy,gan"]), ("plan", ["--config=configs/generate.py"])):
        with pytest.raises(SystemExit):
            parse(verb, [*argv, "--help"], description="")
        lines = capsys.readouterr().out.split("\nkeys:\n")[1].splitlines()
        assert len(lines) % 2 == 0 and len(lines) > 80
        assert all(line.startswith("  --config.") for line in lines[::2])
        assert all(re.fullmatch(r"      \S.*\.", line) for line in lines[1::2])
        if verb == "train":
            place = lines.index("  --config.mesh.fsdp=1  [devices: 1 or more]")
            assert lines[place + 1] == "      Devices that share the weights and the batch between them."
    own = help_lines("train", {"mine": 3})  # a key of one's own has no sentence
    assert own == ["  --config.mine=3"]


@pytest.mark.parametrize(
    ("config", "typed", "meant"),
    [
        ("dmd", "lr", "optim.student.lr"),
        ("dmd", "optim.studnt.lr", "optim.student.lr"),
        ("dmd", "optim.student.lrr", "optim.student.lr"),
        ("dmd", "sampler.step", "sampler.steps"),
        ("dmd", "bacth_size", "data.batch_size"),
        ("dmd", "roles.student.lora.rnk", "roles.student.lora.rank"),
        ("dmd", "rols.real_score.init", "roles.real_score.init"),
        ("dmd", "b1", "optim.student.b1"),
        ("dmd", "dfake_gen_update_ratio", "cadence.student"),
        ("dmd", "model_kwargs.local_attn_size", "blocks.window"),
        ("ar_diffusion", "num_frame_per_block", "blocks.frames"),
        ("generate", "promt", "prompt"),
        ("generate", "hight", "height"),
        ("generate", "solver", "sampler.solver"),
    ],
)
def test_a_mistyped_key_is_told_its_nearest(config, typed, meant):
    known = leaves(shipped()[config, ""])
    assert nearest_keys(typed, known)[0] == meant
    verb = "generate" if config == "generate" else "train"
    with pytest.raises(UserError, match=rf"--config.{typed}: .* has no such key; did you mean {meant}\b"):
        parse(verb, [f"--config=configs/{config}.py", f"--config.{typed}=1", "--workdir=x"], description="")


def test_one_that_is_like_none_is_told_nothing():
    known = leaves(shipped()["dmd", ""])
    assert hint_for("zzzz", known) == hint_for("model.qqq", known) == ""
    assert "says: none: the dataset says it" in hint_for("image_or_video_shape", known)
    assert "says: videos, of configs/generate.py" in hint_for("num_samples", known)


# ---- the reference's names


def test_the_references_names_have_a_key_or_a_reason():
    known = {name for _, name, _ in every_key()}
    names = [theirs for theirs, _, _ in REFERENCE_NAMES]
    assert len(set(names)) == len(names)
    for theirs, ours, note in REFERENCE_NAMES:
        assert ours or note.startswith("none"), theirs
        assert {key.strip() for key in ours.split(",") if key} <= known, theirs
    recorded = (ROOT / "tests/golden/reference_names.txt").read_text().split("\n\n")[1].split()
    assert set(recorded) <= set(names) and len(recorded) > 60


# ---- docs/config.md


def test_the_page_of_keys_is_current():
    """`python benchmarks/config_page.py` writes it."""
    assert (ROOT / PAGE).read_text() == page()


def test_the_page_has_every_key():
    text = page()
    for kind in {kind for kind, _, _ in every_key()} - {"convert"}:
        for key in keys_for(kind):
            assert cell(key.text) in text, key.text
    for theirs, _, _ in REFERENCE_NAMES:
        assert f"`{theirs}`" in text


def test_verbs_know_their_configs():
    assert {kind_of(verb, keys_of(c)) for verb in ("train", "plan") for c in read_by(verb)} == {"experiment"}
    assert kind_of("plan", keys_of(shipped()["bench", ""])) == "bench" and generate.DESCRIPTION
