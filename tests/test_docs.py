"""What docs/ shows works as written: the examples, every command and every Python block; and the site builds."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import hf_al
from hf_al.evaluation import load_model
from hf_al.modeling import blocks, objectives

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


# --- bring your own


@pytest.fixture(scope="module")
def examples():
    """The modules of docs/examples, imported as a user's own; what they register is taken back afterwards."""
    tables = (objectives.OBJECTIVES, blocks.ENCODERS, hf_al.MODEL_CLASSES)
    before = [dict(table) for table in tables]
    modules = {}
    for path in sorted((DOCS / "examples").glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        modules[path.stem] = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = modules[path.stem]
        spec.loader.exec_module(modules[path.stem])
    yield modules
    for name in modules:
        del sys.modules[name]
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


OWN = {
    "own_objective": {"model_type": "al_lstm", "objective": "local_similarity"},
    "own_encoder": {"model_type": "al_conv", "objective": "associated", "kernel_size": 3},
    "both": {"model_type": "al_conv", "objective": "local_similarity", "embedding_block": False},
    "own_encoder_end_to_end": {"model_type": "al_conv", "objective": "backprop"},
}
LOCAL = [name for name in OWN if "end_to_end" not in name]


def gradients(loss, model) -> set[str]:
    """Names of the parameters that the loss gives a gradient other than zero."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    values = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {name for name, value in zip(names, values, strict=True) if value is not None and bool(value.any())}


@pytest.mark.parametrize("own", LOCAL)
def test_the_losses_of_the_examples_stay_in_their_block(own, examples, make_model, make_batch):
    model = make_model(**OWN[own], num_blocks=4).train()
    losses = model(**make_batch()).local_losses
    assert len(losses) == 4
    for k, loss in enumerate(losses):
        own_parameters = {name for name, _ in model.named_parameters() if name.startswith(f"model.blocks.{k}.")}
        assert gradients(loss, model) == own_parameters


@pytest.mark.parametrize("own", OWN)
def test_padding_changes_no_answer_of_the_examples(own, examples, make_model, make_batch):
    model = make_model(**OWN[own]).eval()
    batch = make_batch()
    del batch["labels"]
    with torch.no_grad():
        expected = model(**batch, output_exit_logits=True).exit_logits
        for side in ((0, 5), (5, 0)):
            padded = {name: torch.nn.functional.pad(values, side) for name, values in batch.items()}
            for got, logits in zip(model(**padded, output_exit_logits=True).exit_logits, expected, strict=True):
                torch.testing.assert_close(got, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("own", OWN)
def test_the_examples_train_and_load_back(own, examples, few_tweets, tmp_path):
    values = dict(OWN[own])
    args = hf_al.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        model_type=values.pop("model_type"),
        model={**values, "num_blocks": 3, "hidden_size": 16, "target_size": 12},
        max_steps=4,
        logging_steps=2,
        threads=1,
        use_cpu=True,
    )
    result = hf_al.train(args, few_tweets)
    assert result.report["steps"] == 4
    assert result.report["warnings"] == []
    loaded, tokenizer = load_model(args.output_dir)
    batch = tokenizer(few_tweets["test"]["text"][:8], padding=True, return_tensors="pt")
    with torch.no_grad():
        got, expected = (model.eval()(**batch, output_exit_logits=True).exit_logits for model in (loaded, result.model))
    assert type(loaded) is type(result.model)
    assert len(got) == (1 if values["objective"] == "backprop" else 3)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_an_own_encoder_can_be_saved_for_inference_only(examples, make_model, make_batch, tmp_path):
    model = make_model(**OWN["own_encoder"]).eval()
    model.save_pretrained(tmp_path, inference_only=True)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    batch = make_batch()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert (tmp_path / "own_encoder.py").is_file()
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in model.parameters())


def test_an_own_config_is_checked_as_the_others_are(examples):
    with pytest.raises(Exception, match="Expected an odd kernel_size, got 4"):
        examples["own_encoder"].ConvConfig(kernel_size=4)
    args = hf_al.TrainingArguments(output_dir="unused", model_type="al_conv", model={"kernel_sise": 3})
    with pytest.raises(ValueError, match=r"Unknown config value 'kernel_sise' for al_conv. Did you mean kernel_size"):
        hf_al.train(args)


def test_what_nobody_registered_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"Expected model_type to be one of al_lstm, al_transformer.* got 'al_gru'"):
        hf_al.TrainingArguments(output_dir="unused", model_type="al_gru")
    with pytest.raises(Exception, match=r"Expected objective to be one of associated, .* got 'hebbian'"):
        hf_al.ALLstmConfig(objective="hebbian")


def test_classes_that_do_not_belong_together_are_not_registered(examples):
    own = examples["own_encoder"]
    with pytest.raises(ValueError, match="Expected ALLstmForSequenceClassification to name its config, ConvConfig"):
        hf_al.register_architecture(
            own.ConvEncoder, own.ConvConfig, own.ConvModel, hf_al.ALLstmForSequenceClassification
        )
