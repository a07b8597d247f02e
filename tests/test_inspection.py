"""`hf-al inspect`: the numbers shown are those of the model."""

import json
import shutil

import pytest
from conftest import ARCHITECTURES, OBJECTIVES

from hf_al.saved.inspection import as_text, encoder_in_words, inspect


@pytest.fixture
def saved(make_model, tmp_path):
    """saved("al_lstm", objective="al_ce", ...) -> (folder, the model that was saved there)."""

    def save(model_type: str = "al_lstm", inference_only: bool = False, **config):
        model = make_model(model_type, **config)
        model.save_pretrained(tmp_path, inference_only=inference_only)
        return str(tmp_path), model

    return save


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_parameters_and_shapes_are_those_of_the_model(model_type, objective, saved):
    folder, model = saved(model_type, objective=objective)
    found = inspect(folder)
    assert sum(found["parameters"].values()) == sum(p.numel() for p in model.parameters())
    shapes = {f"model.blocks.{b['block']}.{n}": s for b in found["blocks"] for n, s in b["shapes"].items()}
    assert shapes == {name: list(p.shape) for name, p in model.named_parameters()}
    training_only = sum(p.numel() for n, p in model.named_parameters() if model.is_training_only(n))
    assert found["parameters"]["training_only"] == training_only
    for block in found["blocks"]:
        counts = block["parameters"]
        parts = sum(counts[part] for part in ("encode", "bridge", "encode_target", "decode_target"))
        assert parts == counts["inference"] + counts["training_only"]
    assert [block["block"] for block in found["blocks"] if block["exit"]] == model.config.exits()


def test_an_inference_only_model_has_no_training_only_parameters_and_one_exit(saved):
    folder, _ = saved(inference_only=True)
    found = inspect(folder)
    assert found["parameters"]["training_only"] == 0
    assert [block["exit"] for block in found["blocks"]] == [False, False, True]


def test_no_weights_are_needed(saved, tmp_path):
    folder, _ = saved()
    expected = inspect(folder)
    (tmp_path / "model.safetensors").unlink()
    assert inspect(folder) == expected


def test_without_a_report_the_page_says_that_accuracies_are_unknown(saved):
    folder, _ = saved()
    text = as_text(inspect(folder))
    assert "There is no report.json beside this model" in text
    assert all(line.endswith(" -") for line in text.splitlines() if line.strip().startswith(("0 ", "1 ", "2 ")))


def test_encoders_are_named(make_model):
    lstm = make_model(num_blocks=2, embedding_size=10, layers_per_block=2)
    assert encoder_in_words(lstm, 0) == "60 embedding rows of 10"
    assert encoder_in_words(lstm, 1) == "2 bidirectional LSTM layers of 2 x 8"
    transformer = make_model("al_transformer", embedding_block=False)
    assert encoder_in_words(transformer, 0) == "60 embedding rows of 16, 1 transformer layer of 16, 2 heads"


@pytest.mark.medium
def test_the_page_of_a_trained_model_has_what_its_report_says(trained, shell):
    folder, _ = trained
    report = json.loads((folder / "report.json").read_text())
    status, out, _ = shell("inspect", str(folder))
    assert status == 0
    for words in ("al_lstm", "objective al_ce", "3 classes: negative, neutral, positive", "128 tokens"):
        assert words in out
    for name, count in report["parameters"].items():
        assert f"{count:,} " in out, name
    for row in report["validation"]:
        (line,) = [line for line in out.splitlines() if line.strip().startswith(f"{row['block']} ")]
        assert line.endswith(f"{row['accuracy']:.4f}")
    assert "no report.json" not in out


@pytest.mark.medium
def test_json_has_the_same(trained, shell):
    folder, _ = trained
    status, out, _ = shell("inspect", str(folder), "--json")
    assert status == 0
    found = json.loads(out)
    assert found == inspect(str(folder))
    report = json.loads((folder / "report.json").read_text())
    assert [block["validation"] for block in found["blocks"]] == report["validation"]


@pytest.mark.medium
def test_a_broken_config_or_another_library_is_a_mistake(trained, tmp_path, shell):
    shutil.copy(trained[0] / "config.json", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for values, said in (
        ({**config, "hidden_size": 7}, "Expected an even hidden_size"),
        ({"model_type": "bert"}, "Expected an AL model, got one of type 'bert'"),
        ({"model_type": "no such thing"}, "Could not load"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(values))
        status, out, err = shell("inspect", str(tmp_path))
        assert (status, out) == (2, "")
        assert said in err
        assert "Traceback" not in err
    (tmp_path / "config.json").write_text("{")
    status, _, err = shell("inspect", str(tmp_path))
    assert status == 2
    assert "Could not load" in err
