"""A user's mistake is one message that says what was expected, what came and what to do; status 2; nothing is lost."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from hooks import hook
from safetensors.torch import load_file, save_file

from hf_al.cli import main
from hf_al.ranges import SCHEDULES
from hf_al.training import checkpoint
from hf_al.training.stage import Stage

SMALL = [
    "--num_blocks=2", "--hidden_size=16", "--target_size=12", "--threads=1", "--use_cpu", "--disable_tqdm",
    "--max_steps=6", "--save_steps=2", "--logging_steps=4", "--eval_strategy=no",
]  # fmt: skip


def csv(labels: list[str], text: str = "text number {n} is about {label}") -> str:
    return "text,label\n" + "".join(f"{text.format(n=n, label=label)},{label}\n" for n, label in enumerate(labels))


GOOD = csv(["red", "green", "blue"] * 20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a finished run and its data: run/ and train.csv."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "train.csv").write_text(GOOD)
    main(["train", f"--train_file={folder / 'train.csv'}", f"--output_dir={folder / 'run'}", *SMALL])
    return folder


@pytest.fixture
def place(trained, tmp_path, monkeypatch) -> Path:
    """The user's current folder: train.csv, and the finished run in run/."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def shell(capsys):
    """`hf-al ARGV` in this process: shell("train ...") -> (exit status, standard output, standard error)."""

    def run(line: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = 0
        try:
            main(line.split())
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def write(name: str, text: str | bytes):
    """Writes the faulty file into the user's current folder."""

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)

    return make


def nothing(folder: Path) -> None:
    """Nothing needs to be put there."""


def cut_the_weights(folder: Path) -> None:
    file = folder / "run" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def spoil_the_header(folder: Path) -> None:
    file = folder / "run" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:8] + b"\xff" * 8 + file.read_bytes()[16:])


def reshape_a_weight(folder: Path) -> None:
    file = folder / "run" / "model.safetensors"
    save_file({**load_file(file), "model.blocks.1.bridge.layers.0.bias": torch.zeros(3)}, file, {"format": "pt"})


def flip_a_bit_of_each_checkpoint(folder: Path) -> None:
    for file in folder.glob("run/checkpoints/*/block-001.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")


def pickle_only(folder: Path) -> None:
    (folder / "run" / "model.safetensors").rename(folder / "run" / "pytorch_model.bin")


EVALUATE = "evaluate run --test_file=train.csv"
TRAIN = "train --output_dir=new " + " ".join(SMALL)
GOES_ON = "train --train_file=train.csv --output_dir=run --resume_from_checkpoint=last " + " ".join(SMALL)

