"""Configurations: everything that cannot work is refused when the config is built, with what to do instead."""

import dataclasses
import math
import re

import pytest
from conftest import ARCHITECTURES, FROM_SCRATCH, OBJECTIVES
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

import hf_al

CONFIGS = {model_type: classes[0] for model_type, classes in hf_al.MODEL_CLASSES.items()}
LSTM, TRANSFORMER = FROM_SCRATCH
REFUSED = (ValueError, StrictDataclassError)  # the latter wraps what a strict config raises when it is built
MULTI_LABEL = {"problem_type": "multi_label_classification"}
REGRESSION = {"problem_type": "regression", "num_labels": 2}

BELOW_ONE = (
    "vocab_size",
    "hidden_size",
    "embedding_size",
    "num_blocks",
    "layers_per_block",
    "target_size",
    "bridge_layers",
    "max_position_embeddings",
)
PROBABILITIES = ("hidden_dropout_prob", "embedding_dropout_prob", "bridge_dropout_prob", "label_smoothing")
NOT_PROBABILITIES = (-0.1, 1.0, 1.5, math.nan, math.inf)
POSITIVE = ("initializer_range", "code_scale", "embedding_std")
CHOICES = (
    "objective",
    "associated_loss",
    "label_activation",
    "bridge_activation",
    "initialization",
    "pooling",
    "problem_type",
)

OF_BOTH = [
    *[{name: value} for name in BELOW_ONE for value in (0, -3)],
    *[{name: value} for name in PROBABILITIES for value in NOT_PROBABILITIES],
    *[{name: value} for name in POSITIVE for value in (0.0, -1.0, math.nan, math.inf)],
    *[{name: "nonsense"} for name in CHOICES],
    {"pad_token_id": -1},
    {"pad_token_id": 9, "vocab_size": 9},
    {"num_labels": 0},
    {"class_weights": [1.0, 1.0], "num_labels": 3},
    {"class_weights": [1.0, -1.0, 1.0], "num_labels": 3},
    {"class_weights": [1.0, math.nan, 1.0], "num_labels": 3},
    {"class_weights": [0.0, 0.0, 0.0], "num_labels": 3},
    {"class_weights": [1.0, 1.0], **REGRESSION},
    {"label_smoothing": 0.1, **MULTI_LABEL},
    {"label_smoothing": 0.1, **REGRESSION},
    {"label_mean": [0.0, 1.0, 2.0], "num_labels": 3},
    {"label_deviation": [1.0], **MULTI_LABEL, "num_labels": 1},
    {"label_mean": [0.0], **REGRESSION},
    {"label_deviation": [1.0], **REGRESSION},
    {"label_deviation": [1.0, 0.0], **REGRESSION},
    {"label_deviation": [1.0, -2.0], **REGRESSION},
    {"label_deviation": [1.0, math.nan], **REGRESSION},
    {"label_deviation": [1.0, math.inf], **REGRESSION},
    {"label_mean": [1.0, math.nan], **REGRESSION},
]
OF_ONE = [
    (LSTM, {"hidden_size": 33}),
    (LSTM, {"pooling": "first"}),
    (TRANSFORMER, {"pooling": "final"}),
    (TRANSFORMER, {"hidden_size": 30, "num_attention_heads": 4}),
    (TRANSFORMER, {"hidden_size": 12, "num_attention_heads": 4}),
    (TRANSFORMER, {"num_attention_heads": 0}),
    (TRANSFORMER, {"num_attention_heads": -2}),
    (TRANSFORMER, {"intermediate_size": 0}),
    (TRANSFORMER, {"hidden_act": "nonsense"}),
    (TRANSFORMER, {"position_embedding_type": "nonsense"}),
    *[(TRANSFORMER, {"attention_probs_dropout_prob": value}) for value in NOT_PROBABILITIES],
    *[(TRANSFORMER, {name: v}) for name in ("rotary_base", "layer_norm_eps") for v in (0.0, -1.0, math.nan, math.inf)],
]
WRONG = [*[(model_type, values) for model_type in FROM_SCRATCH for values in OF_BOTH], *OF_ONE]


def shown(values: dict) -> str:
    return ",".join(f"{name}={value}" for name, value in values.items())


