"""Resume: stopped at any step and resumed, a run ends with the weights of one that was never stopped, bit for bit."""

import dataclasses
import itertools
import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import slow, wait_for_a_checkpoint
from hooks import hook

import hf_al
from hf_al.arguments import named
from hf_al.parsing import parse_arguments
from hf_al.training import checkpoint, run_folder
from hf_al.training.optim import BlockOptimizers
from hf_al.training.plan import CONDITIONS, IDENTITY
from hf_al.training.stage import Stage

STEPS = 60  # 25 per epoch: 397 rows in batches of 16; saves at 7, 14, ... and evaluations at 11, 22, ... are mid-epoch
FLAGS = [
    f"--max_steps={STEPS}", "--max_train_samples=397", "--per_device_train_batch_size=8",
    "--gradient_accumulation_steps=2", "--max_grad_norm=0.5", "--warmup_steps=0.2", "--learning_rate=5e-3",
    "--weight_decay=0.01", "--target_learning_rate_factor=2", "--save_steps=7", "--eval_strategy=steps",
    "--eval_steps=11", "--num_blocks=3", "--hidden_size=16", "--target_size=12", "--hidden_dropout_prob=0.2",
    "--embedding_dropout_prob=0.2", "--bridge_dropout_prob=0.2", "--threads=1", "--use_cpu", "--disable_tqdm",
    "--max_seq_length=32",
]  # fmt: skip
ARCHITECTURES = {"al_lstm": [], "al_transformer": ["--num_attention_heads=2"]}


class Stopped(Exception):
    """Thrown into a run from outside."""


@pytest.fixture(scope="module")
def run_flags(tweet_files):
    """Flags of a run on real tweets in files: run_flags("al_lstm", "associated", output_dir, *more) -> argv."""

    def flags(model_type: str, objective: str, output_dir: Path, *more: str) -> list[str]:
        which = [f"--model_type={model_type}", f"--objective={objective}", f"--output_dir={output_dir}"]
        return [*tweet_files, *FLAGS, *ARCHITECTURES[model_type], *which, *more]

    return flags


@pytest.fixture(scope="module")
def never_stopped(run_flags, tmp_path_factory):
    """The folder of an undisturbed run, trained once for each architecture and objective."""
    folders: dict[tuple[str, str], Path] = {}

    def folder(model_type: str, objective: str) -> Path:
        key = (model_type, objective)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("never_stopped") / "run"
            hf_al.train(parse_arguments(run_flags(*key, folders[key])))
        return folders[key]

    return folder


def weights_of(folder: Path) -> dict[str, bytes]:
    """The bytes of the exported model, and of the weights and optimizer state at the last step."""
    last = checkpoint.checkpoint_path(folder, STEPS)
    files = [folder / "model.safetensors", *sorted(last.glob("*.safetensors"))]
    assert len(files) == 4, files
    return {path.name: path.read_bytes() for path in files}


def stop_at(which: int):
    """Throws at the call with this number, counted from 1."""
    calls = itertools.count(1)

    def stop(call):
        if next(calls) == which:
            raise Stopped

    return stop


def stop_after_save(patch, which: int) -> None:
    hook(patch, checkpoint, "save_checkpoint", after=stop_at(which))


def stop_while_saving(patch, which: int) -> None:
    """Stops in checkpoint `which` when one block's file is written and the next is not."""
    hook(patch, checkpoint, "save_file", before=stop_at(3 * (which - 1) + 2))


def stop_before_evaluation(patch, which: int) -> None:
    hook(patch, Stage, "evaluate", before=stop_at(which))


def stop_between_updates(patch, step: int) -> None:
    """Stops when block 0 has taken step `step` and the last block has not."""

    def stop(call):
        if call.step == step and call.unit[-1] == 2:
            raise Stopped

    hook(patch, BlockOptimizers, "update", before=stop)


def signal_in_step(patch, step: int, number: signal.Signals) -> None:
    """Sends the signal between the updates of two blocks in optimizer step `step`, counted from 1."""

    def send(call):
        if call.step + 1 == step and call.unit[-1] == 1:
            os.kill(os.getpid(), number)

    hook(patch, BlockOptimizers, "update", before=send)


STOPS = {
    "after_the_first_save": (stop_after_save, 1),
    "after_the_fourth_save": (stop_after_save, 4),
    "while_saving": (stop_while_saving, 3),
    "between_updates_of_step_20": (stop_between_updates, 20),
    "between_updates_of_the_last_step": (stop_between_updates, STEPS - 1),
    "before_an_evaluation": (stop_before_evaluation, 3),
}


