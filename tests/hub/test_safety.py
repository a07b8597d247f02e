"""Models of strangers, by their ids: refused in one line, before memory is taken or anything is unpickled."""

import json
import pickle
import shutil
from pathlib import Path

import hub_jobs as jobs
import pytest
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.medium, pytest.mark.timeout(120)]


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def configure(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def pickle_instead(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def name_a_file_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    index = {"weight_map": {"stray": "../../../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def put_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.blocks.1.decode_target.bias"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


HOSTILE = {
    "depth": (lambda folder: configure(folder, num_blocks=10**9), "1000000000 blocks of 1 layers"),
    "width": (lambda folder: configure(folder, hidden_size=10**8), "instead of"),
    "negative": (lambda folder: configure(folder, hidden_size=-16), "Expected hidden_size to be at least 1, got -16"),
    "pickle": (pickle_instead, "got pytorch_model.bin. Pickled weights can run any code"),
    "elsewhere": (name_a_file_elsewhere, "Expected an index of weight files in"),
    "nan": (
        put_nan,
        "Expected finite weights, got nan or inf in model.blocks.1.decode_target.bias",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_repository_is_refused_in_one_line(kind, hub, trained, files, tmp_path, monkeypatch):
    spoil, said = HOSTILE[kind]
    shutil.copytree(trained[0], tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints", "plots"))
    spoil(tmp_path / "copy")
    hub.run(jobs.push_files, str(tmp_path / "copy"), f"tester/hostile-{kind}")
    for command in (["predict", "--input"], ["evaluate", "--test_file"]):
        argv = [command[0], f"tester/hostile-{kind}", command[1], str(files / "test.csv")]
        status, out, err = hub.run(jobs.shell, *argv)
        assert (status, out, len(err.splitlines())) == (2, "", 1), err
        assert said in err
    assert not Path("unpickled").exists()
    assert hub.run(jobs.peak_memory_mib) < 4000, "MiB"


def test_inspecting_a_hostile_config_takes_no_memory(hub, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints", "plots"))
    configure(tmp_path / "copy", num_blocks=10**9)
    hub.run(jobs.push_files, str(tmp_path / "copy"), "tester/hostile-inspected")
    status, out, err = hub.run(jobs.shell, "inspect", "tester/hostile-inspected")
    assert (status, out) == (2, "")
    assert "Expected num_blocks to be at most 1000, got 1000000000" in err
