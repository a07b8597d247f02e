"""What goes wrong around a run: disks that are full or read-only, signals, kills. The last checkpoint stays."""

import builtins
import errno
import gc
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import in_own_mounts, slow, wait_for_a_checkpoint
from hooks import hook
from transformers import AutoModelForSequenceClassification

import hf_al
from hf_al import atomic
from hf_al import report as reporting
from hf_al.cli import main
from hf_al.training import checkpoint
from hf_al.training.stage import Stage

STEPS = 12
FLAGS = [
    f"--max_steps={STEPS}", "--max_train_samples=100", "--per_device_train_batch_size=8", "--eval_strategy=no",
    "--num_blocks=2", "--hidden_size=16", "--target_size=12", "--threads=1", "--use_cpu", "--disable_tqdm",
    "--max_seq_length=32", "--save_steps=4",
]  # fmt: skip
LAST = "--resume_from_checkpoint=last"


@pytest.fixture(scope="module")
def files(few_tweets, tmp_path_factory) -> list[str]:
    """The flags that name a training and a validation file, which any user of the machine may read."""
    folder = Path(tempfile.mkdtemp(prefix="hf_al_data_"))
    folder.chmod(0o755)
    for split in ("train", "validation"):
        few_tweets[split].to_json(folder / f"{split}.jsonl")
    yield [f"--{split}_file={folder / f'{split}.jsonl'}" for split in ("train", "validation")]
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory) -> Path:
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    main(["train", *files, *FLAGS, f"--output_dir={folder}"])
    return folder


@pytest.fixture
def shell(capsys):
    """`hf-al ARGV` in this process: shell("train", ...) -> (exit status, standard error)."""

    def run(*argv: str) -> tuple[int, str]:
        capsys.readouterr()
        status = 0
        try:
            main(list(argv))
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().err

    return run


def weights_of(folder: Path) -> list[bytes]:
    last = checkpoint.checkpoint_path(folder, STEPS)
    return [path.read_bytes() for path in [folder / "model.safetensors", *sorted(last.glob("*.safetensors"))]]


def steps_of(folder: Path) -> list[int]:
    return [checkpoint.read_manifest(path)["progress"]["step"] for path in checkpoint.complete_checkpoints(folder)]


def before_step(monkeypatch, step: int, act) -> None:
    """Calls `act()` in the middle of optimizer step `step`, counted from 1."""

    def at_step(call):
        if call.step + 1 == step:
            act()

    hook(monkeypatch, Stage, "train_batch", before=at_step)


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if "tmp" in path.name]


# --- a full disk


@contextmanager
def no_file_above(size: int):
    """A limit that the system enforces on this process, like a quota; setting it needs no privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_without_room_ends_with_one_message_and_the_run_goes_on_later(
    files, undisturbed, shell, tmp_path, monkeypatch
):
    argv = ["train", *files, *FLAGS, f"--output_dir={tmp_path / 'run'}"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before_step(monkeypatch, 7, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard)))
    try:
        status, err = shell(*argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        monkeypatch.undo()
    assert status == 2, err
    assert err.splitlines()[-1] == (
        f"hf-al train: error: Could not write checkpoint-00000008 to {tmp_path / 'run'}: File too large. Make room "
        "there, or make it writable; then --resume_from_checkpoint last continues from step 4."
    )
    assert "Traceback" not in err
    assert steps_of(tmp_path / "run") == [4]
    assert not leftovers(tmp_path)
    assert shell(*argv, LAST)[0] == 0
    assert weights_of(tmp_path / "run") == weights_of(undisturbed)


def test_an_export_without_room_keeps_the_checkpoints_and_the_old_model(files, undisturbed, shell, tmp_path):
    """tokenizer.json and the weights are written by libraries that raise exceptions of their own."""
    shutil.copytree(undisturbed, tmp_path / "run")
    old = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    argv = ["train", *files, *FLAGS, f"--output_dir={tmp_path / 'run'}", LAST]
    biggest = max(len(content) for content in old.values())
    for size in (100, 1000, len(old["tokenizer.json"]) - 1, biggest - 1):
        with no_file_above(size):
            status, err = shell(*argv)
        assert status == 2
        expected = f"Could not write the model to {tmp_path / 'run'}: File too large. Make room there"
        assert err.splitlines()[-1].startswith(f"hf-al train: error: {expected}"), err
        assert err.splitlines()[-1].endswith(f"continues from step {STEPS}.")
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == old
        assert not leftovers(tmp_path)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # datasets leaves the csv file open
def test_a_cache_without_room_says_where_it_is(tmp_path, shell):
    rows = "".join(f"some text number {n},{'ab'[n % 2]}\n" for n in range(300))
    (tmp_path / "train.csv").write_text(f"text,label\n{rows}")
    with no_file_above(2000):
        status, err = shell("train", f"--train_file={tmp_path / 'train.csv'}", f"--output_dir={tmp_path / 'run'}")
    gc.collect()
    assert status == 2
    assert err.splitlines()[-1] == (
        "hf-al train: error: Could not write to the cache of datasets: File too large. Make room there, or name "
        "another place: HF_HOME=FOLDER."
    )
    assert not (tmp_path / "run").exists()


SMALL_DISK = """
import os, subprocess, sys
from pathlib import Path
from hf_al.cli import main
from hf_al.training import checkpoint

