"""--report_to: each tracker's own files are read back after a real run; nobody is asked for a key, none is written."""

import json
import logging
import os
import pty
import re
import select
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.utils import LoggerType

import hf_al
from hf_al.ranges import TRACKERS
from hf_al.training import trackers

STEPS, LOGGED = 12, [4, 8, 12]
METRICS = {
    "learning_rate", "examples_per_second", "peak_memory_mib", "loss/0/associated", "loss/1/reconstruction",
    "grad_norm/1", "validation/1/accuracy", "validation/0/log_loss", "codes/1/separation", "codes/0/spread",
}  # fmt: skip
SECRETS = {
    "WANDB_API_KEY": "5ecre7" * 7,
    "HF_TOKEN": "hf_5ecre7token5ecre7token",
    "MLFLOW_TRACKING_TOKEN": "mlflow5ecre7token",
    "MLFLOW_TRACKING_PASSWORD": "mlflow5ecre7password",
    "TRACKIO_WRITE_TOKEN": "trackio5ecre7token",
    "AWS_SECRET_ACCESS_KEY": "aws5ecre7key",
}


def arguments(output_dir, **values) -> hf_al.TrainingArguments:
    model = {"num_blocks": 2, "hidden_size": 16, "target_size": 12, **values.pop("model", {})}
    defaults = {"max_steps": 2, "threads": 1, "use_cpu": True, "disable_tqdm": True}
    return hf_al.TrainingArguments(output_dir=str(output_dir), model=model, **{**defaults, **values})


@pytest.fixture(scope="module")
def command(few_tweets, tmp_path_factory):
    """Command line and environment of a short run with its own home: command(output_dir, report_to, **variables)."""
    folder = tmp_path_factory.mktemp("tweets")
    files = []
    for split in ("train", "validation"):
        few_tweets[split].to_json(folder / f"{split}.jsonl")
        files.append(f"--{split}_file={folder / f'{split}.jsonl'}")

    def build(output_dir: Path, report_to: str, **variables: str):
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "MLFLOW", "TRACKIO", "COMET"))}
        home = {"HOME": str(output_dir.parent), "HF_HOME": str(output_dir.parent / "hf")}
        flags = [
            f"--output_dir={output_dir}", f"--report_to={report_to}", f"--max_steps={STEPS}", "--logging_steps=4",
            "--num_blocks=2", "--hidden_size=16", "--target_size=12", "--threads=1", "--use_cpu",
            "--learning_rate=2e-3",
        ]  # fmt: skip
        argv = [sys.executable, "-m", "hf_al.cli", "train", *files, *flags]
        return argv, {**kept, **home, **variables}

    return build


@pytest.fixture(scope="module")
def tracked(command, tmp_path_factory):
    """A run that reports to all four trackers, with keys in its environment. -> (its folder, what it printed)"""
    output_dir = tmp_path_factory.mktemp("home") / "run"
    argv, environment = command(output_dir, "tensorboard,wandb,trackio,mlflow", WANDB_MODE="offline", **SECRETS)
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr
    return output_dir, done


