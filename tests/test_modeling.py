"""The classifiers as transformers' users know them: outputs, exits, saving, loading, precision."""

import json
import logging
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, FROM_SCRATCH, OBJECTIVES
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

import hf_al
from hf_al.modeling.blocks import truncate
from hf_al.modeling.lstm import packed, sort_by_length

PROBLEMS = {
    "single_label": ({}, lambda: torch.tensor([0, 2, 1, 1])),
    "multi_label": (
        {"problem_type": "multi_label_classification"},
        lambda: torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]]),
    ),
    "regression": ({"num_labels": 1}, lambda: torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "regression_of_two": ({"num_labels": 2, "problem_type": "regression"}, lambda: torch.arange(8.0).view(4, 2)),
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "embedding_dropout_prob": 0.0, "bridge_dropout_prob": 0.0}


def without_labels(batch: dict) -> dict:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def still(make_model, model_type: str, **config):
    attention = {"attention_probs_dropout_prob": 0.0} if model_type == "al_transformer" else {}
    return make_model(model_type, **NO_DROPOUT, **attention, **config)


def count_calls(model) -> list[int]:
    """The blocks whose encoder was called, in order."""
    calls: list[int] = []
    for block in model.model.blocks:
        block.encode.register_forward_hook(lambda *_, k=block.index: calls.append(k))
    return calls