@pytest.mark.medium
@pytest.mark.parametrize(
    ("objective", "stop"),
    [
        *(("associated", stop) if stop == "between_updates_of_step_20" else slow("associated", stop) for stop in STOPS),
        slow("al_ce", "after_the_fourth_save"),
        slow("al_ce", "between_updates_of_step_20"),
        ("backprop", "after_the_first_save"),
        slow("backprop", "between_updates_of_the_last_step"),
    ],
)
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(objective, stop, run_flags, never_stopped, tmp_path):
    flags = run_flags("al_lstm", objective, tmp_path / "run", "--resume_from_checkpoint=last")
    throw, when = STOPS[stop]
    with pytest.MonkeyPatch.context() as patch:
        throw(patch, when)
        with pytest.raises(Stopped):
            hf_al.train(parse_arguments(flags))
    assert not (tmp_path / "run" / "model.safetensors").exists()
    hf_al.train(parse_arguments(flags))
    assert weights_of(tmp_path / "run") == weights_of(never_stopped("al_lstm", objective))


@pytest.mark.medium
def test_a_run_stopped_again_and_again_ends_with_the_same_bits(run_flags, never_stopped, tmp_path):
    flags = run_flags("al_lstm", "associated", tmp_path / "run", "--resume_from_checkpoint=last")
    for step in (9, 12, 58):
        with pytest.MonkeyPatch.context() as patch:
            stop_between_updates(patch, step)
            with pytest.raises(Stopped):
                hf_al.train(parse_arguments(flags))
    hf_al.train(parse_arguments(flags))
    assert weights_of(tmp_path / "run") == weights_of(never_stopped("al_lstm", "associated"))


@pytest.mark.medium
@pytest.mark.parametrize(
    "number", [signal.SIGINT, slow(signal.SIGTERM), slow(signal.SIGHUP)], ids=["SIGINT", "SIGTERM", "SIGHUP"]
)
def test_a_run_that_signals_stopped_at_odd_steps_ends_with_the_same_bits(number, run_flags, never_stopped, tmp_path):
    """Real signals, at a step with neither save nor evaluation, at one with both, and at the last but one."""
    flags = run_flags("al_lstm", "associated", tmp_path / "run", "--resume_from_checkpoint=last")
    for step in (5, 22, STEPS - 1):
        with pytest.MonkeyPatch.context() as patch:
            signal_in_step(patch, step, number)
            with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
                hf_al.train(parse_arguments(flags))
        newest = checkpoint.complete_checkpoints(tmp_path / "run")[-1]
        assert checkpoint.read_manifest(newest)["progress"]["step"] == step
    hf_al.train(parse_arguments(flags))
    assert weights_of(tmp_path / "run") == weights_of(never_stopped("al_lstm", "associated"))


@pytest.mark.medium
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_killed_process_and_its_resumption_end_with_the_same_bits(
    model_type, run_flags, never_stopped, start, tmp_path
):
    expected = weights_of(never_stopped(model_type, "associated"))
    flags = run_flags(model_type, "associated", tmp_path / "run", "--resume_from_checkpoint=last")
    process = start("train", *flags, log=tmp_path / "log")
    wait_for_a_checkpoint(process, tmp_path / "run", tmp_path / "log")
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL, "the run was over before it could be killed"
    newest = checkpoint.complete_checkpoints(tmp_path / "run")[-1]
    step = checkpoint.read_manifest(newest)["progress"]["step"]
    assert 0 < step < STEPS
    assert step % 25, "not in the middle of an epoch"
    hf_al.train(parse_arguments(flags))
    assert weights_of(tmp_path / "run") == expected


@pytest.mark.medium
@pytest.mark.parametrize("what", ["optimizer_state", "step_number"])
def test_a_resume_that_forgets_something_is_seen(what, run_flags, never_stopped, tmp_path, monkeypatch):
    flags = run_flags("al_lstm", "associated", tmp_path / "run", "--resume_from_checkpoint=last")
    with pytest.MonkeyPatch.context() as patch:
        stop_after_save(patch, 2)
        with pytest.raises(Stopped):
            hf_al.train(parse_arguments(flags))
    if what == "optimizer_state":
        monkeypatch.setattr(BlockOptimizers, "load_state", lambda *args, **kwargs: None)
    else:

        def earlier(call):
            if call.result is not None:
                call.result["progress"]["step"] -= 1

        hook(monkeypatch, run_folder, "open_checkpoint", after=earlier)
    hf_al.train(parse_arguments(flags))
    spoiled, expected = weights_of(tmp_path / "run"), weights_of(never_stopped("al_lstm", "associated"))
    assert all(spoiled[name] != expected[name] for name in expected if name.startswith("block"))


