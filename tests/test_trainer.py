"""transformers' own Trainer and pipeline on hf_al models, as a user would start them."""

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES
from datasets import DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)

import hf_al
from hf_al.data.tokenization import build_tokenizer, pair_separator

LONGEST = 24
LABELS = {0: "negative", 1: "neutral", 2: "positive"}
LONG_TEXT = "the flight was late and nobody told us why " * 200


@pytest.fixture(scope="module")
def tokenizer(few_tweets):
    args = hf_al.TrainingArguments(output_dir="unused", max_seq_length=LONGEST, tokenizer_vocab_size=500)
    return build_tokenizer(args, few_tweets["train"])


@pytest.fixture
def make_tweet_model(make_model, tokenizer):
    """A tiny model for the tokenizer; biases are not zero, so that texts get different scores."""

    def make(model_type: str, **config):
        names = {"id2label": LABELS, "label2id": {name: i for i, name in LABELS.items()}, "num_labels": None}
        names = {} if "num_labels" in config else {n: v for n, v in names.items() if v}
        values = {"vocab_size": len(tokenizer), "max_position_embeddings": LONGEST, "embedding_std": 1.0}
        return make_model(model_type, **{**values, **names, **config}).eval()

    return make


@pytest.fixture
def tokenized(few_tweets, tokenizer):
    ids = {name: i for i, name in enumerate(sorted(set(few_tweets["train"]["label"])))}

    def encode(rows):
        return {**tokenizer(rows["text"], truncation=True), "labels": [ids[name] for name in rows["label"]]}

    few = {name: split.select(range(80)) for name, split in few_tweets.items()}
    return DatasetDict(few).map(encode, batched=True, remove_columns=["text", "label"])


def saved(model, tokenizer, folder) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def classifier(folder: str, **options):
    return pipeline("text-classification", model=folder, device="cpu", **options)


