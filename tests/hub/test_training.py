"""Training that shares its model, and its checkpoints on the way."""

import json
import os
import shutil
from pathlib import Path

import hub_jobs as jobs
import pytest
import yaml
from server import TOKEN

import hf_al
from hf_al.hub import Checkpoints
from hf_al.parsing import parse_arguments
from hf_al.training.checkpoint import open_checkpoint
from hf_al.training.run_folder import adopt_best

pytestmark = [pytest.mark.medium, pytest.mark.timeout(120)]
TEXTS = ["thank you so much", "you lost my bag"]


@pytest.fixture
def flags(files) -> list[str]:
    data = [f"--{split}_file={files / f'{split}.csv'}" for split in ("train", "validation", "test")]
    small = ["--num_blocks=2", "--hidden_size=16", "--target_size=12", "--threads=1", "--use_cpu", "--max_steps=30"]
    return [*data, *small, "--plots=false", "--disable_tqdm", "--eval_strategy=no", "--save_steps=4"]


def test_a_run_is_shared_when_it_ends(hub, flags, tmp_path):
    folder = tmp_path / "my_run"
    status, _, err = hub.run(jobs.shell, "train", *flags, f"--output_dir={folder}", "--push_to_hub")
    assert status == 0, err
    assert f"Pushed to {hub.endpoint}/tester/my_run/commit/" in err
    assert hub.run(jobs.answers, "tester/my_run", TEXTS) == hub.run(jobs.answers, str(folder), TEXTS)
    assert not [name for name in hub.run(jobs.files, "tester/my_run") if name.startswith("last-checkpoint")]


@pytest.mark.parametrize("best", ["none", "earlier"])
def test_a_stopped_run_goes_on_from_the_checkpoint_on_the_hub(best, hub, flags, tmp_path):
    """On a machine that has nothing but the data and the id; it ends as the undisturbed run does."""
    repo = f"tester/stopped_{best}"
    if best == "earlier":  # at a rate this low, no evaluation is better than the first
        flags = [*flags, "--eval_strategy=steps", "--eval_steps=6", "--learning_rate=1e-12", "--save_total_limit=1"]
    status, _, err = hub.run(jobs.shell, "train", *flags, f"--output_dir={tmp_path / 'undisturbed'}")
    assert status == 0, err
    shared = [*flags, "--push_to_hub", f"--hub_model_id={repo}", "--hub_strategy=checkpoint"]
    status, _, err = hub.run(jobs.interrupted, 17, "train", *shared, f"--output_dir={tmp_path / 'first'}")
    assert status == 130, err
    assert not list((tmp_path / "first" / "checkpoints").glob("tmp-*"))
    shutil.rmtree(tmp_path / "first")
    names = {name.split("/")[0] for name in hub.run(jobs.files, repo)}
    assert "last-checkpoint" in names
    assert ("best-checkpoint" in names) == (best == "earlier")
    assert "model.safetensors" not in names
    there = Path(hub.run(jobs.download, repo)) / "last-checkpoint"
    again = [*shared, f"--output_dir={tmp_path / 'second'}", f"--resume_from_checkpoint={there}"]
    status, _, err = hub.run(jobs.shell, "train", *again)
    assert status == 0, err
    assert "step 18 of 30" in err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("undisturbed", "second")]
    shared_files = hub.run(jobs.files, repo)
    assert weights[0] == weights[1] == shared_files["model.safetensors"]
    assert not [name for name in shared_files if "checkpoint" in name]


def test_a_run_goes_on_where_the_last_checkpoint_on_the_hub_is_the_best(flags, tmp_path):
    first, there = tmp_path / "first", tmp_path / "there" / "last-checkpoint"
    result = hf_al.train(parse_arguments([*flags, "--eval_strategy=steps", "--eval_steps=6", f"--output_dir={first}"]))
    best = result.report["best_step"]
    shutil.copytree(first / "checkpoints" / f"checkpoint-{best:08d}", there)
    adopt_best(there, tmp_path / "second", best)
    assert open_checkpoint(tmp_path / "second" / "checkpoints" / f"checkpoint-{best:08d}")["progress"]["step"] == best


