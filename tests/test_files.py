"""Files as people have them: odd names and delimiters, columns and keys that come twice, a damaged tokenizer."""

import gzip
import json
import shutil

import pytest
from conftest import assert_mistake

import hf_al
from hf_al.data.files import read_file, stream_file
from hf_al.headers import checked_file, guess_delimiter
from hf_al.loading import load_model
from hf_al.parsing import read_yaml

ROWS = [("good flight", "yes"), ("bad, bad seat", "no"), ("a; b", "yes")]


def table(delimiter: str) -> str:
    return "\n".join(delimiter.join(f'"{cell}"' for cell in row) for row in [("text", "label"), *ROWS]) + "\n"


def rows_of(data) -> list[tuple[str, str]]:
    return [(row["text"], row["label"]) for row in data]


@pytest.mark.parametrize("name", ["a[1].csv", "what?.csv", "all*.csv", "{a,b}.csv", "a b.csv"])
def test_a_name_is_no_pattern(name, tmp_path):
    (tmp_path / name).write_text(table(","))
    (tmp_path / "a1.csv").write_text("text,label\nanother,file\n")
    assert rows_of(read_file(str(tmp_path / name))) == ROWS
    assert rows_of(stream_file(str(tmp_path / name))) == ROWS


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_delimiter_is_guessed_from_the_header(delimiter, tmp_path, trained, shell):
    path = tmp_path / "rows.csv"
    path.write_text("\ufeff" + table(delimiter), encoding="utf-8")
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    for name in (path, tmp_path / "rows.csv.gz"):
        assert rows_of(read_file(str(name))) == ROWS
        status, out, err = shell("predict", str(trained[0]), "--input", str(name), "--with_text", "--threads=1")
        assert status == 0, err
        assert [json.loads(line)["text"] for line in out.splitlines()] == [text for text, _ in ROWS]


def test_a_named_delimiter_holds(tmp_path, trained, shell):
    path = tmp_path / "rows.csv"
    path.write_text("text|label\ngood, very; good|yes\nbad|no\n")
    assert rows_of(read_file(str(path), "|")) == [("good, very; good", "yes"), ("bad", "no")]
    argv = ["predict", str(trained[0]), "--input", str(path), "--csv_delimiter", "|", "--with_text", "--threads=1"]
    assert json.loads(shell(*argv)[1].splitlines()[0])["text"] == "good, very; good"
    assert_mistake(shell(*argv[:-2], "--csv_delimiter=||"), "--csv_delimiter", "expected one character, got '||'")


