"""`cfjax compare --against=peft`: adapters merged, beside the network, differentiated and written."""

import json

import pytest

from cfjax.__main__ import main
from cfjax.comparison import peft
from cfjax.conversion import lora_write
from tests.commands import ROOT

SMALL = {"frames": 2, "height": 32, "width": 32, "text_length": 8}


def run_compare(workdir, *flags):
    overrides = [f"--config.{name}={value}" for name, value in SMALL.items()]
    config = f"--config={ROOT}/configs/compare.py"
    code = main(["compare", "--against=peft", config, f"--workdir={workdir}", *flags, *overrides])
    record = json.loads((workdir / "compare.json").read_text())
    return code, record, {f"{row['part']}: {row['what']}": row for row in record["rows"]}


def test_adapters_agree_with_peft(tmp_path, capsys):
    code, record, rows = run_compare(tmp_path)
    print(capsys.readouterr().out)
    assert code == 0 and record["against"] == "peft" and record["versions"]["peft"]
    assert {name.split(":")[0] for name in rows} == {"merge", "apart", "written"} == {*peft.CHECKS}
    merges = [row for name, row in rows.items() if name.startswith("merge")]
    assert len(merges) == len(peft.FORMS) and all("of 40 tensors" in row["note"] for row in merges)
    assert all(row["max_rel"] < 3e-7 for row in merges)  # 0 where both multiply alike
    assert rows["apart: flow"]["max_rel"] < 1e-5
    assert rows["apart: gradients of all A and B"]["max_rel"] < 1e-4
    assert rows["written: merged by peft"]["max_rel"] < 3e-7


@pytest.mark.parametrize("part, wrong", [("merge", "weight"), ("written", "order")])
def test_a_difference_is_a_failure(tmp_path, monkeypatch, capsys, part, wrong):
    """A weight that peft was not told; heads written in our own order, not the release's."""
    if wrong == "weight":
        read = peft.open_loras
        monkeypatch.setattr(peft, "open_loras", lambda folder: read(f"{folder}:1.01"))
    else:
        monkeypatch.setattr(lora_write, "_theirs", lambda down, up, layout, config: (down.T.copy(), up.T.copy()))
    code, _, rows = run_compare(tmp_path, f"--only={part}")
    assert code == 1 and not any(row["ok"] for row in rows.values())
    assert f"FAIL  {part}" in capsys.readouterr().out
