"""`hf-al study`: a finished run is kept and used once, arms are chosen on validation, differences have intervals."""

import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import assert_mistake, slow
from hooks import hook
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_al.atomic import alone_at
from hf_al.study import execution
from hf_al.study.intervals import packed, points_apart, unpacked
from hf_al.study.page import draw, in_short, tables, verdict, write_page
from hf_al.study.plan import read_study
from hf_al.study.results import Results
from hf_al.study.runs import Key, all_runs, planned
from hf_al.study.summary import Summary
from hf_al.training.checkpoint import CannotResume
from hf_al.training.memory import TooLarge
from hf_al.training.stage import Stage

ROOT = Path(__file__).parents[1]
STUDIES = sorted((ROOT / "recipes" / "studies").glob("*.yaml"))
LARGE = ("objectives", "inside", "depth", "schedule", "word_vectors", "label_noise")  # their pages take seconds
RECIPE = {
    "model_type": "al_lstm", "model": {"num_blocks": 2, "hidden_size": 16, "target_size": 12}, "word_vectors": "none",
    "max_steps": 4, "use_cpu": True,
}  # fmt: skip
STUDY = {
    "name": "tiny", "question": "Which is better?", "recipes": "recipes", "sets": ["mine"], "architectures": ["lstm"],
    "seeds": [1, 2], "baseline": "backprop",
    "arms": {"al_ce": {"objective": "al_ce"}, "backprop": {"objective": "backprop"}},
}  # fmt: skip


class Place:
    """A folder with recipes, data and a study.yaml, and what `hf-al study` does there."""

    def __init__(self, folder: Path, files: Path, shell):
        self.folder, self.shell, self.yaml = folder, shell, folder / "study.yaml"
        (folder / "recipes").mkdir()
        for name in ("mine", "other"):
            (folder / "recipes" / f"{name}_lstm.yaml").write_text(yaml.safe_dump(RECIPE))
            (folder / "data" / name).mkdir(parents=True)
            for split in ("train", "validation", "test"):
                (folder / "data" / name / f"{split}.csv").write_bytes((files / f"{split}.csv").read_bytes())
        self.write()

    def write(self, **values) -> None:
        self.yaml.write_text(yaml.safe_dump({**STUDY, **values}, sort_keys=False))

    @property
    def argv(self) -> list[str]:
        return ["study", str(self.yaml), f"--output_dir={self.folder / 'out'}", f"--data_dir={self.folder / 'data'}"]

    def run(self, *flags: str) -> tuple[int, str, str]:
        return self.shell(*self.argv, *flags)

    def rows(self) -> list[dict]:
        return json.loads((self.folder / "study.json").read_text())["rows"]

    def study(self):
        study = read_study(str(self.yaml))
        return study, all_runs(study, self.folder / "out", str(self.folder / "data"))


@pytest.fixture
def place(tmp_path, files, shell) -> Place:
    return Place(tmp_path, files, shell)


def row(key: Key, validation: float = 0.5, right: tuple[int, ...] = (1, 0, 1, 0), **more) -> dict:
    """A finished run, as `carry_out` gives it."""
    bits = np.array(right)
    found = {
        "metric": "accuracy", "validation": validation, "validation drop": 0.0, "train": 0.9, "test": bits.mean(),
        "tests": len(bits), "right": packed(bits), "train seconds": 3.0,
        "data": {"rows": {"test": len(bits)}, "fingerprint": {"test": key.set}},
    }  # fmt: skip
    versions = dict.fromkeys(("python", "torch", "transformers"), "3")
    machine = {"gpu": None, "processor": "p", "cores": 2, "threads": 1, **versions}
    return {**key._asdict(), **found, "seconds": 4.0, "machine": machine, "hf_al": "0", **more}


@pytest.fixture
def pretended(monkeypatch):
    """Runs that take no time: returns the keys of those that were carried out; `given` says what comes of them."""

    class Pretended(list):
        given = staticmethod(row)

    done = Pretended()

    def carry_out(run):
        done.append(run.key)
        return done.given(run.key)

    monkeypatch.setattr(execution, "carry_out", carry_out)
    monkeypatch.setattr(execution, "check_values", lambda runs: None)
    monkeypatch.setattr(execution, "check_data", lambda runs, results: None)
    return done


# --- real runs


