"""Early exit: a text gets the answer of the exit by which it leaves, later blocks run on full batches, and calibration
keeps its promises."""

import json
import math
import shutil
import time
from functools import partial

import numpy as np
import pytest
import torch
from conftest import assert_mistake, slow
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError

import hf_al
from hf_al.card import model_card
from hf_al.data import tokenization
from hf_al.early import check_exit
from hf_al.exits import Trial, calibrate_exits, choose_thresholds, temperature
from hf_al.loading import load_model
from hf_al.modeling.blocks import ALBlock
from hf_al.modeling.early_exit import ExitRule, WaitingTexts
from hf_al.modeling.limits import EXIT_RULES
from hf_al.saved.prediction import predict
from hf_al.saved.rows import Unusable
from hf_al.training.measure import block_seconds

KINDS = [
    ("al_lstm", {}),
    ("al_lstm", {"carry_state": True, "pooling": "final"}),
    ("al_transformer", {}),
    ("al_transformer", {"position_embedding_type": "learned", "pooling": "first"}),
    ("al_encoder", {}),
    ("al_encoder", {"lookahead": 1}),
]
TEMPERATURES = [0.5, 2.0, 1.5]
MULTI_LABEL = {"problem_type": "multi_label_classification"}


@pytest.fixture
def classifier(make_model):
    """A model in evaluation mode whose answers differ from text to text."""

    def make(model_type: str = "al_transformer", **config):
        return make_model(model_type, **{"embedding_std": 1.0, **config}).eval()

    return make


@torch.no_grad()
def of_every_exit(model, batch) -> list[torch.Tensor]:
    return [t.float() for t in model(batch["input_ids"], batch["attention_mask"], output_exit_logits=True).exit_logits]


def calibrate_by_hand(model, thresholds, rule="confidence") -> None:
    model.config.exit_rule, model.config.exit_thresholds = rule, thresholds
    model.config.exit_temperatures = TEMPERATURES


def half_leave(model, batch, rule="confidence") -> None:
    """Thresholds between two texts: half of all texts pass each of them."""
    multi_label = model.config.resolved_problem_type == "multi_label_classification"
    logits = zip(of_every_exit(model, batch), TEMPERATURES, strict=True)
    readings = [ExitRule(rule, multi_label, 0).read(logits_NC / t).sort().values for logits_NC, t in logits]
    middle = len(batch["input_ids"]) // 2
    calibrate_by_hand(model, [float(r[middle - 1 : middle + 1].mean()) for r in readings[:-1]] + [None], rule)


def padded_left(batch) -> dict:
    order = batch["attention_mask"].argsort(dim=1, stable=True)
    return {name: batch[name].gather(1, order) for name in ("input_ids", "attention_mask")}


def answers(model, batch, **options):
    return model.predict(batch["input_ids"], batch["attention_mask"], exit="adaptive", **options)


def assert_each_is_of_its_exit(model, batch, out, tolerance: float = 1e-5) -> None:
    logits = of_every_exit(model, batch)
    for k, temperature_k in enumerate(TEMPERATURES):
        left = out.exit_blocks == k
        assert left.any(), f"no text left after block {k}: the test shows nothing"
        torch.testing.assert_close(
            out.logits[left], logits[k][left] / temperature_k, atol=tolerance, rtol=max(1e-5, tolerance)
        )


# --- what is answered


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize(("model_type", "config"), KINDS, ids=str)
def test_a_text_gets_the_logits_of_the_exit_that_it_left_by(model_type, config, batch_size, classifier, make_batch):
    model, batch = classifier(model_type, **config), make_batch(rows=24, tokens=9)
    half_leave(model, batch)
    assert_each_is_of_its_exit(model, batch, answers(model, batch, batch_size=batch_size))


@pytest.mark.parametrize(("model_type", "config"), KINDS, ids=str)
def test_padding_on_the_left_changes_nothing(model_type, config, classifier, make_batch):
    model, batch = classifier(model_type, **config), make_batch(rows=24, tokens=9)
    half_leave(model, batch)
    right, left = answers(model, batch, batch_size=5), answers(model, padded_left(batch), batch_size=5)
    assert torch.equal(left.exit_blocks, right.exit_blocks)
    torch.testing.assert_close(left.logits, right.logits, atol=1e-5, rtol=1e-5)
    assert_each_is_of_its_exit(model, padded_left(batch), left)


