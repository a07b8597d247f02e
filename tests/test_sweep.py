"""`hf-al sweep`: the same budget for every arm, on validation alone, and nothing is lost when it is interrupted."""

import json
import signal
import sqlite3
import time
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import optuna
import pandas as pd
import pytest
import yaml
from conftest import assert_mistake
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from hf_al.atomic import alone_at
from hf_al.sweep.outcome import draw
from hf_al.sweep.plan import read_sweep
from hf_al.sweep.trials import _next_trial, carry_out, carry_out_sweep, finished, open_studies

pytestmark = [pytest.mark.medium, pytest.mark.timeout(120)]
ARMS = {"ours": {"objective": "al_ce"}, "theirs": {"objective": "backprop"}}
SWEEPS = sorted((Path(__file__).parents[1] / "recipes" / "sweeps").glob("*.yaml"))
PLOTS = ("slices", "importance", "together")
SEARCH = {"learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}, "pooling": ["mean", "max"]}


@pytest.fixture
def asked(files, tmp_path):
    """asked(**changes) -> the yaml of a small sweep on tweets; its data are in the folder `data`."""
    data = tmp_path / "data" / "few"
    data.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (data / f"{split}.csv").write_text((files / f"{split}.csv").read_text())
    recipe = {
        "model_type": "al_lstm", "dataset_name": "tweets", "max_steps": 6, "eval_strategy": "steps", "eval_steps": 2,
        "use_cpu": True, "word_vectors": None, "model": {"hidden_size": 16, "num_blocks": 2, "target_size": 12},
    }  # fmt: skip
    (tmp_path / "few_lstm.yaml").write_text(yaml.safe_dump(recipe))

    def write(**changes) -> Path:
        values = {"recipe": "few_lstm.yaml", "trials": 3, "arms": ARMS, "search": SEARCH, **changes}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
        return path

    return write


def flags(path: Path) -> list[str]:
    return [str(path), f"--output_dir={path.parent / 'out'}", f"--data_dir={path.parent / 'data'}"]


def studies_of(path: Path, trials: int | None = None) -> dict[str, optuna.Study]:
    return open_studies(read_sweep(str(path), path.parent / "out", str(path.parent / "data"), trials))


def wait_for(path: Path, *states: str) -> None:
    """Until there is a trial in each of these states."""
    deadline, found = time.monotonic() + 60, set()
    while not found.issuperset(states):
        assert time.monotonic() < deadline
        time.sleep(0.05)
        file = f"file:{path.parent / 'out' / 'sweep.db'}?mode=ro"
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(file, uri=True)) as database:
            found = {state for (state,) in database.execute("select state from trials")}


def test_every_arm_gets_its_trials_and_leaves_its_best_settings(asked, shell):
    path = asked(trials=2)
    test = path.parent / "data" / "few" / "test.csv"
    test.write_text("text,label\nno,class\n")  # nothing depends on the test split, not even whether it can be used
    status, out, err = shell("sweep", *flags(path))
    assert status == 0, err
    reports = list((path.parent / "out" / "trials").glob("*/*/report.json"))
    assert len(reports) == 4
    assert not any("test" in json.loads(report.read_text()) for report in reports)
    trials = pd.read_parquet(path.parent / "out" / "trials.parquet")
    assert trials.groupby("arm").size().to_dict() == {"ours": 2, "theirs": 2}
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("ours", "theirs"))] == ["ours", "theirs"]
    for arm, rows in trials.groupby("arm"):
        best = rows.loc[rows["validation"].idxmax()]
        kept = yaml.safe_load((path.parent / "out" / f"best_{arm}.yaml").read_text())
        assert kept["learning_rate"] == pytest.approx(best["learning_rate"])
        assert kept["model"]["pooling"] == best["pooling"]
        assert kept["model"]["objective"] == ARMS[arm]["objective"]


def test_a_list_can_be_a_choice(asked, shell):
    choices = [0.5, [0.0, 0.25]]
    path = asked(trials=3, arms={"ours": ARMS["ours"]}, search={"weight_decay": choices}, common={"max_steps": 2})
    status, _, err = shell("sweep", *flags(path))
    assert status == 0, err
    trials = pd.read_parquet(path.parent / "out" / "trials.parquet")
    kept = {number: yaml.safe_load(text) for number, text in zip(trials["number"], trials["weight_decay"], strict=True)}
    assert {str(value) for value in kept.values()} == {"0.5", "[0.0, 0.25]"}
    for number, value in kept.items():
        report = json.loads((path.parent / "out" / "trials" / "ours" / str(number) / "report.json").read_text())
        assert report["arguments"]["weight_decay"] == value
    best = yaml.safe_load((path.parent / "out" / "best_ours.yaml").read_text())
    assert best["weight_decay"] == kept[trials["validation"].idxmax()]
    assert not any("Warning" in line for line in err.splitlines())


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_that_comes_along_can_be_read(path, tmp_path):
    assert read_sweep(str(path), tmp_path).trials > 1


