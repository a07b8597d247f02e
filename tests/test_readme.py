"""What README.md tells a newcomer works as written."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")


@pytest.mark.medium
@pytest.mark.timeout(180)
def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert "num_train_epochs=3" in code
    monkeypatch.chdir(tmp_path)
    exec(code.replace("num_train_epochs=3", "max_steps=3, max_train_samples=200"), {})
    out = capsys.readouterr().out
    assert "accuracy" in out
    assert "label" in out


def test_the_example_is_about_fifteen_lines():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 18


def test_the_tree_names_every_file_of_the_package():
    root = Path(__file__).parents[1] / "hf_al"
    for path in root.rglob("*.py"):
        if path.name != "__init__.py":
            assert f"  {path.name} " in README, f"{path.name} is not in README's tree"


def test_the_two_commands_come_first():
    assert README.splitlines()[1].startswith("make quickstart")
    assert README.splitlines()[2].startswith("make test")