@pytest.mark.parametrize("way", ["weights", "autocast"])
@pytest.mark.parametrize("model_type", hf_al.MODEL_CLASSES)
def test_bfloat16_works_too(model_type, way, classifier, make_batch):
    model, batch = classifier(model_type), make_batch(rows=24, tokens=9)
    if way == "weights":
        model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        half_leave(model, batch)
        out = answers(model, batch, batch_size=5)
        assert out.logits.dtype == torch.float32
        assert_each_is_of_its_exit(model, batch, out, tolerance=0.05)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about parts of torch that it uses
@pytest.mark.parametrize(
    ("model_type", "backend"),  # inductor needs a C++ compiler
    [
        ("al_transformer", "eager"),
        slow("al_transformer", "inductor"),
        slow("al_encoder", "eager"),
        slow("al_encoder", "inductor"),
    ],
)
def test_compiled_blocks_answer_the_same(model_type, backend, classifier, make_batch):
    model, batch = classifier(model_type), make_batch(rows=24, tokens=9)
    half_leave(model, batch)
    plain = answers(model, batch, batch_size=5)
    for block in model.model.blocks:
        block.encode.compile(dynamic=True, backend=backend)
    compiled = answers(model, batch, batch_size=5)
    assert torch.equal(compiled.exit_blocks, plain.exit_blocks)
    torch.testing.assert_close(compiled.logits, plain.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about parts of torch that it uses
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_model_that_is_compiled_whole_answers_the_same(backend, classifier, make_batch):
    model, batch = classifier("al_lstm"), make_batch(rows=12, tokens=9)
    half_leave(model, batch)
    plain, whole = answers(model, batch, batch_size=5), model(**batch).logits
    model.compile(dynamic=True, backend=backend)
    torch.testing.assert_close(model(**batch).logits, whole, atol=1e-5, rtol=1e-5)
    compiled = answers(model, batch, batch_size=5)
    assert torch.equal(compiled.exit_blocks, plain.exit_blocks)
    torch.testing.assert_close(compiled.logits, plain.logits, atol=1e-5, rtol=1e-5)


def test_texts_are_cut_and_masked_as_the_model_does_it(classifier, make_batch):
    model, batch = classifier("al_encoder", max_position_embeddings=128, sep_token_id=3), make_batch(24, 150)
    batch["attention_mask"][5] = 0  # a text without tokens
    batch["input_ids"][5] = 0
    half_leave(model, batch)
    out = answers(model, batch, batch_size=7)
    assert_each_is_of_its_exit(model, batch, out)
    without_mask = model.predict(batch["input_ids"], exit="adaptive", batch_size=7)
    assert torch.equal(without_mask.exit_blocks, out.exit_blocks)
    given = model.predict(**padded_left(batch), token_type_ids=torch.zeros_like(batch["input_ids"]), exit=1)
    assert set(given.exit_blocks.tolist()) == {1}


def test_the_order_of_the_texts_is_kept(classifier, make_batch):
    model, batch = classifier(), make_batch(rows=40, tokens=9)
    half_leave(model, batch)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    out = answers(model, batch, batch_size=6)
    shuffled = answers(model, {name: tensor[order] for name, tensor in batch.items()}, batch_size=6)
    assert torch.equal(shuffled.exit_blocks, out.exit_blocks[order])
    torch.testing.assert_close(shuffled.logits, out.logits[order], atol=1e-5, rtol=1e-5)


def test_the_mode_of_the_model_stays_and_dropout_is_off(classifier, make_batch):
    model, batch = classifier(), make_batch(rows=24, tokens=9)
    half_leave(model, batch)
    expected = answers(model, batch)
    model.train()
    assert torch.equal(answers(model, batch).logits, expected.logits)
    assert model.training


def test_no_text_is_no_answer(classifier):
    out = classifier().predict(torch.ones(0, 4, dtype=torch.long))
    assert out.logits.shape == (0, 3)
    assert out.exit_blocks.tolist() == []


def test_all_leave_where_they_are_told_to(classifier, make_batch):
    model, batch = classifier(), make_batch(rows=10)
    logits = of_every_exit(model, batch)
    for k, block in ((0, 0), (1, 1), (2, None)):
        out = model.predict(batch["input_ids"], batch["attention_mask"], exit=block, batch_size=4)
        assert out.exit_blocks.tolist() == [k] * 10
        torch.testing.assert_close(out.logits, logits[k], atol=1e-5, rtol=1e-5)


# --- what is computed


@pytest.fixture
def calls(monkeypatch) -> dict[str, list]:
    """What is called while a model answers: `blocks`, each with its texts, and `exits`."""
    found: dict[str, list] = {"blocks": [], "exits": []}
    forward, exit_ = ALBlock.forward, ALBlock.exit

    def counted_forward(self, boundary, inputs, **options):
        found["blocks"].append((self.index, len(inputs["attention_mask"])))
        return forward(self, boundary, inputs, **options)

    def counted_exit(self, *args):
        found["exits"].append(self.index)
        return exit_(self, *args)

    monkeypatch.setattr(ALBlock, "forward", counted_forward)
    monkeypatch.setattr(ALBlock, "exit", counted_exit)
    return found


def test_with_a_threshold_of_0_all_leave_after_the_first_block(classifier, make_batch, calls):
    model, batch = classifier(), make_batch(rows=10)
    calibrate_by_hand(model, [0.0, 0.0, None])
    assert answers(model, batch, batch_size=4).exit_blocks.tolist() == [0] * 10
    assert [block for block, _ in calls["blocks"]] == [0, 0, 0]


def test_exits_that_nobody_can_leave_by_are_not_computed(classifier, make_batch, calls):
    model, batch = classifier(), make_batch(rows=8)
    calibrate_by_hand(model, [None, None, None])
    out = answers(model, batch, batch_size=4)
    assert calls["exits"] == [2, 2]
    assert [block for block, _ in calls["blocks"]] == [0, 1, 2, 0, 1, 2]
    expected = of_every_exit(model, batch)[-1] / TEMPERATURES[-1]
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=1e-5)