disk, argv = Path(sys.argv[1]), sys.argv[2:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], check=True)
try:
    main(["train", *argv])
except SystemExit as stop:
    print("status", stop.code)
free = os.statvfs(disk)
print("free", free.f_bavail * free.f_bsize)
print("steps", [p.name for p in checkpoint.complete_checkpoints(disk / "run")], os.listdir(disk / "run/checkpoints"))
subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
main(["train", *argv, "--resume_from_checkpoint=last"])
print("done", sorted(os.listdir(disk / "run")))
"""


@pytest.mark.slow
def test_a_disk_that_is_really_full_keeps_the_last_checkpoint(files, tmp_path):
    """A small tmpfs."""
    alone = in_own_mounts(tmp_path)
    flags = [*files, *FLAGS, f"--output_dir={tmp_path / 'run'}", "--save_steps=1", "--save_total_limit=99"]
    done = subprocess.run(
        [*alone, sys.executable, "-c", SMALL_DISK, str(tmp_path), *flags], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "status 2" in done.stdout
    assert "Traceback" not in done.stderr
    message = re.search(
        r"Could not write checkpoint-(\d+) to .*: No space left on device\..* step (\d+)\.", done.stderr
    )
    assert message, done.stderr
    failed, kept = map(int, message.groups())
    assert kept == failed - 1 > 0
    steps = [f"checkpoint-{step:08d}" for step in range(1, kept + 1)]
    listed = re.search(r"^steps (\[.*?\]) (\[.*?\])$", done.stdout, re.MULTILINE)
    assert eval(listed[1]) == sorted(eval(listed[2])) == steps, "what was begun must not fill the disk"
    assert "'config.json'" in done.stdout.splitlines()[-1]


# --- a folder that may not be written


@contextmanager
def as_an_ordinary_user():
    """As another user than root, who may write everywhere, whatever a folder's mode."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder(monkeypatch):
    """A folder that every user may write to, with a cache in it: pytest's folders are for one user only."""
    folder = Path(tempfile.mkdtemp(prefix="hf_al_open_"))
    (folder / "cache").mkdir()
    for path in (folder, folder / "cache"):
        path.chmod(0o777)
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder / "cache"))
    yield folder
    subprocess.run(["chmod", "-R", "u+w", folder], check=True)
    shutil.rmtree(folder)


def test_a_read_only_output_dir_is_refused_before_anything_is_read(open_folder, shell):
    (open_folder / "run").mkdir(mode=0o555)
    (open_folder / "old").mkdir()
    (open_folder / "old" / "config.json").write_text("mine")
    (open_folder / "old").chmod(0o555)
    with as_an_ordinary_user():
        for name, *more in (["run"], ["run/deeper/still"], ["old", "--overwrite_output_dir"], ["old", LAST]):
            status, err = shell("train", "--train_file=no.csv", f"--output_dir={open_folder / name}", *more)
            assert status == 2
            assert err.splitlines()[-1] == (
                f"hf-al train: error: Expected a writable output_dir, got {open_folder / name}: Permission denied. "
                "Pass another folder, or fix its permissions."
            )
    assert (open_folder / "old" / "config.json").read_text() == "mine"
    assert not list((open_folder / "run").iterdir())


def test_checkpoints_that_become_read_only_end_the_run_with_one_message(files, open_folder, shell, monkeypatch):
    folder = open_folder / "run" / "checkpoints"
    before_step(monkeypatch, 7, lambda: folder.chmod(0o555))
    with as_an_ordinary_user():
        status, err = shell("train", *files, *FLAGS, f"--output_dir={open_folder / 'run'}")
    assert status == 2
    assert err.splitlines()[-1] == (
        f"hf-al train: error: Could not write checkpoint-00000008 to {open_folder / 'run'}: Permission denied. Make "
        "room there, or make it writable; then --resume_from_checkpoint last continues from step 4."
    )
    assert "Traceback" not in err
    assert steps_of(open_folder / "run") == [4]


