"""From YAML, flags and the source of the configs to the arguments of a run."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from transformers import PreTrainedConfig

import hf_al
from hf_al.arguments import TrainingArguments
from hf_al.config_fields import DECIDED, TABLE, config_fields, made_anew
from hf_al.parsing import parse_arguments, resolve

RECIPES = Path(__file__).parent.parent / "recipes"


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


FROM_SCRATCH = [path for path in sorted(RECIPES.glob("*.yaml")) if not path.stem.endswith("encoder")]


@pytest.mark.parametrize("path", FROM_SCRATCH, ids=lambda path: path.stem)
@pytest.mark.parametrize("blocks", [1, 6])
def test_num_blocks_alone_works_with_every_recipe(blocks, path):
    from hf_al.training.setup import check_model

    args = parse_arguments(["--config", str(path), "--output_dir=out", f"--num_blocks={blocks}"])
    check_model(args)
    config_class, _, model_class = hf_al.MODEL_CLASSES[args.model_type]
    model = model_class(config_class(vocab_size=50, num_labels=3, **args.model))
    assert len(model.model.blocks) == blocks


# --- config values, read without importing the configs


def test_the_table_of_config_values_is_made_of_the_classes():
    """If this fails, run `python -m hf_al.config_fields`."""
    assert TABLE.read_text(encoding="utf-8") == made_anew()


@pytest.mark.parametrize("model_type", hf_al.MODEL_CLASSES)
def test_config_values_in_the_table_are_those_of_the_class(model_type):
    config_class = hf_al.MODEL_CLASSES[model_type][0]
    inherited = {f.name for f in dataclasses.fields(PreTrainedConfig)}
    decided = inherited | DECIDED | set(config_class.decided)
    real = {f.name: f for f in dataclasses.fields(config_class) if f.name not in decided}
    found = config_fields(model_type)
    assert found.keys() == real.keys()
    for name, field in found.items():
        assert (field.kind, field.default) == (real[name].type, real[name].default), name


@pytest.mark.parametrize("model_type", hf_al.MODEL_CLASSES)
def test_every_config_value_is_described(model_type):
    for name, field in config_fields(model_type).items():
        assert field.texts, name
        assert all(text and "`" not in text for text in field.texts), name


def test_help_shows_what_a_config_value_means_and_its_default(shell):
    _, out, _ = shell("train", "--help")
    text = " ".join(out.split())
    assert "width of the hidden states between blocks. (default: 128)" in text
    assert "al_transformer: heads; hidden_size must be a multiple of it. (default: 4)" in text
    assert "al_lstm: mean, max or final" in text
    assert text.count("padding excluded") == 1


def test_what_data_and_tokenizer_decide_is_no_flag(shell):
    _, out, _ = shell("train", "--help")
    for name in DECIDED:
        assert f"--{name} " not in out


def test_resolved_arguments_leave_the_flags_as_they_were():
    flags = {"config": None, "output_dir": "out", "num_blocks": 3}
    assert resolve(flags).model == {"num_blocks": 3}
    assert flags == {"config": None, "output_dir": "out", "num_blocks": 3}


def test_arguments_written_as_yaml_are_read_back(recipe):
    args = TrainingArguments(learning_rate=1e-5, warmup_steps=0.1, dataset_name="tw\u00e9ets", model={"num_blocks": 2})
    again = parse_arguments(recipe(args.to_yaml()))
    assert again.to_dict() == {**args.to_dict(), "output_dir": "out"}