def test_later_blocks_run_on_full_batches(classifier, make_batch, calls):
    model, batch = classifier(), make_batch(rows=200, tokens=9)
    half_leave(model, batch)
    calls["blocks"].clear()
    out = answers(model, batch, batch_size=8)
    assert len(out.logits) == 200
    for k in range(3):
        sizes = [texts for block, texts in calls["blocks"] if block == k]
        assert sum(sizes) == int((out.exit_blocks >= k).sum())
        assert sum(size < 8 for size in sizes) <= 1, sizes
    assert len(calls["blocks"]) < 3 * 25 * 0.75  # without regrouping every batch would go through every block


def test_fewer_than_two_batches_wait_before_a_block(classifier, make_batch, monkeypatch):
    model, batch = classifier(), make_batch(rows=200, tokens=9)
    half_leave(model, batch)
    waiting = []
    add = WaitingTexts.add

    def counted(self, *args):
        add(self, *args)
        waiting.append(len(self.rows_n))
        assert all(len(t) == len(self.rows_n) for name, t in self.boundary.items() if name == "hidden")

    monkeypatch.setattr(WaitingTexts, "add", counted)
    answers(model, batch, batch_size=8)
    assert 8 < max(waiting) < 2 * 8


# --- the rules


def by_the_book(logits, rule: str, thresholds, multi_label: bool) -> list[int]:
    """The exit of each text, one text at a time."""
    left = []
    for row in range(len(logits[0])):
        streak, last_answer = 0, None
        for k, threshold in enumerate(thresholds):
            if threshold is None and k < len(thresholds) - 1:
                continue
            z = [float(value) for value in logits[k][row]]
            answer = [value > 0 for value in z] if multi_label else z.index(max(z))
            streak = streak + 1 if answer == last_answer else 1
            last_answer = answer
            p = [1 / (1 + math.exp(-v)) for v in z] if multi_label else [math.exp(v) / sum(map(math.exp, z)) for v in z]
            if multi_label:
                confidence = min(max(q, 1 - q) for q in p)
                entropy = max(-q * math.log(q) - (1 - q) * math.log(1 - q) for q in p)
            else:
                confidence, entropy = max(p), -sum(q * math.log(q) for q in p)
            sure = {"confidence": confidence, "entropy": -entropy, "patience": streak}[rule]
            if threshold is None or sure >= (-threshold if rule == "entropy" else threshold):
                left.append(k)
                break
    return left


