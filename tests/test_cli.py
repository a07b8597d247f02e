"""The command line as a shell sees it: exit status, standard output, standard error."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import run_program

import hf_al
from hf_al.cli import COMMANDS

SCRIPT = str(Path(sys.executable).with_name("hf-al"))

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
    done = run_program("--help")
    assert done.returncode == 0
    assert "hf-al COMMAND" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("program", [["-m", "hf_al.cli"], [SCRIPT]], ids=["module", "script"])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_waits_for_no_large_package(program, command):
    argv = [sys.executable, "-X", "importtime", *program, *([command] if command else []), "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "datasets", "accelerate", "numpy", "pyarrow", "huggingface_hub"}
    assert done.stdout.startswith(f"usage: {' '.join(['hf-al', command]).strip()} ")


def test_every_public_name_is_there_in_the_command_line_too():
    """Which imports the package without the models at first."""
    code = (
        "import sys; sys.argv[0] = 'bin/hf-al'; import hf_al; assert 'torch' not in sys.modules\n"
        "for name in hf_al.__all__: getattr(hf_al, name)\n"
        "from transformers import AutoConfig; print(AutoConfig.for_model('al_lstm').model_type)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "al_lstm\n", done.stderr
    assert set(hf_al.__all__) <= set(dir(hf_al)) | set(hf_al._LAZY)


def test_importing_the_package_registers_the_models():
    code = "import hf_al; from transformers import AutoConfig; print(AutoConfig.for_model('al_transformer').model_type)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "al_transformer\n", done.stderr


# --- completion


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["pre"], "predict"),
        (["train", "--learn"], "--learning_rate"),
        (["train", "--num_b"], "--num_blocks"),
        (["predict", "--input_f"], "--input_format"),
    ],
)
def test_bash_completes_commands_and_flags(typed, offered, shell):
    status, script, _ = shell("--print_completion", "bash")
    assert status == 0
    words = " ".join(["hf-al", *typed])
    code = (
        f"{script}\nCOMP_WORDS=({words}); COMP_CWORD={len(typed)}; _shtab_hf_al; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=60)
    assert offered in done.stdout.split(), done.stderr


@pytest.mark.parametrize("name", ["zsh", "tcsh"])
def test_other_shells_have_a_completion_script(name, shell):
    status, script, _ = shell("--print_completion", name)
    assert status == 0
    for command in COMMANDS:
        assert command in script


# --- the arguments of a run, printed


def test_print_config_gives_the_resolved_arguments_back_as_yaml(shell, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("learning_rate: 1e-4\nseed: 1\ndataset_name: tweets\nmodel: {num_blocks: 5}\n")
    flags = ["--seed=2", "--objective=al_ce", f"--output_dir={tmp_path / 'out'}"]
    status, out, err = shell("train", "--config", str(recipe), *flags, "--print_config")
    assert (status, err) == (0, "")
    values = yaml.safe_load(out)
    assert (values["learning_rate"], values["seed"], values["dataset_name"]) == (1e-4, 2, "tweets")
    assert values["model"] == {"num_blocks": 5, "objective": "al_ce"}
    (tmp_path / "printed.yaml").write_text(out)
    assert shell("train", "--config", str(tmp_path / "printed.yaml"), "--print_config") == (0, out, "")
    assert not (tmp_path / "out").exists()


def test_print_config_needs_neither_data_nor_output_dir_but_right_values(shell):
    status, out, _ = shell("train", "--print_config", "--train_file=not_there_yet.csv")
    assert status == 0
    assert yaml.safe_load(out)["train_file"] == "not_there_yet.csv"
    assert_mistake(shell("train", "--print_config", "--learning_rate=-1"), "Expected learning_rate above 0")


# --- stopping


@pytest.fixture
def start():
    """Starts `hf-al ARGV` with pipes, and ends it after the test. Ctrl-C reaches it also where the tests run in the
    background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    started = []

    def run(*argv: str) -> subprocess.Popen:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        started.append(subprocess.Popen([SCRIPT, *argv], **pipes))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()
    signal.signal(signal.SIGINT, before)


@pytest.mark.medium
def test_ctrl_c_is_one_message_and_status_130(trained, start):
    process = start("predict", str(trained[0]), "--batch_size=1", "--threads=1")
    process.stdin.write(b"a fine day\n" * 16)
    process.stdin.flush()
    assert json.loads(process.stdout.readline())["label"]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode() == "hf-al predict: interrupted.\n"


@pytest.mark.medium
def test_ctrl_c_leaves_the_answers_so_far_beside_their_place(trained, start, tmp_path):
    output = tmp_path / "answers.jsonl"
    process = start("predict", str(trained[0]), "--batch_size=1", "--threads=1", "--output", str(output))
    process.stdin.write(b"a fine day\n" * 40)
    process.stdin.flush()
    aside = tmp_path / "answers.jsonl.tmp"
    while process.poll() is None and not (aside.exists() and len(aside.read_text().splitlines()) == 32):
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode() == f"hf-al predict: interrupted. The answers so far are in {aside}.\n"
    assert len(aside.read_text().splitlines()) == 32
    assert not output.exists()


@pytest.mark.medium
def test_ctrl_c_in_training_says_how_to_go_on(files, start, tmp_path):
    data = [f"--train_file={files / 'train.csv'}", f"--output_dir={tmp_path}", "--max_steps=100000", "--use_cpu"]
    process = start("train", *data, "--num_blocks=2", "--hidden_size=16", "--target_size=12", "--threads=1")
    for line in process.stderr:
        if b"Training 2 units" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().splitlines()[-1].startswith("hf-al train: interrupted. --resume_from_checkpoint last")
    assert "Traceback" not in err.decode()


@pytest.mark.medium
def test_a_reader_that_goes_away_ends_the_program_quietly(trained, start):
    process = start("predict", str(trained[0]), "--batch_size=1", "--threads=1")
    process.stdin.write(b"a fine day\n" * 16)
    process.stdin.flush()
    process.stdout.readline()
    process.stdout.close()
    process.stdin.write(b"a fine day\n" * 16)
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0


def test_help_into_a_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([SCRIPT, "train", "--help"], stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


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
    done = run_program("evaluate", str(folder), "--test_file", str(files / "test.csv"))
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
        (["trian"], ["Expected one of train, evaluate", "Did you mean train?", "got 'trian'"]),
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
        (["predict", ".", "--input=no.csv"], ["Expected a file at no.csv, found none"]),
        (["predict", ".", "--input=."], ["Expected a .txt, .csv, .tsv or .jsonl file"]),
        (["predict", ".", "--input=.", "--input_format=csv"], ["Expected a file as --input, got the folder"]),
        (["predict", ".", "--input_format=xml"], ["--input_format", "'xml'", "jsonl"]),
        (["predict", ".", "--output=no/where.jsonl"], ["Expected a folder for --output, found none at no"]),
        (["predict", ".", "--output=."], ["Expected a file as --output, got the folder"]),
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
