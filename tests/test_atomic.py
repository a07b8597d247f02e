"""Files that get their name once they are complete, and what may have that name already."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_al.atomic import export, replacing


def write(path: Path, text: str = "new") -> None:
    with replacing(path) as file:
        file.write(text)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link", "link of a link"])
def test_what_a_shell_opened_to_append_to_keeps_what_it_had(name, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("old ")
    (tmp_path / "link").symlink_to("/dev/stdout")
    (tmp_path / "link of a link").symlink_to("link")
    code = (
        f"from pathlib import Path; import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import os; os.environ['HF_AL_MODELS'] = 'later'; from hf_al.atomic import replacing\n"
        f"with replacing(Path({name!r})) as file: file.write('new')"
    )
    with kept.open("a") as out:
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, stdout=out, check=True, timeout=50)
    assert kept.read_text() == "old new"
    assert (tmp_path / "link").is_symlink()


def test_links_are_followed_and_a_circle_is_an_error_of_the_system(tmp_path):
    target = tmp_path / "folder" / "target"
    target.parent.mkdir()
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("folder/target")
    write(tmp_path / "a")
    assert target.read_text() == "new"
    assert (tmp_path / "a").is_symlink()
    (tmp_path / "c").symlink_to("d")
    (tmp_path / "d").symlink_to("c")
    with pytest.raises(OSError, match="symbolic links"):
        write(tmp_path / "c")


@pytest.mark.parametrize("name", ["n" * 255, "ä" * 127])
def test_a_name_may_be_as_long_as_the_system_allows(name, tmp_path):
    write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_part_that_is_not_kept_is_removed(tmp_path):
    with pytest.raises(KeyError), replacing(tmp_path / "x"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_all_files_of_an_export_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        with export(tmp_path / "model") as aside:
            save_file({"weight": torch.zeros(1)}, aside / "model.safetensors")
            (aside / "config.json").write_text("{}")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o640}


def test_an_export_takes_no_file_of_the_users_for_its_own(tmp_path):
    (tmp_path / "export.tmp").write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "old.png").write_bytes(b"")
    (tmp_path / "plots").symlink_to(elsewhere)
    with export(tmp_path) as aside:
        (aside / "plots").mkdir()
        (aside / "plots" / "a.png").write_bytes(b"")
        (aside / "config.json").write_text("{}")
    assert (tmp_path / "export.tmp").read_text() == "mine"
    assert os.listdir(tmp_path / "plots") == ["a.png"]
    assert (elsewhere / "old.png").exists()
