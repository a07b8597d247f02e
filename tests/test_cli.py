"""The command line as a shell sees it: exit status, standard output, standard error."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_al.cli import main
from hf_al.training.arguments import parse_arguments

RECIPES = Path(__file__).parent.parent / "recipes"
SMALL = ["--hidden_size=16", "--num_blocks=2", "--target_size=12", "--max_steps=5", "--threads=1", "--use_cpu"]


def hf_al(*argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """`hf-al ARGV` in a process of its own."""
    program = [str(Path(sys.executable).with_name("hf-al")), *argv]
    return subprocess.run(program, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.fixture
def shell(capsys):
    """`hf-al ARGV` in this process: shell("train", ...) -> (exit status, standard output, standard error)."""

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = 0
        try:
            main(list(argv))
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture(scope="module")
def files(few_tweets, tmp_path_factory):
    """train.csv, validation.csv and test.csv of real tweets."""
    folder = tmp_path_factory.mktemp("data")
    for split, rows in few_tweets.items():
        rows.map(lambda row: {"text": " ".join(row["text"].split())}).to_csv(folder / f"{split}.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    """A model that `hf-al train` left, and what the process said: (folder, completed process)."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    data = [f"--{split}_file={files / f'{split}.csv'}" for split in ("train", "validation", "test")]
    done = hf_al("train", *data, *SMALL, f"--output_dir={folder}", "--max_steps=20")
    assert done.returncode == 0, done.stderr
    return folder, done


# --- help


def test_help_goes_to_standard_output(shell):
    for argv in (["--help"], ["-h"], ["help"]):
        status, out, err = shell(*argv)
        assert status == 0
        assert "hf-al COMMAND" in out
        assert "train" in out
        assert "evaluate" in out
        assert err == ""


def test_no_command_prints_the_help_and_is_a_mistake(shell):
    status, out, _ = shell()
    assert status == 2
    assert "hf-al COMMAND" in out


def test_help_of_train_lists_every_flag_that_later_work_relies_on(shell):
    status, out, _ = shell("train", "--help")
    assert status == 0
    names = (
        "config output_dir train_file validation_file test_file dataset_name seed max_steps save_steps threads "
        "resume_from_checkpoint objective num_blocks hidden_size target_size layers_per_block num_attention_heads "
        "text_column_names label_column_name learning_rate"
    )
    for name in names.split():
        assert f"--{name} " in out, name


def test_help_of_evaluate_lists_its_flags(shell):
    status, out, _ = shell("evaluate", "--help")
    assert status == 0
    assert "--test_file" in out
    assert "DIR" in out


@pytest.mark.medium
def test_the_installed_program_prints_the_help():
    done = hf_al("--help")
    assert done.returncode == 0
    assert "hf-al COMMAND" in done.stdout
    assert done.stderr == ""


# --- train, then evaluate


@pytest.mark.medium
def test_train_prints_the_results_and_says_the_rest_on_standard_error(trained):
    folder, done = trained
    assert "| block | accuracy | macro_f1 | log_loss | ece |" in done.stdout
    assert str(folder) in done.stdout
    assert "Threads: 1 of" in done.stderr
    assert "Threads" not in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.medium
def test_train_leaves_a_model_with_its_report_and_arguments(trained):
    folder, _ = trained
    for name in ("config.json", "model.safetensors", "tokenizer.json", "report.json", "report.md", "checkpoints"):
        assert (folder / name).exists(), name
    saved = yaml.safe_load((folder / "training_config.yaml").read_text())
    assert saved["model"] == {"hidden_size": 16, "num_blocks": 2, "target_size": 12}


