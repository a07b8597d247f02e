"""The command line as a shell sees it: exit status, standard output, standard error."""

import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import assert_mistake, run_program

import hf_al
from hf_al.commands import COMMANDS

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


@pytest.mark.parametrize("program", [["-m", "hf_al_program"], [SCRIPT]], ids=["module", "script"])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_waits_for_no_large_package(program, command):
    argv = [sys.executable, "-X", "importtime", *program, *([command] if command else []), "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported
    large = {"torch", "transformers", "datasets", "accelerate", "numpy", "pyarrow", "huggingface_hub", "onnx"}
    assert not imported & large
    assert done.stdout.startswith(f"usage: {' '.join(['hf-al', command]).strip()} ")


@pytest.mark.medium
def test_every_public_name_is_there_in_the_command_line_too():
    """The command line first imports the package without the models."""
    code = (
        "import sys, hf_al_program, hf_al; assert 'torch' not in sys.modules\n"
        "for name in hf_al.__all__: getattr(hf_al, name)\n"
        "from transformers import AutoConfig; print(AutoConfig.for_model('al_lstm').model_type)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "al_lstm\n", done.stderr
    assert set(hf_al.__all__) <= set(dir(hf_al)) | set(hf_al._LAZY)


@pytest.mark.slow
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


# --- train, then evaluate


@pytest.mark.medium
def test_train_prints_the_results_and_says_the_rest_on_standard_error(trained):
    folder, done = trained
    assert "block  accuracy  macro_f1  log_loss     ece\n" in done.stdout
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
def test_evaluate_prints_one_json_object_and_nothing_else(trained, files, start):
    folder, _ = trained
    process = start("evaluate", str(folder), "--test_file", str(files / "test.csv"))
    out, err = process.communicate()
    assert process.wait(60) == 0, err
    result = json.loads(out)
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


@pytest.mark.medium
def test_columns_of_the_run_are_found_again_without_flags(trained, files, tmp_path, shell):
    folder = shutil.copytree(trained[0], tmp_path / "model")
    report = json.loads((folder / "report.json").read_text())
    report["arguments"] |= {"text_column_names": "what", "label_column_name": "mood"}
    (folder / "report.json").write_text(json.dumps(report))
    header, *rows = (files / "test.csv").read_text().splitlines()
    assert header == "text,label"
    path = tmp_path / "test.csv"
    path.write_text("\n".join(["text,label,what,mood", *(f"nothing,none,{row}" for row in rows)]) + "\n")
    status, out, err = shell("evaluate", str(folder), "--test_file", str(path), "--threads", "1")
    assert status == 0, err
    assert json.loads(out)["exits"] == report["test"]
    answers = [
        shell("predict", str(folder), "--input", str(file), "--threads", "1")[1] for file in (path, files / "test.csv")
    ]
    assert answers[0] == answers[1] != ""
    same = list(csv.DictReader([header, *rows]))
    lines = [{"text": "nothing", "what": row["text"], "mood": row["label"]} for row in same]
    unlike = []  # json lines and columns of no name, which are known only when they are read
    for name, objects in (("named", lines), ("usual", same)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, objects)) + "\n")
        status, out, err = shell("evaluate", str(folder), f"--test_file={tmp_path / name}.jsonl", "--threads=1")
        assert status == 0, err
        unlike.append(out)
        unlike.append(shell("predict", str(folder), f"--input={tmp_path / name}.jsonl", "--threads=1")[1])
    assert unlike[:2] == unlike[2:]
    path.write_text(",text,label,what,mood\n" + "".join(f"{i},nothing,none,{row}\n" for i, row in enumerate(rows)))
    out = shell("evaluate", str(folder), "--test_file", str(path), "--threads", "1")[1]
    assert json.loads(out)["exits"] == report["test"]


@pytest.mark.medium
def test_a_model_of_pairs_says_so_when_it_gets_single_texts(trained, tmp_path, shell, caplog):
    folder = shutil.copytree(trained[0], tmp_path / "model")
    report = json.loads((folder / "report.json").read_text())
    report["data"]["pairs"] = True
    (folder / "report.json").write_text(json.dumps(report))
    (tmp_path / "rows.csv").write_text("text,text_pair\nhello,there\n")
    assert shell("predict", str(folder), f"--input={tmp_path / 'rows.csv'}", "--threads=1")[0] == 0
    assert "pairs of texts" not in caplog.text
    assert shell("predict", str(folder), "hello", "--threads=1")[0] == 0
    assert "pairs of texts" in caplog.text