@pytest.mark.parametrize(("model_type", "values"), WRONG, ids=[f"{m}-{shown(v)}" for m, v in WRONG])
def test_what_cannot_work_is_refused_with_expected_got_and_what_to_do(model_type, values):
    with pytest.raises(REFUSED, match=r"Expected ") as caught:
        CONFIGS[model_type](**values)
    sentence = re.search(r"Expected .*", str(caught.value), re.DOTALL).group()
    assert "got " in sentence
    assert next(iter(values)) in sentence
    told = [part for part in re.split(r"(?<=\.)\s+(?=[A-Z])", sentence) if not part.startswith("Expected")]
    assert told, f"the message does not say what to do: {sentence}"


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": "32"},
        {"num_blocks": 2.5},
        {"embedding_block": "yes"},
        {"class_weights": "balanced"},
        {"objective": None},
        {"pad_token_id": None},
    ],
    ids=shown,
)
@pytest.mark.parametrize("model_type", FROM_SCRATCH)
def test_a_value_of_the_wrong_type_is_refused_by_name(model_type, values):
    with pytest.raises(REFUSED, match=next(iter(values))):
        CONFIGS[model_type](**values)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"hidden_size": 32},
        {"hidden_size": 32, "num_blocks": 1},
        {"vocab_size": 1, "pad_token_id": 0},
        {"hidden_dropout_prob": 0, "embedding_dropout_prob": 0.0, "bridge_dropout_prob": 0.99},
        {"class_weights": [0.0, 2.0], "num_labels": 2},
        {"class_weights": [0.5, 2.0], "num_labels": 2, **MULTI_LABEL},
        {"label_mean": [0.0, -1.0], "label_deviation": [0.5, 2.0], **REGRESSION},
        {"label_smoothing": 0.1, "num_labels": 3},
    ],
    ids=lambda values: shown(values) or "defaults",
)
@pytest.mark.parametrize("model_type", FROM_SCRATCH)
def test_what_can_work_is_accepted(model_type, values):
    config = CONFIGS[model_type](**values)
    for name, value in values.items():
        assert getattr(config, name) == value


def test_learned_positions_need_no_even_head():
    assert CONFIGS[TRANSFORMER](hidden_size=12, num_attention_heads=4, position_embedding_type="learned").hidden_size


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_config_comes_back_from_json_the_same(model_type, tmp_path):
    changed = {
        "hidden_size": 32, "num_blocks": 6, "embedding_size": 10, "objective": "al_ce", "associated_loss": "cosine",
        "embedding_block": False, "class_weights": [1.0, 2.0, 0.5], "label_smoothing": 0.1, "pad_token_id": 3,
        "id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}, "hidden_dropout_prob": 0.25,
    }  # fmt: skip
    extra = {"carry_state": True, "pooling": "final"} if model_type == LSTM else {"num_attention_heads": 2}
    config = CONFIGS[model_type](**changed, **extra)
    config.save_pretrained(tmp_path)
    for loaded in (AutoConfig.from_pretrained(tmp_path), CONFIGS[model_type].from_pretrained(tmp_path)):
        assert type(loaded) is CONFIGS[model_type]
        for name in {field.name for field in dataclasses.fields(loaded)} - {"transformers_version"}:
            assert getattr(loaded, name) == getattr(config, name), name
        assert loaded.to_json_string() == config.to_json_string()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_config_that_was_changed_by_hand_into_nonsense_does_not_load(model_type, tmp_path):
    CONFIGS[model_type]().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"target_size": 128', '"target_size": 0'))
    with pytest.raises(REFUSED, match="Expected target_size"):
        AutoConfig.from_pretrained(tmp_path)


def test_the_unit_of_training_is_a_block_and_for_backprop_the_network():
    for objective in OBJECTIVES:
        units = CONFIGS[LSTM](num_blocks=3, objective=objective).units
        assert [list(unit) for unit in units] == ([[0, 1, 2]] if objective == "backprop" else [[0], [1], [2]])


def test_every_block_has_an_exit_where_its_bridge_is_trained_and_kept():
    for objective in OBJECTIVES:
        config = CONFIGS[LSTM](num_blocks=3, objective=objective)
        assert config.exits() == ([2] if objective == "backprop" else [0, 1, 2])
        config.inference_only = True
        assert config.exits() == [2]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_problem_type_of_a_config_is_what_transformers_takes_for_it(model_type):
    config_class = CONFIGS[model_type]
    assert config_class(num_labels=1).resolved_problem_type == "regression"
    assert config_class(num_labels=2).resolved_problem_type == "single_label_classification"
    assert config_class(num_labels=1, **MULTI_LABEL).resolved_problem_type == "multi_label_classification"


def test_names_of_labels_come_in_the_order_of_their_ids():
    names = {2: "c", 0: "a", 1: "b"}
    config = CONFIGS[LSTM](id2label=names, label2id={name: i for i, name in names.items()})
    assert config.label_names == ["a", "b", "c"]
    assert config.classes == 3
