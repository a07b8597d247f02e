"""Objectives and architectures of a user's own from the command line."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

import hf_al
from hf_al import plots
from hf_al.own import import_own, named_in

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
SMALL = ["--hidden_size=16", "--num_blocks=2", "--target_size=12", "--max_steps=4", "--threads=1", "--use_cpu"]


def run(start, *argv: str) -> tuple[int, str, str]:
    """In a process of its own: what a module registers stays."""
    program = start(*argv)
    out, err = program.communicate()
    return program.wait(60), out, err


@pytest.fixture(scope="module")
def conv(tweet_files, tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("own") / "conv"


@pytest.mark.slow
def test_an_own_architecture_is_trained_and_asked_for_on_the_command_line(conv, start, tweet_files, tmp_path):
    module = ["--import", str(EXAMPLES / "own_encoder.py")]
    flags = ["--model_type=al_conv", "--kernel_size=5", *SMALL, f"--output_dir={conv}"]
    status, _, err = run(start, "train", *module, *flags, *tweet_files)
    assert status == 0, err
    assert json.loads((conv / "config.json").read_text())["kernel_size"] == 5
    (tmp_path / "in.txt").write_text("lovely crew\n")
    commands = {
        "predict": ["--input", str(tmp_path / "in.txt")], "evaluate": [tweet_files[-1]], "inspect": [], "export": [],
    }  # fmt: skip
    for name, more in commands.items():
        target = [str(tmp_path / "copy")] if name == "export" else []
        status, _, err = run(start, name, str(conv), *target, *more)
        assert (status, f"pass --import {module[1]}." in err) == (2, True), err
        assert len(err.strip().splitlines()) == 1
        status, _, err = run(start, name, str(conv), *target, *more, *module)
        assert status == 0, err


@pytest.mark.slow
def test_an_own_objective_is_found_by_its_module_and_its_losses_are_plotted(start, tweet_files, tmp_path, monkeypatch):
    shutil.copy(EXAMPLES / "own_objective.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    flags = ["--import=own_objective", "--objective=local_similarity", "--logging_steps=1", *SMALL, "--output_dir=run"]
    status, _, err = run(start, "train", *flags, *tweet_files)
    assert status == 0, err
    report = json.loads(Path("run/report.json").read_text())
    figure = plots.losses(report)
    assert [axes.get_title() for axes in figure.axes] == ["hidden side: exit", "similarity"]
    assert "import_module: own_objective" in Path("run/training_config.yaml").read_text()
    status, _, err = run(start, "train", "--config=run/training_config.yaml", "--output_dir=again", "--plots=false")
    assert status == 0, err
    assert Path("run/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere_at_all", "Could not import nowhere_at_all: ModuleNotFoundError"),
        ("no/file.py", "Could not import no/file.py: FileNotFoundError"),
        ("broken.py", "Could not import broken.py: ZeroDivisionError: division by zero"),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("broken.py").write_text("1 / 0")
    before = list(sys.path), set(sys.modules)
    with pytest.raises(ValueError, match=said):
        hf_al.TrainingArguments(import_module=name)
    assert (list(sys.path), set(sys.modules) - {"broken"}) == before
    assert "broken" not in sys.modules


def test_a_module_is_imported_once_and_from_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("counted_module.py").write_text("import os; os.environ['COUNTED'] = os.environ.get('COUNTED', '') + 'x'")
    monkeypatch.setenv("COUNTED", "")
    import_own("counted_module, counted_module")
    import_own("counted_module.py")
    assert sys.modules.pop("counted_module")
    assert os.environ["COUNTED"] == "x"


def test_every_module_of_a_package_is_imported_and_no_file_is_taken_for_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    for folder, stems in {"my_package": ("__init__", "one", "two"), "a": ("my_blocks",), "b": ("my_blocks",)}.items():
        Path(folder).mkdir()
        for stem in stems:
            Path(folder, f"{stem}.py").write_text(f"folder = {folder!r}")
    try:
        import_own("my_package.one,my_package.two,a/my_blocks.py")
        assert {"my_package.one", "my_package.two", "my_blocks"} <= sys.modules.keys()
        with pytest.raises(ValueError, match=r"got b/my_blocks\.py: my_blocks is .*a/my_blocks\.py\. Rename the file"):
            import_own("a/my_blocks.py,b/my_blocks.py")
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]


def test_modules_are_found_on_a_command_line():
    argv = ["train", "--import", "a", "--x", "--import_module=b,c", "--import=d", "--import"]
    assert named_in(argv) == ["a", "b,c", "d"]