@pytest.mark.parametrize("config", [{}, MULTI_LABEL], ids=str)
@pytest.mark.parametrize(
    ("model_type", "rule"),  # an untrained encoder gives all texts the same answer, which shows nothing of patience
    [(m, rule) for m in hf_al.MODEL_CLASSES for rule in EXIT_RULES if (m, rule) != ("al_encoder", "patience")],
)
def test_texts_leave_by_the_rule(model_type, rule, config, classifier, make_batch):
    model, batch = classifier(model_type, **config), make_batch(rows=40, tokens=9)
    if rule == "patience":
        calibrate_by_hand(model, [2, 2, None], rule)
    else:
        half_leave(model, batch, rule)
    logits = [z / t for z, t in zip(of_every_exit(model, batch), TEMPERATURES, strict=True)]
    out = answers(model, batch, batch_size=7)
    assert out.exit_blocks.tolist() == by_the_book(logits, rule, model.config.exit_thresholds, bool(config))
    assert len(set(out.exit_blocks.tolist())) == (2 if rule == "patience" else 3)


def test_patience_does_not_count_exits_that_are_switched_off(classifier, make_batch):
    model, batch = classifier(), make_batch(rows=40, tokens=9)
    calibrate_by_hand(model, [None, 2, None], "patience")
    assert set(answers(model, batch).exit_blocks.tolist()) == {2}
    calibrate_by_hand(model, [1, None, None], "patience")
    assert set(answers(model, batch).exit_blocks.tolist()) == {0}


# --- calibration


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_temperature_of_logits_is_found(true, multi_label):
    generator = torch.Generator().manual_seed(0)
    z_NC = 2 * torch.randn(20000, 4, generator=generator)
    if multi_label:
        targets_NC = torch.bernoulli(z_NC.sigmoid(), generator=generator)
    else:
        drawn_N = torch.multinomial(z_NC.softmax(1), 1, generator=generator)[:, 0]
        targets_NC = torch.nn.functional.one_hot(drawn_N, 4).float()
    assert temperature(z_NC * true, targets_NC, multi_label) == pytest.approx(true, rel=0.05)


def test_a_temperature_is_finite_even_if_every_answer_is_right_or_wrong():
    logits_NC = 1000 * torch.eye(3).repeat(5, 1)
    targets_NC = torch.eye(3).repeat(5, 1)
    assert temperature(logits_NC, targets_NC, False) == pytest.approx(0.05)
    assert temperature(logits_NC, targets_NC.roll(1, 1), False) == pytest.approx(20.0)


def make_trial(rule="confidence", seconds=([1.0, 1.0, 1.0], [0.1, 0.1, 0.1]), accuracies=(0.8, 0.85, 0.9)) -> Trial:
    """1000 texts; an exit is more often right where it is surer."""
    rng = np.random.default_rng(0)
    sure_KN = rng.uniform(0.3, 1.0, (3, 1000))
    ranks_KN = sure_KN.argsort(1).argsort(1) / 1000
    wrong_KN = np.array([[1 - a] for a in accuracies])
    correct_KN = rng.uniform(size=(3, 1000)) > 2 * wrong_KN * (1 - ranks_KN)
    readings = list(torch.from_numpy(sure_KN).float())
    if rule == "entropy":
        readings = [1 - reading for reading in readings]
    if rule == "patience":
        readings = [torch.from_numpy(rng.integers(0, 2, (1000, 1))) for _ in range(3)]
    return Trial(rule, readings, torch.from_numpy(correct_KN), seconds)


