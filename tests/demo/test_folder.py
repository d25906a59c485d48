"""The demo's folder: cleared of an earlier demo and of nothing else."""

import pytest

from dpo_fast.cli import main
from dpo_fast.demo.folder import MARKER, prepare_folder
from dpo_fast.errors import UserError


def test_a_second_demo_replaces_the_first_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    prepare_folder(out)
    (out / "run").mkdir()
    (out / "run" / "x").touch()
    (out / "summary.json").touch()
    prepare_folder(out)
    assert [path.name for path in out.iterdir()] == [MARKER]
    (out / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"thesis\.tex.*no demo wrote"):
        prepare_folder(out)
    assert (out / "thesis.tex").exists()


def test_a_folder_of_someone_else_is_refused_on_the_command_line(tmp_path, capsys):
    (tmp_path / "summary.json").touch()
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 2
    assert "choose a new or an empty folder" in capsys.readouterr().err
    assert (tmp_path / "summary.json").exists()
    (tmp_path / "file").touch()
    assert main(["demo", "--out", str(tmp_path / "file")]) == 2