@pytest.mark.medium
def test_last_starts_at_step_0_and_says_so_where_there_is_no_checkpoint(run_flags, never_stopped, tmp_path, caplog):
    flags = run_flags("al_lstm", "associated", tmp_path, "--resume_from_checkpoint=last")
    with caplog.at_level(logging.INFO, "hf_al"):
        hf_al.train(parse_arguments(flags))
    assert [r.levelname for r in caplog.records if "starting at step 0" in r.message] == ["WARNING"]
    assert weights_of(tmp_path) == weights_of(never_stopped("al_lstm", "associated"))


@pytest.mark.medium
def test_a_finished_run_can_be_resumed_and_stays_as_it_is(run_flags, never_stopped, tmp_path):
    before = never_stopped("al_lstm", "associated")
    shutil.copytree(before, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    flags = run_flags("al_lstm", "associated", tmp_path / "run", "--resume_from_checkpoint=last")
    assert hf_al.train(parse_arguments(flags)).report["steps"] == STEPS
    assert weights_of(tmp_path / "run") == weights_of(before)


def test_a_run_does_not_go_on_in_the_folder_of_another_one(never_stopped, tmp_path):
    mine, others = (never_stopped("al_lstm", objective) / "checkpoints" for objective in ("associated", "backprop"))
    shutil.copytree(others, tmp_path / "run" / "checkpoints")
    resumed = checkpoint.checkpoint_path(mine.parent, STEPS)
    alone = tmp_path / "last-checkpoint"  # without the best one beside it
    shutil.copytree(resumed, alone)
    before = sorted(others.rglob("*"))
    for path in (resumed, alone):
        with pytest.raises(checkpoint.CannotResume, match="Expected an output_dir without another run"):
            run_folder.adopt_best(path, tmp_path / "run", STEPS)
    assert sorted(others.rglob("*")) == before
    run_folder.adopt_best(resumed, tmp_path / "new", STEPS)
    there = checkpoint.checkpoint_path(tmp_path / "new", STEPS)
    assert {path.name: path.read_bytes() for path in there.iterdir()} == {
        path.name: path.read_bytes() for path in resumed.iterdir()
    }


def test_a_checkpoint_resumes_in_another_output_dir(run_flags, never_stopped, tmp_path):
    """Also if the best step so far is earlier, so that its weights are only in the first folder."""
    first = never_stopped("al_lstm", "associated")
    last = f"--resume_from_checkpoint={checkpoint.checkpoint_path(first, STEPS)}"
    manifest = checkpoint.read_manifest(checkpoint.checkpoint_path(first, STEPS))
    assert manifest["progress"]["best_step"] < STEPS, "choose a seed whose best step is not the last one"
    hf_al.train(parse_arguments(run_flags("al_lstm", "associated", tmp_path / "run", last)))
    expected = (first / "model.safetensors").read_bytes()
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == expected


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--hidden_size=20", "hidden_size was 16 and is now 20"),
        ("--seed=43", "seed was 42 and is now 43"),
        ("--per_device_train_batch_size=4", "global_batch_size was 16 and is now 8"),
        ("--max_train_samples=396", "train was"),
        ("--max_predict_samples=20", "test was"),
        ("--objective=al_ce", "objective was 'associated' and is now 'al_ce'"),
        ("--metric_for_best_model=log_loss", "metric_for_best_model was 'accuracy' and is now 'log_loss'"),
    ],
)
def test_another_run_is_not_resumed(flag, named, run_flags, never_stopped):
    folder = never_stopped("al_lstm", "associated")
    flags = run_flags("al_lstm", "associated", folder, "--resume_from_checkpoint=last", flag)
    with pytest.raises(ValueError, match=r"Expected the (model|data|run) of .*, got another") as error:
        hf_al.train(parse_arguments(flags))
    assert named in str(error.value)


def test_another_tokenizer_setting_is_another_run_even_if_it_changes_no_training_text(few_tweets, tmp_path):
    lower = few_tweets.map(lambda row: {"text": row["text"].lower()})
    values = {"model": {"num_blocks": 2, "hidden_size": 16, "target_size": 12}, "threads": 1, "use_cpu": True}
    for more, error in (({}, None), ({"lowercase": False, "resume_from_checkpoint": "last"}, "tokenizer was")):
        args = hf_al.TrainingArguments(output_dir=str(tmp_path), max_steps=2, plots=False, **values, **more)
        if error is None:
            hf_al.train(args, lower)
        else:
            with pytest.raises(ValueError, match=error):
                hf_al.train(args, lower)