def wait_until(happens, process, place) -> None:
    """Waits for what a study does in another process, whose messages are in `log`; it must not end before."""
    deadline = time.monotonic() + 60
    while not happens():
        assert process.poll() is None, (place.folder / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.medium
def test_a_study_keeps_a_row_for_each_run_and_does_none_twice(place, monkeypatch):
    wild = {"objective": "al_ce", "learning_rate": 1e38}
    place.write(seeds=[1], inside=True, arms={**STUDY["arms"], "wild": wild})
    trained = []
    hook(monkeypatch, execution, "train", before=lambda call: trained.append(call.args.output_dir))
    status, out, err = place.run()
    assert status == 0, err
    assert len(trained) == 3
    al, twin, wild = place.rows()
    assert "Expected finite" in wild["error"]
    assert "test" not in wild
    for found in (al, twin):
        assert found["tests"] == found["data"]["rows"]["test"] == 80
        assert unpacked(found["right"], 80).mean() == pytest.approx(found["test"])
        assert found["test by exit"][-1] == pytest.approx(found["test"])
        assert found["validation"] - found["validation drop"] <= found["validation"]
        assert {"train", "best step", "seconds", "machine", "hf_al"} <= found.keys()
    assert al["arguments"].items() >= {"max_steps": 4, "learning_rate": 5e-3, "model.hidden_size": 16}.items()
    assert not {"adam_beta1", "seed", "train_file"} & al["arguments"].keys()
    wrong = [block["exit"]["wrong"] for block in al["inside"]]
    assert wrong == pytest.approx([1 - right for right in al["test by exit"]])
    classes = al["inside"][0]["exit"]["classes"]
    assert "exit" not in twin["inside"][0]
    assert "minus baseline" in out
    page = (place.folder / "out" / "study_tiny.md").read_text()
    for words in ("Which is better?", "hf-al study", "Failed: mine lstm, wild, seed 1: ", "al_ce"):
        assert words in page
    for image in ("study_tiny.png", "study_tiny_inside_lstm.png"):
        assert image in page
        assert (place.folder / "out" / "images" / image).stat().st_size > 5000
    assert "### lstm, mine, by block" in page
    assert all(f"class {name}" in page for name in classes)
    kept = {path.name for path in (place.folder / "out" / "runs").glob("*/*")}
    assert kept == {"report.json"}

    place.run()
    assert len(trained) == 3
    text = json.loads((place.folder / "study.json").read_text())
    text["rows"] = [found for found in text["rows"] if found["arm"] != "backprop"]
    (place.folder / "study.json").write_text(json.dumps(text))
    place.run()
    assert len(trained) == 4
    times = ("seconds", "train seconds")
    again = next(found for found in place.rows() if found["arm"] == "backprop")
    assert {n: v for n, v in again.items() if n not in times} == {n: v for n, v in twin.items() if n not in times}


@pytest.mark.slow
def test_kill_9_loses_no_finished_run_and_the_next_start_goes_on(place, start, pretended):
    place.write(arms={**STUDY["arms"], "long": {"objective": "al_ce", "max_steps": 100000, "save_steps": 5}}, seeds=[1])
    process = start(*place.argv, log=place.folder / "log")
    begun = "out/runs/*long*/checkpoints/checkpoint-*/manifest.json"
    wait_until(lambda: list(place.folder.glob(begun)), process, place)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    assert [found["arm"] for found in place.rows()] == ["al_ce", "backprop"]
    data = place.rows()[0]["data"]
    pretended.given = lambda key: row(key, right=(1,) * 80, data=data)
    place.run()
    assert [key.arm for key in pretended] == ["long"]


@pytest.mark.medium
def test_a_run_that_was_interrupted_goes_on_from_its_checkpoint(place, monkeypatch):
    place.write(seeds=[1], common={"save_steps": 2})
    steps, stop = [], [True]

    def batch(call):
        steps.append(call.step)
        if call.step == 1 and stop:
            stop.pop()
            os.kill(os.getpid(), signal.SIGINT)

    hook(monkeypatch, Stage, "train_batch", before=batch)
    status, _, err = place.run()
    assert (status, steps) == (130, [0, 1])
    assert "0 finished runs are kept" in err
    assert place.run()[0] == 0
    assert steps == [0, 1, 2, 3, *range(4)], "the first run goes on, then comes the second one"
    assert [found["steps"] for found in place.rows()] == [4, 4]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_two_jobs_find_what_one_finds(place):
    assert place.run()[0] == 0
    one = place.rows()
    status, _, err = place.run("--jobs=2", f"--results={place.folder / 'two.json'}")
    assert status == 0, err
    two = json.loads((place.folder / "two.json").read_text())["rows"]
    times = ("seconds", "train seconds")
    assert [{n: v for n, v in found.items() if n not in times} for found in two] == [
        {n: v for n, v in found.items() if n not in times} for found in one
    ]


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("victim", ["a run", "the study"])
def test_what_dies_leaves_no_process_behind(victim, place, start):
    """A run would go on beside the one that takes its place after the next start."""
    arms = {name: {"objective": name, "max_steps": 100000, "save_steps": 5} for name in ("al_ce", "backprop")}
    place.write(arms=arms, seeds=[1])
    process = start(*place.argv, "--jobs=2", log=place.folder / "log")
    wait_until(lambda: len(list(place.folder.glob("out/runs/*/checkpoints"))) == 2, process, place)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    runs = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(runs) == 2
    os.kill(runs[0] if victim == "a run" else process.pid, signal.SIGKILL)
    process.wait(60)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in runs):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if victim == "a run":
        assert "ended with status -9, perhaps for lack of memory" in (place.folder / "log").read_text()
    assert not (place.folder / "study.json").exists()


# --- which runs are done again


def test_finished_runs_are_skipped(place, pretended):
    place.run()
    assert pretended == [Key("mine", "lstm", arm, seed) for seed in (1, 2) for arm in ("al_ce", "backprop")]
    place.write(seeds=[1, 2, 3])
    place.run()
    assert pretended[4:] == [Key("mine", "lstm", "al_ce", 3), Key("mine", "lstm", "backprop", 3)]