@pytest.mark.parametrize("rule", ["confidence", "entropy", "patience"])
def test_no_more_accuracy_is_lost_than_allowed_and_more_loss_buys_more_speed(rule):
    trial = make_trial(rule)
    last = float(trial.correct_KN[-1].double().mean())
    speedups = []
    for drop in (0.0, 0.01, 0.03, 0.2):
        best = choose_thresholds(trial, drop)
        assert best.accuracy >= last - drop - 1e-9
        again = trial.outcome(best.thresholds)
        assert (again.accuracy, again.speedup) == (best.accuracy, best.speedup)
        speedups.append(best.speedup)
    assert speedups == sorted(speedups)
    assert speedups[0] >= 1.0 - 1e-9
    assert speedups[-1] > 2.0


@pytest.mark.parametrize("rule", ["confidence", "entropy", "patience"])
def test_a_speedup_is_reached_or_refused(rule):
    trial = make_trial(rule)
    fast, faster = (choose_thresholds(trial, 0.002, target) for target in (1.2, 2.5))
    assert fast.speedup >= 1.2
    assert faster.speedup >= 2.5
    assert fast.accuracy >= faster.accuracy
    with pytest.raises(ValueError, match=r"Expected a target_speedup that the exits can reach, got 4: .* 2\.82 times"):
        choose_thresholds(trial, 0.002, 4)  # 3.1 s / 1.1 s


def test_exits_that_cost_more_than_they_save_are_switched_off():
    best = choose_thresholds(make_trial(seconds=([1.0, 1.0, 1.0], [5.0, 5.0, 0.1])), 0.05)
    assert best.thresholds == [None, None, None]
    assert best.speedup == pytest.approx(1.0)
    best = choose_thresholds(make_trial(seconds=([1.0, 1.0, 1.0], [0.1, 5.0, 0.1])), 0.05)
    assert best.thresholds[0] is not None
    assert best.thresholds[1:] == [None, None]


def test_the_expected_speedup_is_that_of_the_blocks_that_run():
    trial = make_trial()
    half = float(trial.readings[0].median())
    outcome = trial.outcome([half, None, None])
    share = float((outcome.left_N == 0).double().mean())
    assert share == pytest.approx(0.5, abs=0.01)
    assert outcome.speedup == pytest.approx(3.1 / (share * 1.1 + (1 - share) * 3.2))
    assert trial.outcome([None, None, None]).speedup == pytest.approx(1.0)


def test_a_bridge_that_looks_ahead_is_part_of_what_its_exit_costs(classifier):
    sizes = {"hidden_size": 64, "intermediate_size": 256}
    model = classifier("al_encoder", lookahead=2, **sizes)
    blocks, exits = block_seconds(model, torch.device("cpu"), np.full(9, 64))
    assert len(blocks) == len(exits) == 3
    assert min(blocks) > 0
    assert min(exits) >= 0
    assert exits[0] > 0


@pytest.fixture
def tokenizer(few_tweets):
    return tokenization.build_tokenizer(hf_al.TrainingArguments(max_seq_length=40), few_tweets["train"])


def labelled(few_tweets, multi_label: bool) -> Dataset:
    rows = few_tweets["validation"]
    return rows.map(lambda row: {"label": [row["label"]]}) if multi_label else rows


@pytest.fixture
def of_tweets(classifier, tokenizer, few_tweets):
    """A model with the words and the classes of a few tweets: of_tweets(num_blocks=6)."""
    names = dict(enumerate(sorted(set(few_tweets["train"]["label"]))))
    ids = {name: i for i, name in names.items()}
    return partial(classifier, vocab_size=len(tokenizer), max_position_embeddings=40, id2label=names, label2id=ids)