@pytest.mark.slow
def test_more_trials_go_on_with_those_that_are_done(asked, shell):
    path = asked(trials=1)
    assert shell("sweep", *flags(path))[0] == 0
    before = {arm: [(t.number, t.value) for t in finished(study)] for arm, study in studies_of(path).items()}
    assert shell("sweep", *flags(path), "--trials=3")[0] == 0
    for arm, study in studies_of(path, 3).items():
        after = [(t.number, t.value) for t in finished(study)]
        assert len(after) == 3
        assert after[:1] == before[arm]
        assert len({t.params["learning_rate"] for t in finished(study)}) == 3


def test_plots_are_drawn_of_four_different_values(tmp_path):
    spaces = {
        "learning_rate": FloatDistribution(1e-4, 1e-2, log=True), "num_blocks": IntDistribution(1, 4),
        "pooling": CategoricalDistribution(["mean", "max"]),
    }  # fmt: skip
    study, sweep = optuna.create_study(direction="maximize"), SimpleNamespace(output_dir=tmp_path, search=spaces)
    for i in range(6):
        assert draw(sweep, "ours", study) == ([] if i < 4 else [f"{name}_ours.png" for name in PLOTS])
        params = {"learning_rate": 10 ** (i / 4 - 4), "num_blocks": 1 + i % 4, "pooling": ["mean", "max"][i % 2]}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=0.5 + i * i / 100))
    assert len({path.read_bytes() for path in tmp_path.glob("*.png")}) == 3
    assert draw(SimpleNamespace(output_dir=tmp_path, search={"pooling": ()}), "ours", study) == ["slices_ours.png"]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_stopped(asked, start):
    path = asked(trials=4, arms={"ours": ARMS["ours"]})
    process = start("sweep", *flags(path))
    wait_for(path, "COMPLETE", "RUNNING")  # one is finished, and another one is under way
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    before = {t.number: (t.params, t.value) for t in finished(studies_of(path)["ours"])}
    assert 1 <= len(before) < 4
    again = start("sweep", *flags(path))
    assert again.wait(100) == 0
    after = finished(studies_of(path)["ours"])
    assert len(after) == 4
    assert before.items() <= {t.number: (t.params, t.value) for t in after}.items()


@pytest.mark.slow
def test_a_trial_that_is_worse_than_most_ends_early(asked, shell):
    path = asked(trials=12, arms={"ours": ARMS["ours"]}, search={"learning_rate": {"low": 1e-7, "high": 1e-2}}, seed=3)
    assert shell("sweep", *flags(path))[0] == 0
    trials = pd.read_parquet(path.parent / "out" / "trials.parquet")
    early = trials[trials["state"] == "pruned"]
    assert 1 <= len(early) < 12
    assert early["evaluations"].map(len).min() < 3
    assert early["validation"].isna().all()


def test_a_trial_that_goes_on_is_judged_by_its_evaluations_before(asked, tmp_path):
    path = asked(arms={"ours": ARMS["ours"]})
    plan = read_sweep(str(path), tmp_path / "out", str(path.parent / "data"))
    run = {**plan.arms["ours"], "learning_rate": 5e-3, "pooling": "mean", "output_dir": str(tmp_path / "trial")}

    def stopped(values: list[tuple[int, float]]) -> None:
        if values[-1][0] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(run, stopped)
    reports: list[list[tuple[int, float]]] = []
    carry_out(run, reports.append)
    assert [number for values in reports for number, _ in values] == [1, 2, 3]
    assert len(reports) < 3


def test_a_trial_may_be_stopped_any_number_of_times(asked, start):
    path = asked(trials=1, arms={"ours": ARMS["ours"]}, common={"max_steps": 100_000})
    for states in (["RUNNING"], ["FAIL", "RUNNING"]):
        process = start("sweep", *flags(path))
        wait_for(path, *states)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    (trial,) = [t for t in studies_of(path)["ours"].get_trials() if t.state == TrialState.WAITING]
    assert trial.user_attrs["starts"] == 1


@pytest.mark.slow
def test_trials_side_by_side_keep_to_the_budget(asked, shell):
    path = asked(trials=3)
    assert shell("sweep", *flags(path), "--jobs=2")[0] == 0
    trials = pd.read_parquet(path.parent / "out" / "trials.parquet")
    assert trials.groupby("arm").size().to_dict() == {"ours": 3, "theirs": 3}


@pytest.mark.slow
def test_a_trial_that_fails_counts_and_says_why(asked, shell):
    path = asked(trials=4, arms={"ours": {"learning_rate": 1e38}}, search={"hidden_size": [8, 400_000]})
    status, _, err = shell("sweep", *flags(path))
    assert status == 0, err
    trials = pd.read_parquet(path.parent / "out" / "trials.parquet")
    assert (trials["state"] == "fail").all()
    assert trials["error"].str.contains("finite|fits the").all()
    assert trials["error"].str.contains("fits the").any()