# name: (what is put there, command line, message)
MISTAKES = {
    # --- files
    "missing_file": (
        nothing, f"{TRAIN} --train_file=no.csv",
        "hf-al train: error: Expected a file at no.csv, found none. Check the path.",
    ),
    "missing_test_file": (
        nothing, f"{TRAIN} --train_file=train.csv --test_file=no.csv",
        "hf-al train: error: Expected a file at no.csv, found none. Check the path.",
    ),
    "missing_file_to_evaluate": (
        nothing, "evaluate run --test_file=no.csv",
        "hf-al evaluate: error: Expected a file at no.csv, found none. Check the path.",
    ),
    "undecodable_bytes": (
        write("a.csv", "text,label\ncafé,b\n".encode("latin-1")), f"{TRAIN} --train_file=a.csv",
        "hf-al train: error: Expected a.csv to be a csv file, got UnicodeDecodeError: 'utf-8' codec can't decode "
        "byte 0xe9 in position 3: unexpected end of data. Save it as UTF-8.",
    ),
    "empty_file": (
        write("a.csv", ""), f"{TRAIN} --train_file=a.csv",
        "hf-al train: error: Expected rows in a.csv, got an empty file. Add rows of text and label.",
    ),
    "only_a_header": (
        write("a.csv", "text,label\n"), f"{TRAIN} --train_file=a.csv",
        "hf-al train: error: Expected rows in a.csv, got only a header. Add rows of text and label.",
    ),
    "unknown_ending": (
        write("a.xlsx", "x"), f"{TRAIN} --train_file=a.xlsx",
        "hf-al train: error: Expected a .csv, .tsv, .json, .jsonl or .parquet file (also .gz), got a.xlsx. Convert "
        "it, or fix its extension.",
    ),
    "empty_text": (
        write("a.csv", GOOD + '" ",red\n'), f"{TRAIN} --train_file=a.csv",
        "hf-al train: error: Expected a text in every row, got an empty one: text, train split, row 60 (from 0). "
        "Remove the row, or fill the text in.",
    ),
    "no_data": (
        nothing, TRAIN,
        "hf-al train: error: Expected data, got none. Pass --train_file FILE, or --dataset_name with a Hub id or "
        "'tweets'.",
    ),
    # --- columns and labels
    "wrong_text_column": (
        nothing, f"{TRAIN} --train_file=train.csv --text_column_names=txt",
        "hf-al train: error: Expected column 'txt', got the columns ['text', 'label']. Did you mean text? Check the "
        "column flags.",
    ),
    "wrong_label_column": (
        nothing, f"{TRAIN} --train_file=train.csv --label_column_name=lable",
        "hf-al train: error: Expected column 'lable', got the columns ['text', 'label']. Did you mean label? Check the "
        "column flags.",
    ),
    "no_label_column": (
        write("a.csv", "a,b,c\n1,2,3\n"), f"{TRAIN} --train_file=a.csv",
        "hf-al train: error: Cannot tell the label column among ['a', 'b', 'c']. Pass --label_column_name NAME.",
    ),
    "wrong_number": (
        write("a.csv", "text,age,label\na text,1,a\nanother,two,b\n"),
        f"{TRAIN} --train_file=a.csv --numeric_column_names=age",
        "hf-al train: error: Expected a number or nothing, got 'two'. This is column 'age' in row 1 (from 0) of the "
        "train split. Correct it, leave the cell empty if the value is missing, or take the column out of "
        "--numeric_column_names.",
    ),
    "column_missing_in_test": (
        write("a.csv", "text,mood\na,red\n"), f"{TRAIN} --train_file=train.csv --test_file=a.csv",
        "hf-al train: error: Expected column 'label' in the test split, got ['text', 'mood']. Give the columns of "
        "all splits the same names.",
    ),
    "missing_label": (
        write("a.csv", GOOD + "a text,\n"), f"{TRAIN} --train_file=a.csv",
        "hf-al train: error: Expected a label in every row, got none in row 60 (from 0) of the train split. Remove "
        "the row, or fill the label in.",
    ),
    "label_that_train_never_saw": (
        write("a.csv", csv(["red", "grey"])), f"{TRAIN} --train_file=train.csv --test_file=a.csv",
        "hf-al train: error: Expected the labels blue, green, red in the test split, got ['grey'] too. Add such rows "
        "to train, or remove them.",
    ),
    "label_that_the_model_never_saw": (
        write("a.csv", csv(["red", "grey"])), "evaluate run --test_file=a.csv",
        "hf-al evaluate: error: Expected the labels blue, green, red in the test split, got ['grey'] too. Add such "
        "rows to train, or remove them.",
    ),
    "one_class_only": (
        write("a.csv", csv(["red"] * 30)), f"{TRAIN} --train_file=a.csv",
        "hf-al train: error: Expected at least two classes in train, got only red. Add rows of another class, or "
        "name the label column: --label_column_name.",
    ),
    "fewer_examples_than_classes": (
        nothing, f"{TRAIN} --train_file=train.csv --max_train_samples=2",
        "hf-al train: error: Expected at least one training example of each class, got 2 examples of 3 classes. Add "
        "examples, raise --max_train_samples, or name the label column: --label_column_name.",
    ),
    "each_label_once": (
        write("a.csv", csv([str(n) for n in range(9)])), f"{TRAIN} --train_file=a.csv",
        "hf-al train: error: Expected enough rows to cut a validation split of 10% from 9, got none. Pass "
        "--validation_file, or more data. Each row has a label of its own: is it the right --label_column_name?",
    ),
    "words_for_regression": (
        nothing, f"{TRAIN} --train_file=train.csv --problem_type=regression",
        "hf-al train: error: Expected numbers as labels for regression, got 'red' in row 0 (from 0) of train. Name "
        "another --label_column_name, or another --problem_type.",
    ),
    # --- values
    "wrong_type_in_a_flag": (
        nothing, f"{TRAIN} --train_file=train.csv --seed=abc",
        "hf-al train: error: Argument --seed: expected int, got 'abc'.",
    ),
    "wrong_range_in_a_flag": (
        nothing, f"{TRAIN} --train_file=train.csv --learning_rate=-1",
        "hf-al train: error: Expected learning_rate above 0, got -1.0.",
    ),
    "wrong_type_in_yaml": (
        write("a.yaml", "seed: fast\n"), f"{TRAIN} --train_file=train.csv --config=a.yaml",
        "hf-al train: error: Expected seed as int, got 'fast'.",
    ),
    "wrong_range_in_yaml": (
        write("a.yaml", "adam_beta1: 1.5\n"), f"{TRAIN} --train_file=train.csv --config=a.yaml",
        "hf-al train: error: Expected adam_beta1 in [0, 1), got 1.5.",
    ),
    "wrong_type_of_a_model_value": (
        write("a.yaml", "model: {num_blocks: many}\n"), "train --output_dir=new --config=a.yaml",
        "hf-al train: error: Expected num_blocks as int, got 'many'.",
    ),
    "wrong_range_of_a_model_value": (
        nothing, f"{TRAIN} --train_file=train.csv --hidden_dropout_prob=1.5",
        "hf-al train: error: Expected hidden_dropout_prob in [0, 1), got 1.5. Pass hidden_dropout_prob=0.1, for "
        "example, or 0.0 to switch it off.",
    ),
    "unknown_flag": (
        nothing, f"{TRAIN} --train_file=train.csv --learing_rate=1",
        "hf-al train: error: Unknown flag --learing_rate=1. Did you mean --learning_rate?",
    ),
    "unknown_key": (
        write("a.yaml", "learing_rate: 1\n"), f"{TRAIN} --train_file=train.csv --config=a.yaml",
        "hf-al train: error: Unknown key 'learing_rate' in a.yaml. Did you mean learning_rate?",
    ),
    "missing_yaml": (
        nothing, f"{TRAIN} --train_file=train.csv --config=no.yaml",
        "hf-al train: error: Expected a YAML file at no.yaml, found none. Check --config.",
    ),
    "not_yaml": (
        write("a.yaml", "a: b: c\n"), f"{TRAIN} --train_file=train.csv --config=a.yaml",
        "hf-al train: error: Expected YAML in a.yaml, got something else: mapping values are not allowed here in "
        '"<unicode string>", line 1, column 5: a: b: c ^',
    ),
    "unknown_objective": (
        nothing, f"{TRAIN} --train_file=train.csv --objective=associate",
        "hf-al train: error: Expected objective to be one of associated, al_ce, local_ce, supcon, deinfo, predsim, "
        "backprop, got 'associate'. "
        "Did you mean associated?",
    ),
    "unknown_schedule": (
        nothing, f"{TRAIN} --train_file=train.csv --lr_scheduler_type=cosin",
        f"hf-al train: error: Expected lr_scheduler_type to be one of {', '.join(SCHEDULES)}, got 'cosin'. Did you "
        "mean cosine?",
    ),
    "unknown_optimizer": (
        nothing, f"{TRAIN} --train_file=train.csv --optim=adamm",
        "hf-al train: error: Expected optim to be one of adamw, adam, sgd, adafactor, got 'adamm'. Did you mean adam?",
    ),
    "unknown_value_of_the_optimizer": (
        nothing, f"{TRAIN} --train_file=train.csv --optim=sgd --optim_args=momentun=0.9",
        "hf-al train: error: Expected optim_args of torch's SGD, got {'momentun': 0.9}: SGD.__init__() got an "
        "unexpected keyword argument 'momentun'.",
    ),
    "rates_of_other_blocks": (
        nothing, f"{TRAIN} --train_file=train.csv --num_blocks=3 --learning_rate=1e-3,2e-3",
        "hf-al train: error: Expected learning_rate as one number, or 3 of them (num_blocks), got 2.",
    ),
    "unknown_metric": (
        nothing, f"{TRAIN} --train_file=train.csv --metric_for_best_model=accurate",
        "hf-al train: error: Expected metric_for_best_model to be one of accuracy, macro_f1, log_loss, ece, f1_micro, "
        "f1_macro, mse, pearson, got 'accurate'. Did you mean accuracy?",
    ),
    "metric_of_another_problem": (
        nothing, f"{TRAIN} --train_file=train.csv --metric_for_best_model=mse",
        "hf-al train: error: Expected metric_for_best_model among accuracy, macro_f1, log_loss, ece "
        "(single_label_classification), got 'mse'. Leave it out to choose by accuracy.",
    ),
    "unknown_command": (
        nothing, "trian",
        "hf-al: error: Expected one of train, grow, prune, evaluate, predict, calibrate, inspect, compare, push, "
        "export, plan, sweep, study, demo, serve, got 'trian'. "
        "Did you mean train? See hf-al --help.",
    ),
    # --- folders
    "output_dir_not_empty": (
        write("old/mine.txt", "x"), TRAIN.replace("=new", "=old") + " --train_file=train.csv",
        "hf-al train: error: Expected an empty output_dir, got files in old. Pass --overwrite_output_dir to start "
        "anew, --resume_from_checkpoint last to go on, or another folder.",
    ),
    "output_dir_is_a_file": (
        nothing, TRAIN.replace("=new", "=train.csv") + " --train_file=train.csv",
        "hf-al train: error: Expected a folder as output_dir, got the file train.csv. Pass another name.",
    ),
    "output_dir_below_a_file": (
        nothing, TRAIN.replace("=new", "=train.csv/new") + " --train_file=train.csv",
        "hf-al train: error: Expected a writable output_dir, got train.csv/new: Not a directory. Pass another "
        "folder, or fix its permissions.",
    ),
    "overwrite_with_bad_data": (
        nothing, TRAIN.replace("=new", "=run") + " --train_file=no.csv --overwrite_output_dir",
        "hf-al train: error: Expected a file at no.csv, found none. Check the path.",
    ),
    "overwrite_with_bad_labels": (
        write("a.csv", csv(["red"] * 30)), TRAIN.replace("=new", "=run") + " --train_file=a.csv --overwrite_output_dir",
        "hf-al train: error: Expected at least two classes in train, got only red. Add rows of another class, or "
        "name the label column: --label_column_name.",
    ),
    # --- resuming
    "resume_with_another_architecture": (
        nothing, f"{GOES_ON} --model_type=al_transformer",
        "hf-al train: error: Expected the model of run/checkpoints/checkpoint-00000006, got another: model_type was "
        "'al_lstm' and is now 'al_transformer'. Resume with the arguments and data of that run, or start anew in "
        "another output_dir.",
    ),
    "resume_with_another_width": (
        nothing, f"{GOES_ON} --hidden_size=32",
        "hf-al train: error: Expected the model of run/checkpoints/checkpoint-00000006, got another: hidden_size was "
        "16 and is now 32. Resume with the arguments and data of that run, or start anew in another output_dir.",
    ),
    "resume_with_other_data": (
        write("train.csv", GOOD.replace("red\n", "green\n", 1)), GOES_ON,
        "hf-al train: error: Expected the data of run/checkpoints/checkpoint-00000006, got another: train was "
        "'dba0ee8e2c0486ba' and is now '191370272b6d3812'. Resume with the arguments and data of that run, or start "
        "anew in another output_dir.",
    ),
    "resume_with_another_seed": (
        nothing, f"{GOES_ON} --seed=7",
        "hf-al train: error: Expected the run of run/checkpoints/checkpoint-00000006, got another: seed was 42 and "
        "is now 7. Resume with the arguments and data of that run, or start anew in another output_dir.",
    ),
    "resume_from_no_checkpoint": (
        nothing, GOES_ON.replace("=last", "=run"),
        "hf-al train: error: Expected a complete checkpoint (manifest.json and its block files) in run, found none. "
        "Pass the folder of one, or 'last'.",
    ),
    "resume_from_damage": (
        flip_a_bit_of_each_checkpoint, GOES_ON,
        "hf-al train: error: Expected an intact checkpoint, got damaged ones only: "
        "run/checkpoints/checkpoint-00000004/block-001.safetensors does not hold the bytes that were written "
        "(sha256). Pass the folder of another one, or start in another output_dir.",
    ),
    "resume_elsewhere_with_another_seed": (
        nothing,
        f"{TRAIN} --train_file=train.csv --seed=7 --resume_from_checkpoint=run/checkpoints/checkpoint-00000006",
        "hf-al train: error: Expected the run of run/checkpoints/checkpoint-00000006, got another: seed was 42 and "
        "is now 7. Resume with the arguments and data of that run, or start anew in another output_dir.",
    ),
    # --- models
    "no_such_model": (
        nothing, "evaluate nowhere --test_file=train.csv",
        "hf-al evaluate: error: Expected a model folder or a Hub id (user/name), found nothing at nowhere.",
    ),
    "a_folder_that_is_no_model": (
        nothing, "evaluate . --test_file=train.csv",
        "hf-al evaluate: error: Expected a model folder with config.json, got .. Pass the output_dir of a finished "
        "run.",
    ),
    "weights_cut_off": (
        cut_the_weights, EVALUATE,
        "hf-al evaluate: error: Expected a whole safetensors file at run/model.safetensors, got SafetensorError: "
        "Error while deserializing header: incomplete metadata, file not fully covered. It is missing, cut off or "
        "corrupt: copy it again.",
    ),
    "weights_corrupt": (
        spoil_the_header, EVALUATE,
        "hf-al evaluate: error: Expected a whole safetensors file at run/model.safetensors, got SafetensorError: "
        "Error while deserializing header: invalid UTF-8 in header: invalid utf-8 sequence of 1 bytes from index 0. "
        "It is missing, cut off or corrupt: copy it again.",
    ),
    "weights_of_another_shape": (
        reshape_a_weight, EVALUATE,
        "hf-al evaluate: error: Expected in run/model.safetensors the weights that run/config.json describes, got "
        "others: blocks.1.bridge.layers.0.bias has shape [3] instead of [12]. Config and weights are from different "
        "models: copy both from one run.",
    ),
    "weights_pickled": (
        pickle_only, EVALUATE,
        "hf-al evaluate: error: Expected model.safetensors in run, got pytorch_model.bin. Pickled weights can run "
        "any code when they are read; save the model as safetensors.",
    ),
    "config_of_another_library": (
        write("run/config.json", '{"model_type": "bert"}'), EVALUATE,
        "hf-al evaluate: error: Expected an AL model in run, got one of type 'bert'. Pass the output_dir of a "
        "finished run.",
    ),
    "config_cut_off": (
        write("run/config.json", '{"model_type'), EVALUATE,
        "hf-al evaluate: error: Expected run/config.json to hold the values of a model, got JSONDecodeError: "
        "Unterminated string starting at: line 1 column 2 (char 1). Copy it again from the run.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_changes_nothing(mistake, place, shell):
    make, line, message = MISTAKES[mistake]
    make(place)
    before = content(place)
    status, out, err = shell(line)
    said = [line for line in err.splitlines() if line.startswith("hf-al")]
    assert said[-1:] == err.splitlines()[-1:] == [message]
    assert len(said) == 1
    assert "Traceback" not in err
    assert (status, out) == (2, "")
    assert content(place) == before


# --- found while training


def assert_finite_checkpoints(folder: Path, steps: list[int]) -> None:
    kept = checkpoint.complete_checkpoints(folder)
    assert kept == [checkpoint.checkpoint_path(folder, step) for step in steps]
    files = [file for path in kept for file in path.glob("*.safetensors")]
    assert all(tensor.isfinite().all() for file in files for tensor in load_file(file).values())


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_names_its_block_and_step_and_keeps_the_last_checkpoint(
    value, place, shell, monkeypatch
):
    """The exact step is named, although losses are read only at steps 4, 8, ..."""

    def poison(call):
        if call.step + 1 == 7:
            with torch.no_grad():
                call.self.blocks[1].bridge.layers[0].bias[0] = float(value)

    hook(monkeypatch, Stage, "train_batch", before=poison)
    line = f"{TRAIN} --train_file=train.csv --max_steps=10 --save_steps=6 --bridge_activation=identity"
    status, out, err = shell(line)
    assert err.splitlines()[-1] == (
        f"hf-al train: error: Expected finite losses and gradients, got {value} as the associated loss of block 1 at "
        "step 7. Lower the learning rate, or clip: --max_grad_norm 1. The last checkpoint was written before that: "
        "new/checkpoints/checkpoint-00000006."
    )
    assert "Traceback" not in err
    assert (status, out) == (2, "")
    assert_finite_checkpoints(place / "new", [6])


@pytest.mark.parametrize("save_steps", [1, 3])
def test_no_checkpoint_holds_weights_from_after_a_loss_that_was_not_finite(save_steps, place, shell, monkeypatch):
    """Not even one written before the next log, or the extra one for a signal that arrives just then."""

    def signal_and_poison(call):
        if call.step + 1 == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            with torch.no_grad():
                call.self.blocks[0].bridge.layers[0].weight[0, 0] = float("nan")

    hook(monkeypatch, Stage, "train_batch", before=signal_and_poison)
    line = f"{TRAIN} --train_file=train.csv --max_steps=20 --save_steps={save_steps} --logging_steps=100"
    status, _, err = shell(line)
    assert status == 2
    assert "of block 0 at step 5. " in err.splitlines()[-1]
    assert_finite_checkpoints(place / "new", [3, 4] if save_steps == 1 else [3])


def test_a_learning_rate_that_is_too_high_ends_with_advice(place, shell):
    rows = "".join(f"text number {n},{n}.5\n" for n in range(60))
    (place / "numbers.csv").write_text(f"text,label\n{rows}")
    flags = "--learning_rate=1e30 --max_grad_norm=0 --bridge_activation=identity --label_activation=identity"
    status, _, err = shell(f"{TRAIN} --train_file=numbers.csv {flags}")
    assert status == 2
    assert re.fullmatch(
        r"hf-al train: error: Expected finite losses and gradients, got (nan|inf) as the \w+ (loss|grad_norm) of block "
        r"\d at step [23]\. Lower the learning rate, or clip: --max_grad_norm 1\. (There is no checkpoint yet\.|The "
        r"last checkpoint was written before that: new/checkpoints/checkpoint-0000000\d\.)",
        err.splitlines()[-1],
    )
    assert "Traceback" not in err


def test_an_update_that_ruins_the_weights_is_named_at_the_evaluation_after_it(place, shell):
    status, _, err = shell(f"{TRAIN} --train_file=train.csv --learning_rate=1e38 --max_steps=1")
    assert status == 2
    assert "hf-al train: error: After step 1: Expected finite target codes, got others in block 0." in err
    assert "There is no checkpoint yet." in err
