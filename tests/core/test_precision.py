"""Precision policies: checked, and recorded under the keys that records on disk have always had."""

import dataclasses
import json

import pytest

from cfjax.core.errors import UserError
from cfjax.core.precision import BF16, F32, LATER, Policy, to_record
from cfjax.models.vae import VAEConfig
from cfjax.models.wan import WanConfig, preset
from cfjax.worlds.wan import config_from_record

MIXED = Policy(compute="bfloat16", norm="bfloat16")


@pytest.mark.parametrize("policy", [F32, BF16, MIXED])
def test_a_policy_is_recorded_as_compute_and_island(policy):
    assert policy.to_record() == {"compute": policy.compute, "island": policy.norm}
    assert Policy.from_record(policy.to_record()) == policy
    assert Policy.from_record({"compute": policy.compute}) == Policy(policy.compute)


@pytest.mark.parametrize("config", [preset("toy", precision=MIXED), VAEConfig(precision=BF16)])
def test_a_networks_config_is_recorded_with_its_policy(config):
    record = to_record(config)
    # A field that came later is recorded where it is not its default: records without it stay as they were.
    assert list(record) == [f.name for f in dataclasses.fields(config) if f.metadata != LATER]
    assert list(record["precision"]) == ["compute", "island"]
    assert config_from_record(type(config), json.loads(json.dumps(record))) == config


def test_a_later_field_is_recorded_where_it_is_used():
    config = preset("toy", image_dim=32)
    record = to_record(config)
    assert record["image_dim"] == 32 and "actions" not in record
    assert config_from_record(WanConfig, json.loads(json.dumps(record))) == config


def test_a_record_of_an_earlier_version_is_read():
    sizes = {name: value for name, value in to_record(preset("toy")).items() if name != "precision"}
    recorded = {**sizes, "precision": {"compute": "bfloat16", "island": "float32"}}
    assert config_from_record(WanConfig, recorded) == preset("toy", precision=BF16)


def test_other_dtypes_are_refused():
    with pytest.raises(UserError, match=r"precision\.norm='float16'"):
        Policy(norm="float16")
