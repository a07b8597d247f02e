"""Results that mean little come with a warning, or are refused with the reason."""

import json
import random

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

import hf_al
from hf_al.data import sources
from hf_al.data.oddities import data_warnings
from hf_al.training.health import answer_warnings

SMALL = {
    "model": {"num_blocks": 2, "hidden_size": 16, "target_size": 12}, "max_steps": 3, "threads": 1, "use_cpu": True,
    "plots": False,
}  # fmt: skip


def arguments(folder, **values) -> hf_al.TrainingArguments:
    return hf_al.TrainingArguments(output_dir=str(folder), **{**SMALL, **values})


def test_a_test_split_that_is_in_train_is_said_before_training_and_in_the_report(few_tweets, tmp_path, caplog):
    caplog.set_level("WARNING", logger="hf_al")
    splits = DatasetDict({**few_tweets, "test": few_tweets["train"].select(range(50))})
    report = hf_al.train(arguments(tmp_path), splits).report
    said = "50 of 50 test texts are in train as well"
    assert [message for message in report["warnings"] if said in message]
    assert [record for record in caplog.records if said in record.message]


def tokens(*rows: list[int]) -> Dataset:
    return Dataset.from_dict({"input_ids": list(rows), "label": [0] * len(rows)})


def test_shared_texts_are_counted_by_their_tokens():
    train = tokens(*([i, i + 1] for i in range(50)))
    data = {"train": train, "validation": tokens([1, 2], [9]), "test": tokens(*([i, 7] for i in range(40)))}
    (message,) = data_warnings(DatasetDict(data), ["a", "b"])
    assert message.startswith("1 of 2 validation texts are in train")
    assert not data_warnings(DatasetDict({**data, "validation": tokens([3], [2, 1], [])}), ["a", "b"])


@pytest.mark.parametrize(("tokenizer_type", "warns"), [("word", True), ("bpe", False)])
def test_texts_without_spaces_between_words_are_said_to_be_unknown_and_not_to_be_in_train(
    tokenizer_type, warns, tmp_path
):
    letters = [chr(0x4E00 + i) for i in range(20)]
    texts = [
        "".join(random.Random(i).choices(letters, k=7)) + "\u3001" + letters[i % 20] * 3 + f"{i}。" for i in range(60)
    ]
    rows = Dataset.from_dict({"text": texts, "label": ["a", "b"] * 30})
    splits = DatasetDict(train=rows.select(range(40)), test=rows.select(range(40, 60)))
    report = hf_al.train(arguments(tmp_path, tokenizer_type=tokenizer_type), splits).report
    assert not [message for message in report["warnings"] if "are in train as well" in message]
    unknown = [message for message in report["warnings"] if "of the words of" in message]
    assert len(unknown) == (3 if warns else 0)
    assert all("% of the words of" in message and "--tokenizer_type bpe" in message for message in unknown)


def test_real_splits_have_no_warning(few_tweets, tmp_path):
    report = hf_al.train(arguments(tmp_path, max_steps=90, learning_rate=2e-2), few_tweets).report
    assert not report["warnings"]


@pytest.mark.parametrize("label", ["nan", "NaN", "null"])
def test_a_label_that_reads_like_a_missing_value_is_named(label):
    (message,) = data_warnings(DatasetDict(train=tokens([1])), ["bad", label])
    assert repr(label) in message


def test_a_model_with_one_answer_is_called_that():
    counts = np.array([[0, 5, 0], [0, 9, 0], [0, 1, 0]])
    (message,) = answer_warnings(counts, ["a", "b", "c"], "test")
    assert "answers 'b' to every one of the 15 test texts" in message
    assert not answer_warnings(counts + np.eye(3, dtype=int), ["a", "b", "c"], "test")
    assert not answer_warnings(np.array([[7, 0], [0, 0]]), ["a", "b"], "test")  # there is one label only


def test_the_report_has_the_warning_about_one_answer(few_tweets, tmp_path):
    report = hf_al.train(arguments(tmp_path, max_steps=30, learning_rate=1e-2), few_tweets).report
    assert any("to every one of the 80 test texts" in message for message in report["warnings"])
    assert "to every one of the 80 test texts" in (tmp_path / "report.md").read_text()


def test_one_word_among_numbers_is_no_classification(tmp_path):
    path = tmp_path / "scores.csv"
    rows = [f"text {i},{i / 7:.2f}" for i in range(100)]
    path.write_text("text,label\n" + "\n".join([*rows, "another text,nan"]) + "\n")
    with pytest.raises(ValueError, match=r"got numbers and 'nan' in row 100 \(from 0\), 1 such in all"):
        sources.load_text_datasets(hf_al.TrainingArguments(train_file=str(path)))
    path.write_text("text,label\n" + "\n".join(["a,1.5", "b,2.5", "c,other", "d,1.5", "e,2.5", "f,other"]) + "\n")
    data = sources.load_text_datasets(hf_al.TrainingArguments(train_file=str(path), validation_file=str(path)))
    assert data["train"].features["label"].names == ["1.5", "2.5", "other"]


def test_objects_as_labels_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"text {i}", "label": {"name": "a", "id": i}} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="got objects with name, id"):
        sources.load_text_datasets(hf_al.TrainingArguments(train_file=str(path)))


def test_a_vocabulary_without_words_is_refused(tmp_path):
    rows = Dataset.from_dict({"text": [f"word{i}" for i in range(40)], "label": ["a", "b"] * 20})
    with pytest.raises(ValueError, match="Pass --min_frequency 1"):
        hf_al.train(arguments(tmp_path), DatasetDict(train=rows))


def test_runs_on_different_data_are_not_compared_without_a_word(few_tweets, tmp_path, shell):
    for name, rows in (("a", 300), ("b", 300), ("c", 200)):
        hf_al.train(arguments(tmp_path / name, max_train_samples=rows), few_tweets)
    same, other = (shell("compare", str(tmp_path / "a"), str(tmp_path / name))[1] for name in ("b", "c"))
    assert "data of these runs differ" not in same
    assert "data of these runs differ" in other