# --- every touch of the disk in an export


class Broken(OSError):
    """A disk that fails."""


def fail_at(patch: pytest.MonkeyPatch, folder: Path, call: int, once: bool) -> list[str]:
    """Makes the n-th call that changes the disk fail, or all from that one on."""
    calls: list[str] = []

    def guard(owner, name, counts=lambda *args, **kwargs: True):
        original = getattr(owner, name)

        def guarded(*args, **kwargs):
            if counts(*args, **kwargs):
                calls.append(name)
                if len(calls) == call or (len(calls) > call and not once):
                    raise Broken(errno.ENOSPC, name)
            return original(*args, **kwargs)

        patch.setattr(owner, name, guarded)

    def writes(file, mode="r", *args, **kwargs):
        return not isinstance(file, int) and str(file).startswith(str(folder)) and set(mode) & set("wax+")

    import transformers.modeling_utils

    guard(transformers.modeling_utils, "safe_save_file")
    guard(builtins, "open", writes)
    guard(io, "open", writes)
    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
        guard(os, name)
    return calls


@pytest.fixture(scope="module")
def two_models(undisturbed):
    """Two models of one architecture, told apart by their weights and the step in their reports."""
    import json

    model, tokenizer = hf_al.loading.load_model(str(undisturbed))
    other, _ = hf_al.loading.load_model(str(undisturbed))
    for parameter in other.parameters():
        parameter.data += 1
    report = json.loads((undisturbed / "report.json").read_text())
    return [(model, tokenizer, report), (other, tokenizer, {**report, "steps": 99})]


def write_model(folder: Path, content) -> None:
    model, tokenizer, report = content
    with atomic.export(folder) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        reporting.write_report(aside, report)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_old_new_or_no_model(folder: Path, old: dict, new: dict) -> str:
    now = {name: content for name, content in bytes_of(folder).items() if "tmp" not in name}
    if now in (old, new):
        return "old" if now == old else "new"
    assert "config.json" not in now
    with pytest.raises((OSError, ValueError), match="config"):
        AutoModelForSequenceClassification.from_pretrained(folder)
    return "none"


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("how", [slow("one_call_fails"), slow("all_later_calls_fail"), "the_process_dies"])
def test_an_export_that_breaks_anywhere_leaves_the_old_model_the_new_one_or_none(how, two_models, tmp_path):
    first, second = two_models
    write_model_to(tmp_path / "old", first)
    write_model_to(tmp_path / "new", second)
    old, new = bytes_of(tmp_path / "old"), bytes_of(tmp_path / "new")
    shutil.copytree(tmp_path / "old", tmp_path / "count")
    with pytest.MonkeyPatch.context() as patch:
        counted = fail_at(patch, tmp_path, 10**9, True)
        write_model(tmp_path / "count", second)
        calls = len(counted)
    assert calls > 20
    seen = set()
    for call in range(1, calls + 1):
        folder = tmp_path / f"broken_{call}"
        shutil.copytree(tmp_path / "old", folder)
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, tmp_path, call, how == "one_call_fails")
            if how == "the_process_dies":
                patch.setattr(__name__ + ".Broken", lambda *_: os._exit(9))
                if not (child := os.fork()):
                    with suppress(BaseException):
                        write_model(folder, second)
                    os._exit(0)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
            else:
                with suppress(Broken):
                    write_model(folder, second)
        seen.add(assert_old_new_or_no_model(folder, old, new))
        if how == "one_call_fails":
            assert not leftovers(folder)
        write_model(folder, second)
        assert bytes_of(folder) == new
        shutil.rmtree(folder)
    assert seen == {"old", "new", "none"}


def write_model_to(folder: Path, content) -> None:
    folder.mkdir()
    write_model(folder, content)


# --- signals


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_finishes_the_step_saves_and_raises(number, error, few_tweets, tmp_path, monkeypatch, caplog):
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    before_step(monkeypatch, 5, lambda: os.kill(os.getpid(), number))
    args = hf_al.TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, threads=1, eval_strategy="no",
        model={"num_blocks": 2, "hidden_size": 16, "target_size": 12},
    )  # fmt: skip
    with pytest.raises(error) as stop:
        hf_al.train(args, few_tweets)
    assert error is KeyboardInterrupt or stop.value.code == 143
    assert steps_of(tmp_path) == [5]
    assert caplog.records[-1].message == (
        f"Stopped by {number.name} after step 5 of 30, with a checkpoint in {tmp_path}. "
        "Continue with --resume_from_checkpoint last."
    )
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers


