"""Several processes as users start them (`hf-al train --stages`, `accelerate launch`): what they leave and print."""

import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import assert_mistake, in_own_mounts, run_program, slow, wait_for_a_checkpoint

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


@pytest.mark.slow
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


TWO_MACHINES = """
set -e
mount --bind hosts /etc/hosts
unshare --net sleep 300 & other=$!
trap "kill $other" EXIT
sleep 1
ip link set lo up
ip link add wire type veth peer name wire netns $other
ip address add 10.77.0.1/24 dev wire
ip link set wire up
second="nsenter --target $other --net"
$second sh -c "ip link set lo up; ip address add 10.77.0.2/24 dev wire; ip link set wire up"
(cd 1; exec $second unshare --time --monotonic 100000 "$@" --machine_rank=1 $PROGRAM >log 2>&1) & pid=$!
(cd 0; exec "$@" --machine_rank=0 $PROGRAM >log 2>&1)
wait $pid
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_machines_that_share_nothing_train_one_model(files, shell, tmp_path):
    """Each with a network, a folder, data and clocks of its own; they find each other by name."""
    data = ["--train_file=train.csv", "--validation_file=validation.csv"]
    flags = [*data, *SMALL, "--max_steps=6", "--output_dir=run", "--save_steps=2", "--trace=2", "--import=clock"]
    for machine, hours in (("0", 0), ("1", 5)):
        shutil.copytree(files, tmp_path / machine)
        (tmp_path / machine / "clock.py").write_text(
            f"import time\nnow = time.time\ntime.time = lambda: now() + 3600 * {hours}\n"
        )
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 first.machine\n10.77.0.2 second.machine\n")
    launcher = [
        str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file",
        str(ROOT / "recipes" / "accelerate" / "two_machines.yaml"), "--main_process_ip=first.machine",
        "--main_process_port=29511",
    ]  # fmt: skip
    recipe = shlex.join([str(ROOT / "recipes" / "train.py"), *flags, "--stages=2"])
    environment = {"ACCELERATE_USE_CPU": "1", "GLOO_SOCKET_IFNAME": "wire", "PROGRAM": recipe}
    alone = [*in_own_mounts(tmp_path), "--net"]
    if subprocess.run([*alone, "ip", "link", "add", "wire", "type", "veth"], capture_output=True).returncode:
        pytest.skip("this container allows no virtual network, not even in a namespace of its own")
    process = subprocess.Popen(
        [*alone, "sh", "-c", TWO_MACHINES, "sh", *launcher], cwd=tmp_path, env={**os.environ, **environment},
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        _, err = process.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    said = [(tmp_path / machine / "log").read_text() for machine in ("0", "1")]
    assert process.returncode == 0, "\n".join([err, *said])
    assert "stage 0 does not find run: checkpoints go over the wire." in said[0]
    assert not [path for path in (tmp_path / "1" / "run").rglob("*") if path.is_file()]
    assert len(list((tmp_path / "0" / "run" / "checkpoints").iterdir())) == 2
    here = [f"--{split}_file={files / f'{split}.csv'}" for split in ("train", "validation")]
    assert shell("train", *here, *SMALL, "--max_steps=6", f"--output_dir={tmp_path / 'alone'}")[0] == 0
    assert weights(tmp_path / "0" / "run") == weights(tmp_path / "alone")


@pytest.mark.slow
def test_a_port_that_is_taken_is_reported_where_it_is(data, tmp_path):
    """By accelerate's launcher, before any process starts."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launcher = [
            str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file",
            str(ROOT / "recipes" / "accelerate" / "two_machines.yaml"), "--main_process_ip=127.0.0.1",
            f"--main_process_port={port}",
        ]  # fmt: skip
        recipe = [str(ROOT / "recipes" / "train.py"), *data, *SMALL, "--stages=2", f"--output_dir={tmp_path / 'run'}"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
        done = subprocess.run([*launcher, *recipe], env=environment, capture_output=True, text=True, timeout=55)
    assert done.returncode != 0
    assert f"port `{port}`, but another process is utilizing it" in done.stderr
    assert not (tmp_path / "run").exists()


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