def test_rows_of_other_arguments_are_named_and_only_they_run_again(place, pretended):
    place.run()
    del pretended[:]
    place.write(arms={**STUDY["arms"], "al_ce": {"objective": "al_ce", "learning_rate": 0.5}})
    assert_mistake(
        place.run(),
        "rows with the arguments of the study, got 2 with others: mine lstm, al_ce, seed 1: ",
        "learning_rate was 0.005 and is now 0.5;",
        "--rerun_changed",
    )
    assert "changed: learning_rate" in place.run("--dry_run")[1]
    assert pretended == []
    place.run("--rerun_changed")
    assert pretended == [Key("mine", "lstm", "al_ce", 1), Key("mine", "lstm", "al_ce", 2)]
    assert {found["arguments"]["learning_rate"] for found in place.rows() if found["arm"] == "al_ce"} == {0.5}
    assert place.run()[0] == 0


def test_a_change_of_the_recipe_or_of_a_default_is_seen_and_a_new_argument_is_not(place, pretended, monkeypatch):
    place.run()
    recipe = place.folder / "recipes" / "mine_lstm.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "max_steps": 5}))
    assert_mistake(place.run(), "max_steps was 4 and is now 5")
    recipe.write_text(yaml.safe_dump(RECIPE))
    assert place.run()[0] == 0

    kept = json.loads((place.folder / "study.json").read_text())
    del kept["defaults"]["lstm"]["adam_epsilon"]  # as if the rows had been made before it was an argument
    (place.folder / "study.json").write_text(json.dumps(kept))
    assert place.run()[0] == 0
    kept["defaults"]["lstm"]["adam_beta1"] = 0.8  # as if that had been the default
    (place.folder / "study.json").write_text(json.dumps(kept))
    assert_mistake(place.run(), "adam_beta1 was 0.8 and is now 0.9")


def test_rows_of_other_data_are_refused(place, pretended):
    place.run()
    place.write(seeds=[1, 2, 3])
    pretended.given = lambda key: row(key, data={"fingerprint": {"test": "another"}})
    assert_mistake(place.run(), "Expected the data of the earlier runs on mine, got other rows or labels")
    assert len(place.rows()) == 4


def test_two_studies_do_not_keep_rows_in_one_file(place, pretended):
    """Each would write its own rows over those of the other."""
    with alone_at(place.folder / "study.json"):
        assert_mistake(place.run("--output_dir=elsewhere"), "Expected nobody else at work on")
        assert place.run("--dry_run")[0] == 0
    assert not pretended


def test_ctrl_c_says_how_to_go_on(place, pretended):
    def interrupted(key):
        if len(pretended) == 3:
            raise KeyboardInterrupt
        return row(key)

    pretended.given = interrupted
    status, _, err = place.run()
    assert status == 130
    last = err.splitlines()[-1]
    kept = place.folder / "study.json"
    assert last == f"hf-al study: interrupted. 2 finished runs are kept in {kept}. The same command goes on."
    pretended.given = row
    place.run()
    assert len(pretended) == 3 + 2


def test_a_dry_run_lists_the_runs_and_estimates_their_time(place, pretended):
    status, out, _ = place.run("--dry_run")
    assert (status, pretended) == (0, [])
    assert out.count("to run") == 4
    assert "0 of 4 runs are done, and none tells how long they take." in out
    place.write(seeds=[1])
    place.run()
    place.write(seeds=[1, 2, 3])
    assert "2 of 6 runs are done, about 16 s to go." in place.run("--dry_run")[1]
    assert "about 8 s to go." in place.run("--dry_run", "--jobs=2")[1]


# --- which arms get more seeds

SCREENED = {
    "screen": 1, "best_of": 1, "seeds": [1, 2, 3],
    "arms": {**{name: {"bridge_activation": name} for name in ("tanh", "gelu", "elu")},
             "backprop": {"objective": "backprop"}},
}  # fmt: skip


def test_screening_chooses_on_validation_and_not_on_test(place, pretended):
    """Test would choose tanh, which answers everything right."""
    place.write(**SCREENED)
    validation = {"tanh": 0.5, "gelu": 0.7, "elu": 0.6, "backprop": 0.1}
    rights = {"tanh": (1, 1, 1, 1), "gelu": (0, 0, 0, 1)}
    pretended.given = lambda key: row(key, validation[key.arm], rights.get(key.arm, (1, 0, 1, 0)))
    place.run()
    assert [key.arm for key in pretended if key.seed == 1] == ["tanh", "gelu", "elu", "backprop"]
    others = [(key.arm, key.seed) for key in pretended if key.seed > 1]
    assert sorted(others) == [("backprop", 2), ("backprop", 3), ("gelu", 2), ("gelu", 3)]
    page = (place.folder / "out" / "study_tiny.md").read_text()
    assert "Seed 1 screens all arms: for each architecture, the best 1 by validation" in page


def test_screening_takes_the_mean_over_all_sets_and_leaves_failed_arms_out(place):
    place.write(**SCREENED, sets=["mine", "other"])
    study, _ = place.study()
    validation = {("mine", "tanh"): 0.9, ("other", "tanh"): 0.1, ("mine", "gelu"): 0.6, ("other", "gelu"): 0.6}
    rows = {}
    for key in planned(study, {}):
        if key.seed == 1:
            rows[key] = row(key, validation.get((key.set, key.arm), 0.2))
    assert {key.arm for key in planned(study, rows) if key.seed == 2} == {"gelu", "backprop"}
    failed = Key("mine", "lstm", "gelu", 1)
    rows[failed] = {**failed._asdict(), "error": "diverged"}
    assert {key.arm for key in planned(study, rows) if key.seed == 2} == {"tanh", "backprop"}
    del rows[failed]  # screening is not over yet
    assert {key.arm for key in planned(study, rows) if key.seed == 2} == {"backprop"}