def test_a_run_with_fewer_steps_than_are_done_is_not_resumed(run_flags, never_stopped):
    folder = never_stopped("al_lstm", "associated")
    flags = run_flags("al_lstm", "associated", folder, "--resume_from_checkpoint=last", "--max_steps=10")
    with pytest.raises(ValueError, match=rf"Expected a run of more than the {STEPS} steps that .* has done, got 10"):
        hf_al.train(parse_arguments(flags))


def test_a_run_that_goes_on_under_other_conditions_says_which_once(run_flags, never_stopped, tmp_path, caplog):
    shutil.copytree(never_stopped("al_lstm", "associated"), tmp_path / "run")
    more = ["--resume_from_checkpoint=last", "--learning_rate=1e-3", "--max_grad_norm=1", f"--max_steps={STEPS + 1}"]
    with caplog.at_level(logging.WARNING, "hf_al"):
        report = hf_al.train(parse_arguments(run_flags("al_lstm", "associated", tmp_path / "run", *more))).report
    said = [r.message for r in caplog.records if "other conditions" in r.message]
    assert said == [
        "The run continues under other conditions, so its result will not be that of an uninterrupted run: "
        "learning_rate was 0.005 and is now 0.001; max_grad_norm was 0.5 and is now 1.0; "
        f"total_steps was {STEPS} and is now {STEPS + 1}."
    ]
    changed = [message for message in report["warnings"] if f"other conditions: after step {STEPS}, " in message]
    assert len(changed) == 3


@pytest.mark.medium
@pytest.mark.parametrize(
    "extra",
    [
        ("--embedding_optimizer=sparse_adam", "--lr_scheduler_type=reduce_lr_on_plateau", "--warmup_steps=0",
         "--lr_scheduler_kwargs=patience=0,factor=0.3", "--learning_rate=5e-3,4e-3,3e-3"),
        slow(("--optim=adafactor", "--learning_rate=1e-2")),
        slow(("--optim=sgd", "--optim_args=momentum=0.9", "--embedding_learning_rate_factor=0")),
    ],
    ids=["sparse_rows_plateau_and_rates_of_each_block", "adafactor", "sgd_and_frozen_rows"],
)  # fmt: skip
def test_every_kind_of_optimizer_state_is_resumed(extra, run_flags, tmp_path):
    whole, run = (run_flags("al_lstm", "al_ce", tmp_path / n, *extra) for n in ("whole", "run"))
    hf_al.train(parse_arguments(whole))
    with pytest.MonkeyPatch.context() as patch:
        stop_after_save(patch, 4)  # after two evaluations
        with pytest.raises(Stopped):
            hf_al.train(parse_arguments(run))
    hf_al.train(parse_arguments([*run, "--resume_from_checkpoint=last"]))
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")


def test_of_every_argument_it_is_known_whether_a_resumed_run_may_change_it():
    """A new argument belongs into `IDENTITY` or `CONDITIONS`, changes no result, or what it decides is compared."""
    compared = {
        "model_revision", "model_type", "model", "tokenizer_type", "tokenizer_vocab_size", "min_frequency", "lowercase",
        "text_style", "max_seq_length", "word_vectors_extra_words", "streaming", "streaming_buffer_size",
        "max_train_samples", "label_noise", "label_noise_seed", "max_eval_samples", "num_train_epochs", "max_steps",
        "metric_for_best_model",
    }  # fmt: skip
    of_the_end = {"do_predict", "max_predict_samples"}
    no_result = named("only", "showing", "output", "machine")
    chosen = {*IDENTITY, *CONDITIONS, *named("section", "data"), *named("path", "file", "folder", "any"), *no_result}
    known = {field.name for field in dataclasses.fields(hf_al.TrainingArguments)}
    assert known == {*chosen, *compared, *of_the_end, "fp16"}  # which is refused
    assert not {*IDENTITY, *CONDITIONS} & {*compared, *of_the_end, *no_result}


def test_only_facts_that_are_asked_for_are_stated_of_arguments():
    fields = dataclasses.fields(hf_al.TrainingArguments)
    assert {f.metadata["section"] for f in fields} == {"", "data"}
    assert {f.metadata["path"] for f in fields} == {"", "file", "folder", "any"}
    assert {f.metadata["only"] for f in fields} == {"", "showing", "output", "machine"}