def test_a_comma_wins_a_tie():
    assert [guess_delimiter(header) for header in ("text", "a,b;c", "a;b;c,d", "a\tb")] == [",", ",", ";", "\t"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_they_do(end, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(table(";").replace("\n", end).encode())
    assert rows_of(read_file(str(path))) == ROWS


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves a refused file open
def test_a_column_may_look_different_after_many_rows(tmp_path):
    """datasets takes the type of a column from the first rows of a csv file."""
    path = tmp_path / "long.csv"
    fractions, words = [*["1"] * 40_000, "3.5", "2"], [*["1"] * 40_000, "none", ""]
    rows = zip(fractions, words, strict=True)
    path.write_text("text,label,price,stock\n" + "".join(f"a text,0,{a},{b}\n" for a, b in rows))
    data = read_file(str(path))
    assert data["price"][-3:] == [1.0, 3.5, 2.0]
    assert data["stock"][-3:] == ["1", "none", ""]
    assert data["label"][-1] == 0


@pytest.mark.parametrize("read", [read_file, stream_file])
@pytest.mark.parametrize("rows", ["one, more,yes\ntwo,no\n", "one,yes,\ntwo, more,no\n", "one,yes\ntwo, more,no\n"])
def test_a_row_with_more_cells_than_the_header_is_refused(rows, read, tmp_path):
    """pandas would take the first cells as names of the rows, or drop the last ones."""
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + rows)
    with pytest.raises(ValueError, match=r"must be in quotes\."):
        read(str(path))


@pytest.mark.parametrize("read", [read_file, stream_file])
@pytest.mark.parametrize("cells", [("true", "false"), ("01", "02"), ("1.0", "nan"), ("TRUE", "False")])
def test_cells_stay_as_they_are_unless_all_are_numbers(cells, read, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label,name\n" + "".join(f"a text,{cells[i % 2]},{i}\n" for i in range(12_000)))
    rows = [(row["label"], row["name"]) for row in read(str(path))]
    assert rows == [(cells[i % 2], i) for i in range(12_000)]


@pytest.mark.parametrize(("cells", "numbers"), [((" 1", "+2"), [1, 2]), (("-1e-3", " +.5 "), [-0.001, 0.5])])
def test_numbers_may_have_a_sign_and_blanks(cells, numbers, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"a text,{cell}\n" for cell in cells))
    assert read_file(str(path))["label"][:] == numbers


def test_a_late_cell_of_a_stream_that_is_no_whole_number_stays_as_it_is(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,a,b\n" + "a text,1,2\n" * 10_001 + "a text,,3\na text,2.5,4\n")
    rows = list(stream_file(str(path)))[-3:]
    assert [(row["a"], row["b"]) for row in rows] == [(1, 2), ("", 3), ("2.5", 4)]


@pytest.mark.parametrize("header", ['"text', "text," + "x" * 200_000, '"te"xt",label'])
def test_a_header_that_is_no_csv_is_no_crash(header, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(header + "\n")
    assert checked_file(str(path))[1] == "csv"


def test_a_column_that_comes_twice_is_named(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text,label,text\na,b,c\n")
    with pytest.raises(ValueError, match="got 'text' 2 times"):
        read_file(str(path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("seed: 1\nseed: 2\n", "the key 'seed' comes 2 times"),
        ("model:\n  num_blocks: 2\n  num_blocks: 3\n", "the key 'num_blocks' comes 2 times"),
    ],
)
def test_a_key_that_comes_twice_is_named(content, said, tmp_path):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ValueError, match=said):
        read_yaml(str(tmp_path / "a.yaml"))


def test_numbers_of_a_yaml_file_are_what_they_look_like(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "seed: 010\nmax_steps: 1:30\nlearning_rate: 1e-3\nweight_decay: 5e-4\nthreads: 10\n"
    )
    values = read_yaml(str(tmp_path / "a.yaml"))
    assert values == {
        "seed": "010", "max_steps": "1:30", "learning_rate": 1e-3, "weight_decay": 5e-4, "threads": 10,
    }  # fmt: skip
    with pytest.raises(ValueError, match="Expected max_steps as int, got '1:30'"):
        hf_al.TrainingArguments(max_steps=values["max_steps"])


def test_what_a_run_saves_reads_back_as_the_same_arguments(tmp_path):
    args = hf_al.TrainingArguments(
        learning_rate=[1e-05, 0.5], seed=0, weight_decay=1e-12, max_grad_norm=0.0, optim_args={"momentum": 0.9}
    )
    args.save(tmp_path / "a.yaml")
    assert hf_al.TrainingArguments(**read_yaml(str(tmp_path / "a.yaml"))) == args


@pytest.mark.parametrize("name", ["1e-3", "1e5", "1.5e3", "no", "010", "1:30", "null"])
def test_names_that_look_like_something_else_read_back_as_names(name, tmp_path):
    args = hf_al.TrainingArguments(output_dir=name, label_column_name=name, eval_strategy="no")
    args.save(tmp_path / "run.yaml")
    read = hf_al.TrainingArguments(**read_yaml(str(tmp_path / "run.yaml")))
    assert (read.output_dir, read.label_column_name, read.eval_strategy) == (name, name, "no")


def test_no_needs_no_quotes_as_eval_strategy(tmp_path):
    (tmp_path / "run.yaml").write_text("output_dir: out\neval_strategy: no\n")
    assert hf_al.TrainingArguments(**read_yaml(str(tmp_path / "run.yaml"))).eval_strategy == "no"


def test_a_damaged_tokenizer_is_named(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    path = tmp_path / "run" / "tokenizer.json"
    path.write_text(path.read_text()[:500])
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_model(str(tmp_path / "run"))


def test_a_mistyped_folder_is_not_only_a_matter_of_the_hub(shell, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_mistake(shell("predict", "out/mien", "some text"), "Found no folder out/mien here")