def test_of_several_baselines_the_best_by_validation_is_the_one(place):
    arms = {**SCREENED["arms"], "twin": {"objective": "backprop", "bridge_activation": "elu"}}
    place.write(**{**SCREENED, "arms": arms}, baseline=["backprop", "twin"])
    study, _ = place.study()
    rows = {key: row(key, 0.9 if key.arm == "twin" else 0.4) for key in planned(study, {})}
    assert {key.arm for key in planned(study, rows) if key.seed == 2} == {"tanh", "twin"}
    assert Summary(study, rows).reference("lstm", "gelu") == "twin"


def test_settings_that_all_fail_are_not_chosen_from(place, pretended):
    place.write(tune={"lstm": {"learning_rate": [0.001, 0.01, 0.1]}})
    failed = {"error": "diverged", "seconds": 1.0, "hf_al": "0"}

    def given(key):
        found = row(key)
        return {**key._asdict(), **failed, "machine": found["machine"]} if key.arm == "al_ce" else found

    pretended.given = given
    assert place.run()[0] == 0
    assert [key.arm for key in pretended if key.seed == 2] == ["backprop"]
    page = (place.folder / "out" / "study_tiny.md").read_text()
    assert "| al_ce | none (failed, failed, failed) |" in page
    assert "| backprop | learning_rate=0.001 (0.5000, 0.5000, 0.5000) * |" in page
    assert "| al_ce | 0 |" in page


def test_a_seed_that_failed_is_counted_and_compared_on_no_set(place):
    place.write(sets=["mine", "other"], seeds=[1, 2, 3])
    study, _ = place.study()
    rows = {key: row(key, right=(1, 0, 0, 0) if key.seed == 2 else (1, 1, 1, 0)) for key in planned(study, {})}
    failed = Key("other", "lstm", "al_ce", 2)
    rows[failed] = {**failed._asdict(), "error": "diverged"}
    summary = Summary(study, rows)
    assert in_short(summary)[0].endswith("; some seeds failed and do not count: `al_ce`.")
    line = summary.table("lstm", ["mine", "other"])[0]
    assert line["seeds"] == "2, 1 failed"
    assert line["test"] == 0.75
    assert line["minus baseline, points (95 %)"] == "+0.00 (+0.00 to +0.00)"


TUNED = {"tune": {"lstm": {"learning_rate": [0.001, 0.01], "weight_decay": [0.0, 0.1]}}}


def test_every_arm_is_tuned_alike_and_other_seeds_get_its_best_setting(place, pretended):
    """By validation: test would choose the setting without weight decay. A setting that fails is not chosen."""
    place.write(**TUNED, sets=["mine", "other"])

    def given(key):
        best = "learning_rate=0.01, weight_decay=0.1" if key.arm == "al_ce" else "learning_rate=0.001, weight_decay=0.1"
        if key.arm == "backprop" and "0.01" in key.setting:
            return {**key._asdict(), "error": "diverged", "seconds": 1.0, "machine": row(key)["machine"], "hf_al": "0"}
        chosen = key.setting == best
        return row(key, 0.7 if chosen else 0.6, (1, 0, 0, 0) if chosen else (1, 1, 1, 1))

    pretended.given = given
    assert place.run()[0] == 0
    mine = [key for key in pretended if key.set == "mine"]
    assert pretended[: len(mine)] == mine  # set by set
    assert len({key for key in mine if key.seed == 1}) == 2 * 4
    assert {key[2:] for key in mine if key.seed == 2} == {
        ("al_ce", 2, "learning_rate=0.01, weight_decay=0.1"),
        ("backprop", 2, "learning_rate=0.001, weight_decay=0.1"),
    }
    study, runs = place.study()
    summary = Summary(study, Results(place.folder / "study.json", runs).rows)
    assert summary.rows[Key("mine", "lstm", "al_ce", 1)]["test"] == 0.25
    assert summary.table("lstm", ["mine"])[0]["seeds"] == "2"
    page = (place.folder / "out" / "study_tiny.md").read_text()
    assert "| al_ce | learning_rate=0.01, weight_decay=0.1 (0.6000, 0.6000, 0.6000, 0.7000) * |" in page
    assert "| backprop | learning_rate=0.001, weight_decay=0.1 (0.6000, 0.7000, failed, failed) * |" in page
    assert "- Failed: mine lstm, backprop, learning_rate=0.01, weight_decay=0.0, seed 1: diverged" in page


def test_a_setting_reaches_the_run_and_screening_ranks_arms_at_their_best(place):
    place.write(**SCREENED, tune={"lstm": {"learning_rate": [0.001, 0.01]}})
    study, runs = place.study()
    for key, run in runs.items():
        assert run.arguments["learning_rate"] == float(key.setting.removeprefix("learning_rate="))
    assert len({run.folder for run in runs.values()}) == len(runs)
    validation = {("tanh", "learning_rate=0.01"): 0.9, ("gelu", "learning_rate=0.001"): 0.8}
    rows = {key: row(key, validation.get((key.arm, key.setting), 0.5)) for key in planned(study, {})}
    others = {(key.arm, key.setting) for key in planned(study, rows) if key.seed == 2}
    assert others == {("tanh", "learning_rate=0.01"), ("backprop", "learning_rate=0.001")}