@pytest.mark.medium
def test_evaluate_prints_one_json_object_and_nothing_else(trained, files):
    folder, _ = trained
    done = hf_al("evaluate", str(folder), "--test_file", str(files / "test.csv"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.keys() == {"accuracy", "macro_f1", "log_loss", "ece", "examples", "exits"}
    assert result["examples"] == 80
    assert [row["block"] for row in result["exits"]] == [0, 1]
    assert all(math.isfinite(row[name]) for row in result["exits"] for name in ("accuracy", "macro_f1", "log_loss"))
    assert result["accuracy"] == result["exits"][-1]["accuracy"]


@pytest.mark.medium
def test_evaluate_gives_the_test_numbers_of_the_training_report(trained, files, shell):
    folder, _ = trained
    report = json.loads((folder / "report.json").read_text())
    status, out, _ = shell("evaluate", str(folder), "--test_file", str(files / "test.csv"), "--threads", "1")
    assert status == 0
    assert json.loads(out)["exits"] == report["test"]


@pytest.mark.medium
def test_saved_arguments_train_the_same_model_again(trained, tmp_path, shell):
    folder, _ = trained
    status, _, err = shell("train", "--config", str(folder / "training_config.yaml"), f"--output_dir={tmp_path}")
    assert status == 0, err
    assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.medium
def test_evaluate_takes_columns_of_other_names(trained, files, tmp_path, shell):
    folder, _ = trained
    text = (files / "test.csv").read_text().replace("text,label", "what,mood", 1)
    (tmp_path / "test.csv").write_text(text)
    flags = ["--test_file", str(tmp_path / "test.csv"), "--text_column_names", "what", "--label_column_name", "mood"]
    status, out, _ = shell("evaluate", str(folder), *flags, "--threads", "1")
    assert status == 0
    assert json.loads(out)["examples"] == 80


# --- a user's mistakes


def assert_mistake(result: tuple[int, str, str], *said: str) -> None:
    status, out, err = result
    assert status == 2, err
    assert out == ""
    assert err.startswith("hf-al")
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    for words in said:
        assert words in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["trian"], ["Expected one of train, evaluate", "got 'trian'"]),
        (["train"], ["Expected --output_dir, got none"]),
        (["train", "--output_dir=out"], ["Expected data, got none", "--train_file", "--dataset_name"]),
        (["train", "--output_dir=out", "--learing_rate=1"], ["--learing_rate", "Did you mean --learning_rate?"]),
        (["train", "--output_dir=out", "--num_block=2"], ["--num_block", "Did you mean --num_blocks?"]),
        (["train", "--output_dir=out", "stray"], ["stray"]),
        (["train", "--output_dir=out", "--seed=abc"], ["seed", "int", "'abc'"]),
        (["train", "--output_dir=out", "--learning_rate=fast"], ["learning_rate", "float", "'fast'"]),
        (["train", "--output_dir=out", "--bf16=maybe"], ["bf16", "bool", "'maybe'"]),
        (["train", "--output_dir=out", "--seed"], ["--seed", "expected one argument"]),
        (["train", "--output_dir=out", "--train_file=no.csv"], ["Expected a file at no.csv, found none"]),
        (["train", "--output_dir=out", "--config=no.yaml"], ["Expected a YAML file at no.yaml, found none"]),
        (["train", "--output_dir=out", "--fp16"], ["fp16", "Pass bf16=True"]),
        (["train", "--output_dir=out", "--objective=al"], ["Expected objective to be one of associated", "got 'al'"]),
        (["train", "--output_dir=out", "--hidden_size=7"], ["Expected an even hidden_size", "hidden_size=8"]),
        (["train", "--output_dir=out", "--num_attention_heads=2"], ["'num_attention_heads' for al_lstm"]),
        (["train", "--output_dir=out", "--vocab_size=2"], ["--vocab_size"]),
        (["train", "--output_dir=out", "--dataset_name=tweets", "--train_file=a.csv"], ["train_file or dataset_name"]),
        (["evaluate"], ["DIR"]),
        (["evaluate", "nowhere"], ["--test_file"]),
        (["evaluate", "nowhere", "--test_file=no.csv"], ["Expected a model folder or a Hub id", "nowhere"]),
        (["evaluate", ".", "--test_file=no.csv"], ["Expected a model folder with config.json"]),
        (["evaluate", ".", "--tset_file=no.csv"], ["--test_file"]),
        (["evaluate", ".", "--test_file=no.csv", "--threads=two"], ["threads", "'two'"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_clear_line_and_status_2(argv, said, shell, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_mistake(shell(*argv), *said)


@pytest.mark.medium
def test_a_mistake_in_a_real_process_is_one_clear_line_and_status_2(tmp_path):
    done = hf_al("train", "--output_dir=out", "--train_file=no.csv", cwd=tmp_path)
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
    assert "Could not load nobody/nothing" in err
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
        assert "Could not load" in err
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


# --- from YAML and flags to arguments


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and returns the flags that name it: recipe("seed: 1")."""

    def write(text: str) -> list[str]:
        (tmp_path / "recipe.yaml").write_text(text)
        return ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", "out"]

    return write


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_a_number_in_yaml_is_a_number_however_it_is_written(written, recipe):
    args = parse_arguments(recipe(f"learning_rate: {written}\nmodel: {{embedding_std: {written}}}"))
    assert args.learning_rate == 1e-4
    assert args.model["embedding_std"] == 1e-4


def test_flags_override_the_recipe_and_leave_the_rest(recipe):
    flags = recipe("seed: 1\nlearning_rate: 0.5\nmodel: {num_blocks: 5, hidden_size: 64}\ndataset_name: tweets")
    args = parse_arguments([*flags, "--seed=2", "--num_blocks", "7", "--objective", "al_ce"])
    assert (args.seed, args.learning_rate, args.dataset_name) == (2, 0.5, "tweets")
    assert args.model == {"num_blocks": 7, "hidden_size": 64, "objective": "al_ce"}


@pytest.mark.parametrize("flag", ["--train_file=mine.csv", "--dataset_name=mine"])
def test_a_data_flag_replaces_the_whole_data_section_of_the_recipe(flag, recipe):
    section = {
        "dataset_name": "theirs", "dataset_config_name": "small", "validation_file": "v.csv", "test_file": "t.csv",
        "train_split_name": "a", "validation_split_name": "b", "test_split_name": "c", "text_column_names": "x",
        "label_column_name": "y", "problem_type": "regression", "validation_fraction": 0.3, "validation_seed": 9,
    }  # fmt: skip
    flags = recipe(yaml.safe_dump({**section, "seed": 3, "max_seq_length": 7}))
    args = parse_arguments([*flags, flag])
    untouched = parse_arguments(["--output_dir", "out"])
    name, value = flag.removeprefix("--").split("=")
    for key in section:
        assert getattr(args, key) == (value if key == name else getattr(untouched, key)), key
    assert (args.seed, args.max_seq_length) == (3, 7)


def test_another_data_flag_does_not_replace_the_data_section(recipe):
    args = parse_arguments([*recipe("train_file: a.csv\nlabel_column_name: y"), "--test_file=t.csv"])
    assert (args.train_file, args.label_column_name, args.test_file) == ("a.csv", "y", "t.csv")


@pytest.mark.parametrize("argv", [["--bf16"], ["--bf16", "true"], ["--bf16=yes"]])
def test_a_switch_can_stand_alone_or_have_a_value(argv):
    assert parse_arguments(["--output_dir=out", *argv]).bf16 is True
    assert parse_arguments(["--output_dir=out", "--bf16=false"]).bf16 is False


def test_a_list_can_be_given_as_a_flag():
    assert parse_arguments(["--output_dir=out", "--class_weights=[1, 2.5]"]).model == {"class_weights": [1.0, 2.5]}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("blocks", [1, 6])
def test_num_blocks_alone_works_with_every_recipe(blocks, path):
    from hf_al.registration import MODEL_CLASSES
    from hf_al.training.setup import check_model

    args = parse_arguments(["--config", str(path), "--output_dir=out", f"--num_blocks={blocks}"])
    check_model(args)
    config_class, _, model_class = MODEL_CLASSES[args.model_type]
    model = model_class(config_class(vocab_size=50, num_labels=3, **args.model))
    assert len(model.model.blocks) == blocks
