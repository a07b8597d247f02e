"""A stage that dies, hangs, has no memory or is told to stop: all end, one says why, and the run goes on afterwards."""

import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import jobs
import psutil
import pytest
from conftest import slow, wait_for_a_checkpoint
from runs import STEPS, alone, run_flags, sha256
from world import run_world

from hf_al.training import checkpoint

pytestmark = pytest.mark.medium


@pytest.mark.parametrize(
    ("killed", "first", "then"),
    [
        ("in a step", 3, 2), slow("in a step", 1, 4), slow("while saving", 4, 1), slow("while saving", 2, 3),
        slow("in an evaluation", 3, 4),
    ],
)  # fmt: skip
def test_a_resumed_run_may_have_another_number_of_stages(killed, first, then, run_flags, alone, tmp_path):
    case = "lstm_associated_state"
    flags = run_flags(case, first, tmp_path / "run", "--ddp_timeout=4")  # no launcher ends processes that still wait
    said = run_world(first, jobs.dies, killed, "killed", flags, check=False)
    assert said[0] == "ended with status -9"
    assert all("Error: Stage" in words or "SystemExit" in words for words in said[1:])
    assert not (tmp_path / "run" / "model.safetensors").exists()
    last = checkpoint.complete_checkpoints(tmp_path / "run")[-1]
    assert 13 <= int(last.name[-8:]) < {"in a step": 31, "while saving": 26, "in an evaluation": 44}[killed]
    more = run_flags(case, then, tmp_path / "run", "--resume_from_checkpoint=last")
    run_world(then, jobs.train, more)
    assert sha256(tmp_path / "run") == alone(case)


def test_a_killed_stage_ends_the_others_with_its_name(run_flags, tmp_path):
    said = run_world(3, jobs.dies, "in a step", "killed", run_flags("lstm_al_ce", 3, tmp_path / "run"), check=False)
    assert said[0] == "ended with status -9"
    assert "ConnectionError: Stage 1 lost stage 0 at step 3" in said[1]
    assert "--resume_from_checkpoint last continues from the last checkpoint." in said[1]
    assert "lost stage 1 at step" in said[2] or "SystemExit" in said[2]


def test_an_error_is_said_once_and_ends_all(run_flags, tmp_path):
    said = run_world(3, jobs.dies, "in a step", "error", run_flags("lstm_al_ce", 3, tmp_path / "run"), check=False)
    assert "ValueError: Died on purpose" in said[0]
    assert [words.splitlines()[-1] for words in said[1:]] == ["SystemExit: 2"] * 2


@pytest.mark.slow  # test_replicas has a quick one
@pytest.mark.parametrize(("number", "where"), [(signal.SIGTERM, 0), (signal.SIGTERM, 2), (signal.SIGINT, 1)])
def test_a_signal_at_any_stage_stops_all_after_the_same_step(number, where, run_flags, alone, tmp_path):
    flags = run_flags("lstm_al_ce", 3, tmp_path / "run", "--resume_from_checkpoint=last")
    said = run_world(3, jobs.signalled_in_step, number, 20, where, flags)
    assert len(set(said)) == 1
    status, step = said[0]
    assert status == 128 + number
    assert 20 < step < STEPS
    run_world(2, jobs.train, run_flags("lstm_al_ce", 2, tmp_path / "run", "--resume_from_checkpoint=last"))
    assert sha256(tmp_path / "run") == alone("lstm_al_ce")


@pytest.mark.slow
def test_a_signal_while_the_last_checkpoint_is_written_stops_all(run_flags, alone, tmp_path):
    flags = run_flags("lstm_al_ce", 2, tmp_path / "run")
    assert run_world(2, jobs.signalled_at_the_end, STEPS, flags) == [143, 143]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    run_world(1, jobs.train, run_flags("lstm_al_ce", 1, tmp_path / "run", "--resume_from_checkpoint=last"))
    assert sha256(tmp_path / "run") == alone("lstm_al_ce")


WHENS = [slow("in an evaluation"), slow("while saving"), slow("at the start"), slow("while exporting")]


@pytest.mark.parametrize("when", ["in a step", *WHENS])
def test_a_stage_that_hangs_is_named_and_ends_the_others(when, run_flags, tmp_path):
    flags = run_flags("lstm_al_ce", 2, tmp_path / "run", "--ddp_timeout=3")
    hung = int(when == "while exporting")
    said = run_world(2, jobs.dies, when, "stopped", flags, check=False, timeout=20, hung=hung)
    assert said[hung].startswith("still busy")  # no launcher here kills it
    where = {"in a step": "step ", "while saving": "step ", "at the start": "the start"}.get(when, "an evaluation")
    assert f"ConnectionError: Stage {1 - hung} lost stage {hung} at {where}" in said[1 - hung]
    assert "no word for 3 seconds. --resume_from_checkpoint last continues" in said[1 - hung]


@pytest.mark.parametrize("when", ["in a step", *WHENS])
def test_a_stage_without_memory_says_what_to_change(when, run_flags, tmp_path):
    said = run_world(2, jobs.dies, when, "memory", run_flags("lstm_al_ce", 2, tmp_path / "run"), check=False)
    victim = int(when == "while exporting")
    where, advice = {
        "in a step": ("step 32 of 60", "per_device_train_batch_size"),
        "while saving": (r"step \d+ of 60", "per_device_train_batch_size"),
        "in an evaluation": ("the evaluation after step 44", "per_device_eval_batch_size"),
    }.get(when, ("the start or the end of the run", "hidden_size"))
    assert re.search(rf"TooLarge: Ran out of memory at {where}\. Pass a smaller --{advice}", said[victim])
    assert said[victim].splitlines()[-1].endswith(" or --offload.")
    assert "SystemExit" in said[1 - victim].splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at the start", "while exporting"])
