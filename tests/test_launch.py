"""Several processes as users start them (`hf-al train --stages`, `accelerate launch`): what they leave and print."""

import logging
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import assert_mistake, run_program, slow, wait_for_a_checkpoint

from hf_al import cli, commands
from hf_al.training import checkpoint

ROOT = Path(__file__).parents[1]
SMALL = [
    "--num_blocks=2", "--hidden_size=16", "--target_size=12", "--threads=1", "--use_cpu", "--disable_tqdm",
    "--eval_strategy=no",
]  # fmt: skip


@pytest.fixture
def data(files) -> list[str]:
    return [f"--{split}_file={files / f'{split}.csv'}" for split in ("train", "validation")]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.medium
def test_stages_start_their_processes_and_leave_the_bytes_of_one(data, shell, tmp_path):
    """Even if somebody else has the port that accelerate's launcher takes first."""
    flags = [*data, *SMALL, "--max_steps=6"]
    with socket.socket() as taken:
        with suppress(OSError):  # taken anyway
            taken.bind(("127.0.0.1", 29500))
            taken.listen()
        done = run_program("train", *flags, "--stages=2", f"--output_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation metrics by exit") == 1
    assert done.stderr.count("Saved to") == 1
    assert "Traceback" not in done.stderr
    assert "c10d" not in done.stderr
    assert shell("train", *flags, f"--output_dir={tmp_path / 'one'}")[0] == 0
    assert weights(tmp_path / "two") == weights(tmp_path / "one")


@pytest.mark.slow
def test_replicas_start_their_processes_too(data, tmp_path):
    done = run_program("train", *data, *SMALL, "--max_steps=6", "--replicas=2", f"--output_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Saved to") == 1
    assert "0-1" in done.stderr, "the ranks of the stage"
    assert "Traceback" not in done.stderr
    assert weights(tmp_path / "run")


@pytest.mark.medium
def test_a_launch_that_fails_says_why_in_one_line_and_leaves_its_process_as_it_was(data, tmp_path, capfd):
    """A notebook that starts a run continues afterwards."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    environment = dict(os.environ)
    flags = [*data, *SMALL, "--objective=backprop", "--word_vectors=none", f"--output_dir={tmp_path / 'run'}"]
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(["train", *flags, "--stages=2"])
    out, err = capfd.readouterr()
    assert (end.value.code, out) == (2, "")
    assert [line for line in err.splitlines() if "Threads" not in line] == [
        "hf-al train: error: Expected a local objective with --stages 2, got backprop: its gradients cross all blocks. "
        "Leave --stages 2 out, or pass another --objective."
    ]
    assert not (tmp_path / "run").exists()
    assert [signal.getsignal(number) for number in numbers] == before
    assert dict(os.environ) == environment
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.slow
def test_accelerate_launch_takes_stages(data, shell, tmp_path):
    flags = [*data, *SMALL, "--max_steps=6"]
    config = ROOT / "recipes" / "accelerate" / "two_cpu_processes.yaml"
    program = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(config)]
    argv = [*program, str(ROOT / "recipes" / "train.py"), *flags, "--stages=2", f"--output_dir={tmp_path / 'two'}"]
    done = subprocess.run(
        argv, env={**os.environ, "ACCELERATE_USE_CPU": "1"}, capture_output=True, text=True, timeout=55
    )
    assert done.returncode == 0, done.stderr
    assert shell("train", *flags, f"--output_dir={tmp_path / 'one'}")[0] == 0
    assert weights(tmp_path / "two") == weights(tmp_path / "one")


@pytest.mark.slow
def test_two_launchers_meet_and_train_one_model(data, shell, tmp_path):
    """Two machines, as far as loopback can show."""
    flags = [*data, *SMALL, "--max_steps=6"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [
        str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file",
        str(ROOT / "recipes" / "accelerate" / "two_machines.yaml"), "--main_process_ip=127.0.0.1",
        f"--main_process_port={port}",
    ]  # fmt: skip
    recipe = [str(ROOT / "recipes" / "train.py"), *flags, "--stages=2", f"--output_dir={tmp_path / 'two'}"]
    launchers = []
    try:
        for machine in range(2):
            with (tmp_path / f"log{machine}").open("w") as log:
                launchers.append(
                    subprocess.Popen(
                        [*program, f"--machine_rank={machine}", *recipe], stdout=log, stderr=log,
                        env={**os.environ, "ACCELERATE_USE_CPU": "1"}, start_new_session=True,
                    )
                )  # fmt: skip
        said = "\n".join((tmp_path / f"log{machine}").read_text() for machine in range(2))
        assert [launcher.wait(50) for launcher in launchers] == [0, 0], said
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
    assert shell("train", *flags, f"--output_dir={tmp_path / 'one'}")[0] == 0
    assert weights(tmp_path / "two") == weights(tmp_path / "one")


@pytest.mark.parametrize("more", [["--stages=3"], ["--stages=5", "--num_blocks=4"]])
def test_more_stages_than_blocks_are_refused_before_any_process_starts(more, data, shell, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "launch", lambda *args: pytest.fail("started"))
    result = shell("train", *data, *SMALL, f"--output_dir={tmp_path / 'run'}", *more)
    blocks, stages = (2, 3) if len(more) == 1 else (4, 5)
    assert_mistake(
        result, f"Expected 1 to {blocks} stages, one or more blocks each, got {stages}.",
        "Pass fewer --stages, or more --num_blocks.",
    )  # fmt: skip


def test_a_launch_of_one_process_for_two_stages_is_refused_with_the_command(data, shell, tmp_path, monkeypatch):
    """As `accelerate launch --cpu --num_processes 2` starts it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    result = shell("train", *data, *SMALL, "--stages=2", f"--output_dir={tmp_path / 'run'}")
    assert_mistake(
        result, "Expected 2 processes, one per stage, got 1.", "hf-al train --stages 2 ...",
        "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2 --num_machines 1",
    )  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stages", [0, -1])
def test_a_run_of_no_stages_is_refused(stages, data, shell, tmp_path):
    flags = [*data, *SMALL, f"--output_dir={tmp_path / 'run'}", f"--stages={stages}"]
    assert_mistake(shell("train", *flags), "stages", str(stages))
    assert not (tmp_path / "run").exists()


@pytest.mark.medium
@pytest.mark.parametrize(
    ("number", "status"),
    [slow(signal.SIGINT, 130), slow(signal.SIGTERM, 143)],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_signal_to_the_launcher_stops_all_with_a_checkpoint(number, status, data, tmp_path):
    """Ctrl-C reaches every process of the terminal, and each stage once more from the launcher."""
    flags = [*data, *SMALL, "--max_steps=100000", "--save_steps=50", f"--output_dir={tmp_path / 'run'}", "--stages=2"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "hf_al.cli", "train", *flags], stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_for_a_checkpoint(process, tmp_path / "run", tmp_path / "log", seconds=40)
            if number == signal.SIGINT:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            assert process.wait(30) == status, (tmp_path / "log").read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    said = (tmp_path / "log").read_text()
    step = checkpoint.read_manifest(checkpoint.complete_checkpoints(tmp_path / "run")[-1])["progress"]["step"]
    assert said.count(f"Stopped by {number.name} after step {step} of 100000") == 1, said
    assert "Traceback" not in said
