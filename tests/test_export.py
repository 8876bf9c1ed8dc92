"""`cfjax export`: what it will not do to a folder. What it writes is tried in test_configs.py."""

from cfjax.__main__ import main
from tests.commands import ROOT


def test_a_folder_that_is_no_export_is_left_alone(tmp_path, capsys):
    """Told at once, before the run is opened and evaluated."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("done")
    argv = ["export", f"--config={ROOT}/configs/export.py", "--config.run=/nowhere", f"--workdir={tmp_path / 'mine'}"]
    assert main(argv) == 2
    assert "mine is not an export; choose another folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