class Messages(logging.Handler):
    """What a library logs."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture
def transformers_messages():
    """Warnings that transformers logs (without `warnings`), which users see as well."""
    handler = Messages()
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(level)


# --- outputs


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_training_returns_one_attached_loss_a_block_that_sum_to_the_loss(model_type, objective, make_model, make_batch):
    model = make_model(model_type, objective=objective).train()
    output = model(**make_batch())
    assert output.loss.shape == ()
    assert output.loss.requires_grad
    assert output.logits.shape == (4, 3)
    assert not output.logits.requires_grad
    assert output.exit_logits is output.hidden_states is output.attentions is None
    if objective == "backprop":
        assert output.local_losses is None
        return
    assert isinstance(output.local_losses, tuple)
    assert len(output.local_losses) == model.config.num_blocks
    assert all(loss.shape == () and loss.requires_grad for loss in output.local_losses)
    assert torch.allclose(output.loss, sum(output.local_losses))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_evaluation_returns_the_loss_of_the_exit_and_no_local_loss(model_type, objective, make_model, make_batch):
    model = make_model(model_type, objective=objective).eval()
    batch = make_batch()
    output = model(**batch)
    assert output.local_losses is None
    assert torch.allclose(output.loss, F.cross_entropy(output.logits, batch["labels"]))
    assert model(**without_labels(batch)).loss is None


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_exits_and_hidden_states_come_on_request(mode, model_type, make_model, make_batch):
    model = getattr(make_model(model_type), mode)()
    output = model(**make_batch(), output_exit_logits=True, output_hidden_states=True)
    assert [tuple(logits.shape) for logits in output.exit_logits] == [(4, 3)] * 3
    assert [tuple(hidden.shape) for hidden in output.hidden_states] == [(4, 7, 16)] * 3
    assert torch.equal(output.exit_logits[-1], output.logits)


def test_backprop_has_the_last_exit_only(make_model, make_batch):
    model = make_model(objective="backprop").eval()
    output = model(**make_batch(), output_exit_logits=True)
    assert len(output.exit_logits) == 1
    assert torch.equal(output.exit_logits[0], output.logits)
    with pytest.raises(ValueError, match="exit_block"):
        model(**make_batch(), exit_block=0)


def test_attentions_are_weights_over_the_text_of_each_layer(make_model, make_batch):
    model = make_model("al_transformer", layers_per_block=2, attn_implementation="eager").eval()
    batch = make_batch()
    attentions = model(**batch, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(4, 2, 7, 7)] * 4
    padding_N11T = batch["attention_mask"][:, None, None] == 0
    for weights in attentions:
        assert torch.allclose(weights.sum(-1), torch.ones(4, 2, 7), atol=1e-6)
        assert not weights.masked_select(padding_N11T).any()


def test_attentions_that_cannot_be_had_are_none_or_refused(make_model, make_batch, transformers_messages):
    model = make_model("al_transformer", attn_implementation="sdpa").eval()
    assert model(**make_batch(), output_attentions=True).attentions == ()
    assert model.model(**without_labels(make_batch()), output_attentions=True).attentions == ()
    with pytest.raises(ValueError, match="al_lstm have no attention"):
        make_model("al_lstm").eval()(**make_batch(), output_attentions=True)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_tuple_comes_back_where_it_is_asked_for(model_type, make_model, make_batch):
    model = make_model(model_type).eval()
    batch = without_labels(make_batch())
    assert torch.equal(model(**batch, return_dict=False)[0], model(**batch).logits)


# --- exits


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("k", [0, 1, 2])
def test_an_exit_runs_no_block_after_it(k, model_type, make_model, make_batch):
    model = make_model(model_type).eval()
    batch = make_batch()
    everything = model(**batch, output_exit_logits=True).exit_logits
    calls = count_calls(model)
    output = model(**batch, exit_block=k, output_exit_logits=True, output_hidden_states=True)
    assert calls == list(range(k + 1))
    assert torch.equal(output.logits, everything[k])
    assert len(output.exit_logits) == len(output.hidden_states) == k + 1
    assert torch.allclose(output.loss, F.cross_entropy(everything[k], batch["labels"]))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_without_the_other_exits_only_the_bridge_of_the_last_one_runs(model_type, make_model, make_batch):
    model = make_model(model_type).eval()
    calls = []
    for block in model.model.blocks:
        block.bridge.register_forward_hook(lambda *_, k=block.index: calls.append(k))
    model(**without_labels(make_batch()), exit_block=1)
    assert calls == [1]


@pytest.mark.parametrize("k", [-1, 3, 100])
def test_an_exit_that_does_not_exist_is_refused(k, make_model, make_batch):
    with pytest.raises(ValueError, match=rf"Expected exit_block .*\[0, 1, 2\].*got {k}"):
        make_model().eval()(**make_batch(), exit_block=k)


def test_training_one_exit_alone_is_refused(make_model, make_batch):
    with pytest.raises(ValueError, match="exit_block=None"):
        make_model().train()(**make_batch(), exit_block=1)


# --- inputs


@pytest.mark.parametrize("config", [{}, {"embedding_size": 6}])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_embeddings_can_be_given_in_place_of_ids(model_type, config, make_model, make_batch):
    model = make_model(model_type, **config).eval()
    batch = without_labels(make_batch())
    expected = model(**batch).logits
    rows = model.get_input_embeddings()(batch.pop("input_ids"))
    assert torch.equal(model(inputs_embeds=rows, **batch).logits, expected)


@pytest.mark.parametrize("given", [("input_ids", "inputs_embeds"), ()])
def test_ids_and_embeddings_both_or_neither_are_refused(given, make_model):
    values = {"input_ids": torch.ones(1, 2, dtype=torch.long), "inputs_embeds": torch.ones(1, 2, 16)}
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        make_model().eval()(**{name: values[name] for name in given})


@pytest.mark.parametrize("pad", [0, 5])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_without_a_mask_padding_is_where_the_pad_token_is(model_type, pad, make_model, make_batch):
    model = make_model(model_type, pad_token_id=pad).eval()
    batch = without_labels(make_batch())
    batch["input_ids"][batch["input_ids"] == pad] = 7
    batch["input_ids"][batch["attention_mask"] == 0] = pad
    assert torch.equal(model(batch["input_ids"]).logits, model(**batch).logits)
    everything = torch.ones_like(batch["attention_mask"])
    assert not torch.allclose(model(batch["input_ids"]).logits, model(batch["input_ids"], everything).logits)


def test_a_long_pair_is_cut_as_its_tokenizer_cuts_it():
    """Every length of both texts, padding on either side."""
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "a": 3, "b": 4}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    pairs = [("a " * n, "b " * m) for n in range(1, 12) for m in range(12)]
    pairs = [pair if pair[1] else pair[:1] for pair in pairs]
    for limit in (5, 6, 8, 9, 12):
        tokenizer.no_truncation()
        whole = [tokenizer.encode(*pair).ids for pair in pairs]
        tokenizer.enable_truncation(limit)
        expected = [tokenizer.encode(*pair).ids for pair in pairs]
        for side in ("right", "left"):
            width = max(map(len, whole))
            ids = torch.tensor(
                [row + [0] * (width - len(row)) if side == "right" else [0] * (width - len(row)) + row for row in whole]
            )
            cut = truncate({"input_ids": ids, "attention_mask": (ids > 0).long()}, limit, separator=2)
            got = [row[mask.bool()].tolist() for row, mask in zip(cut["input_ids"], cut["attention_mask"], strict=True)]
            assert got == expected


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_text_beyond_the_maximum_length_is_cut_and_keeps_its_last_token(model_type, make_model):
    model = make_model(model_type, max_position_embeddings=6).eval()
    texts = torch.randint(1, 60, (3, 20))
    texts[1, 4:] = 0
    texts[2, 6:] = 0
    cut = torch.cat([texts[:, :5], texts[:, -1:]], 1)
    cut[1] = torch.tensor([*texts[1, :4].tolist(), 0, 0])
    cut[2] = texts[2, :6]
    assert torch.equal(model(texts).logits, model(cut).logits)


# --- problem types


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_problem_type_trains_and_evaluates(problem, model_type, objective, make_model, make_batch):
    config, labels = PROBLEMS[problem]
    model = make_model(model_type, objective=objective, **config)
    batch = {**make_batch(), "labels": labels()}
    loss = model.train()(**batch).loss
    loss.backward()
    assert bool(loss.isfinite())
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    output = model.eval()(**batch)
    expected = {
        "single_label": lambda: F.cross_entropy(output.logits, batch["labels"]),
        "multi_label": lambda: F.binary_cross_entropy_with_logits(output.logits, batch["labels"]),
    }.get(problem, lambda: F.mse_loss(output.logits, batch["labels"].view_as(output.logits)))
    assert torch.allclose(output.loss, expected())


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (torch.tensor([0, 1, 2, 0]), "single_label_classification"),
        (torch.eye(4, 3), "multi_label_classification"),
    ],
)
def test_the_problem_type_follows_from_the_labels_where_none_is_given(labels, kind, make_model, make_batch):
    model = make_model().train()
    assert model.config.problem_type is None
    model(**{**make_batch(), "labels": labels})
    assert model.config.problem_type == kind


def test_regression_answers_in_the_units_of_the_labels(make_model, make_batch):
    plain = make_model(num_labels=1).eval()
    scaled = make_model(num_labels=1, label_mean=[100.0], label_deviation=[7.0]).eval()
    batch = without_labels(make_batch())
    assert torch.allclose(scaled(**batch).logits, 100 + 7 * plain(**batch).logits)
    labels = torch.tensor([90.0, 100.0, 110.0, 120.0])
    output = scaled(**batch, labels=labels)
    assert torch.allclose(output.loss, F.mse_loss(output.logits.squeeze(1), labels))


# --- saving and loading


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_saved_model_comes_back_bit_for_bit(model_type, objective, make_model, tmp_path):
    model = make_model(model_type, objective=objective)
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    loaded = type(model).from_pretrained(tmp_path)
    assert not loaded.training
    got, expected = loaded.state_dict(), model.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_auto_classes_know_the_models(model_type, make_model, tmp_path):
    config_class, model_class, classifier_class = hf_al.MODEL_CLASSES[model_type]
    make_model(model_type).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is config_class
    assert type(AutoModel.from_pretrained(tmp_path)) is model_class
    assert type(AutoModelForSequenceClassification.from_pretrained(tmp_path)) is classifier_class
    assert type(AutoModelForSequenceClassification.from_config(config_class(vocab_size=9))) is classifier_class


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_auto_model_is_the_encoder_of_the_classifier(model_type, make_model, make_batch, tmp_path):
    model = make_model(model_type).eval()
    model.save_pretrained(tmp_path)
    batch = without_labels(make_batch())
    output = AutoModel.from_pretrained(tmp_path)(**batch, output_hidden_states=True)
    expected = model(**batch, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(output.hidden_states, expected, strict=True))
    assert torch.equal(output.last_hidden_state, expected[-1])


@pytest.mark.parametrize("load", [AutoModelForSequenceClassification, AutoModel])
@pytest.mark.parametrize("inference_only", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_loading_says_nothing(
    model_type, objective, inference_only, load, make_model, tmp_path, transformers_messages, capfd
):
    make_model(model_type, objective=objective).save_pretrained(tmp_path, inference_only=inference_only)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, info = load.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert transformers_messages == []
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_inference_only_model_predicts_the_same_with_fewer_parameters(
    model_type, objective, make_model, make_batch, tmp_path
):
    model = make_model(model_type, objective=objective).eval()
    model.save_pretrained(tmp_path, inference_only=True)
    saved = set(load_file(tmp_path / "model.safetensors"))
    assert saved == {name for name, _ in model.named_parameters() if not model.is_training_only(name)}
    assert not any("encode_target" in name for name in saved)
    assert {name.split(".")[2] for name in saved if ".bridge." in name} == {"2"}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert {name for name, _ in loaded.named_parameters()} == saved
    batch = make_batch()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert torch.equal(loaded(**batch).loss, model(**batch).loss)
    assert not model.config.inference_only


def test_an_inference_only_model_cannot_be_trained_and_has_one_exit(make_model, make_batch, tmp_path):
    make_model().save_pretrained(tmp_path, inference_only=True)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"inference_only=True.*whole model"):
        loaded.train()(**make_batch())
    loaded.eval()
    assert loaded.config.exits() == [2]
    with pytest.raises(ValueError, match="exit_block"):
        loaded(**make_batch(), exit_block=0)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_inference_only_model_can_be_saved_again(model_type, make_model, make_batch, tmp_path):
    make_model(model_type).save_pretrained(tmp_path / "once", inference_only=True)
    once = AutoModelForSequenceClassification.from_pretrained(tmp_path / "once")
    once.save_pretrained(tmp_path / "twice")
    twice = AutoModelForSequenceClassification.from_pretrained(tmp_path / "twice")
    assert twice.config.inference_only
    assert torch.equal(once(**make_batch()).logits, twice(**make_batch()).logits)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_whole_model_can_still_be_trained_after_an_inference_only_save(model_type, make_model, make_batch, tmp_path):
    model = make_model(model_type).train()
    model.save_pretrained(tmp_path, inference_only=True)
    model(**make_batch()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which peft reads
def test_adapters_for_all_linear_layers_leave_the_label_side_alone(make_model, make_batch):
    """Its layers are also called without an input."""
    model = make_model("al_transformer").train()
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    adapted(**make_batch()).loss.backward()
    assert not any("target" in name and "lora" in name for name, _ in adapted.named_parameters())


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_another_number_of_labels_can_be_loaded_over_a_saved_body(model_type, make_model, make_batch, tmp_path):
    make_model(model_type).save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    output = loaded.train()(**{**make_batch(), "labels": torch.tensor([4, 3, 0, 1])})
    assert output.logits.shape == (4, 5)
    assert bool(output.loss.isfinite())


# --- what transformers models can do


@pytest.mark.parametrize("size", [80, 30])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_embedding_table_can_be_resized(model_type, size, make_model, make_batch, tmp_path):
    model = make_model(model_type).eval()
    batch = without_labels(make_batch())
    batch["input_ids"] %= 29
    expected = model(**batch).logits
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == size
    assert torch.equal(model(**batch).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, expected)
    assert not loaded.get_input_embeddings().weight[0].any()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_checkpointing_gives_equal_gradients(objective, make_model, make_batch):
    gradients = []
    for checkpointing in (False, True):
        model = make_model("al_transformer", objective=objective, layers_per_block=2).train()
        calls = []
        for block in model.model.blocks:
            for layer in block.encode.layers:
                layer.attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(1)
        model(**make_batch()).loss.backward()
        assert len(calls) == (8 if checkpointing else 4)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.equal(checkpointed[name], gradient), name


def test_an_lstm_says_that_it_cannot_checkpoint_gradients(make_model):
    with pytest.raises(ValueError, match="does not support activation checkpointing"):
        make_model("al_lstm").activation_checkpointing_enable()


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_eager_and_sdpa_attention_agree(positions, make_model, make_batch):
    batch = make_batch(rows=6, tokens=12)
    outputs = []
    for implementation in ("eager", "sdpa"):
        model = make_model(
            "al_transformer", position_embedding_type=positions, attn_implementation=implementation, layers_per_block=2
        ).eval()
        assert model.config._attn_implementation == implementation
        outputs.append(torch.stack(model(**without_labels(batch), output_exit_logits=True).exit_logits))
    assert torch.allclose(outputs[0], outputs[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_the_order_of_the_words_matters_to_the_transformer(positions, make_model):
    model = make_model("al_transformer", position_embedding_type=positions, embedding_std=1.0).eval()
    text = torch.tensor([[3, 4, 5, 6, 7]])
    assert not torch.allclose(model(text).logits, model(text.flip(1)).logits, atol=1e-4)


def test_rotary_attention_depends_on_distances_only(make_model):
    """Left padding moves a text to other columns; a shift of all positions must not matter."""
    model = make_model("al_transformer", attn_implementation="eager").eval()
    texts = torch.tensor([[3, 4, 5, 6]])
    inputs = model.model.prepare_inputs(texts)
    block = model.model.blocks[1]
    hidden = model.model.blocks[0].encode({}, inputs)
    here = block.encode(hidden, inputs)["hidden"]
    shifted = model.model.prepare_inputs(torch.cat([torch.full((1, 3), 9), texts], 1))
    moved = {**inputs, "cos": shifted["cos"][:, 3:], "sin": shifted["sin"][:, 3:]}
    assert torch.allclose(block.encode(hidden, moved)["hidden"], here, atol=1e-6)
    scrambled = {**inputs, "cos": inputs["cos"].flip(1), "sin": inputs["sin"]}
    assert not torch.allclose(block.encode(hidden, scrambled)["hidden"], here, atol=1e-6)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_bfloat16_loads_and_runs(model_type, make_model, make_batch, tmp_path):
    model = make_model(model_type).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    batch = make_batch()
    output = loaded(**batch)
    assert output.logits.dtype == torch.bfloat16
    assert torch.allclose(output.logits.float(), model(**batch).logits, atol=0.05)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_bfloat16_model_trains(problem, model_type, objective, make_model, make_batch):
    config, labels = PROBLEMS[problem]
    model = make_model(model_type, objective=objective, **config).to(torch.bfloat16).train()
    loss = model(**{**make_batch(), "labels": labels()}).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert bool(loss.isfinite())


# --- the blocks


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("config", [{}, {"embedding_size": 6}])
@pytest.mark.parametrize("model_type", FROM_SCRATCH)
def test_block_0_is_the_embedding_alone_or_with_the_first_encoder(model_type, config, merged, make_model, make_batch):
    model = make_model(model_type, embedding_block=not merged, **config).train()
    assert [len(b.encode.layers) > 0 for b in model.model.blocks] == [merged, True, True]
    assert [b.encode.embeddings is not None for b in model.model.blocks] == [True, False, False]
    output = model(**make_batch(), output_hidden_states=True)
    first = 16 if merged or model_type == "al_transformer" else config.get("embedding_size", 16)
    assert [hidden.shape[-1] for hidden in output.hidden_states] == [first, 16, 16]
    assert model.get_input_embeddings().embedding_dim == config.get("embedding_size", 16)


@pytest.mark.parametrize("embedding_block", [True, False])
def test_a_carried_state_is_the_same_in_training_and_evaluation(embedding_block, make_model, make_batch):
    config = {"embedding_block": embedding_block, "num_blocks": 4, "layers_per_block": 2, "embedding_size": 6}
    model = still(make_model, "al_lstm", carry_state=True, **config)
    batch = make_batch()
    wanted = {"output_exit_logits": True, "output_hidden_states": True}
    trained, evaluated = model.train()(**batch, **wanted), model.eval()(**batch, **wanted)
    for name in ("exit_logits", "hidden_states"):
        assert all(torch.equal(a, b) for a, b in zip(trained[name], evaluated[name], strict=True)), name
    apart = still(make_model, "al_lstm", **config).eval()
    apart.load_state_dict(model.state_dict())
    first = 1 if embedding_block else 0
    for k, (with_state, without) in enumerate(
        zip(evaluated.exit_logits, apart(**batch, **wanted).exit_logits, strict=True)
    ):
        assert torch.equal(with_state, without) == (k <= first)


def test_a_carried_state_is_the_final_state_of_the_block_before(make_model, make_batch):
    model = still(make_model, "al_lstm", carry_state=True).eval()
    batch = without_labels(make_batch(rows=1))
    rows = model.get_input_embeddings()(batch["input_ids"])
    lengths = batch["attention_mask"].sum(1)
    by_length = sort_by_length(lengths, rows.device)
    hidden, state = packed(model.model.blocks[1].encode.layers[0], rows, by_length)
    expected, _ = packed(model.model.blocks[2].encode.layers[0], hidden, by_length, state)
    got = model(**batch, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_parts_of_a_block_have_the_names_that_others_rely_on(model_type, make_model):
    model = make_model(model_type)
    names = {tuple(name.split(".")[:4]) for name, _ in model.named_parameters()}
    parts = ("encode", "bridge", "encode_target", "decode_target")
    assert names == {("model", "blocks", str(k), part) for k in range(3) for part in parts}


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "elu", "gelu", "layer_norm", "identity"])
def test_no_activation_bounds_the_logits(activation, make_model, make_batch):
    model = make_model(label_activation=activation, bridge_activation=activation).eval()
    with torch.no_grad():
        model.model.blocks[0].decode_target.bias.fill_(50.0)
    logits = model(**without_labels(make_batch()), output_exit_logits=True).exit_logits
    assert all(exit_NC.min().item() > 10 for exit_NC in logits)


# --- initialisation


def matrices(model) -> dict[str, torch.Tensor]:
    """The matrices that `initialization` applies to: of linear layers, and of each LSTM gate."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[name] = module.weight
        elif isinstance(module, nn.LSTM):
            for key, parameter in module.named_parameters():
                if key.startswith("weight"):
                    gates = parameter.split(module.hidden_size)
                    found.update({f"{name}.{key}.{i}": gate for i, gate in enumerate(gates)})
    return found


