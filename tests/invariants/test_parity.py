"""Parity: the trained, the evaluated and the loaded network are the same."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ARCHITECTURES, FROM_SCRATCH, OBJECTIVES
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoModelForSequenceClassification

import hf_al
from hf_al.data.batching import Collator, evaluation_batches, token_lengths
from hf_al.data.tokenization import build_tokenizer
from hf_al.parallel.placement import place
from hf_al.training.stage import Stage

TOLERANCE = 1e-5
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "embedding_dropout_prob": 0.0, "bridge_dropout_prob": 0.0}
PROBLEMS = {
    "single_label": {},
    "multi_label": {"problem_type": "multi_label_classification"},
    "regression": {"num_labels": 1, "problem_type": "regression", "label_mean": [2.5], "label_deviation": [3.0]},
}


@pytest.fixture
def make_still_model(make_model):
    """A model without dropout, so that training mode has nothing random in it."""

    def make(model_type: str, **config):
        attention = {"attention_probs_dropout_prob": 0.0} if model_type == "al_transformer" else {}
        return make_model(model_type, **NO_DROPOUT, **attention, **config)

    return make


def rows_of_tokens(config, count: int = 23) -> Dataset:
    rng = np.random.default_rng(0)
    features = {
        "single_label_classification": ClassLabel(names=["a", "b", "c"]),
        "multi_label_classification": List(ClassLabel(names=["a", "b", "c"])),
        "regression": Value("float32"),
    }
    draw = {
        "single_label_classification": lambda: int(rng.integers(3)),
        "multi_label_classification": lambda: [int(rng.integers(3))],
        "regression": lambda: float(rng.normal()),
    }
    kind = config.resolved_problem_type
    texts = [rng.integers(1, config.vocab_size, rng.integers(1, 12)).tolist() for _ in range(count)]
    columns = {"input_ids": texts, "label": [draw[kind]() for _ in texts]}
    return Dataset.from_dict(columns, Features({"input_ids": List(Value("int64")), "label": features[kind]}))


def evaluate(model, data: Dataset, batch_size: int) -> dict[int, np.ndarray]:
    collator = Collator(model.config.pad_token_id, model.config.classes)
    stage = Stage(model, place(model.config.units), torch.device("cpu"), collator)
    return stage.evaluate(data, batch_size)


@torch.no_grad()
def read(model, data: Dataset, batch_size: int) -> dict[int, np.ndarray]:
    """What `Stage.evaluate` returns, through the forward of the model instead."""
    collator = Collator(model.config.pad_token_id, model.config.classes)
    logits = {k: np.zeros((len(data), model.config.classes), np.float32) for k in model.config.exits()}
    for rows in evaluation_batches(token_lengths(data), batch_size):
        batch = collator(data, rows)
        batch.pop("labels")
        for k, exit_NC in zip(logits, model(**batch, output_exit_logits=True).exit_logits, strict=True):
            logits[k][rows] = exit_NC.numpy()
    return logits


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_reloaded_model_gives_the_exits_of_training_time_evaluation_bit_for_bit(
    model_type, objective, problem, make_model, tmp_path
):
    model = make_model(model_type, objective=objective, **PROBLEMS[problem]).train()
    data = rows_of_tokens(model.config)
    expected = evaluate(model, data, 8)
    assert list(expected) == model.config.exits()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    got = read(loaded, data, 8)
    for k, logits in expected.items():
        assert np.ptp(logits, axis=0).min() > 0
        assert np.array_equal(got[k], logits)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_batch_size_changes_no_logit_beyond_rounding(model_type, make_model):
    model = make_model(model_type)
    data = rows_of_tokens(model.config)
    one_by_one, together = evaluate(model, data, 1), evaluate(model, data, len(data))
    for k, logits in one_by_one.items():
        assert np.abs(logits - together[k]).max() <= TOLERANCE


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_training_mode_without_dropout_reads_the_same_exits(model_type, objective, make_still_model, make_batch):
    model = make_still_model(model_type, objective=objective)
    batch = make_batch()
    trained = model.train()(**batch, output_exit_logits=True, output_hidden_states=True)
    with torch.no_grad():
        evaluated = model.eval()(**batch, output_exit_logits=True, output_hidden_states=True)
    assert torch.equal(trained.logits, evaluated.logits)
    for name in ("exit_logits", "hidden_states"):
        for a, b in zip(trained[name], evaluated[name], strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_evaluation_uses_no_dropout_and_gives_training_mode_back(model_type, make_model):
    model = make_model(model_type, hidden_dropout_prob=0.5, bridge_dropout_prob=0.5).train()
    data = rows_of_tokens(model.config)
    first, second = evaluate(model, data, 8), evaluate(model, data, 8)
    assert model.training
    for k, logits in first.items():
        assert np.array_equal(logits, second[k])


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_exit_of_one_pass_is_the_exit_that_is_asked_for(model_type, make_model, make_batch):
    model = make_model(model_type).eval()
    batch = make_batch()
    batch.pop("labels")
    with torch.no_grad():
        exits = model(**batch, output_exit_logits=True).exit_logits
        for k, logits in enumerate(exits):
            assert torch.equal(model(**batch, exit_block=k).logits, logits)


# --- a whole run


def short_tokenizer(few_tweets, folder) -> dict:
    """A loaded tokenizer whose limit is below `max_seq_length`."""
    args = hf_al.TrainingArguments(output_dir="unused", max_seq_length=9)
    build_tokenizer(args, few_tweets["train"]).save_pretrained(folder / "tokenizer")
    return {"tokenizer_name": str(folder / "tokenizer"), "max_seq_length": 24}


def bf16_elsewhere(few_tweets, folder) -> dict:
    """An Accelerator that something else in this process made."""
    AcceleratorState._reset_state(reset_partial_state=False)
    Accelerator(cpu=True, mixed_precision="bf16")
    return {}


RUNS = {"bf16": lambda *_: {"bf16": True}, "short_tokenizer": short_tokenizer, "bf16_elsewhere": bf16_elsewhere}


@pytest.mark.parametrize("how", RUNS)
@pytest.mark.parametrize("model_type", FROM_SCRATCH)
def test_evaluate_gives_the_numbers_of_the_report(model_type, how, few_tweets, tmp_path):
    try:
        values = {
            "max_steps": 20,
            "eval_strategy": "no",
            "use_cpu": True,
            "threads": 1,
            **RUNS[how](few_tweets, tmp_path),
        }
        sizes = {"num_blocks": 3, "hidden_size": 16, "target_size": 12, "embedding_std": 1.0}
        args = hf_al.TrainingArguments(
            output_dir=str(tmp_path / "run"), model_type=model_type, model=sizes, disable_tqdm=True, **values
        )
        report = hf_al.train(args, few_tweets).report
        assert hf_al.evaluate(args.output_dir, few_tweets["test"])["exits"] == report["test"]
    finally:
        AcceleratorState._reset_state(reset_partial_state=False)