@pytest.mark.parametrize("rule", ["confidence", "entropy", "patience"])
@pytest.mark.parametrize("config", [{}, MULTI_LABEL], ids=str)
def test_what_calibration_expects_is_what_happens_on_its_text(rule, config, of_tweets, tokenizer, few_tweets):
    rows, model = labelled(few_tweets, bool(config)), of_tweets(**config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    metrics = hf_al.evaluate(model, rows, tokenizer)
    found = calibrate_exits(model, tokenizer, rows, 0.05, rule=rule)
    assert found["speedup"] == model.config.exit_speedup > 0  # measured
    assert found["accuracy"] >= found["last_accuracy"] - 0.05 - 1e-9
    assert found["last_accuracy"] == pytest.approx(metrics["accuracy"])
    assert found["examples"] == len(rows)
    for row, of_exit in zip(found["exits"], metrics["exits"], strict=True):
        assert row["ece_before"] == pytest.approx(of_exit["ece"], abs=1e-6) if not config else row["ece_before"] >= 0
    assert sum(row["share"] for row in found["exits"]) == pytest.approx(1.0)
    assert model.config.exit_temperatures == [row["temperature"] for row in found["exits"]]
    assert model.config.exit_thresholds == [row["threshold"] for row in found["exits"]]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    (chunk,) = predict(model, tokenizer, [(text,) for text in rows["text"]], batch_size=8, exit_block="adaptive")
    shares = [sum(answer["exit"] == k for answer in chunk) / len(rows) for k in range(3)]
    assert shares == pytest.approx([row["share"] for row in found["exits"]])
    if not config:
        right = [answer["label"] == label for answer, label in zip(chunk, rows["label"], strict=True)]
        assert sum(right) / len(rows) == pytest.approx(found["accuracy"])


def test_an_encoder_is_calibrated(of_tweets, tokenizer, few_tweets):
    model = of_tweets("al_encoder")
    found = calibrate_exits(model, tokenizer, few_tweets["validation"], 0.05)
    assert model.config.exit_thresholds == [row["threshold"] for row in found["exits"]]
    texts = [(text,) for text in few_tweets["validation"]["text"]]
    (answers,) = predict(model, tokenizer, texts, batch_size=8, exit_block="adaptive")
    shares = [sum(answer["exit"] == k for answer in answers) / len(texts) for k in range(3)]
    assert shares == pytest.approx([row["share"] for row in found["exits"]])


def test_a_speedup_can_be_asked_for(of_tweets, tokenizer, few_tweets):
    found = calibrate_exits(of_tweets(num_blocks=6), tokenizer, few_tweets["validation"], 0.0, target_speedup=1.5)
    assert found["expected_speedup"] >= 1.5


def test_the_speedup_is_measured_and_one_that_falls_short_is_said(
    of_tweets, tokenizer, few_tweets, monkeypatch, caplog
):
    """Here leaving early is expected to pay, but takes longer."""
    model = of_tweets(num_blocks=6)
    predict_by = model.predict

    def slow_early(*args, exit=None, **kwargs):
        time.sleep(0.3 if exit == "adaptive" else 0)
        return predict_by(*args, exit=exit, **kwargs)

    monkeypatch.setattr(model, "predict", slow_early)
    found = calibrate_exits(model, tokenizer, few_tweets["validation"], target_speedup=1.5)
    assert found["speedup"] < 1 < found["expected_speedup"]
    assert "measured" in caplog.text


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ({"problem_type": "regression", "num_labels": 1}, {}, "Expected a classifier, got a model for regression"),
        ({"objective": "backprop"}, {}, r"Expected a model with several exits, got one with the exit \[2\] only"),
        ({"num_blocks": 1}, {}, r"Expected a model with several exits, got one with the exit \[0\] only"),
        ({}, {"rule": "luck"}, "Expected rule to be one of confidence, entropy, patience, got 'luck'"),
        ({}, {"max_accuracy_drop": -0.1}, r"Expected max_accuracy_drop in \[0, 1\).*got -0.1"),
        ({}, {"target_speedup": 0.5}, "Expected target_speedup to be at least 1, got 0.5"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(config, options, said, classifier, tokenizer, few_tweets):
    with pytest.raises(ValueError, match=said):
        calibrate_exits(classifier(**config), tokenizer, few_tweets["validation"], **options)


# --- the config


@pytest.mark.parametrize(
    "values",
    [
        {"exit_rule": "luck"},
        {"exit_temperatures": [1.0, 1.0]},
        {"exit_temperatures": [1.0, 0.0, 1.0]},
        {"exit_temperatures": [1.0, math.inf, 1.0]},
        {"exit_thresholds": [0.5, None], "exit_temperatures": TEMPERATURES},
        {"exit_thresholds": [0.5, 0.5, 0.5], "exit_temperatures": TEMPERATURES},
        {"exit_thresholds": [0.5, 1.5, None], "exit_temperatures": TEMPERATURES},
        {"exit_thresholds": [0.5, math.nan, None], "exit_temperatures": TEMPERATURES},
        {"exit_thresholds": [-1.0, None, None], "exit_temperatures": TEMPERATURES, "exit_rule": "entropy"},
        {"exit_thresholds": [0, None, None], "exit_temperatures": TEMPERATURES, "exit_rule": "patience"},
        {"exit_thresholds": [0.5, None, None]},
        {"exit_thresholds": [0.5, None, None], "exit_temperatures": TEMPERATURES, "objective": "backprop"},
        {"exit_temperatures": TEMPERATURES, "problem_type": "regression"},
    ],
    ids=str,
)
def test_a_calibration_that_cannot_be_is_refused_when_the_config_is_built(values):
    with pytest.raises((ValueError, StrictDataclassError), match=r"Expected (no )?.*exit_.*, got .*\. \w+"):
        hf_al.ALLstmConfig(num_blocks=3, **values)


def test_a_calibration_is_saved_with_the_model_but_not_with_one_for_inference_only(classifier, make_batch, tmp_path):
    model, batch = classifier(), make_batch(rows=24, tokens=9)
    half_leave(model, batch)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "small", inference_only=True)
    whole, small = (type(model).from_pretrained(tmp_path / name) for name in ("whole", "small"))
    assert torch.equal(answers(whole, batch).exit_blocks, answers(model, batch).exit_blocks)
    assert model.config.exit_thresholds is not None
    assert small.config.exit_temperatures is small.config.exit_thresholds is None
    with pytest.raises(
        ValueError, match=r"Expected a classifier with several exits for exit='adaptive'.*Leave exit out"
    ):
        answers(small, batch)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"exit": "adaptive"}, "Expected a calibrated model with exit='adaptive'.*hf-al calibrate"),
        ({"exit": 3}, r"Expected exit_block to be one of \[0, 1, 2\], got 3"),
        ({"exit": True}, "Expected exit to be 'adaptive' or a number of a block, got True"),
        ({"batch_size": 2.5}, "Expected batch_size to be a whole number from 1, got 2.5"),
        ({"input_ids": torch.ones(7, dtype=torch.long)}, r"Expected input_ids of shape \(N, T\).*got \(7,\)"),
        ({"input_ids": None}, r"Expected input_ids of shape \(N, T\)"),
        ({"exit": "early"}, "Expected exit to be 'adaptive' or a number of a block, got 'early'"),
        ({"batch_size": 0}, "Expected batch_size to be a whole number from 1, got 0"),
    ],
)
def test_an_exit_that_is_not_there_is_refused(options, said, classifier, make_batch):
    with pytest.raises(ValueError, match=said):
        classifier().predict(**{"input_ids": make_batch()["input_ids"], **options})


