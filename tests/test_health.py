"""Is every block alive? Dead ones are named, healthy ones are not."""

import json
import logging

import pytest
import torch
from conftest import slow
from datasets import Dataset, DatasetDict
from hooks import hook

import hf_al
from hf_al.training import health
from hf_al.training.stage import Stage

LABELS = torch.tensor([0, 1, 2, 0])
PARTS = ("encode", "bridge", "encode_target", "decode_target")


def nudge(model) -> None:
    """What an optimizer step does: every parameter moves."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-4


def of_codes(report) -> list[str]:
    """Without those about data and answers."""
    return [message for message in report["warnings"] if "target code" in message or "Nothing updated" in message]


def warnings(model, at_start) -> list[str]:
    codes = health.code_health(model, LABELS)
    return health.code_warnings(codes, model.config) + health.update_warnings(model, at_start)


def arguments(output_dir, **values) -> hf_al.TrainingArguments:
    model = {"num_blocks": 3, "hidden_size": 16, "target_size": 12, **values.pop("model", {})}
    defaults = {"max_steps": 20, "learning_rate": 5e-3, "threads": 1, "use_cpu": True, "disable_tqdm": True}
    return hf_al.TrainingArguments(output_dir=str(output_dir), model=model, **{**defaults, **values})


@pytest.mark.parametrize("model_type", ["al_lstm", "al_transformer"])
@pytest.mark.parametrize("objective", ["associated", "al_ce", "local_ce", "backprop"])
def test_a_model_that_was_updated_everywhere_gives_no_warning(objective, model_type, make_model):
    model = make_model(model_type, objective=objective)
    at_start = health.part_sums(model)
    nudge(model)
    assert warnings(model, at_start) == []


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_collapsed_target_code_is_named(block, make_model):
    model = make_model()
    at_start = health.part_sums(model)
    nudge(model)
    torch.nn.init.zeros_(model.model.blocks[block].encode_target.weight)
    rows = health.code_health(model, LABELS)
    assert [row["collapsed"] for row in rows] == [k >= block for k in range(3)]  # what is lost stays lost
    assert rows[block]["rank"] == 0
    assert rows[block]["spread"] == 0
    messages = warnings(model, at_start)
    assert f"target code of block {block} has collapsed" in messages[0]
    assert "Try label_activation=tanh" in messages[0]


def test_a_code_that_hardly_differs_between_labels_has_collapsed(make_model):
    model = make_model()
    with torch.no_grad():
        model.model.blocks[1].encode_target.weight *= 1e-3
    assert [row["collapsed"] for row in health.code_health(model, LABELS)][:2] == [False, True]


def test_a_code_that_confuses_two_classes_has_a_lower_rank(make_model):
    model = make_model()
    with torch.no_grad():
        weight = model.model.blocks[0].encode_target.weight
        weight[:, 1] = weight[:, 0]
    rows = health.code_health(model, LABELS)
    assert rows[0]["possible_rank"] == 2
    assert [row["rank"] for row in rows] == [1, 1, 1]


def test_classes_that_validation_lacks_count_all_the_same(make_model):
    rows = health.code_health(make_model(), torch.tensor([1, 1, 1]))
    assert [row["possible_rank"] for row in rows] == [2, 2, 2]


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        ("multi_label_classification", torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])),
        ("regression", torch.randn(6, 3)),
    ],
)
def test_codes_of_other_problem_types_are_looked_at_too(problem_type, labels, make_model):
    model = make_model(problem_type=problem_type)
    assert not any(row["collapsed"] for row in health.code_health(model, labels))
    torch.nn.init.zeros_(model.model.blocks[1].encode_target.weight)
    assert [row["collapsed"] for row in health.code_health(model, labels)] == [False, True, True]


@pytest.mark.parametrize("objective", ["local_ce", "backprop"])
def test_objectives_without_codes_have_none_to_report(objective, make_model):
    assert health.code_health(make_model(objective=objective), LABELS) == []


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("block", [0, 2])
def test_a_part_that_nothing_updated_is_named(block, part, make_model):
    model = make_model()
    at_start = health.part_sums(model)
    before = {name: p.detach().clone() for name, p in getattr(model.model.blocks[block], part).named_parameters()}
    nudge(model)
    with torch.no_grad():
        for name, parameter in getattr(model.model.blocks[block], part).named_parameters():
            parameter.copy_(before[name])
    assert health.never_updated(model, at_start) == [f"{block}.{part}"]
    (message,) = warnings(model, at_start)
    assert f"Nothing updated {part} of block {block}" in message


def test_one_changed_weight_is_an_update(make_model):
    model = make_model()
    at_start = health.part_sums(model)
    with torch.no_grad():
        model.model.blocks[1].bridge.layers[0].weight[3, 4] += 1e-3
    expected = {f"{k}.{part}" for k in range(3) for part in PARTS} - {"1.bridge"}
    assert set(health.never_updated(model, at_start)) == expected


def test_parts_that_backprop_does_not_train_are_not_expected_to_move(make_model):
    """Its target codes and inner bridges are not part of the trained network; its last bridge is."""
    model = make_model(objective="backprop")
    at_start = health.part_sums(model)
    names = set(health.never_updated(model, at_start))
    assert names == {"0.encode", "1.encode", "2.encode", "2.bridge", *(f"{k}.decode_target" for k in range(3))}


def test_separation_is_the_smallest_distance_of_two_classes_over_the_typical_one(make_model):
    """Codes placed by hand on a line, at 0, 1 and 4: distances 1, 3 and 4."""
    model = make_model(label_activation="identity", num_blocks=1)
    layer = model.model.blocks[0].encode_target
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0] = torch.tensor([0.0, 1.0, 4.0])
    (row,) = health.code_health(model, LABELS)
    assert row["separation"] == pytest.approx(1 / ((1 + 9 + 16) / 3) ** 0.5)
    assert row["closest"] == ["LABEL_0", "LABEL_1"]
    assert row["rank"] == 1


def test_classes_that_lie_equally_far_apart_have_a_separation_of_one(make_model):
    model = make_model(label_activation="identity", num_blocks=1)
    torch.nn.init.eye_(model.model.blocks[0].encode_target.weight)
    assert health.code_health(model, LABELS)[0]["separation"] == pytest.approx(1)


def test_two_classes_with_one_code_are_named(make_model):
    model = make_model(id2label={0: "negative", 1: "neutral", 2: "positive"}, label2id=None)
    with torch.no_grad():
        weight = model.model.blocks[1].encode_target.weight
        codes = model.model.blocks[0].encode_target(torch.eye(3))
        weight -= weight @ torch.outer(codes[2] - codes[0], codes[2] - codes[0]) / (codes[2] - codes[0]).square().sum()
    rows = health.code_health(model, LABELS)
    assert [row["partly_collapsed"] for row in rows] == [False, True, True]
    assert not any(row["collapsed"] for row in rows)
    messages = health.code_warnings(rows, model.config)
    assert "block 1 has partly collapsed (separation" in messages[0]
    assert "rank 1 of 2" in messages[0]
    assert "'negative' and 'positive' have" in messages[0]


def test_values_that_lie_close_together_are_not_taken_for_a_collapse(make_model):
    """A thousand values: neighbours are near each other, and so may their codes be."""
    model = make_model(problem_type="regression", num_labels=1)
    rows = health.code_health(model, torch.randn(1000))
    assert health.code_warnings(rows, model.config) == []
    assert all(row["separation"] > 0.1 and row["closest"] is None for row in rows)


def test_values_that_float32_cannot_tell_apart_are_no_collapse(make_model):
    """As of a standardised count of views: most values are small beside the largest."""
    labels = torch.tensor([0.0, 1.0, 2.0, 3.0, 1e3, 5e8, 9e8])
    labels = (labels - labels.mean()) / labels.std()
    model = make_model(problem_type="regression", num_labels=1)
    assert all(row["separation"] > 0.1 for row in health.code_health(model, labels))
    assert health.code_health(model, torch.full((7,), 5e8)) == []


def test_thousands_of_classes_are_looked_at_by_some_of_them(make_model):
    model = make_model(num_labels=3000, num_blocks=1)
    (row,) = health.code_health(model, torch.zeros(1, dtype=torch.long))
    assert row["possible_rank"] == row["rank"] == 12
    assert set(row["closest"]) <= set(model.config.label_names)


def test_health_is_plain_json(make_model):
    rows = health.code_health(make_model(), LABELS)
    assert json.loads(json.dumps(rows)) == rows


# --- collapses of real runs, each with the cure that its warning names

TOPICS = 40  # classes, each recognisable by a word of its own


@pytest.fixture(scope="module")
def many_classes() -> DatasetDict:
    def rows(count: int) -> Dataset:
        return Dataset.from_dict(
            {
                "text": [f"word{i % TOPICS} and something else" for i in range(count)],
                "label": [f"topic{i % TOPICS}" for i in range(count)],
            }
        )

    return DatasetDict(train=rows(320), validation=rows(TOPICS))


COLLAPSES = {
    "sigmoid": (
        {"label_activation": "sigmoid"}, 1.0, "has collapsed", "label_activation=tanh",
        {"label_activation": "tanh"}, None,
    ),
    "fast": ({}, 300.0, "partly collapsed", "target_learning_rate_factor of 0.01 or less", {}, 10.0),
    "fast_sigmoid": (
        {"label_activation": "sigmoid"}, 300.0, "has collapsed", "target_learning_rate_factor of 0.01 or less",
        {"label_activation": "tanh"}, 10.0,
    ),
    "small": ({"target_size": 1}, 1.0, "partly collapsed", "target_size=16", {"target_size": 16}, None),
    "layer_norm": (
        {"target_size": 2, "label_activation": "layer_norm"}, 1.0, "partly collapsed", "target_size=16",
        {"target_size": 16}, None,
    ),
    "tiny_start": (
        {"initialization": "normal", "initializer_range": 1e-4}, 0.01, "has collapsed", "initialization=xavier",
        {"initialization": "xavier"}, None,
    ),
}  # fmt: skip


def collapse_arguments(output_dir, factor, model) -> hf_al.TrainingArguments:
    model = {"num_blocks": 4, "hidden_size": 8, "target_size": 64, **model}
    return arguments(
        output_dir, model=model, learning_rate=1e-3, target_learning_rate_factor=factor, max_steps=100, max_seq_length=8
    )


@pytest.mark.medium
@pytest.mark.parametrize("which", [n if n == "fast" else slow(n) for n in COLLAPSES])
def test_the_warning_of_a_collapse_names_what_cures_it(which, many_classes, tmp_path):
    model, factor, what, advice, cure, cured_factor = COLLAPSES[which]
    ill = hf_al.train(collapse_arguments(tmp_path / "ill", factor, model), many_classes).report
    assert any(what in message and advice in message for message in ill["warnings"]), ill["warnings"]
    args = collapse_arguments(tmp_path / "cured", cured_factor or factor, {**model, **cure})
    cured = hf_al.train(args, many_classes).report
    assert of_codes(cured) == [], cured["code_health"]


def test_a_collapse_is_seen_while_training_and_said_once_for_each_block(many_classes, tmp_path, caplog):
    args = collapse_arguments(tmp_path, 1.0, {"label_activation": "sigmoid"})
    args.eval_strategy, args.eval_steps, args.max_steps = "steps", 5, 15
    report = hf_al.train(args, many_classes).report
    codes = [row["codes"] for row in report["history"] if "codes" in row]
    assert [[row["collapsed"] for row in rows] for rows in codes] == [[False, True, True, True]] * 3
    warned = [r.getMessage() for r in caplog.records if "has collapsed" in r.getMessage()]
    assert [message.split(" has")[0][-7:] for message in warned] == ["block 1", "block 2", "block 3"]
    assert len(of_codes(report)) == 3


@pytest.mark.parametrize("embedding_block", [True, False])
def test_frozen_embedding_rows_are_not_taken_for_dead_ones(embedding_block, few_tweets, tmp_path):
    model = {"embedding_block": embedding_block}
    args = arguments(tmp_path, embedding_learning_rate_factor=0.0, model=model)
    assert of_codes(hf_al.train(args, few_tweets).report) == []


# --- in a run


def test_a_healthy_run_warns_of_nothing(few_tweets, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "hf_al"):
        report = hf_al.train(arguments(tmp_path), few_tweets).report
    assert of_codes(report) == []
    assert len(report["code_health"]) == 3
    assert [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("hf_al")] == []


@pytest.mark.parametrize("block", [0, 1])
def test_a_run_whose_target_code_collapses_says_so(block, few_tweets, tmp_path, monkeypatch, caplog):
    def collapse(call):
        torch.nn.init.zeros_(call.self.blocks[block].encode_target.weight)

    hook(monkeypatch, Stage, "train_batch", after=collapse)
    report = hf_al.train(arguments(tmp_path), few_tweets).report
    assert f"The target code of block {block} has collapsed" in report["warnings"][0]
    assert report["code_health"][block]["collapsed"]
    assert report["warnings"][0] in (tmp_path / "report.md").read_text()
    assert report["warnings"][0] in caplog.text


def test_codes_that_collapse_after_the_chosen_step_are_no_warning_of_the_report(few_tweets, tmp_path, monkeypatch):
    """The report is about the weights that are saved."""

    def collapse(call):
        if call.step >= 10:
            torch.nn.init.zeros_(call.self.blocks[1].encode_target.weight)
            torch.nn.init.zeros_(call.self.blocks[2].bridge.layers[0].weight)  # so that no later step is better

    hook(monkeypatch, Stage, "train_batch", after=collapse)
    values = {"max_steps": 20, "eval_strategy": "steps", "eval_steps": 5, "logging_steps": 5, "seed": 1}
    report = hf_al.train(arguments(tmp_path, **values), few_tweets).report
    assert report["best_step"] <= 10, "choose a seed whose later steps are worse"
    assert of_codes(report) == []
    assert not any(row["collapsed"] for row in report["code_health"])
    last = [row for row in report["history"] if "codes" in row][-1]
    assert last["codes"][1]["collapsed"]


def test_a_run_whose_label_side_never_moves_says_so(few_tweets, tmp_path):
    report = hf_al.train(arguments(tmp_path, target_learning_rate_factor=1e-30), few_tweets).report
    for k in range(3):
        for part in ("encode_target", "decode_target"):
            assert any(f"Nothing updated {part} of block {k}" in message for message in report["warnings"])
    assert not any("encode of" in message or "bridge of" in message for message in report["warnings"])


def test_a_run_with_a_frozen_part_says_so(few_tweets, tmp_path, monkeypatch):
    def freeze(call):
        call.result.model.blocks[1].bridge.requires_grad_(False)

    hook(monkeypatch, hf_al.training.start, "build_model", after=freeze)
    report = hf_al.train(arguments(tmp_path), few_tweets).report
    assert [message.split(":")[0] for message in report["warnings"]] == ["Nothing updated bridge of block 1"]


def test_a_resumed_run_that_was_over_warns_of_nothing(few_tweets, tmp_path):
    hf_al.train(arguments(tmp_path), few_tweets)
    report = hf_al.train(arguments(tmp_path, resume_from_checkpoint="last"), few_tweets).report
    assert of_codes(report) == []
