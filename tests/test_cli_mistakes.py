"""A user's mistake on the command line is one message and exit status 2, never a traceback."""

import sys
from pathlib import Path

import pytest
from conftest import assert_mistake, run_program

SCRIPT = str(Path(sys.executable).with_name("hf-al"))

# --- a user's mistakes


TWEETS = ["train", "--output_dir=out", "--dataset_name=tweets"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], ["Expected one of train, grow", "Did you mean train?", "got 'trian'"]),
        (["train"], ["Expected --output_dir, got none"]),
        (["train", "--output_dir=out"], ["Expected data, got none", "--train_file", "--dataset_name"]),
        (["train", "--output_dir=out", "--learing_rate=1"], ["--learing_rate", "Did you mean --learning_rate?"]),
        (["train", "--output_dir=out", "--num_block=2"], ["--num_block", "Did you mean --num_blocks?"]),
        (["train", "--output_dir=out", "--num_hidden_layers=2"], ["Did you mean --num_blocks?"]),
        (
            ["train", "--output_dir=out", "--train_file=a.csv", "--test_split_name=x"],
            ["Expected a Hub id", "split_name=x"],
        ),
        (
            ["train", "--output_dir=out", "--overwrite_output_dir", "--resume_from_checkpoint=last"],
            ["Expected either overwrite_output_dir or resume_from_checkpoint, got both"],
        ),
        (["train", "--output_dir=out", "stray"], ["stray"]),
        (["train", "--output_dir=out", "--seed=abc"], ["seed", "int", "'abc'"]),
        (["train", "--output_dir=out", "--learning_rate=fast"], ["learning_rate", "float", "'fast'"]),
        (["train", "--output_dir=out", "--bf16=maybe"], ["bf16", "bool", "'maybe'"]),
        (["train", "--output_dir=out", "--seed"], ["--seed", "expected one argument"]),
        (["train", "--output_dir=out", "--train_file=no.csv"], ["Expected a file at no.csv, found none"]),
        (["train", "--output_dir=out", "--config=no.yaml"], ["Expected a YAML file at no.yaml, found none"]),
        (["train", "--output_dir=out", "--fp16"], ["fp16", "Pass bf16=True"]),
        (
            ["train", "--output_dir=out", "--dataset_name=tweets", "--objective=al"],
            ["Expected objective to be one of associated", "got 'al'"],
        ),
        (
            ["train", "--output_dir=out", "--dataset_name=tweets", "--hidden_size=7"],
            ["Expected an even hidden_size", "hidden_size=8"],
        ),
        (["train", "--output_dir=out", "--num_attention_heads=2"], ["'num_attention_heads' for al_lstm"]),
        (["train", "--output_dir=out", "--vocab_size=2"], ["--vocab_size"]),
        (["train", "--output_dir=out", "--dataset_name=tweets", "--train_file=a.csv"], ["train_file or dataset_name"]),
        (["--foo"], ["Unknown flag --foo"]),
        (["evaluate"], ["DIR"]),
        (["evaluate", "nowhere"], ["--test_file"]),
        (["evaluate", "nowhere", "--test_file=no.csv"], ["Expected a model folder or a Hub id", "nowhere"]),
        (["evaluate", ".", "--test_file=no.csv"], ["Expected a model folder with config.json"]),
        (["evaluate", ".", "--tset_file=no.csv"], ["--test_file"]),
        (["evaluate", ".", "--test_file=no.csv", "--threads=two"], ["threads", "'two'"]),
        (["evaluate", ".", "--test_file=no.csv", "--threads=0"], ["--threads", "at least 1", "'0'"]),
        (["evaluate", ".", "--test_file=no.csv", "--thread=1"], ["Unknown flag --thread", "Did you mean --threads?"]),
        (["predict"], ["DIR"]),
        (["predict", "."], ["Expected a model folder with config.json"]),
        (["predict", "nowhere"], ["Expected a model folder or a Hub id", "nowhere"]),
        (["predict", "user/name", "--input=no.csv"], ["Expected a file at no.csv, found none"]),
        (["predict", "user/name", "--input=."], ["Expected a .txt, .csv, .tsv or .jsonl file"]),
        (["predict", "user/name", "--input=.", "--input_format=csv"], ["Expected a file as --input, got the folder"]),
        (["predict", ".", "--input_format=xml"], ["--input_format", "'xml'", "jsonl"]),
        (["predict", "user/name", "--output=no/where.jsonl"], ["Expected a folder for --output, found none at no"]),
        (["predict", "user/name", "--output=."], ["Expected a file as --output, got the folder"]),
        (["inspect", "."], ["Expected a model folder with config.json"]),
        (["inspect", "nowhere"], ["Expected a model folder or a Hub id", "nowhere"]),
        (["compare", "."], ["Expected report.json in ., found none"]),
        (["compare", "nowhere"], ["Expected report.json in nowhere, found none"]),
        (["compare"], ["DIR"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_clear_line_and_status_2(argv, said, shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_mistake(shell(*argv), *said)


@pytest.mark.medium
def test_a_mistake_in_a_real_process_is_one_clear_line_and_status_2(tmp_path):
    done = run_program("train", "--output_dir=out", "--train_file=no.csv", cwd=tmp_path)
    errors = done.stderr.strip().splitlines()
    assert done.returncode == 2
    assert errors[-1] == "hf-al train: error: Expected a file at no.csv, found none. Check the path."
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.medium
def test_a_hub_id_that_cannot_be_reached_is_a_mistake(tmp_path, files, shell):
    """The tests run without a network."""
    status, _, err = shell("evaluate", "nobody/nothing", "--test_file", str(files / "test.csv"))
    assert status == 2
    assert "Found no folder nobody/nothing here, and could not load a model of that name from the Hub" in err
    assert "Traceback" not in err
    status, _, err = shell("train", f"--output_dir={tmp_path}", "--dataset_name=nobody/nothing")
    assert status == 2
    assert "Could not load the data set 'nobody/nothing'" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning_rat: 1e-3", ["Unknown key 'learning_rat'", "Did you mean learning_rate?"]),
        ("num_blocks: 3", ["Unknown key 'num_blocks'", "model"]),
        ("model: {num_blokcs: 3}", ["Unknown config value 'num_blokcs'", "Did you mean num_blocks?"]),
        ("model: {num_blocks: many}", ["Expected num_blocks as int, got 'many'"]),
        ("model: 3", ["model", "got 3"]),
        ("model: [num_blocks]", ["model", "num_blocks"]),
        ("seed: fast", ["Expected seed as int, got 'fast'"]),
        ("seed:", ["Expected seed as int, got None"]),
        ("seed: [1]", ["Expected seed as int, got [1]"]),
        ("- seed", ["Expected a mapping of arguments"]),
        ("seed: 1: 2", ["Expected YAML in"]),
        ("1: 2", ["Unknown key 1"]),
        ("learning_rate: -1", ["Expected learning_rate above 0, got -1"]),
    ],
)
def test_a_mistake_in_a_recipe_is_one_clear_line_and_status_2(text, said, shell, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"dataset_name: tweets\n{text}\n" if text != "- seed" else text)
    flags = ["--config", str(tmp_path / "recipe.yaml"), f"--output_dir={tmp_path / 'out'}"]
    assert_mistake(shell("train", *flags), *said)


def test_a_recipe_that_is_no_text_is_a_mistake(shell, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00seed")
    assert_mistake(shell("train", f"--config={tmp_path / 'recipe.yaml'}", "--output_dir=out"), "Expected YAML in")


def test_an_output_dir_with_files_is_a_mistake(shell, tmp_path, files):
    (tmp_path / "thesis.tex").write_text("years of work")
    result = shell("train", f"--output_dir={tmp_path}", f"--train_file={files / 'train.csv'}")
    assert_mistake(result, "Expected an empty output_dir", "--overwrite_output_dir", "--resume_from_checkpoint last")


def test_an_output_dir_that_is_a_file_is_a_mistake(shell, tmp_path, files):
    result = shell("train", f"--output_dir={files / 'train.csv'}", f"--train_file={files / 'train.csv'}")
    assert_mistake(result, "Expected a folder as output_dir, got the file")


@pytest.mark.medium
def test_a_broken_model_is_a_mistake(trained, files, tmp_path, shell):
    folder, _ = trained
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    whole = (folder / "model.safetensors").read_bytes()
    for content in (None, b"", whole[:1000], b"\xff" * 1000):
        if content is not None:
            (tmp_path / "model.safetensors").write_bytes(content)
        status, out, err = shell("evaluate", str(tmp_path), "--test_file", str(files / "test.csv"))
        assert status == 2
        assert out == ""
        assert str(tmp_path / "model.safetensors") in err or "Expected model.safetensors in" in err
        assert "Traceback" not in err


@pytest.mark.medium
def test_a_model_of_another_library_is_a_mistake(tmp_path, files, shell):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertForSequenceClassification(BertConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path)
    status, out, err = shell("evaluate", str(tmp_path), "--test_file", str(files / "test.csv"))
    assert status == 2
    assert out == ""
    assert "Traceback" not in err