# --- what the rows say


def test_each_arm_is_compared_with_its_own_baseline(place):
    arms = {f"{name} {n}": {"objective": name, "num_blocks": n} for n in (2, 3) for name in ("al_ce", "backprop")}
    place.write(arms=arms, baseline={f"al_ce {n}": f"backprop {n}" for n in (2, 3)})
    study, _ = place.study()
    rights = {"al_ce 2": (1, 1, 1, 0), "al_ce 3": (1, 0, 0, 0), "backprop 2": (1, 1, 0, 0), "backprop 3": (1, 1, 1, 0)}
    rows = {key: row(key, right=rights[key.arm]) for key in planned(study, {})}
    summary = Summary(study, rows)
    assert summary.difference("lstm", "al_ce 2", ("mine",))[0] == pytest.approx(25)
    assert summary.difference("lstm", "al_ce 3", ("mine",))[0] == pytest.approx(-50)
    lines = {line["arm"]: line for line in summary.table("lstm", ["mine"])}
    assert lines["al_ce 2"]["baseline"] == "backprop 2"
    assert lines["al_ce 2"]["test"] == 0.75
    assert lines["al_ce 2"]["seeds"] == "2"
    assert lines["al_ce 2"]["std"] == 0


def test_any_two_arms_can_be_compared_without_a_run(place, pretended):
    names = ("a", "b", "backprop")
    place.write(arms={name: {"bridge_layers": n} for n, name in enumerate(names, 1)}, sets=["mine", "other"])
    rights = {"a": (1, 1, 1, 0), "b": (1, 0, 0, 0)}
    pretended.given = lambda key: row(key, right=rights.get(key.arm, (1, 1, 0, 0)))
    place.run()
    done = len(pretended)
    status, out, _ = place.run("--compare", "a", "b")
    assert (status, len(pretended)) == (0, done)
    lines = [line.split() for line in out.splitlines() if line.startswith("lstm")]
    assert [line[1:-5] for line in lines] == [["mine,", "other"], ["mine"], ["other"]]
    assert {line[-4] for line in lines} == {"+50.00"}
    assert place.run("--compare", "a", "b", "--sets=other")[1].count("lstm") == 1
    assert_mistake(place.run("--compare", "a", "backprob"), "Did you mean backprop?")
    assert_mistake(place.run("--compare", "a", "b", "--sets=mine,othr"), "Did you mean other?")
    assert_mistake(place.run("--sets=mine"), "Expected --sets with --compare")
    assert len(pretended) == done


def test_an_arm_can_be_compared_with_one_of_another_study(place, pretended):
    pretended.given = lambda key: row(key, right=(1, 1, 1, 0))
    place.run()
    first = place.folder / "first.yaml"
    place.yaml.rename(first)
    (place.folder / "study.json").rename(first.with_suffix(".json"))
    place.write(arms={"deep": {"num_blocks": 3}, "backprop": {"objective": "backprop"}}, sets=["mine", "other"])
    place.run()
    flags = ("--compare", "deep", "al_ce", f"--other_study={first}")
    lines = [line.split() for line in place.run(*flags)[1].splitlines() if line.startswith("lstm")]
    assert [line[:4] for line in lines] == [["lstm", "mine", "2", "+0.00"]]  # the only set of both
    assert_mistake(place.run("--compare", "deep", "al_ce"), "Expected one of the arms")
    assert_mistake(place.run(*flags, "--sets=other"), "got 'other'")
    assert_mistake(place.run(f"--other_study={first}"), "Expected --other_study with --compare")
    rows = place.rows()
    for kept in rows:
        kept["data"]["fingerprint"]["test"] = "others"
    text = json.loads((place.folder / "study.json").read_text())
    (place.folder / "study.json").write_text(json.dumps({**text, "rows": rows}))
    assert_mistake(place.run(*flags), "Expected the same test rows of mine in both studies")


def test_a_look_inside_that_is_wanted_later_is_not_forgotten(place, pretended):
    place.run()
    place.write(inside=True)
    assert_mistake(place.run(), "inside was false and is now true")
    pretended.given = lambda key: row(key, inside=[])
    assert place.run("--rerun_changed")[0] == 0
    assert place.run()[0] == 0


@pytest.mark.parametrize("is_of_the_run", [True, False])
def test_only_a_checkpoint_that_cannot_be_resumed_is_given_up(is_of_the_run, place, monkeypatch, tmp_path):
    tried = []

    def train(args, on_evaluation):
        tried.append(args.resume_from_checkpoint)
        if args.resume_from_checkpoint:
            raise (TooLarge("no memory left") if is_of_the_run else CannotResume("of other data"))

    monkeypatch.setattr(execution, "train", train)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    flags = {"output_dir": str(tmp_path / "run"), "model_type": "al_lstm"}
    if is_of_the_run:
        with pytest.raises(TooLarge):
            execution.train_on(flags)
        assert tried == ["last"]
    else:
        execution.train_on(flags)
        assert tried == ["last", None]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 0.2, "ahead of the baseline"), (-0.4, 0.1, "at most 0.5 points behind"), (-1, -0.1, "behind"),
        (-0.4, -0.1, "behind, by at most 0.5 points"), (-0.6, 0.1, "too close to tell"),
        (0.04, 3, "at most 0.5 points behind"), (-0.46, 1, "too close to tell"),  # to a tenth of a point
    ],
)  # fmt: skip
def test_an_interval_has_one_verdict(low, high, said):
    assert verdict(low, high) == said


