"""`hf-al compare`: the numbers of the reports, side by side."""

import copy
import json
import subprocess
import sys

import pytest
from conftest import assert_mistake

from hf_al.messages import table
from hf_al.saved.comparison import as_text, compare

REPORT = {
    "model_type": "al_lstm",
    "objective": "al_ce",
    "num_blocks": 2,
    "metric": "accuracy",
    "steps": 20,
    "validation": [{"block": 0, "accuracy": 0.5}, {"block": 1, "accuracy": 0.6}],
    "test": [{"block": 0, "accuracy": 0.4}, {"block": 1, "accuracy": 0.55}],
    "parameters": {"inference": 12345, "training_only": 67},
    "data": {"fingerprint": {"train": "a"}, "rows": {"train": 90, "validation": 10}},
    "speed": {"train_seconds": 3.0, "examples_per_second": 100.0, "peak_memory_mib": 512.0},
    "arguments": {
        "seed": 1,
        "validation_seed": 0,
        "output_dir": "a",
        "learning_rate": 0.1,
        "model": {"num_blocks": 2, "objective": "al_ce"},
    },
}


@pytest.fixture
def run(tmp_path):
    """Writes a run that differs from REPORT in the given values: run("b", seed=2, model={...}) -> its folder."""

    def write(name: str, validation: float = 0.6, report: dict | None = None, **arguments) -> str:
        values = copy.deepcopy({**REPORT, **(report or {})})
        values["arguments"] |= {"output_dir": name, **arguments}
        values["validation"][-1]["accuracy"] = validation
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(values))
        return str(tmp_path / name)

    return write


def test_a_run_is_a_row_with_the_numbers_of_its_report(run):
    folder = run("a")
    (row,) = compare([folder + "/"])["runs"]
    assert row == {
        "run": folder, "model": "al_lstm", "objective": "al_ce", "blocks": 2, "seed": 1, "steps": 20,
        "parameters": 12345, "training_only": 67, "metric": "accuracy", "validation": 0.6,
        "test": {"0": 0.4, "1": 0.55}, "train_seconds": 3.0, "examples_per_second": 100.0, "peak_memory_mib": 512.0,
    }  # fmt: skip
    line = as_text(compare([folder])).splitlines()[2]
    for words in (folder, "al_ce", "12,345", "0.6000", "0.4000 0.5500", "3.0", "100", "512"):
        assert words in line


def test_runs_that_are_equal_but_for_the_seed_get_mean_and_range(run):
    folders = [run("a", 0.6), run("b", 0.7, seed=2), run("c", 0.8, seed=3), run("d", 0.1, learning_rate=0.2)]
    found = compare(folders)
    (group,) = found["groups"]
    assert (group["runs"], group["seeds"]) == (folders[:3], [1, 2, 3])
    assert group["validation"] == {"mean": pytest.approx(0.7), "min": 0.6, "max": 0.8}
    assert group["test"]["1"] == {"mean": pytest.approx(0.55), "min": 0.55, "max": 0.55}
    assert "0.7000 (0.6000 to 0.8000)" in as_text(found)


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        ({"fingerprint": {"train": "other"}}, {}),
        ({"rows": {"train": 80, "validation": 10}}, {}),
        ({}, {"validation_seed": 1}),
        ({}, {"label_noise": 0.1, "label_noise_seed": 0}),
    ],
    ids=["rows", "limit", "validation", "noise"],
)
def test_runs_on_other_data_are_said_so_and_not_one_group(data, arguments, run):
    folders = [run("a"), run("b", seed=2, report={"data": {**REPORT["data"], **data}}, **arguments)]
    found = compare(folders)
    assert (found["same_data"], found["groups"]) == (False, [])
    assert "The data of these runs differ" in as_text(found)


def test_the_length_that_texts_are_cut_to_is_not_their_data(run):
    assert compare([run("a", max_seq_length=20), run("b", max_seq_length=40)])["same_data"]


def test_a_pruned_model_is_no_other_seed(run):
    runs = [run("a"), run("b", seed=2), run("pruned", report={"num_blocks": 1, "pruned_from": 2})]
    (group,) = compare(runs)["groups"]
    assert group["runs"] == runs[:2]


def test_the_same_seed_twice_is_no_group(run):
    assert compare([run("a"), run("b")])["groups"] == []


def test_the_arguments_that_differ_are_listed(run):
    a, b = run("a"), run("b", seed=2, learning_rate=0.2, model={"num_blocks": 3, "objective": "al_ce"}, new_one=True)
    assert compare([a, b])["differences"] == {
        "seed": {a: 1, b: 2},
        "learning_rate": {a: 0.1, b: 0.2},
        "model.num_blocks": {a: 2, b: 3},
        "new_one": {a: None, b: True},
    }
    assert "All arguments but output_dir are the same." in as_text(compare([a, run("c")]))


def test_runs_may_stand_on_both_sides_of_a_flag(run, shell):
    status, out, err = shell("compare", run("a"), "--json", run("b", seed=2))
    assert status == 0, err
    assert [row["seed"] for row in json.loads(out)["runs"]] == [1, 2]


def test_a_run_without_test_has_a_dash(run):
    report = {key: value for key, value in REPORT.items() if key != "test"}
    folder = run("a")
    with open(f"{folder}/report.json", "w") as file:
        json.dump(report, file)
    assert compare([folder])["runs"][0]["test"] == {}
    assert " -  " in as_text(compare([folder])).splitlines()[2]


@pytest.mark.parametrize("content", ["{", "[]", "1", "null", '{"arguments": 1}', "[" * 100_000, "\xff"])
def test_a_report_that_is_none_is_a_mistake(content, shell, tmp_path):
    (tmp_path / "report.json").write_bytes(content.encode("latin-1"))
    status, out, err = shell("compare", str(tmp_path))
    assert (status, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert str(tmp_path) in err


def test_columns_are_aligned_and_numbers_stand_to_the_right():
    rows = [{"name": "a", "count": 5, "share": 0.5}, {"name": "long", "count": 1234, "share": None}]
    assert table(rows).splitlines() == [
        "name  count  share",
        "----  -----  ------",
        "a         5  0.5000",
        "long   1234  -",
    ]


def test_an_id_is_looked_up_on_the_hub(shell):
    """The tests are offline."""
    assert_mistake(shell("compare", "user/name"), "Found no folder user/name here, and could not load report.json")


def test_comparing_loads_no_model(run):
    program = f"import sys, hf_al_program; hf_al_program.main(['compare', {run('a')!r}])"
    code = f"{program}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.medium
def test_a_real_run_can_be_compared(trained, shell):
    folder, _ = trained
    report = json.loads((folder / "report.json").read_text())
    status, out, _ = shell("compare", str(folder), "--json")
    assert status == 0
    (row,) = json.loads(out)["runs"]
    assert row["validation"] == report["validation"][-1]["accuracy"]
    assert row["test"] == {str(r["block"]): r["accuracy"] for r in report["test"]}
    status, out, _ = shell("compare", str(folder), str(folder))
    assert status == 0
    assert out.count(str(folder)) == 1  # named twice, shown once