def test_a_stage_that_is_killed_outside_of_training_ends_the_others(when, run_flags, alone, tmp_path):
    flags = run_flags("lstm_al_ce", 2, tmp_path / "run", "--ddp_timeout=3")
    said = run_world(2, jobs.dies, when, "killed", flags, check=False)
    victim = 1 if when == "while exporting" else 0
    assert said[victim] == "ended with status -9"
    assert "ConnectionError: Stage" in said[1 - victim] or "SystemExit" in said[1 - victim]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    run_world(2, jobs.train, [*flags, "--resume_from_checkpoint=last"])
    assert sha256(tmp_path / "run") == alone("lstm_al_ce")


class Launched:
    """A run of two stages as a user starts it, and all its processes, which end with the test whatever happens."""

    def __init__(self, flags: list[str], folder: Path, log: Path):
        self.folder, self.log = folder, log
        self.processes: dict[int, psutil.Process] = {}
        with log.open("a") as said:
            self.launcher = subprocess.Popen(
                [sys.executable, "-m", "hf_al.cli", "train", *flags], stdout=said, stderr=said, start_new_session=True
            )

    def stages(self) -> list[psutil.Process]:
        """The processes that train, as soon as there are any."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.launcher.pid).children():
                if "hf_al_program" in child.cmdline():
                    self.processes[child.pid] = child
        return list(self.processes.values())

    def wait(self, seconds: float) -> int:
        """Waits until all have ended. The status of the launcher."""
        status = self.launcher.wait(seconds)
        _, alive = psutil.wait_procs(self.stages(), seconds)
        assert not alive, f"orphans: {alive}"
        return status

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, *_: object) -> None:
        for process in [*self.stages(), self.launcher]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()  # also one that is stopped


@pytest.mark.slow
def test_no_process_outlives_its_launcher(run_flags, tmp_path):
    flags = run_flags("lstm_al_ce", 2, tmp_path / "run", "--max_steps=1000000")
    with Launched(flags, tmp_path / "run", tmp_path / "log") as run:
        wait_for_a_checkpoint(run.launcher, tmp_path / "run", tmp_path / "log", seconds=40)
        assert len(run.stages()) == 2
        run.launcher.kill()
        assert run.wait(30) == -signal.SIGKILL
    said = (tmp_path / "log").read_text()
    assert "--resume_from_checkpoint last continues from the last checkpoint." in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_launcher_kills_a_stage_that_hangs(run_flags, tmp_path):
    flags = run_flags("lstm_al_ce", 2, tmp_path / "run", "--max_steps=1000000", "--ddp_timeout=5")
    with Launched(flags, tmp_path / "run", tmp_path / "log") as run:
        wait_for_a_checkpoint(run.launcher, tmp_path / "run", tmp_path / "log", seconds=40)
        run.stages()[1].suspend()
        assert run.wait(5 + 40) == 2
    said = (tmp_path / "log").read_text()
    assert said.count("no word for 5 seconds. --resume_from_checkpoint last continues") == 1
    assert "Traceback" not in said


@pytest.mark.slow
def test_kills_at_random_moments_leave_the_bytes_of_an_undisturbed_run(run_flags, alone, tmp_path):
    """A short form of the next one, in worlds."""
    moments = random.Random(0)
    flags = run_flags("lstm_al_ce", 2, tmp_path / "run", "--ddp_timeout=4", "--resume_from_checkpoint=last")
    for _ in range(2):
        victim, seconds = moments.randrange(2), moments.uniform(0.3, 2.5)
        said = run_world(2, jobs.killed_after, victim, seconds, flags, check=False)
        assert said[victim] == "ended with status -9"
    run_world(2, jobs.train, flags)
    assert sha256(tmp_path / "run") == alone("lstm_al_ce")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_at_any_time_leave_the_bytes_of_an_undisturbed_run(run_flags, alone, tmp_path):
    """Of either stage or of the launcher, at any moment of a run, its start included."""
    moments = random.Random(0)
    flags = run_flags("lstm_al_ce", 2, tmp_path / "run", "--ddp_timeout=10", "--resume_from_checkpoint=last")
    killed = 0
    while killed < 20:
        with Launched(flags, tmp_path / "run", tmp_path / "log") as run:
            with suppress(subprocess.TimeoutExpired):
                run.launcher.wait(moments.uniform(1, 15))
            if run.launcher.poll() is None:
                victims = [*run.stages(), run.launcher]
                moments.choice(victims).kill()
                killed += 1
                done = run.wait(10 + 30) == 0  # the victim had nothing left to do
                assert not done or sha256(tmp_path / "run") == alone("lstm_al_ce"), (tmp_path / "log").read_text()
            else:
                assert run.wait(10) == 0, (tmp_path / "log").read_text()
                assert sha256(tmp_path / "run") == alone("lstm_al_ce")
                for path in sorted((tmp_path / "run").rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
    with Launched(flags, tmp_path / "run", tmp_path / "log") as run:
        assert run.wait(60) == 0, (tmp_path / "log").read_text()
    assert sha256(tmp_path / "run") == alone("lstm_al_ce")
