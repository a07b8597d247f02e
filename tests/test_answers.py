"""Answers as tables, with the id and the text of their rows; a text on the command line; a copy for inference."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import assert_mistake
from transformers import AutoModelForSequenceClassification

from hf_al.saved.answers import columns, flat
from hf_al.saved.prediction import answers_to

TEXTS = ["thank you so much", "you lost my bag", "which gate"]


def predicted(shell, *argv: str) -> list[dict]:
    status, out, err = shell("predict", *argv, "--threads=1")
    assert status == 0, err
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def rows(tmp_path):
    """A file with an id column, and a row without a text."""
    path = tmp_path / "rows.csv"
    path.write_text("id,text\na7,thank you so much\nb8,\nc9,which gate\n")
    return path


@pytest.mark.medium
def test_texts_on_the_command_line_are_answered(trained, shell, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    given = predicted(shell, str(trained[0]), *TEXTS)
    assert given == predicted(shell, str(trained[0]), "--input", str(tmp_path / "texts.txt"))
    assert given == predicted(shell, str(trained[0]), TEXTS[0], "--threads=1", *TEXTS[1:])
    alone = predicted(shell, str(trained[0]), "thank you\nso much")[0]
    assert (alone["label"], alone["score"]) == (given[0]["label"], pytest.approx(given[0]["score"], abs=1e-5))


@pytest.mark.medium
def test_id_and_text_go_into_the_answers_also_of_unusable_rows(trained, rows, shell, tmp_path):
    found = predicted(shell, str(trained[0]), "--input", str(rows), "--id_column=id", "--with_text")
    assert [row["id"] for row in found] == ["a7", "b8", "c9"]
    assert [row.get("text") for row in found] == ["thank you so much", None, "which gate"]
    assert "error" in found[1]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    found = predicted(shell, str(trained[0]), "--input", str(lines), "--id_column=id")
    assert [row["id"] for row in found] == ["0", "1", "2"]
    assert not any("text" in row for row in found)


@pytest.mark.medium
@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_tables_hold_what_the_json_lines_hold(ending, trained, rows, shell, tmp_path):
    argv = [str(trained[0]), "--input", str(rows), "--id_column=id", "--with_text", "--all_scores"]
    expected = [flat(row) for row in predicted(shell, *argv)]
    out = tmp_path / f"answers.{ending}"
    assert predicted(shell, *argv, "--output", str(out)) == []
    if ending == "parquet":
        table = pq.read_table(out).to_pylist()
    else:
        with out.open(newline="") as file:
            table = list(csv.DictReader(file, delimiter="," if ending == "csv" else "\t"))
    assert len(table) == 3
    for row, wanted in zip(table, expected, strict=True):
        for name, value in row.items():
            if value in (None, ""):
                assert wanted.get(name) is None
            else:
                assert value == wanted[name] if ending == "parquet" else value == str(wanted[name])
    names = {"id", "text", "label", "score", "score_positive", "exit_0_label", "exit_1_score", "error"}
    assert names | {"exit_0_score_positive", "exit_1_score_positive"} <= table[0].keys()


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_any_text_comes_back_from_a_table(ending, tmp_path):
    path, texts = tmp_path / f"answers.{ending}", ["a\rb", "a\r\nb", "a\nb", 'a "b", \t c', "plain"]
    with answers_to(str(path), {"text": pa.string(), "score": pa.float64()}) as write:
        write([{"text": text, "score": 0.5} for text in texts])
    if ending == "parquet":
        found = pq.read_table(path)["text"].to_pylist()
    else:
        with path.open(newline="") as file:
            found = [row["text"] for row in csv.DictReader(file, delimiter="," if ending == "csv" else "\t")]
    assert found == texts


def test_the_answers_before_an_interruption_can_be_read(tmp_path):
    opened = answers_to(str(tmp_path / "answers.parquet"), {"text": pa.string()})
    opened.__enter__()([{"text": "so far"}])
    stop = KeyboardInterrupt()
    assert not opened.__exit__(KeyboardInterrupt, stop, None)
    (kept,) = tmp_path.iterdir()
    assert pq.read_table(pa.BufferReader(kept.read_bytes()))["text"].to_pylist() == ["so far"]


@pytest.mark.parametrize(
    ("kind", "answer", "row"),
    [
        ("regression", {"value": 2.5}, {"value": 2.5}),
        ("regression", {"values": {"a": 1.0, "b": 2.0}}, {"value_a": 1.0, "value_b": 2.0}),
        (
            "multi_label_classification",
            {"labels": [{"label": "a", "score": 0.9}, {"label": "b", "score": 0.7}], "scores": {"a": 0.9, "b": 0.7}},
            {"labels": "a,b", "score_a": 0.9, "score_b": 0.7},
        ),
    ],
)
def test_every_kind_of_answer_fits_its_columns(kind, answer, row, make_model):
    names = ["a", "b"] if answer.get("values") or "labels" in answer else ["value"]
    config = make_model(problem_type=kind, num_labels=len(names), id2label=dict(enumerate(names)), num_blocks=2).config
    exits = {**answer, "exits": [{"block": 0, **{n: v for n, v in answer.items() if n != "scores"}}]}
    found = flat(exits)
    assert {name: value for name, value in found.items() if not name.startswith("exit_")} == row
    assert found.keys() <= columns(config, None, True, []).keys()


@pytest.mark.medium
def test_evaluate_writes_the_answers_to_each_row(trained, files, shell, tmp_path):
    argv = ["evaluate", str(trained[0]), "--test_file", str(files / "test.csv"), "--threads=1"]
    status, out, err = shell(*argv, "--predictions", str(tmp_path / "answers.csv"))
    assert status == 0, err
    with (tmp_path / "answers.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == json.loads(out)["examples"] == 80
    for exit_row in json.loads(out)["exits"]:
        right = [row["true"] == row[f"exit_{exit_row['block']}_label"] for row in table]
        assert sum(right) / len(right) == pytest.approx(exit_row["accuracy"])
    assert shell(*argv)[1] == out


@pytest.mark.medium
def test_export_writes_a_copy_that_answers_the_same(trained, shell, tmp_path):
    status, _, err = shell("export", str(trained[0]), str(tmp_path / "small"), "--inference_only")
    assert status == 0, err
    copy = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert copy.config.inference_only
    whole, small = (predicted(shell, str(folder), *TEXTS) for folder in (trained[0], tmp_path / "small"))
    assert [(row["label"], row["score"]) for row in whole] == [(row["label"], row["score"]) for row in small]
    assert_mistake(shell("export", str(trained[0]), str(tmp_path / "small")), "Expected a new or an empty folder")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["a text", "--input=rows.csv"], "Expected texts or --input, got both ('a text' and rows.csv)"),
        (["a text", "--id_column=id"], "Expected a file with --id_column, got the text 'a text'"),
        (["a text", " "], "Expected a text in every argument, got an empty one"),
        (["--input=rows.csv", "--id_column=number"], "Expected column 'number', got the columns ['id', 'text']"),
    ],
)
def test_a_mistake_is_one_message(argv, said, trained, rows, shell, monkeypatch):
    monkeypatch.chdir(rows.parent)
    assert_mistake(shell("predict", str(trained[0]), *argv), said)
