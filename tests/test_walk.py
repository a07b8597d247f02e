"""One walk over the blocks: what enters and leaves a block, wherever the block is and whatever calls it."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import ARCHITECTURES, FROM_SCRATCH, OBJECTIVES
from transformers import AutoModel, AutoModelForSequenceClassification

import hf_al
from hf_al.data.tokenization import build_tokenizer
from hf_al.modeling.blocks import ALBlock, walk
from hf_al.modeling.objectives import OBJECTIVES as ROWS
from hf_al.modeling.objectives import Objective
from hf_al.saved.prediction import predict
from hf_al.training.local_step import local_steps

CPU = torch.device("cpu")
EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def without_labels(batch: dict) -> dict:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


@pytest.fixture
def entered(monkeypatch) -> list[int]:
    """The blocks whose forward was called, in order."""
    calls: list[int] = []
    forward = ALBlock.forward

    def count(self, *args, **kwargs):
        calls.append(self.index)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(ALBlock, "forward", count)
    return calls


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_driver_enters_every_block_once_through_its_forward(
    model_type, objective, entered, make_model, make_batch
):
    model, batch = make_model(model_type, objective=objective), make_batch()
    drivers = {
        "training": lambda: model.train()(**batch),
        "evaluation": lambda: model.eval()(**batch, output_exit_logits=True),
        "encoder": lambda: model.model(**without_labels(batch)),
        "loop": lambda: list(
            local_steps(
                model.train().model.blocks, model.model.initial_boundary(batch["labels"]),
                model.model.prepare_inputs(**batch), (0, 0, 0, 0), CPU,
            )
        ),
    }  # fmt: skip
    for name, drive in drivers.items():
        entered.clear()
        drive()
        assert entered == [0, 1, 2], name


# --- blocks elsewhere (device_map)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_blocks_offloaded_to_cpu_and_disk_give_the_same_logits(model_type, objective, make_model, make_batch, tmp_path):
    model = make_model(model_type, objective=objective, layers_per_block=2).eval()
    batch = make_batch()
    wanted = {"output_exit_logits": True, "output_hidden_states": True}
    expected = model(**batch, **wanted)
    model.save_pretrained(tmp_path)
    where = {"model.blocks.0": "cpu", "model.blocks.1": "disk", "model.blocks.2": "disk"}
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, device_map=where, offload_folder=tmp_path / "offload"
    ).eval()
    assert {p.device.type for p in loaded.model.blocks[1].parameters()} == {"meta"}
    got = loaded(**batch, **wanted)
    assert torch.equal(got.loss, expected.loss)
    for name in ("exit_logits", "hidden_states"):
        assert all(torch.equal(a, b) for a, b in zip(got[name], expected[name], strict=True)), name


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_offloaded_encoder_gives_the_same_hidden_states(model_type, make_model, make_batch, tmp_path):
    model = make_model(model_type).model.eval()
    model.save_pretrained(tmp_path)
    where = {"blocks.0": "disk", "blocks.1": "cpu", "blocks.2": "disk"}
    loaded = AutoModel.from_pretrained(tmp_path, device_map=where, offload_folder=tmp_path / "offload").eval()
    batch = without_labels(make_batch())
    assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)


def test_blocks_on_several_devices_take_labels_and_return_attentions(make_model, make_batch):
    """As far as one machine without GPUs can show: the last block runs on the device "meta"."""
    model = make_model("al_transformer", attn_implementation="eager").eval()
    last = model.model.blocks[2].to("meta")
    add_hook_to_module(last, AlignDevicesHook(execution_device=torch.device("meta")))
    for training in (False, True):
        out = model.train(training)(**make_batch(), output_attentions=True, output_exit_logits=True)
        assert [logits.device.type for logits in out.exit_logits] == ["cpu", "cpu", "meta"]
        assert len(out.attentions) == 2
        assert out.loss.shape == ()


def test_an_offloaded_model_evaluates_predicts_and_shows_its_attentions(make_model, few_tweets, tmp_path):
    args = hf_al.TrainingArguments(output_dir="unused", max_seq_length=24, tokenizer_vocab_size=60)
    tokenizer = build_tokenizer(args, few_tweets["train"])
    names = {"id2label": dict(enumerate(["negative", "neutral", "positive"]))}
    model = make_model("al_transformer", attn_implementation="eager", vocab_size=len(tokenizer), **names).eval()
    model.save_pretrained(tmp_path)
    where = {"model.blocks.0": "disk", "model.blocks.1": "cpu", "model.blocks.2": "disk"}
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, device_map=where, offload_folder=tmp_path / "offload", attn_implementation="eager"
    )
    results = [
        (
            hf_al.evaluate(m, few_tweets["test"], tokenizer),
            list(predict(m, tokenizer, [("a fine day",)])),
            len(m(**tokenizer("a fine day", return_tensors="pt"), output_attentions=True).attentions),
        )
        for m in (model, loaded)
    ]
    assert results[0] == results[1]
    assert results[0][2] == 2


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_device_map_never_splits_a_block(model_type, make_model):
    from accelerate import infer_auto_device_map

    model = make_model(model_type)
    sizes = [sum(t.nbytes for t in (*block.parameters(), *block.buffers())) for block in model.model.blocks]
    room = {"cpu": sizes[0] + sizes[1] + 64, "disk": 10**9}
    where = infer_auto_device_map(model, room, no_split_module_classes=model._no_split_modules)
    assert set(where) == {f"model.blocks.{k}" for k in range(3)}
    assert set(where.values()) == {"cpu", "disk"}


# --- what leaves a block


@pytest.fixture
def own_objective(monkeypatch):
    """The objective of the documentation, which adds its row to the table."""
    monkeypatch.setattr("hf_al.modeling.objectives.OBJECTIVES", dict(ROWS))
    spec = importlib.util.spec_from_file_location("own_objective", EXAMPLES / "own_objective.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.local_similarity


def sends_views(own, block, pooled_ND, received, labels):
    """A user's objective may send this: views of weights, as they are before the update."""
    losses, sent = own(block, pooled_ND, received, labels)
    weight = block.bridge.layers[0].weight
    return losses, {**sent, "turned": weight.t(), "slice": weight[:2], "whole": weight, "detached": weight.detach()}