def test_the_page_says_in_short_who_is_ahead_and_who_is_behind(place, tmp_path):
    names = ("better", "worse", "alike", "wild", "backprop")
    place.write(arms={name: {"bridge_layers": n} for n, name in enumerate(names, 1)})
    study, _ = place.study()
    right = np.arange(400) % 2
    rights = {"better": right | (np.arange(400) % 8 == 0), "worse": right & (np.arange(400) % 8 != 1)}
    wild = {1: 1 - right, 2: right}

    def given(key):
        return row(key, right=wild[key.seed] if key.arm == "wild" else rights.get(key.arm, right))

    summary = Summary(study, {key: given(key) for key in planned(study, {})})
    said = "ahead of the baseline: `better`; at most 0.5 points behind: `alike`; behind: `worse`"
    said += "; too close to tell: `wild`."
    assert in_short(summary) == [f"- lstm, by 95 % intervals over mine: {said}"]
    write_page(tmp_path / "page.md", summary)
    page = (tmp_path / "page.md").read_text()
    assert said in page
    assert "- mine: 400 rows for test; its fingerprints, as on model cards, begin with test `mine`." in page
    summary = Summary(study, {key: given(key) for key in planned(study, {}) if key.seed == 1})
    assert in_short(summary) == ["- lstm, by 95 % intervals over mine: 4 without an interval."]


@pytest.mark.parametrize(("wrong", "scale"), [(0.05, "linear"), (0.3, "symlog")])
def test_an_arm_that_is_far_behind_does_not_make_one_dot_of_the_others(wrong, scale, place):
    place.write(seeds=[1])
    study, _ = place.study()
    right = np.ones(100, int)
    worse = right * (np.arange(100) >= 100 * wrong)
    rows = {key: row(key, right=right if key.arm == "backprop" else worse) for key in planned(study, {})}
    (axes,) = draw(Summary(study, rows)).axes
    assert axes.get_xscale() == scale


def test_a_mean_is_over_the_sets_that_are_done(place):
    place.write(sets=["mine", "other"])
    study, _ = place.study()
    rows = {key: row(key, right=(1, 1, key.arm == "al_ce", 0)) for key in planned(study, {})}
    assert next(title for title, _, _ in tables(Summary(study, rows))) == "lstm, mean over mine, other"
    del rows[Key("other", "lstm", "backprop", 2)]
    summary = Summary(study, rows)
    assert summary.pooled("lstm") == ("mine",)
    assert [title for title, _, _ in tables(summary)] == ["lstm, mine", "lstm, other"]
    assert in_short(summary) == ["- lstm, by 95 % intervals over mine: at most 0.5 points behind: `al_ce`."]
    assert Summary(study, {}).pooled("lstm") == ("mine", "other")


def test_sets_count_equally_and_only_shared_seeds_are_compared(place, tmp_path):
    place.write(sets=["mine", "other"])
    study, _ = place.study()
    rows = {key: row(key, right=(1, 1, 0, 0)) for key in planned(study, {})}
    for key in planned(study, {}):
        if key.arm == "al_ce":
            rows[key] = row(key, right=(1, 1, 1, 0) if key.set == "mine" else (1, 0, 0, 0))
    del rows[Key("other", "lstm", "backprop", 2)]
    summary = Summary(study, rows)
    assert summary.difference("lstm", "al_ce", ("mine", "other"))[0] == pytest.approx(0)
    assert not np.isnan(summary.difference("lstm", "al_ce", ("mine",))).any()
    lines = {line["arm"]: line for line in summary.table("lstm", ["other"])}
    assert lines["al_ce"]["minus baseline, points (95 %)"] == "-25.00 (one seed)"
    assert [line["seeds"] for line in summary.table("lstm", study.sets)] == ["2", "1"]
    assert draw(summary) is not None
    write_page(tmp_path / "page.md", summary)
    assert (
        "- Yet to be made: 1 runs of `backprop`, about 4 s one after the other." in (tmp_path / "page.md").read_text()
    )


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 3), st.integers(2, 40))
def test_arms_that_answer_alike_are_not_apart_however_much_seeds_and_rows_differ(seed, seeds, count):
    """The interval is paired: what both arms get wrong does not widen it."""
    right = np.random.default_rng(seed).integers(0, 2, (seeds, count))
    assert points_apart([right - right]) == (0, 0, 0)
    better = np.ones_like(right)  # of every row that is wrong, all become right
    middle, low, high = points_apart([better - right])
    assert low <= middle + 1e-9
    assert middle == pytest.approx(100 * (1 - right.mean()))
    assert high >= middle - 1e-9
    assert np.array_equal(unpacked(packed(right[0]), count), right[0])


def test_the_interval_covers_a_known_difference_as_often_as_it_says():
    """An arm that is right on 0.75 of all texts and one on 0.8, of which most texts are shared."""
    generator, covered = np.random.default_rng(1), 0
    for _ in range(30):
        hard = generator.random(300)  # of a text
        noise = generator.normal(0, 0.05, (2, 3, 300))
        ours, theirs = (hard + noise[0] < 0.8).astype(int), (hard + noise[1] < 0.75).astype(int)
        _, low, high = points_apart([ours - theirs])
        covered += low <= 5 <= high
    assert 25 <= covered <= 30