@pytest.mark.parametrize("model_type", FROM_SCRATCH)
@pytest.mark.parametrize("kind", ["xavier", "kaiming", "orthogonal", "normal"])
def test_each_initialization_gives_its_own_scale(kind, model_type, make_model):
    model = make_model(model_type, hidden_size=64, target_size=48, initialization=kind, initializer_range=0.03)
    found = matrices(model)
    assert found
    for name, weight in found.items():
        rows, columns = weight.shape
        if rows * columns < 1000:
            continue
        std = {"xavier": (2 / (rows + columns)) ** 0.5, "kaiming": columns**-0.5, "normal": 0.03}.get(kind)
        if std is not None:
            assert weight.std().item() == pytest.approx(std, rel=0.15), name
            continue
        small = weight if rows <= columns else weight.T
        assert torch.allclose(small @ small.T, torch.eye(len(small)), atol=1e-5), name


@pytest.mark.parametrize("kind", ["xavier", "kaiming", "orthogonal", "normal"])
def test_the_scale_of_the_code_is_that_of_the_label_encoders_alone(kind, make_model):
    usual, wide = (make_model(initialization=kind, code_scale=scale).state_dict() for scale in (1.0, 3.0))
    for name, weight in usual.items():
        factor = 3.0 if name.endswith("encode_target.weight") else 1.0
        assert torch.allclose(wide[name], factor * weight), name