def test_a_second_signal_ends_at_once(few_tweets, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    before_step(monkeypatch, 5, twice)
    args = hf_al.TrainingArguments(output_dir=str(tmp_path), max_steps=30, threads=1, model={"num_blocks": 2})
    with pytest.raises(KeyboardInterrupt):
        hf_al.train(args, few_tweets)
    assert steps_of(tmp_path) == []


def test_a_signal_at_the_last_step_is_not_lost(files, undisturbed, shell, tmp_path, monkeypatch):
    argv = ["train", *files, *FLAGS, f"--output_dir={tmp_path}"]
    before_step(monkeypatch, STEPS, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert shell(*argv)[0] == 143
    assert steps_of(tmp_path)[-1] == STEPS
    assert not (tmp_path / "config.json").exists()
    monkeypatch.undo()
    assert shell(*argv, LAST)[0] == 0
    assert weights_of(tmp_path) == weights_of(undisturbed)


def test_an_ignored_signal_stays_ignored(few_tweets, tmp_path, monkeypatch):
    """As under nohup, or in the background of a script."""
    before_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    args = hf_al.TrainingArguments(output_dir=str(tmp_path), max_steps=3, threads=1, model={"num_blocks": 2})
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        hf_al.train(args, few_tweets)
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_run_in_another_thread_leaves_signals_alone(few_tweets, tmp_path):
    args = hf_al.TrainingArguments(output_dir=str(tmp_path), max_steps=3, threads=1, model={"num_blocks": 2})
    results = []
    thread = threading.Thread(target=lambda: results.append(hf_al.train(args, few_tweets)))
    thread.start()
    thread.join()
    assert results[0].report["steps"] == 3


@pytest.mark.medium
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_a_stopped_process_ends_with_the_status_of_its_signal_and_a_checkpoint(number, status, files, start, tmp_path):
    flags = [*files, *FLAGS, f"--output_dir={tmp_path / 'run'}", "--max_steps=100000", "--save_steps=200"]
    process = start("train", *flags, log=tmp_path / "log")
    wait_for_a_checkpoint(process, tmp_path / "run", tmp_path / "log")
    process.send_signal(number)
    assert process.wait(60) == status
    said = (tmp_path / "log").read_text()
    step = steps_of(tmp_path / "run")[-1]
    assert f"Stopped by {number.name} after step {step} of 100000" in said
    assert "Send the same signal again to stop at once" in said
    assert "Traceback" not in said


# --- secrets


@pytest.mark.slow
def test_no_secret_of_the_environment_is_written_anywhere(files, tmp_path):
    """Not by a run with checkpoints and a tracker, by evaluate, an export, a mistake or a crash."""
    secrets = {
        "HF_TOKEN": "hf_PlantedSecretNumberOne", "WANDB_API_KEY": "PlantedSecretNumberTwo" * 2,
        "AWS_SECRET_ACCESS_KEY": "PlantedSecret/Number+Three", "MY_PASSWORD": "PlantedSecretNumberFour",
    }  # fmt: skip
    run = tmp_path / "run"
    program = textwrap.dedent(
        f"""
        import sys, hf_al
        from hf_al.cli import main
        for argv in sys.argv[1].split(chr(10)):
            try:
                main(argv.split())
            except SystemExit as stop:
                print(stop.code)
        hf_al.ALLstmForSequenceClassification.from_pretrained({str(run)!r}).save_pretrained(
            {str(tmp_path / "lean")!r}, inference_only=True)
        """
    )
    data = " ".join(files)
    test_file = files[1].partition("=")[2]
    commands = [
        f"train {data} {' '.join(FLAGS)} --report_to=tensorboard --output_dir={run}",
        f"evaluate {run} --test_file={test_file}",
        f"evaluate {tmp_path}/nowhere --test_file={test_file}",
        f"train {data} --output_dir={run}",
    ]
    environment = {**os.environ, **secrets, "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", program, "\n".join(commands)], capture_output=True, env=environment, timeout=180
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().count("\n2\n") >= 1
    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"events", "manifest.json", "report.json", "model.safetensors", "training_config.yaml"} <= {
        "events" if "tfevents" in path.name else path.name for path in written
    }
    written |= {"standard output": done.stdout, "standard error": done.stderr}
    for name, secret in secrets.items():
        assert not [str(path) for path, content in written.items() if secret.encode() in content], name