def logits_of(folder: str, texts: list[str]) -> torch.Tensor:
    """Logits (texts, C) of the saved model, each text truncated by its tokenizer and in a batch of its own."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, truncation=True, return_tensors="pt")).logits for text in texts])


# --- Trainer


@pytest.mark.parametrize("objective", ["associated", "backprop"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_trainer_trains_evaluates_and_saves(model_type, objective, make_tweet_model, tokenizer, tokenized, tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=40, per_device_train_batch_size=16, per_device_eval_batch_size=32,
        learning_rate=1e-2, eval_strategy="steps", eval_steps=20, save_strategy="no", logging_steps=10,
        report_to="none", disable_tqdm=True, use_cpu=True, warmup_steps=4,
    )  # fmt: skip

    def accuracy(prediction):
        assert isinstance(prediction.predictions, np.ndarray)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    trainer = Trainer(
        make_tweet_model(model_type, objective=objective, embedding_std=0.1), args,
        train_dataset=tokenized["train"], eval_dataset=tokenized["train"], processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer), compute_metrics=accuracy,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"] - 0.05
    assert after["eval_accuracy"] > before["eval_accuracy"]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    predicted = trainer.predict(tokenized["test"])
    assert predicted.predictions.shape == (len(tokenized["test"]), 3)


@pytest.mark.parametrize("how", ["label_smoothing_factor", "compute_loss_func"])
def test_a_trainer_that_keeps_the_labels_for_itself_is_told_so(how, make_tweet_model, tokenizer, tokenized, tmp_path):
    """Otherwise it would train the blocks end to end, on the logits of the last exit."""
    smoothing = {"label_smoothing_factor": 0.1} if how == "label_smoothing_factor" else {}
    args = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no", **smoothing
    )
    own = None if smoothing else lambda outputs, labels, **_: torch.nn.functional.cross_entropy(outputs.logits, labels)
    trainer = Trainer(
        make_tweet_model("al_lstm"), args, train_dataset=tokenized["train"], processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer), compute_loss_func=own,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"Expected labels in training mode .* Trainer's label_smoothing_factor"):
        trainer.train()


def test_trainer_resumes_from_its_own_checkpoint(make_tweet_model, tokenizer, tokenized, tmp_path):
    def train(folder, resume: bool = False, **values):
        args = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=16, learning_rate=1e-2, save_strategy="steps",
            save_steps=3, report_to="none", disable_tqdm=True, use_cpu=True, max_steps=6,
        )  # fmt: skip
        model = make_tweet_model("al_lstm")
        collator = DataCollatorWithPadding(tokenizer)
        trainer = Trainer(model, args, train_dataset=tokenized["train"], data_collator=collator)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3") if resume else None)
        return model.state_dict()

    whole, resumed = train(tmp_path / "whole"), train(tmp_path / "resumed", resume=True)
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_trainer_refuses_to_train_an_inference_only_model(make_tweet_model, tokenizer, tokenized, tmp_path):
    make_tweet_model("al_lstm").save_pretrained(tmp_path, inference_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    args = TrainingArguments(str(tmp_path / "run"), max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True)
    trainer = Trainer(model, args, train_dataset=tokenized["train"], data_collator=DataCollatorWithPadding(tokenizer))
    with pytest.raises(ValueError, match="inference_only=True"):
        trainer.train()


# --- pipeline


@pytest.mark.parametrize("inference_only", [False, True])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_pipeline_gives_the_softmax_of_the_logits(
    model_type, inference_only, make_tweet_model, tokenizer, few_tweets, tmp_path
):
    model = make_tweet_model(model_type)
    folder = saved(model, tokenizer, tmp_path)
    texts = list(few_tweets["test"]["text"][:6])
    expected = logits_of(folder, texts).softmax(-1)
    model.save_pretrained(folder, inference_only=inference_only)
    for rows, probabilities in zip(classifier(folder)(texts, top_k=None), expected, strict=True):
        assert {row["label"] for row in rows} == set(LABELS.values())
        scores = {row["label"]: row["score"] for row in rows}
        assert [scores[LABELS[i]] for i in range(3)] == pytest.approx(probabilities.tolist(), abs=1e-6)
    for row, probabilities in zip(classifier(folder)(texts), expected, strict=True):
        assert row["label"] == LABELS[int(probabilities.argmax())]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_pipeline_gives_the_sigmoid_of_multi_label_logits(model_type, make_tweet_model, tokenizer, tmp_path):
    model = make_tweet_model(model_type, problem_type="multi_label_classification")
    folder = saved(model, tokenizer, tmp_path)
    rows = classifier(folder)("a lovely flight", top_k=None)
    scores = {row["label"]: row["score"] for row in rows}
    expected = logits_of(folder, ["a lovely flight"]).sigmoid()[0].tolist()
    assert [scores[LABELS[i]] for i in range(3)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("given", [{"problem_type": "regression"}, {}])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_pipeline_gives_the_value_of_a_regression(model_type, given, make_tweet_model, tokenizer, tmp_path):
    model = make_tweet_model(model_type, num_labels=1, label_mean=[40.0], label_deviation=[2.0], **given)
    folder = saved(model, tokenizer, tmp_path)
    (row,) = classifier(folder)("a lovely flight", top_k=None)
    assert row["score"] == pytest.approx(logits_of(folder, ["a lovely flight"]).item(), abs=1e-4)
    assert row["score"] > 30


@pytest.mark.parametrize("positions", ["rotary", "learned", None])
def test_a_pipeline_truncates_a_text_beyond_the_maximum_length(positions, make_tweet_model, tokenizer, tmp_path):
    """transformers' pipeline passes on all tokens; the model cuts them as the tokenizer would have."""
    config = {"position_embedding_type": positions} if positions else {}
    model = make_tweet_model("al_transformer" if positions else "al_lstm", **config)
    folder = saved(model, tokenizer, tmp_path)
    assert len(tokenizer(LONG_TEXT)["input_ids"]) > 10 * LONGEST
    texts = [LONG_TEXT, "short", LONG_TEXT + " indeed"]
    expected = logits_of(folder, texts).softmax(-1)
    plain = classifier(folder)
    for options in ({}, {"batch_size": 3}, {"truncation": True}):
        for rows, probabilities in zip(plain(texts, top_k=None, **options), expected, strict=True):
            scores = {row["label"]: row["score"] for row in rows}
            assert [scores[LABELS[i]] for i in range(3)] == pytest.approx(probabilities.tolist(), abs=1e-6)
    assert expected[0].tolist() != pytest.approx(expected[1].tolist(), abs=1e-3)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_pipeline_takes_text_pairs(model_type, make_tweet_model, tokenizer, tmp_path):
    folder = saved(make_tweet_model(model_type), tokenizer, tmp_path)
    rows = classifier(folder)({"text": "a lovely flight", "text_pair": "not at all"}, top_k=None)
    batch = AutoTokenizer.from_pretrained(folder)("a lovely flight", "not at all", return_tensors="pt")
    with torch.no_grad():
        expected = AutoModelForSequenceClassification.from_pretrained(folder)(**batch).logits.softmax(-1)[0]
    scores = {row["label"]: row["score"] for row in rows}
    assert [scores[LABELS[i]] for i in range(3)] == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_pipeline_cuts_a_long_pair_as_in_training(model_type, make_tweet_model, tokenizer, tmp_path):
    folder = saved(make_tweet_model(model_type, sep_token_id=pair_separator(tokenizer)), tokenizer, tmp_path)
    pair = {"text": LONG_TEXT, "text_pair": "not at all, " * 20}
    default, told = (classifier(folder)(pair, top_k=None, **options) for options in ({}, {"truncation": True}))
    assert default == told
    other = classifier(folder)({**pair, "text_pair": "a lovely flight " * 20}, top_k=None)
    assert [row["score"] for row in other] != pytest.approx([row["score"] for row in default], abs=1e-3)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("text", ["", " ", "\u200b", "\U0001f600", "[PAD]"])
def test_a_pipeline_answers_odd_texts_with_probabilities(text, model_type, make_tweet_model, tokenizer, tmp_path):
    folder = saved(make_tweet_model(model_type), tokenizer, tmp_path)
    rows = classifier(folder)(text, top_k=None)
    assert sum(row["score"] for row in rows) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["word", "wordpiece", "bpe", "unigram"])
def test_every_trained_tokenizer_comes_back_from_disk_the_same(kind, few_tweets, tmp_path):
    args = hf_al.TrainingArguments(
        output_dir="unused", max_seq_length=LONGEST, tokenizer_vocab_size=400, tokenizer_type=kind
    )
    tokenizer = build_tokenizer(args, few_tweets["train"])
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*few_tweets["test"]["text"][:20], LONG_TEXT]
    assert loaded(texts, truncation=True)["input_ids"] == tokenizer(texts, truncation=True)["input_ids"]
    assert loaded.model_max_length == LONGEST
    assert max(len(ids) for ids in loaded(texts, truncation=True)["input_ids"]) == LONGEST