@pytest.mark.parametrize("model_type", FROM_SCRATCH)
def test_biases_start_at_zero_and_forget_gates_open(model_type, make_model):
    model = make_model(model_type)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            continue
        expected = torch.zeros_like(parameter)
        if "bias_ih" in name:
            hidden = len(parameter) // 4
            expected[hidden : 2 * hidden] = 1
        elif name.endswith("norm.weight"):
            expected += 1
        assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("model_type", FROM_SCRATCH)
def test_embedding_rows_start_small_and_padding_at_zero(model_type, make_model):
    weight = make_model(model_type, vocab_size=500, embedding_std=0.3, pad_token_id=4).get_input_embeddings().weight
    assert not weight[4].any()
    assert weight.std().item() == pytest.approx(0.3, rel=0.1)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_same_seed_gives_the_same_weights(model_type, make_model):
    one, same, other = make_model(model_type, seed=1), make_model(model_type, seed=1), make_model(model_type, seed=2)
    state = one.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in same.state_dict().items())
    assert any(not torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_the_saved_config_names_the_code_that_reads_it(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["ALLstmForSequenceClassification"]
    assert config["auto_map"]["AutoConfig"] == "configuration_al.ALLstmConfig"
    code = {"configuration_al.py", "modeling_al.py", "blocks.py", "objectives.py"}
    assert code <= {path.name for path in tmp_path.iterdir()}
