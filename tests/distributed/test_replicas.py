"""Replicas of the stages: the same bits however the blocks are split, and the global batches of one process."""

import json
import signal

import jobs
import pytest
import torch
from conftest import slow
from runs import CASES, STEPS, run_flags, sha256
from safetensors.torch import load_file
from world import run_world

pytestmark = pytest.mark.medium


@pytest.fixture
def run(run_flags, tmp_path):
    """run(case, stages, replicas, *flags) -> the folder of that run."""

    def of(case: str, stages: int, replicas: int, *more: str, name: str | None = None):
        folder = tmp_path / (name or f"{stages}x{replicas}")
        flags = run_flags(
            case, stages, folder, f"--replicas={replicas}", "--embedding_optimizer=same", "--max_steps=30", *more
        )
        run_world(stages * replicas, jobs.train, flags, timeout=120)
        return folder

    return of


def assert_alike(folders) -> None:
    """Up to rounding: the models, and the losses and gradient norms on the way to them."""
    models = [load_file(folder / "model.safetensors") for folder in folders]
    logs = [
        [
            {name: value for name, value in row.items() if name.startswith(("loss", "grad_norm"))}
            for row in json.loads((folder / "report.json").read_text())["history"]
        ]
        for folder in folders
    ]
    assert sum(map(len, logs[0])) > 5
    for other, log in zip(models[1:], logs[1:], strict=True):
        for name, tensor in models[0].items():
            torch.testing.assert_close(other[name], tensor, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(log, logs[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("case", "stages", "replicas"),
    [
        ("lstm_al_ce", 2, 2), slow("lstm_associated_state", 2, 2), slow("transformer_associated", 3, 2),
        slow("transformer_al_ce_plateau_sparse", 2, 3), slow("lstm_al_ce", 4, 2),
    ],
)  # fmt: skip
def test_stages_of_replicas_give_the_bits_of_replicas_alone(case, stages, replicas, run):
    few = ["--max_steps=14", "--eval_steps=7"]
    assert sha256(run(case, 1, replicas, *few), 14) == sha256(run(case, stages, replicas, *few), 14)


@pytest.mark.parametrize("replicas", [2, slow(4)])
def test_replicas_train_on_the_global_batches_of_one_process(replicas, run):
    """Accumulation makes up for the replicas; without dropout, only sums are rounded in another order."""
    plain = ["--hidden_dropout_prob=0", "--embedding_dropout_prob=0", "--bridge_dropout_prob=0", "--max_steps=22"]
    folders = [
        run("lstm_al_ce", 1, count, *plain, f"--gradient_accumulation_steps={4 // count}") for count in (1, replicas)
    ]
    assert_alike(folders)


@pytest.mark.slow
def test_running_statistics_are_those_of_the_first_replica(run_flags, tmp_path):
    flags = run_flags("lstm_al_ce", 1, tmp_path / "run", "--replicas=2", "--max_steps=30", "--eval_steps=30")
    theirs, ours = (found["statistics"] for found in run_world(2, jobs.train_with_statistics, flags))
    assert ours == theirs
    assert any(values for values in ours.values())


def test_only_the_main_process_is_told_of_evaluations(run_flags, tmp_path):
    flags = run_flags("lstm_al_ce", 1, tmp_path / "run", "--replicas=2", "--max_steps=2", "--eval_steps=1")
    assert sorted(run_world(2, jobs.count_evaluations, flags)) == [0, 2]


def test_processes_with_another_split_are_refused(run_flags, tmp_path):
    flags = run_flags("lstm_al_ce", 2, tmp_path / "run")
    said = run_world(2, jobs.other_flags_at_the_first_stage, ["--stages=1", "--replicas=2"], flags, check=False)
    assert any("Expected the same arguments in all processes, got another at stage" in words for words in said)


@pytest.mark.slow
def test_a_batch_of_fewer_rows_than_replicas_is_trained_on(run):
    few = ["--max_train_samples=17", "--per_device_train_batch_size=2", "--gradient_accumulation_steps=4"]
    assert sha256(run("lstm_al_ce", 1, 2, *few), 30) == sha256(run("lstm_al_ce", 2, 2, *few), 30)


@pytest.mark.slow
def test_replicas_resume_on_another_number_of_stages(run):
    constant = ["--lr_scheduler_type=constant", "--warmup_steps=0", "--eval_steps=10"]
    whole = run("lstm_al_ce", 1, 2, *constant, name="whole")
    run("lstm_al_ce", 2, 2, "--max_steps=20", *constant, name="parts")
    parts = run("lstm_al_ce", 1, 2, "--resume_from_checkpoint=last", *constant, name="parts")
    assert sha256(parts, 30) == sha256(whole, 30)


@pytest.mark.parametrize("where", [1, slow(0), slow(2), slow(3)])
def test_a_signal_at_any_process_stops_all_after_the_same_step(where, run_flags, tmp_path):
    flags = run_flags("lstm_al_ce", 2, tmp_path / "run", "--replicas=2")
    said = run_world(4, jobs.signalled_in_step, signal.SIGTERM, 20, where, flags)
    assert len(set(said)) == 1
    status, step = said[0]
    assert status == 143
    assert 20 < step < STEPS


def test_backpropagation_has_replicas_too(run):
    plain = ["--objective=backprop", "--max_steps=11", "--hidden_dropout_prob=0", "--embedding_dropout_prob=0"]
    plain += ["--bridge_dropout_prob=0"]
    assert_alike([run("lstm_al_ce", 1, 1, *plain, "--gradient_accumulation_steps=4"), run("lstm_al_ce", 1, 2, *plain)])


def test_a_killed_replica_ends_the_others_with_its_name(run_flags, tmp_path):
    flags = run_flags("lstm_al_ce", 1, tmp_path / "run", "--replicas=2")
    said = run_world(2, jobs.dies, "in a step", "killed", flags, check=False)
    assert said[0] == "ended with status -9"
    assert "ConnectionError: Stage 0 of replica 0 lost another replica of stage 0 at step 32" in said[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "how"),
    [("at the start", "killed"), ("in an evaluation", "killed"), ("in a step", "stopped"), ("in a step", "memory")],
)
def test_whatever_ends_a_replica_ends_the_others_in_time(when, how, run_flags, tmp_path):
    flags = run_flags("lstm_al_ce", 2, tmp_path / "run", "--replicas=2", "--ddp_timeout=3")
    hung = 0 if how == "stopped" else None
    said = run_world(4, jobs.dies, when, how, flags, check=False, timeout=3 + 30, hung=hung)
    last = {
        "killed": "ended with status -9",
        "stopped": "still busy",
        "memory": "TooLarge: Ran out of memory at step",
    }
    assert last[how] in said[0]
    for words in said[1:]:
        assert words.splitlines()[-1].startswith(("hf_al", "ConnectionError: Stage", "SystemExit: ")), words
    assert how == "memory" or any("ConnectionError: Stage" in words for words in said[1:])
