"""What is passed from outside is honoured or refused: the launcher's precision, threads, workers, progress bars."""

import logging
from datetime import timedelta

import datasets
import pytest
import torch
from safetensors.torch import load_file

import hf_al
from hf_al import messages
from hf_al.training import setup
from hf_al.values import available_cores

SMALL = {
    "model": {"num_blocks": 2, "hidden_size": 16, "target_size": 12}, "max_steps": 3, "use_cpu": True, "plots": False,
    "threads": 1,
}  # fmt: skip


def arguments(folder, **values) -> hf_al.TrainingArguments:
    return hf_al.TrainingArguments(output_dir=str(folder), **{**SMALL, **values})


def test_bf16_of_a_launcher_is_that_of_the_flag(few_tweets, tmp_path, monkeypatch):
    hf_al.train(arguments(tmp_path / "float32"), few_tweets)
    hf_al.train(arguments(tmp_path / "flag", bf16=True), few_tweets)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    args = arguments(tmp_path / "launcher")
    hf_al.train(args, few_tweets)
    assert not args.bf16  # those of the caller stay as they are
    exact, flag, launcher = (
        load_file(tmp_path / name / "model.safetensors") for name in ("float32", "flag", "launcher")
    )
    assert all(torch.equal(flag[name], launcher[name]) for name in flag)
    assert any(not torch.equal(flag[name], exact[name]) for name in flag)
    assert "bf16: true" in (tmp_path / "launcher" / "training_config.yaml").read_text()


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_a_precision_that_needs_a_loss_scaler_is_refused(precision, few_tweets, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(ValueError, match=f"Expected --mixed_precision no or bf16, got {precision} from the launcher"):
        hf_al.train(arguments(tmp_path / "run"), few_tweets)
    assert not (tmp_path / "run").exists()


def test_more_threads_and_workers_than_cores_are_cut_and_said(few_tweets, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="hf_al")
    many = available_cores() + 7
    setup.set_threads(arguments(tmp_path, threads=many))
    assert torch.get_num_threads() == available_cores()
    hf_al.train(arguments(tmp_path, preprocessing_num_workers=many), few_tweets)
    said = "\n".join(record.message for record in caplog.records)
    assert f"--threads {many} is more than this machine has: {available_cores()}." in said
    assert f"--preprocessing_num_workers {many} is more than this machine has: {available_cores()}." in said


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_more_threads_than_cores_are_cut_in_every_command(command, trained, files, shell):
    many = available_cores() + 7
    what = ["--test_file", str(files / "test.csv")] if command == "evaluate" else ["some text"]
    status, out, err = shell(command, str(trained[0]), *what, f"--threads={many}")
    assert (status, torch.get_num_threads()) == (0, available_cores()), err
    assert out


def test_disable_tqdm_shows_no_bar_in_python_either(few_tweets, tmp_path, capfd):
    few = few_tweets.filter(lambda row: len(row["text"]) < 130)  # not in the cache
    datasets.enable_progress_bars()  # another test may have switched them off
    capfd.readouterr()
    hf_al.train(arguments(tmp_path / "quiet", disable_tqdm=True, max_seq_length=19), few)
    assert "examples/s" not in capfd.readouterr().err
    hf_al.train(arguments(tmp_path / "loud", max_seq_length=18), few)
    assert "examples/s" in capfd.readouterr().err


def test_the_time_to_go_is_told_once_and_does_not_wait_for_a_log(few_tweets, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("hf_al.training.record.WORTH_SAYING", 0)
    monkeypatch.setattr("hf_al.training.record.SETTLED", 0)
    caplog.set_level(logging.INFO, logger="hf_al")
    hf_al.train(arguments(tmp_path, max_steps=9, logging_steps=9), few_tweets)
    said = [record.message for record in caplog.records if "to go" in record.message]
    assert said
    assert len(said) == 1
    assert said[0].startswith("About ")


@pytest.mark.parametrize(
    ("time", "said"),
    [(timedelta(seconds=42), "42 s"), (timedelta(minutes=7), "7 min"), (timedelta(hours=30), "30.0 h")],
)
def test_an_estimate_has_the_precision_of_one(time, said):
    assert messages.duration(time.total_seconds()) == said