# --- mistakes

MISTAKES = {
    "unknown_key": ({"arm": 1}, ["Unknown key 'arm' in", "Did you mean arms?"]),
    "no_seeds": ({"seeds": []}, ["Expected name, question", "got no seeds"]),
    "no_question": ({"question": ""}, ["got no question"]),
    "seed_twice": ({"seeds": [1, 1]}, ["Expected each of seeds once", "got 1 2 times"]),
    "seeds_of_words": ({"seeds": ["one"]}, ["Expected a list of whole numbers from 0 as seeds", "['one']"]),
    "seeds_of_any_size": ({"seeds": [1, 2**32]}, ["Expected seed below 2**32, got 4294967296."]),
    "name_with_a_slash": ({"name": "a/b"}, ["Expected a name of letters", "'a/b'"]),
    "baseline_that_is_no_arm": ({"baseline": "backprob"}, ["Expected an arm as baseline", "Did you mean backprop?"]),
    "no_other_arm": ({"arms": {"backprop": {"objective": "backprop"}}}, ["Expected arms beside the baseline"]),
    "unknown_argument": (
        {"common": {"learing_rate": 1}}, ["argument 'learing_rate' in common of", "Did you mean learning_rate?"],
    ),
    "unknown_argument_of_an_arm": (
        {"arms": {**STUDY["arms"], "x": {"num_block": 1}}}, ["'num_block' in arm 'x'", "Did you mean num_blocks?"],
    ),
    "unknown_objective": (
        {"arms": {**STUDY["arms"], "x": {"objective": "al"}}}, ["Expected objective to be one of", "(arm 'x' of"],
    ),
    "value_of_another_type": ({"common": {"max_steps": "many"}}, ["Expected max_steps as int, got 'many'."]),
    "the_same_arm_twice": (
        {"arms": {**STUDY["arms"], "x": {"objective": "al_ce"}}}, ["Expected arms that differ", "'al_ce' and 'x'"],
    ),
    "what_the_study_decides": ({"common": {"seed": 1}}, ["Expected no seed in common", "it is decided for all runs"]),
    "no_recipe": ({"architectures": ["gru"]}, ["Expected the recipe", "mine_gru.yaml, found none. Fix recipes, sets"]),
    "no_data": ({"sets": ["theirs"]}, ["Expected one folder for theirs in", "found none"]),
    "tuning_another_architecture": (
        {"tune": {"lstn": {}}}, ["Expected architectures in tune of", "Did you mean lstm?"],
    ),
    "tuning_one_value": (
        {"tune": {"lstm": {"learning_rate": [0.1]}}}, ["Expected a list of different values for learning_rate"],
    ),
    "tuning_what_does_not_exist": (
        {"tune": {"lstm": {"learing_rate": [1, 2]}}}, ["argument 'learing_rate' in tune of lstm", "learning_rate?"],
    ),
    "tuning_what_an_arm_says": (
        {"tune": {"lstm": {"objective": ["al_ce", "supcon"]}}}, ["Expected objective in tune of", "got it in both"],
    ),
    "tuning_one_value_by_two_names": (
        {"tune": {"lstm": {"learning_rate": ["0.001", 0.001]}}}, ["Expected a list of different values"],
    ),
    "looking_inside_perhaps": ({"inside": "perhaps"}, ["Expected true or false as inside", "got 'perhaps'"]),
    "tuning_no_mapping": ({"tune": ["learning_rate"]}, ["Expected a mapping of architectures to arguments as tune"]),
    "screen_alone": ({"screen": 1}, ["Expected screen and best_of together"]),
    "screen_of_another_seed": ({"screen": 7, "best_of": 1}, ["Expected screen to be one of several seeds", "got 7"]),
    "screen_of_a_truth": ({"screen": True, "best_of": 1}, ["Expected screen to be one of several seeds", "got True"]),
    "best_of_all": ({"screen": 1, "best_of": 1}, ["Expected at least two arms beside the baselines", "got 1"]),
    "several_baselines_without_screen": (
        {"arms": {**STUDY["arms"], "x": {}}, "baseline": ["backprop", "x"]}, ["Expected screen with several baselines"],
    ),
    "an_arm_without_a_baseline": (
        {"arms": {**STUDY["arms"], "x": {}}, "baseline": {"al_ce": "backprop"}}, ["got neither for 'x'"],
    ),
    "streaming": (
        {"common": {"streaming": True, "max_steps": 5, "eval_strategy": "no"}},
        ["Expected no streaming in", "judged on rows of train"],
    ),
    "several_processes": ({"common": {"stages": 2}, "arms": {"a": {"objective": "al_ce"}, "backprop": {}}},
                          ["Expected runs of one process, got 2"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_study_is_one_message_before_anything_starts(mistake, place):
    values, said = MISTAKES[mistake]
    place.write(**values)
    before = sorted(place.folder.rglob("*"))
    assert_mistake(place.run(), *said)
    assert sorted(place.folder.rglob("*")) == before


def test_an_arm_that_is_named_twice_is_a_mistake(place):
    place.yaml.write_text(place.yaml.read_text().replace("arms:\n", "arms:\n  al_ce: {}\n"))
    assert_mistake(place.run(), "the key 'al_ce' comes 2 times")


def test_what_only_the_optimizer_refuses_is_refused_before_the_first_run(place):
    place.write(common={"optim": "sgd", "optim_args": {"momentun": 0.9}})
    assert_mistake(place.run(), "Expected optim_args of torch's SGD", "(mine lstm, arm 'al_ce')")
    assert not (place.folder / "out").exists()


def test_data_without_a_test_file_is_a_mistake(place):
    (place.folder / "data" / "mine" / "test.csv").unlink()
    assert_mistake(place.run(), "Expected train.csv and test.csv in")


@pytest.mark.parametrize("content", ["", "[]", '{"rows": [{}]}', '{"rows": 3}'])
def test_results_of_another_kind_are_a_mistake(content, place):
    (place.folder / "study.json").write_text(content)
    assert_mistake(place.run(), "Expected the results of a study in")
    assert (place.folder / "study.json").read_text() == content


WHOLE = {**row(Key("mine", "lstm", "al_ce", 1)), "arguments": {}}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        *([[{n: v for n, v in WHOLE.items() if n != name}], f"KeyError: '{name}'"] for name in ("right", "machine")),
        ([WHOLE, {**WHOLE, "test": 0.1}], "two rows of the same run"),
        ([{**WHOLE, "seed": "1"}], "TypeError: the seed '1'"),
        ([{**WHOLE, "right": ""}], "right and wrong answers that are not 4"),
        ([{**WHOLE, "right": "no"}], "non-hexadecimal"),
    ],
)  # fmt: skip
def test_rows_that_are_not_whole_are_a_mistake(rows, said, place):
    (place.folder / "study.json").write_text(json.dumps({"defaults": {}, "rows": rows}))
    assert_mistake(place.run("--only_page"), "Expected the results of a study in", said)


# --- the studies that come with hf_al


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_run_of_a_shipped_study_can_be_made(path, tmp_path, encoder_folder):
    study = read_study(str(path))
    found = all_runs(study, tmp_path)
    one_each = {run.key.arm: run for run in found.values()}
    execution.check_values({**one_each, **{run.key.setting: run for run in found.values()}}.values())
    assert study.name == path.stem
    settings = sum(map(len, study.tune.values()))
    assert len(found) == len(study.sets) * settings * len(study.arms) * len(study.seeds)
    assert len({run.folder for run in found.values()}) == len(found)


@pytest.mark.parametrize(
    "path",
    [slow(p) if p.stem in LARGE else p for p in STUDIES if p.with_suffix(".json").exists()],
    ids=lambda path: path.stem,
)
def test_a_committed_page_is_that_of_its_rows(path, tmp_path, monkeypatch):
    """Also: no default, recipe or yaml has changed since the runs were made."""
    monkeypatch.chdir(ROOT)
    study = read_study(str(path.relative_to(ROOT)))
    results = Results(study.path.with_suffix(".json"), all_runs(study, tmp_path))
    results.refuse_changed()
    write_page(tmp_path / "page.md", Summary(study, results.rows))
    assert (tmp_path / "page.md").read_text() == (ROOT / "model_cards" / f"study_{path.stem}.md").read_text()


def test_the_table_of_objectives_says_what_its_page_says():
    cards = ROOT / "model_cards"
    page = (cards / "study_objectives.md").read_text().replace("+", "")
    table = (cards / "study.md").read_text().split("| objective | LSTM | transformer |")[1].split("\n\n")[0]
    intervals = re.findall(r"-?\d\.\d\d \(.+?\)", table)
    assert len(intervals) == 14
    assert not [interval for interval in intervals if f"| {interval} |" not in page]


def test_data_that_a_study_cannot_use_is_refused_before_training(place, monkeypatch):
    monkeypatch.setattr(execution, "carry_out", lambda run: pytest.fail("trained"))
    place.write(seeds=[1])
    path = place.folder / "data" / "mine" / "test.csv"
    before = path.read_text()
    path.write_text("text,label\n")
    assert_mistake(place.run(), "test")
    path.write_text(before)
    _, runs = place.study()
    results = Results(place.folder / "study.json", runs)
    key = next(iter(runs))
    results.rows[key] = {**row(key), "arguments": {}, "data": {"fingerprint": {"train": "another"}}}
    with pytest.raises(ValueError, match="Expected the data of the earlier runs on mine"):
        execution.check_data(runs.values(), results)


def test_two_folders_for_a_set_are_a_mistake_and_similar_names_are_not(place):
    (place.folder / "data" / "minefield").mkdir()
    place.study()
    (place.folder / "data" / "mine_2").mkdir()
    with pytest.raises(ValueError, match=r"Expected one folder for mine in .*, found 2: mine, mine_2"):
        place.study()


def test_seeds_that_differ_make_the_interval_wide_enough():
    """Of 80 studies of three seeds whose arms differ by seed alone, most intervals cover the true difference, 0. A
    bootstrap of three seeds cannot reach 95 %."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(80):
        shift = rng.normal(0, 0.2, 3)
        differences = (rng.random((3, 100)) < 0.5 + shift[:, None]).astype(int) - (rng.random((3, 100)) < 0.5)
        _, low, high = points_apart([differences])
        covered += low <= 0 <= high
    assert covered > 66