def test_checkpoints_are_copied_where_files_cannot_be_linked(tmp_path, monkeypatch, caplog):
    def refused(*_: object) -> None:
        raise OSError("Operation not permitted")

    sent = []
    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(Checkpoints, "_send", lambda self, aside, name: sent.append(sorted(files_in(aside))))
    (tmp_path / "last").mkdir()
    (tmp_path / "best").mkdir()
    (tmp_path / "last" / "a").write_text("a")
    (tmp_path / "best" / "b").write_text("b")
    shared = Checkpoints("user/name", private=False)
    shared.send(tmp_path / "last", tmp_path / "best")
    shared.finish()
    assert sent == [["best-checkpoint/b", "last-checkpoint/a"]]
    shared.send(tmp_path / "last", tmp_path / "gone")
    shared.finish()
    assert "last is not on the Hub" in caplog.text
    assert len(sent) == 1


def files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def test_a_shared_model_is_trained_further_by_its_id(hub, trained, files, tmp_path):
    hub.run(jobs.push, str(trained[0]), "tester/base")
    flags = [f"--train_file={files / 'train.csv'}", "--threads=1", "--use_cpu", "--max_steps=3", "--plots=false"]
    by_id = [
        "--model_name_or_path=tester/base",
        "--model_revision=main",
        "--push_to_hub",
        "--hub_model_id=tester/further",
    ]
    for name, model in (("id", by_id), ("folder", [f"--model_name_or_path={trained[0]}"])):
        status, _, err = hub.run(jobs.shell, "train", *flags, *model, f"--output_dir={tmp_path / name}")
        assert status == 0, err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("id", "folder")]
    assert weights[0] == weights[1] != (trained[0] / "model.safetensors").read_bytes()
    card = hub.run(jobs.files, "tester/further")["README.md"].decode()
    assert "base_model: tester/base" in card
    assert "Training went on from the weights of tester/base." in card


def test_an_encoder_is_fine_tuned_by_its_id(hub, flags, encoder_folder, tmp_path):
    hub.run(jobs.push_files, str(encoder_folder), "tester/encoder")
    flags = [flag for flag in flags if not flag.startswith(("--hidden_size", "--max_steps"))]
    for name, encoder in (("id", "tester/encoder"), ("folder", str(encoder_folder))):
        more = [f"--encoder={encoder}", "--max_steps=3", f"--output_dir={tmp_path / name}"]
        status, _, err = hub.run(jobs.shell, "train", *flags, *more)
        assert status == 0, err
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("id", "folder")]
    assert weights[0] == weights[1]


def test_the_card_compares_with_a_run_by_backpropagation_on_the_same_data(hub, flags, tmp_path):
    runs = {
        "al": [],
        "twin": ["--objective=backprop"],
        "narrow": ["--objective=backprop", "--hidden_size=8", "--max_seq_length=20", "--threads=2"],
        "other": ["--objective=backprop", "--max_train_samples=90"],
    }
    for name, more in runs.items():
        status, _, err = hub.run(jobs.shell, "train", *flags, *more, f"--output_dir={tmp_path / name}")
        assert status == 0, err
    push = ["push", str(tmp_path / "al"), "tester/compared", "--baseline"]
    status, _, err = hub.run(jobs.shell, *push, str(tmp_path / "twin"))
    assert status == 0, err
    card = hub.run(jobs.files, "tester/compared")["README.md"].decode()
    rows = [line for line in card.split("### Compared with backpropagation")[1].splitlines() if line.startswith("| ")]
    twin = json.loads((tmp_path / "twin" / "report.json").read_text())
    assert rows[3].startswith(f"| backprop | {twin['test'][-1]['accuracy']:.4f} |"), rows
    assert "The two differ in nothing but the objective." in card
    hub.run(jobs.push, str(tmp_path / "twin"), "tester/twin")
    before = hub.run(jobs.commits, "tester/compared")
    status, _, err = hub.run(jobs.shell, *push, "tester/twin")
    assert status == 0, err
    assert hub.run(jobs.commits, "tester/compared") == before, "by its id, the card is the same"
    status, _, err = hub.run(jobs.shell, *push, str(tmp_path / "narrow"))
    assert status == 0, err
    card = hub.run(jobs.files, "tester/compared")["README.md"].decode()
    below = card.split("Besides the objective, these arguments differ")[1].split("\n## ")[0]
    rows = [line for line in below.splitlines() if line.startswith("| ")]
    assert rows[2:] == ["| max_seq_length | 128 | 20 |", "| model.hidden_size | 16 | 8 |"]
    for name, said in (("al", "Expected a run by backpropagation"), ("other", "Expected a baseline on the same rows")):
        status, _, err = hub.run(jobs.shell, *push, str(tmp_path / name))
        assert (status, said in err) == (2, True), err


