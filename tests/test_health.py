"""Is every block alive? Dead ones are named, healthy ones are not."""

import logging

import pytest
import torch

import hf_al
from hf_al.parallel.stage import Stage
from hf_al.training import health

LABELS = torch.tensor([0, 1, 2, 0])
PARTS = ("encode", "bridge", "encode_target", "decode_target")


def nudge(model) -> None:
    """What an optimizer step does: every parameter moves."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-4


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
    assert health.warnings(model, LABELS, at_start) == []


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
    messages = health.warnings(model, LABELS, at_start)
    assert f"target code of block {block} has collapsed" in messages[0]
    assert "target_learning_rate_factor" in messages[0]


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
    (message,) = health.warnings(model, LABELS, at_start)
    assert f"Nothing updated {part} of block {block}" in message


def test_one_changed_weight_is_an_update(make_model):
    model = make_model()
    at_start = health.part_sums(model)
    with torch.no_grad():
        model.model.blocks[1].bridge.layers[0].weight[3, 4] += 1e-3
    expected = {f"{k}.{part}" for k in range(3) for part in PARTS} - {"1.bridge"}
    assert set(health.never_updated(model, at_start)) == expected


def test_parts_that_backprop_does_not_train_are_not_expected_to_move(make_model):
    """Its target codes and inner bridges are no part of the network; its last bridge is."""
    model = make_model(objective="backprop")
    at_start = health.part_sums(model)
    names = set(health.never_updated(model, at_start))
    assert names == {"0.encode", "1.encode", "2.encode", "2.bridge", *(f"{k}.decode_target" for k in range(3))}


# --- in a run


def test_a_healthy_run_warns_of_nothing(few_tweets, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "hf_al"):
        report = hf_al.train(arguments(tmp_path), few_tweets).report
    assert report["warnings"] == []
    assert len(report["code_health"]) == 3
    assert [r for r in caplog.records if r.levelno >= logging.WARNING and r.name.startswith("hf_al")] == []


@pytest.mark.parametrize("block", [0, 1])
def test_a_run_whose_target_code_collapses_says_so(block, few_tweets, tmp_path, monkeypatch, caplog):
    train_batch = Stage.train_batch

    def collapse(self, *args):
        result = train_batch(self, *args)
        torch.nn.init.zeros_(self.blocks[block].encode_target.weight)
        return result

    monkeypatch.setattr(Stage, "train_batch", collapse)
    report = hf_al.train(arguments(tmp_path), few_tweets).report
    assert f"The target code of block {block} has collapsed" in report["warnings"][0]
    assert report["code_health"][block]["collapsed"]
    assert report["warnings"][0] in (tmp_path / "report.md").read_text()
    assert report["warnings"][0] in caplog.text


def test_a_run_whose_label_side_never_moves_says_so(few_tweets, tmp_path):
    report = hf_al.train(arguments(tmp_path, target_learning_rate_factor=1e-30), few_tweets).report
    for k in range(3):
        for part in ("encode_target", "decode_target"):
            assert any(f"Nothing updated {part} of block {k}" in message for message in report["warnings"])
    assert not any("encode of" in message or "bridge of" in message for message in report["warnings"])


def test_a_run_with_a_frozen_part_says_so(few_tweets, tmp_path, monkeypatch):
    build = hf_al.training.loop.build_model

    def build_frozen(*args):
        model = build(*args)
        model.model.blocks[1].bridge.requires_grad_(False)
        return model

    monkeypatch.setattr(hf_al.training.loop, "build_model", build_frozen)
    report = hf_al.train(arguments(tmp_path), few_tweets).report
    assert [message.split(":")[0] for message in report["warnings"]] == ["Nothing updated bridge of block 1"]


def test_a_resumed_run_that_was_over_warns_of_nothing(few_tweets, tmp_path):
    hf_al.train(arguments(tmp_path), few_tweets)
    report = hf_al.train(arguments(tmp_path, resume_from_checkpoint="last"), few_tweets).report
    assert report["warnings"] == []