def test_the_number_of_an_exit_may_be_one_of_numpy(classifier, make_batch):
    model, batch = classifier(), make_batch()
    found, expected = (model.predict(batch["input_ids"], exit=exit).logits for exit in (np.int64(1), 1))
    assert torch.equal(found, expected)


# --- answers, and the commands


def test_unusable_rows_keep_their_place(classifier, tokenizer):
    model = classifier(vocab_size=len(tokenizer), max_position_embeddings=40)
    calibrate_by_hand(model, [0.0, None, None])
    rows = [Unusable("no text"), ("one",), ("a longer text",), Unusable("no text")]
    (found,) = predict(model, tokenizer, rows, exit_block="adaptive", all_scores=True)
    assert (found[0], found[3]) == ({"row": 0, "error": "no text"}, {"row": 3, "error": "no text"})
    assert [answer.keys() for answer in found[1:3]] == [{"label", "score", "scores", "exit"}] * 2
    assert predict(model, tokenizer, [Unusable("a")] * 2, exit_block="adaptive").__next__()[1]["row"] == 1


@pytest.mark.medium
@pytest.mark.timeout(120)
def test_a_model_is_calibrated_from_the_command_line(trained, files, shell, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    argv = ["--validation_file", str(files / "validation.csv"), "--threads=1"]
    status, out, err = shell("calibrate", str(folder), *argv, "--max_accuracy_drop=0.1")
    assert status == 0, err
    assert {"temperature", "threshold", "share", "speedup"} <= set(out.split())
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} == {"config.json"}
    old, new = (json.loads(files["config.json"]) for files in (before, after))
    assert {name for name in old if old[name] != new[name]} == {"exit_temperatures", "exit_thresholds", "exit_speedup"}
    assert old.keys() == new.keys()
    model, tokenizer = load_model(str(folder))
    assert model.config.exit_thresholds == new["exit_thresholds"]
    report = json.loads(after["report.json"])
    card = model_card(report, model, "me/mine", []).text
    assert (
        f"{model.config.exit_speedup} times as fast as the last exit where it was calibrated, without tokenization"
        in card
    )
    for k, (degrees, threshold) in enumerate(zip(new["exit_temperatures"], new["exit_thresholds"], strict=True)):
        cells = [str(k), f"{degrees:.4f}", "" if threshold is None else f"{threshold:.4f}"]
        assert "| " + " | ".join(cells) + " |" in card

    rows = tmp_path / "rows.csv"
    rows.write_text("text\nthank you so much\n\nwhich gate\n")
    status, out, err = shell("predict", str(folder), "--input", str(rows), "--exit=adaptive", "--threads=1")
    assert status == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    expected = model.predict(**tokenizer(["thank you so much"], return_tensors="pt"), exit="adaptive")
    assert found[0]["exit"] == expected.exit_blocks.item()
    assert found[0]["score"] == pytest.approx(expected.logits.softmax(1).max().item(), abs=1e-5)
    assert all("exit" in answer or "error" in answer for answer in found)
    table = tmp_path / "answers.csv"
    status, _, err = shell("predict", str(folder), "--input", str(rows), "--exit=adaptive", "--output", str(table))
    assert status == 0, err
    assert table.read_text().splitlines()[0] == "label,score,exit,error"
    for flag in ("--exit", "--exit_block"):
        status, by_block, err = shell("predict", str(folder), "thank you so much", f"{flag}=0", "--threads=1")
        assert status == 0, err
        assert [row["block"] for row in json.loads(by_block)["exits"]] == [0]

    more = [f"--train_file={files / 'train.csv'}", f"--output_dir={tmp_path / 'more'}", "--max_steps=1", "--use_cpu"]
    status, _, err = shell("train", f"--model_name_or_path={folder}", *more, "--threads=1")
    assert status == 0, err
    assert json.loads((tmp_path / "more" / "config.json").read_text())["exit_thresholds"] is None


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["calibrate", "user/name", "--validation_file=v.csv"], ["Expected a model folder, got the Hub id user/name"]),
        (["calibrate", ".", "--validation_file=v.csv"], ["Expected a model folder with config.json"]),
        (["calibrate", "."], ["--validation_file", "--dataset_name"]),
        (["calibrate", ".", "--validation_file=v.csv", "--rule=luck"], ["--rule", "'luck'"]),
        (
            ["calibrate", ".", "--validation_file=v.csv", "--max_accuracy_drop=0.1", "--target_speedup=2"],
            ["--target_speedup", "not allowed with"],
        ),
        (["predict", "user/name", "--exit=early"], ["--exit", "'early'"]),
    ],
    ids=lambda value: " ".join(value)[:50],
)
def test_a_mistake_is_one_clear_line(argv, said, shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_mistake(shell(*argv), *said)


@pytest.mark.medium
def test_adaptive_exits_of_a_model_that_is_not_calibrated_are_refused_before_it_is_loaded(trained, shell):
    result = shell("predict", str(trained[0]), "a text", "--exit=adaptive")
    assert_mistake(result, "Expected a calibrated model with --exit adaptive", "Run hf-al calibrate")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_blocks": 1}, "one of one exit"), ({"num_blocks": 3, "inference_only": True}, "one of one exit"),
        ({"num_blocks": 3, "problem_type": "regression"}, "one of regression"),
    ],
)  # fmt: skip
def test_adaptive_exits_of_a_model_that_cannot_be_calibrated_are_refused(values, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"several exits for --exit adaptive, got .*{said}.*Leave --exit out"):
        check_exit(str(tmp_path), "adaptive")
