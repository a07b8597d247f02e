"""Ctrl-C, readers that go away and terminals: what happens around a running command."""

import json
import os
import signal
import subprocess
import sys
import termios
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import pytest
from conftest import assert_mistake, slow

from hf_al.cli import main

SCRIPT = str(Path(sys.executable).with_name("hf-al"))


@pytest.mark.medium
@pytest.mark.parametrize("command", ["inspect", slow("predict"), slow("evaluate"), slow("export")])
def test_each_command_works_in_a_process_of_its_own(command, trained, files, tmp_path):
    """In a test's process all modules are there, whoever imported them."""
    more = {
        "inspect": [], "predict": ["a fine day"], "evaluate": ["--test_file", str(files / "test.csv")],
        "export": [str(tmp_path / "copy")],
    }  # fmt: skip
    done = subprocess.run(
        [SCRIPT, command, str(trained[0]), *more[command]], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout or (tmp_path / "copy" / "config.json").exists()


# --- stopping


@pytest.mark.medium
def test_ctrl_c_is_one_message_and_status_130(trained, start):
    process = start("predict", str(trained[0]), "--batch_size=1", "--threads=1")
    process.stdin.write(b"a fine day\n" * 16)
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["label"]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.wait(60) == 130
    assert err == "hf-al predict: interrupted.\n"


@pytest.mark.medium
def test_ctrl_c_leaves_the_answers_so_far_beside_their_place(trained, start, tmp_path):
    output = tmp_path / "answers.jsonl"
    process = start("predict", str(trained[0]), "--batch_size=1", "--threads=1", "--output", str(output))
    process.stdin.write(b"a fine day\n" * 40)
    process.stdin.flush()
    found: list[Path] = []
    while process.poll() is None and not (found and len(found[0].read_text().splitlines()) == 32):
        found = list(tmp_path.glob("answers.jsonl.*.tmp"))
    (aside,) = found
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.wait(60) == 130
    assert err == f"hf-al predict: interrupted. What was written so far is in {aside}.\n"
    assert len(aside.read_text().splitlines()) == 32
    assert not output.exists()


@pytest.mark.medium
def test_a_full_disk_leaves_the_answers_so_far_and_says_where(trained, tmp_path):
    (tmp_path / "long.txt").write_text("a fine day\n" * 3000)
    limit = f"ulimit -f 20; exec {sys.executable} -m hf_al_program predict {trained[0]} --threads 1 "
    done = subprocess.run(
        ["bash", "-c", f"{limit} --input long.txt --output answers.jsonl"], cwd=tmp_path, capture_output=True, text=True
    )
    (aside,) = tmp_path.glob("answers.jsonl.*.tmp")
    assert done.returncode == 2
    assert done.stderr == (
        "hf-al predict: error: Could not write the answers to answers.jsonl: File too large. Make room there, or name "
        f"another file. What was written so far is in {aside}.\n"
    )


@pytest.mark.medium
def test_a_full_device_is_named(trained, shell, tmp_path):
    (tmp_path / "one.txt").write_text("a fine day\n")
    result = shell("predict", str(trained[0]), "--input", str(tmp_path / "one.txt"), "--output", "/dev/full")
    assert_mistake(result, "Could not write the answers to /dev/full: No space left on device.")


@pytest.mark.medium
def test_ctrl_c_in_training_says_how_to_go_on(files, start, tmp_path):
    data = [f"--train_file={files / 'train.csv'}", f"--output_dir={tmp_path}", "--max_steps=100000", "--use_cpu",
            "--eval_strategy=steps", "--eval_steps=5"]  # fmt: skip
    process = start("train", *data, "--num_blocks=2", "--hidden_size=16", "--target_size=12", "--threads=1")
    for line in process.stderr:
        if b"step 5: validation" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.wait(60) == 130
    lines = err.splitlines()
    assert lines[-1] == "hf-al train: interrupted."
    assert "Continue with --resume_from_checkpoint last." in lines[-2]
    assert "Traceback" not in err


@pytest.mark.medium
def test_a_reader_that_goes_away_ends_the_program_quietly(trained, start):
    process = start("predict", str(trained[0]), "--batch_size=1", "--threads=1")
    process.stdin.write(b"a fine day\n" * 16)
    process.stdin.flush()
    process.stdout.readline()
    process.stdout.close()
    process.stdin.write(b"a fine day\n" * 16)
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0


def test_help_into_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([SCRIPT, "train", "--help"], stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


# --- progress bars


@contextmanager
def terminal():
    """Standard error is a terminal; yields a function that returns what it has shown."""
    reader, writer = os.openpty()
    termios.tcsetwinsize(reader, (24, 100))

    def shown() -> str:
        print("<end>", end="", file=file, flush=True)
        seen = ""
        while not seen.endswith("<end>"):  # the kernel hands on what was written a little later, in parts
            seen += os.read(reader, 100_000).decode()
        return seen

    with open(writer, "w") as file, redirect_stderr(file):
        yield shown
    os.close(reader)


@pytest.mark.medium
@pytest.mark.parametrize("flags", [[], ["--disable_tqdm"]], ids=["bar", "no bar"])
def test_a_terminal_has_progress_bars_unless_they_are_off(flags, trained, files, capsys):
    folder, _ = trained
    with terminal() as shown:
        main(["predict", str(folder), "--input", str(files / "test.csv"), "--threads=1", *flags])
        assert ("rows/s" in shown()) == (not flags)
        main(["evaluate", str(folder), "--test_file", str(files / "test.csv"), "--threads=1", *flags])
        assert ("Evaluating: 100%" in shown()) == (not flags)
    assert len(capsys.readouterr().out.splitlines()) == 81


@pytest.mark.medium
def test_a_file_has_no_progress_bars(trained, files, shell):
    folder, _ = trained
    for argv in (["predict", str(folder), "--input"], ["evaluate", str(folder), "--test_file"]):
        status, _, err = shell(*argv, str(files / "test.csv"), "--threads=1")
        assert status == 0
        assert "/s]" not in err
    assert "/s]" not in trained[1].stderr