def history(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric -> (step, value) from the run's own report, under the trackers' names."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in json.loads((folder / "report.json").read_text())["history"]:
        values = {k: v for k, v in row.items() if k not in ("step", "validation", "codes")}
        for exit_row in row.get("validation", []):
            values |= {f"validation/{exit_row['block']}/{k}": v for k, v in exit_row.items() if k != "block"}
        for code in row.get("codes", []):
            values |= {f"codes/{code['block']}/{k}": code[k] for k in ("spread", "rank", "separation")}
        for name, value in values.items():
            found.setdefault(name, []).append((row["step"], value))
    assert found.keys() >= METRICS
    assert [step for step, _ in found["learning_rate"]] == LOGGED
    return found


def wandb_records(data: bytes) -> list[bytes]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    assert data[:4] == b":W&B"
    records, parts, at = [], b"", 7
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no room for a header: the rest of the block is padding
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a complete record, or the last part of one
            records.append(parts)
            parts = b""
    return records


def same(read: dict[str, list[tuple[int, float]]], expected: dict[str, list[tuple[int, float]]]) -> bool:
    assert read.keys() == expected.keys()
    return all([s for s, _ in read[n]] == [s for s, _ in expected[n]] for n in expected) and all(
        [v for _, v in read[n]] == pytest.approx([v for _, v in expected[n]], rel=1e-5) for n in expected
    )


@pytest.mark.slow
def test_tensorboard_has_the_history(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = tracked
    events = EventAccumulator(str(folder / "logs" / "hf_al"))
    events.Reload()
    read = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert same(read, history(folder))
    (config,) = (folder / "logs" / "hf_al").glob("*/hparams.yml")
    assert yaml.safe_load(config.read_text())["learning_rate"] == 2e-3


@pytest.mark.slow
def test_wandb_has_the_history_and_the_config_offline(tracked):
    from wandb.proto import wandb_internal_pb2

    folder, _ = tracked
    (file,) = (folder / "logs" / "wandb").glob("offline-run-*/run-*.wandb")
    read: dict[str, list[tuple[int, float]]] = {}
    config = {}
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            for name, value in row.items():
                if not name.startswith("_"):
                    read.setdefault(name, []).append((row["_step"], value))
        config |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.config.update}
        if record.HasField("run"):
            assert record.run.display_name == "run"
            assert record.run.project == "hf_al"
    assert same(read, history(folder))
    assert config["learning_rate"] == 2e-3
    assert config["model.num_blocks"] == 2


@pytest.mark.slow
def test_trackio_has_the_history_and_the_config(tracked):
    """In the folder of all its projects, so that `trackio show` compares them."""
    folder, _ = tracked
    with sqlite3.connect(folder.parent / "hf" / "trackio" / "hf_al.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
        (config,) = database.execute("select config from configs").fetchone()
    read: dict[str, list[tuple[int, float]]] = {}
    for name, step, metrics in rows:
        assert name == "run"
        for metric, value in json.loads(metrics).items():
            read.setdefault(metric, []).append((step, value))
    assert same(read, history(folder))
    assert json.loads(config)["model.num_blocks"] == 2


@pytest.mark.slow
def test_mlflow_has_the_history_and_the_config(tracked, monkeypatch):
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    folder, _ = tracked
    client = MlflowClient(trackers._mlflow_store(folder))
    experiment = client.get_experiment_by_name("hf_al")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    read = {
        name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics
    }
    assert same(read, history(folder))
    assert run.data.params["model.num_blocks"] == "2"


@pytest.mark.slow
def test_no_key_of_the_environment_is_written_or_printed(tracked):
    folder, done = tracked
    files = [path for path in folder.parent.rglob("*") if path.is_file()]
    assert {".wandb", ".db", ".json", ".safetensors"} <= {path.suffix for path in files}
    for name, secret in SECRETS.items():
        assert secret not in done.stdout + done.stderr, name
        for path in files:
            assert secret.encode() not in path.read_bytes(), (name, path)


@pytest.mark.slow
def test_standard_output_has_results_alone(tracked):
    _, done = tracked
    title, head, rule, *rows = done.stdout.splitlines()
    assert title.startswith("validation metrics")
    assert head.split() == ["block", "accuracy", "macro_f1", "log_loss", "ece"]
    assert set(rule) == {"-", " "}
    assert all(re.fullmatch(r"[\d. ]+", row) for row in rows)


@pytest.mark.slow
def test_wandb_asks_nobody_for_a_key(command, tmp_path):
    """On a terminal, without a key: the run goes offline and says so, instead of waiting for an answer."""
    argv, environment = command(tmp_path / "run", "wandb")
    terminal, end = pty.openpty()
    process = subprocess.Popen(argv, env=environment, stdin=end, stdout=end, stderr=end, close_fds=True)
    os.close(end)
    printed = b""
    try:
        while process.poll() is None or select.select([terminal], [], [], 0)[0]:
            assert select.select([terminal], [], [], 120)[0], f"waits, after {printed.decode()}"
            try:
                printed += os.read(terminal, 4096)
            except OSError:  # the other end is closed
                break
    finally:
        if process.poll() is None and b"waits" in printed:
            process.kill()
        os.close(terminal)
    assert process.wait(60) == 0, printed.decode()
    assert b"No wandb key: logging offline" in printed
    assert len(list((tmp_path / "run" / "logs" / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensorbord", "got 'tensorbord'. Did you mean tensorboard?"),
        ("wandb,mlfow", "got 'mlfow'. Did you mean mlflow?"),
        ("xyz", "got 'xyz'."),
        ("comet_ml", "Expected the tracker comet_ml to be installed, found none. Run pip install comet_ml"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused_before_anything_is_touched(name, message, tmp_path):
    kept = tmp_path / "report.json"
    kept.write_text("of an earlier run")
    with pytest.raises(ValueError, match="report_to") as error:
        hf_al.train(arguments(tmp_path, report_to=name, overwrite_output_dir=True, train_file="nowhere.csv"))
    assert message in str(error.value)
    assert str(error.value).startswith("Expected ")
    assert kept.read_text() == "of an earlier run"


@pytest.mark.parametrize(
    ("missing", "package"), [("wandb", "wandb"), ("mlflow", "mlflow"), ("trackio", "trackio gradio_client")]
)
def test_the_message_says_what_to_install(missing, package, monkeypatch):
    installed = [name for name in trackers.get_available_trackers() if str(name) != missing]
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: installed)
    with pytest.raises(ValueError, match=f"Run pip install {package}, or leave it out"):
        trackers.chosen(["tensorboard", missing])


def test_names_are_read_as_users_write_them():
    def chosen(report_to):
        return trackers.chosen(arguments("run", report_to=report_to).trackers)

    assert chosen("none") == chosen("") == []
    assert chosen(" mlflow, tensorboard,mlflow") == ["mlflow", "tensorboard"]
    assert {"tensorboard", "wandb", "trackio", "mlflow"} <= set(chosen("all"))


def test_every_tracker_of_accelerate_has_its_name():
    assert set(TRACKERS) - {"codecarbon"} == {str(name) for name in LoggerType.list()} - {"all"}


def test_trackers_get_flat_plain_values():
    config = {
        "a": 1,
        "b": None,
        "c": "",
        "d": [1, 2],
        "e": True,
        "model": {"num_blocks": 3, "class_weights": [1.0, 2.0]},
    }
    flat = trackers.flat(config)
    assert flat == {"a": 1, "d": "[1, 2]", "e": True, "model.num_blocks": 3, "model.class_weights": "[1.0, 2.0]"}


@pytest.mark.slow
def test_a_failed_run_does_not_keep_the_next_from_starting(few_tweets, tmp_path, monkeypatch):
    """mlflow allows one run at a time, and each run of a process has its own store."""
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with pytest.raises(ValueError, match="finite"):
        hf_al.train(arguments(tmp_path / "a", report_to="mlflow", learning_rate=1e38), few_tweets)
    assert not mlflow.is_tracking_uri_set()
    hf_al.train(arguments(tmp_path / "b", report_to="mlflow"), few_tweets)
    for name in "ab":
        client = mlflow.MlflowClient(trackers._mlflow_store(tmp_path / name))
        assert len(client.search_runs([client.get_experiment_by_name("hf_al").experiment_id])) == 1
    assert not mlflow.is_tracking_uri_set()


def test_a_store_that_the_user_has_chosen_is_used(few_tweets, tmp_path, monkeypatch):
    store = tmp_path / "elsewhere"
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.as_uri())
    hf_al.train(arguments(tmp_path / "run", report_to="mlflow"), few_tweets)
    assert len(list(store.glob("[1-9]*/*/meta.yaml"))) == 1
    assert not (tmp_path / "run" / "logs" / "mlruns").exists()
    assert os.environ["MLFLOW_TRACKING_URI"] == store.as_uri()


def test_a_resumed_run_hides_what_the_interrupted_one_logged_after_its_checkpoint(few_tweets, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def args(steps: int, **values):
        return arguments(
            tmp_path, report_to="tensorboard", max_steps=steps, logging_steps=1, lr_scheduler_type="constant", **values
        )

    hf_al.train(args(4), few_tweets)
    (written,) = (tmp_path / "logs" / "hf_al").glob("events*")
    os.utime(written, (1, 1))
    hf_al.train(args(6, resume_from_checkpoint="last"), few_tweets)
    events = EventAccumulator(str(tmp_path / "logs" / "hf_al"))
    events.Reload()
    assert [e.step for e in events.Scalars("learning_rate")] == [1, 2, 3, 4, 5, 6]


def test_a_tracker_that_cannot_start_is_one_sentence(few_tweets, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "no-such-scheme://server")
    with pytest.raises(OSError, match=r"Could not start the trackers mlflow: .*no-such-scheme"):
        hf_al.train(arguments(tmp_path, report_to="mlflow"), few_tweets)


def test_a_tracker_that_does_not_finish_does_not_lose_the_run(few_tweets, tmp_path, monkeypatch, caplog):
    from accelerate.tracking import TensorBoardTracker

    def gone(self):
        raise ConnectionError("server gone")

    monkeypatch.setattr(TensorBoardTracker, "finish", gone)
    hf_al.train(arguments(tmp_path, report_to="tensorboard"), few_tweets)
    assert "The tracker tensorboard did not finish: server gone" in caplog.text
    assert (tmp_path / "report.json").exists()


def test_a_tracker_that_refuses_values_does_not_stop_the_run(few_tweets, tmp_path, monkeypatch, caplog):
    from accelerate.tracking import TensorBoardTracker

    def gone(self, values, step=None, **kwargs):
        raise ConnectionError("server gone")

    monkeypatch.setattr(TensorBoardTracker, "log", gone)
    hf_al.train(arguments(tmp_path, report_to="tensorboard"), few_tweets)
    assert caplog.text.count("training goes on without them (ConnectionError: server gone)") == 1
    assert (tmp_path / "report.json").exists()


def test_no_tracker_leaves_no_log_folder(few_tweets, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "hf_al"):
        hf_al.train(arguments(tmp_path), few_tweets)
    assert not (tmp_path / "logs").exists()


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")
def test_codecarbon_estimates_the_energy_of_the_training(few_tweets, tmp_path):
    report = hf_al.train(arguments(tmp_path, report_to="codecarbon"), few_tweets).report
    kwh = report["energy_kwh"]
    assert kwh["total"] > 0
    assert kwh["total"] == pytest.approx(kwh["cpu"] + kwh["gpu"] + kwh["memory"])
    assert "Energy of the machine while training (estimate of codecarbon): " in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "logs").exists()


def test_energy_that_was_not_measured_is_not_mentioned(few_tweets, tmp_path):
    report = hf_al.train(arguments(tmp_path), few_tweets).report
    assert report["energy_kwh"] == {}
    assert "Energy" not in (tmp_path / "report.md").read_text()