def test_views_of_a_weight_leave_as_copies_from_before_the_update(own_objective, make_model, make_batch, monkeypatch):
    monkeypatch.setitem(ROWS, "sends_views", Objective(partial(sends_views, own_objective), target_codes=False))
    model, batch = make_model(objective="sends_views").train(), make_batch()
    inputs = model.model.prepare_inputs(**batch)
    for block, out in walk(model.model.blocks, model.model.initial_boundary(batch["labels"]), inputs, learning=True):
        weight = block.bridge.layers[0].weight.detach().clone()
        out.loss.backward()
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(1.0)
        expected = {"turned": weight.t(), "slice": weight[:2], "whole": weight, "detached": weight}
        assert all(torch.equal(out.boundary[name], tensor) for name, tensor in expected.items())
        assert not any(tensor.requires_grad for tensor in out.boundary.values())


# --- gradients that would cross the blocks


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_training_without_labels_is_refused_unless_the_objective_is_end_to_end(
    model_type, objective, make_model, make_batch
):
    model, batch = make_model(model_type, objective=objective).train(), without_labels(make_batch())
    out = model(**batch, output_exit_logits=True, output_hidden_states=True)
    logits = (*out.exit_logits, *out.hidden_states)
    if objective == "backprop":
        logits[0].sum().backward()
    else:
        for logits_NC in logits:
            with pytest.raises(ValueError, match=r"Expected labels in training mode .* label_smoothing in the model's"):
                logits_NC.sum().backward(retain_graph=True)
        assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert model(**batch).logits.shape == (4, 3)
    model.eval()(**batch).logits.sum().backward()  # an explanation of an answer may want gradients


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.filterwarnings("ignore:.*the use_reentrant parameter should be passed explicitly")
@pytest.mark.parametrize("how", [{"use_reentrant": True}, {"use_reentrant": False}, {}, None], ids=str)
def test_checkpointed_layers_get_the_gradients_of_plain_ones(how, objective, make_model, make_batch):
    gradients = []
    for checkpointing in (False, True):
        model = make_model("al_transformer", objective=objective, layers_per_block=2, embedding_block=False).train()
        if checkpointing:
            model.activation_checkpointing_enable(how)
        torch.manual_seed(1)
        model(**make_batch()).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())


# --- other callers


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_may_be_of_any_whole_type(dtype, make_model, make_batch):
    batch = make_batch()
    model = make_model(hidden_dropout_prob=0.0, embedding_dropout_prob=0.0, bridge_dropout_prob=0.0)
    for mode in (True, False):
        expected = model.train(mode)(**batch).loss
        assert torch.equal(model(**{**batch, "labels": batch["labels"].to(dtype)}).loss, expected)


@pytest.mark.medium
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_torch_export_gives_the_same_logits(model_type, make_model, make_batch):
    model, batch = make_model(model_type, layers_per_block=2).eval(), without_labels(make_batch())
    exported = torch.export.export(model, (), kwargs=batch)
    for seed in (0, 5):
        other = without_labels(make_batch(seed=seed))
        left = {name: tensor.flip(1) for name, tensor in other.items()}
        for given in (other, left):
            torch.testing.assert_close(exported.module()(**given).logits, model(**given).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", FROM_SCRATCH)
def test_layers_that_a_checkpoint_lacks_are_new_and_those_that_it_has_are_loaded(model_type, make_model, tmp_path):
    small = make_model(model_type, layers_per_block=1)
    small.save_pretrained(tmp_path)
    large = type(small).from_pretrained(tmp_path, layers_per_block=2)
    found = dict(large.named_parameters())
    for name, parameter in small.named_parameters():
        assert torch.equal(found[name], parameter), name
    assert len(found) > len(dict(small.named_parameters()))


def test_dir_names_what_is_public():
    assert set(hf_al.__all__) <= set(dir(hf_al))


@pytest.mark.parametrize("problem", [{}, {"class_weights": [1.0, 2.0, 3.0]}, {"num_labels": 1, "label_mean": [2.0]}])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_type", FROM_SCRATCH)
def test_no_step_asks_its_device_for_a_number(model_type, objective, problem, make_model, make_batch):
    """Reading one would wait for all that is queued there. The device "meta" has no values: reading raises. (In
    a pretrained encoder transformers reads one: whether a mask has padding.)"""
    model = make_model(model_type, objective=objective, **problem).train().to("meta")
    batch = make_batch()
    lengths = batch["attention_mask"].sum(1)
    labels = batch["labels"].float() if "num_labels" in problem else batch["labels"]
    inputs = model.model.prepare_inputs(
        **{n: t.to("meta") for n, t in {**batch, "labels": labels}.items()}, lengths=lengths
    )
    boundary = model.model.initial_boundary(inputs["labels"])
    for block, out in walk(model.model.blocks, boundary, inputs, learning=True):
        if block.ends_unit:
            out.loss.backward()
    for _ in walk(model.model.blocks, {}, inputs, exits=model.config.exits()):
        pass
    with pytest.raises(NotImplementedError):  # it does raise
        model.model.prepare_inputs(inputs["input_ids"], inputs["attention_mask"])