def test_a_result_on_a_data_set_of_the_hub_is_shared_as_the_hub_reads_it(hub, files, flags, tmp_path):
    data = {f"{split}.csv": str(files / f"{split}.csv") for split in ("train", "validation", "test")}
    hub.run(jobs.push_data, data, "tester/opinions")
    flags = [flag for flag in flags if "_file=" not in flag]
    share = ["--dataset_name=tester/opinions", "--push_to_hub", "--hub_model_id=tester/scored"]
    status, _, err = hub.run(jobs.shell, "train", *flags, *share, f"--output_dir={tmp_path / 'run'}")
    assert status == 0, err
    (entry,) = yaml.safe_load(hub.run(jobs.files, "tester/scored")[".eval_results/hf_al.yaml"])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert entry["dataset"] == {"id": "tester/opinions", "task_id": "default"}
    assert entry["value"] == report["test"][-1]["accuracy"]


def test_a_private_checkpoint_does_not_go_to_a_public_repository(hub, flags, trained, tmp_path):
    hub.run(jobs.push, str(trained[0]), "tester/public")
    before = hub.run(jobs.commits, "tester/public")
    share = ["--push_to_hub", "--hub_model_id=tester/public", "--hub_private_repo", "--hub_strategy=checkpoint"]
    status, _, err = hub.run(jobs.shell, "train", *flags, *share, f"--output_dir={tmp_path / 'run'}")
    assert status == 0, err
    assert "which exists and is public" in err
    assert "is not on the Hub; training goes on." in err
    assert hub.run(jobs.commits, "tester/public") == before


def test_no_file_of_a_run_or_of_a_cache_holds_the_token(hub, flags, tmp_path):
    run, home = tmp_path / "run", Path(hub.environment["HF_HOME"])
    share = ["--push_to_hub", "--hub_model_id=tester/secret", "--hub_strategy=checkpoint", "--report_to=tensorboard"]
    said = [hub.run(jobs.shell, "train", *flags, *share, f"--output_dir={run}")]
    said += [hub.run(jobs.shell, "inspect", "tester/secret"), hub.run(jobs.shell, "compare", "tester/secret", str(run))]
    assert [status for status, _, _ in said] == [0, 0, 0], said
    assert TOKEN not in str(said)

    def with_the_token() -> list[str]:
        files = {path.resolve() for folder in (tmp_path, home) for path in folder.rglob("*") if path.is_file()}
        names = {path.name for path in files}
        assert {"training_config.yaml", "manifest.json", "report.json", "main"} <= names, names
        assert any("tfevents" in name for name in names)
        return [path.name for path in sorted(files) if TOKEN.encode() in path.read_bytes()]

    assert with_the_token() == []
    (run / "planted").write_text(f"token: {TOKEN}")
    assert with_the_token() == ["planted"]


@pytest.mark.parametrize("fault", ["500", "401", "dropped"])
def test_training_survives_a_hub_that_fails(fault, hub, flags, tmp_path):
    hub.state.faults.update(dict.fromkeys(range(1000), fault))
    share = ["--push_to_hub", "--hub_model_id=tester/never", "--hub_strategy=checkpoint"]
    status, out, err = hub.run(jobs.shell, "train", *flags, f"--output_dir={tmp_path / 'run'}", *share)
    hub.state.faults.clear()
    assert status == 0, err
    assert "test metrics by exit" in out
    assert f"To push it later: hf-al push {tmp_path / 'run'} tester/never" in err
    assert "checkpoint-00000004 is not on the Hub; training goes on." in err
    assert "Traceback" not in err
    status, _, err = hub.run(jobs.shell, "push", str(tmp_path / "run"), "tester/never")
    assert status == 0, err


@pytest.mark.parametrize(
    ("more", "token", "said"),
    [
        (["--push_to_hub"], None, "Run: hf auth login, or set HF_TOKEN"),
        (["--push_to_hub", "--hub_model_id=a/b/c"], TOKEN, "Expected a repo id as user/name, got 'a/b/c'"),
        (["--hub_model_id=a/b"], TOKEN, "Expected push_to_hub with hub_model_id"),
        (["--push_to_hub", "--hub_strategy=all"], TOKEN, "Expected hub_strategy to be one of end, checkpoint"),
    ],
    ids=["no_token", "repo_id", "no_push", "strategy"],
)
def test_what_cannot_be_shared_is_refused_before_training(more, token, said, hub, flags, tmp_path):
    hub.run(jobs.set_token, token)
    status, _, err = hub.run(jobs.shell, "train", *flags, f"--output_dir={tmp_path / 'run'}", *more)
    assert (status, said in err) == (2, True), err
    assert not (tmp_path / "run").exists()
    assert not hub.state.log