@pytest.mark.slow
def test_values_that_only_fail_with_the_data_are_one_trial(asked, shell):
    path = asked(trials=4, arms={"ours": {"objective": "al_ce"}}, search={"min_frequency": [1, 10_000]})
    status, _, err = shell("sweep", *flags(path))
    assert status == 0, err
    trials = pd.read_parquet(path.parent / "out" / "trials.parquet").set_index("min_frequency")
    assert (trials.loc[[10_000], "state"] == "fail").all()
    assert trials.loc[[10_000], "error"].str.contains("Expected words").all()
    assert (trials.loc[[1], "state"] == "complete").all()


@pytest.mark.slow
def test_data_that_is_gone_stops_a_sweep_and_counts_for_no_trial(asked, monkeypatch, capfd):
    path = asked(trials=1)
    studies, sweep = studies_of(path), read_sweep(str(path), path.parent / "out", str(path.parent / "data"))
    (path.parent / "data" / "few" / "train.csv").unlink()
    with pytest.raises(ValueError, match=r"train\.csv"):
        carry_out_sweep(sweep, studies, 1)
    assert not any(map(finished, studies.values()))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"recipe": "other.yaml"}, "Expected the recipe"),
        ({"trials": 0}, "Expected a whole number from 1 as trials"),
        ({"arms": {"a": {"objective": "al_ec"}}}, "Did you mean al_ce?"),
        ({"arms": {"a": {"learning_rate": 1e-3}}}, "Expected learning_rate in search of"),
        ({"common": {"learning_rate": 1e-3}}, "or in arms and common, got it in both"),
        ({"seed": 2**32}, "Expected seed below 2**32"),
        ({"search": {"learning_rat": [1e-3, 1e-2]}}, "Unknown argument 'learning_rat'"),
        ({"search": {"learning_rate": {"low": 0.0, "high": 0.1, "log": True}}}, "above 0 for log: true"),
        ({"search": {"learning_rate": {"low": -1.0, "high": 0.1}}}, "Expected learning_rate above 0, got -1.0"),
        ({"search": {"num_blocks": {"low": 1, "high": 4.0}}}, "Expected num_blocks as int"),
        ({"search": {"pooling": ["mean"]}}, "Expected two or more different values"),
        ({"search": {"pooling": ["mean", "mean"]}}, "Expected two or more different values"),
        ({"common": {"streaming": True}}, "Expected no streaming in a study or a sweep"),
        ({"searches": SEARCH, "search": None}, "Did you mean search?"),
    ],
    ids=str,
)
def test_mistakes_are_found_before_the_first_trial(changes, said, asked, shell):
    path = asked(**changes)
    assert_mistake(shell("sweep", *flags(path)), said)
    assert not (path.parent / "out").exists()


def test_another_sweep_does_not_go_on_with_these_trials(asked, shell):
    path = asked(trials=1, arms={"ours": ARMS["ours"]})
    studies_of(path)
    again = asked_again(path, learning_rate=[1e-3, 1e-2])
    assert_mistake(shell("sweep", *flags(again)), "got another search learning_rate for the arm 'ours'")
    path = asked(trials=1, arms={"ours": {**ARMS["ours"], "bridge_layers": 2}})
    assert_mistake(shell("sweep", *flags(path)), "got another bridge_layers for the arm 'ours': 2, it was 1")
    path = asked(trials=1, arms={"ours": ARMS["ours"]}, seed=2)
    assert_mistake(shell("sweep", *flags(path)), "got another seed for the arm 'ours': 2, it was 1")
    studies_of(asked(trials=1, arms={"ours": ARMS["ours"]}, common={"logging_steps": 7}))  # changes no result


def asked_again(path: Path, **search) -> Path:
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, "search": {**values["search"], **search}}))
    return path


def test_trials_whose_database_was_removed_are_not_gone_on_with(asked):
    path = asked(trials=1, arms={"ours": ARMS["ours"]})
    old = path.parent / "out" / "trials" / "ours" / "0" / "checkpoints"
    old.mkdir(parents=True)
    trial = _next_trial(read_sweep(str(path), path.parent / "out", str(path.parent / "data")), studies_of(path), [])
    assert trial.flags["output_dir"] == str(old.parent)
    assert not old.exists()


def test_a_database_that_refuses_is_one_message(asked, shell):
    path = asked(trials=1, arms={"ours": ARMS["ours"]})
    studies_of(path)
    with closing(sqlite3.connect(path.parent / "out" / "sweep.db")) as database:
        database.execute("create trigger full before insert on trials begin insert into disk values (1); end")
        database.commit()
    said = shell("sweep", *flags(path))
    assert_mistake(
        said, "sweep.db to take the results of trials, got: ", "no such table: main.disk", "command goes on."
    )


def test_two_sweeps_do_not_share_a_folder(asked, shell):
    path = asked()
    with alone_at(path.parent / "out"):
        assert_mistake(shell("sweep", *flags(path)), "Expected nobody else at work on")


def test_what_is_no_database_is_refused(asked, shell):
    path = asked(trials=1)
    (path.parent / "out").mkdir()
    (path.parent / "out" / "sweep.db").write_text("no database, but more than a hundred bytes of text. " * 3)
    assert_mistake(shell("sweep", *flags(path)), "Expected the database of a sweep")
