"""What only a GPU can show: `make test-gpu`, on a machine that has one. Not collected otherwise."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import AutoConfig

import hf_al
from hf_al.data.batching import Collator
from hf_al.data.batching import micro_batches as cut
from hf_al.modeling.objectives import OBJECTIVES
from hf_al.parallel.placement import place
from hf_al.training.offload import Offload
from hf_al.training.optim import BlockOptimizers
from hf_al.training.stage import Stage

TINY = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 4}
ENCODERS = {
    "bert": {},
    "modernbert": {"pad_token_id": 0},
    "mpnet": {"pad_token_id": 1},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "llama": {"num_key_value_heads": 2, "pad_token_id": 0},
}
KINDS = ["al_lstm", "al_transformer", *ENCODERS]


def make(kind: str, objective: str = "al_ce", dropout: float = 0.1, **values):
    torch.manual_seed(0)
    values |= {"bridge_dropout_prob": dropout}
    if kind in ENCODERS:
        off = {} if dropout else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        encoder = AutoConfig.for_model(kind, **TINY, max_position_embeddings=64, **ENCODERS[kind], **off)
        config = hf_al.ALEncoderConfig.from_encoder(encoder, num_labels=3, num_blocks=2, objective=objective, **values)
        return hf_al.ALEncoderForSequenceClassification(config)
    config_class, _, model_class = hf_al.MODEL_CLASSES[kind]
    own = {"num_attention_heads": 2, "attention_probs_dropout_prob": dropout} if kind == "al_transformer" else {}
    sizes = {"vocab_size": 64, "hidden_size": 16, "target_size": 12, "num_blocks": 3, "num_labels": 3}
    off = {"hidden_dropout_prob": dropout, "embedding_dropout_prob": dropout}
    return model_class(config_class(**sizes, **own, **off, objective=objective, **values))


def few_rows() -> Dataset:
    rng = np.random.default_rng(0)
    features = Features({"input_ids": List(Value("int32")), "label": ClassLabel(num_classes=3)})
    ids = [rng.integers(4, 60, int(rng.integers(3, 20))).tolist() for _ in range(16)]
    return Dataset.from_dict({"input_ids": ids, "label": rng.integers(0, 3, 16).tolist()}, features)


def after_steps(model, device: str, offload: bool = False, micro_batches: int = 1, bf16: bool = False, **values):
    """Everything that a few steps and evaluations leave: losses, weights, optimizer state, logits; on the CPU."""
    model = copy.deepcopy(model).train()
    if not offload:
        model.to(device)
    units, blocks = model.config.units, dict(enumerate(model.model.blocks))
    optimizers = BlockOptimizers(blocks, units, hf_al.TrainingArguments(output_dir="unused", **values), 10)
    moved = Offload(blocks, optimizers, torch.device(device), Path("/tmp")) if offload else None
    stage = Stage(model, place(units), torch.device(device), Collator(0, 3), optimizers, bf16=bf16, offload=moved)
    data, left = few_rows(), {}
    rows = np.arange(4 * micro_batches)
    steps = ((n, cut(rows + 8 * (n % 2), micro_batches)) for n in range(4))
    for number, parts in stage.batches(data, steps):
        losses, _ = stage.train_batch(parts, number, 0)
        left |= {f"loss {number} {k} {n}": v.float() for k, named in losses.items() for n, v in named.items()}
        left |= {f"logits {number} {k}": torch.tensor(v) for k, v in stage.evaluate(data, 8).items()}
    left |= model.state_dict()
    left |= {f"state {k} {n}": t for k in blocks for n, t in optimizers.state(k).items()}
    return {name: tensor.cpu().clone() for name, tensor in left.items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("objective", tuple(OBJECTIVES))
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_computes_what_a_cpu_computes(kind, objective):
    model = make(kind, objective, dropout=0.0)
    for module in model.modules():  # the dropout of encoders that call it otherwise
        config = getattr(module, "config", None)
        if hasattr(config, "attention_dropout"):
            config.attention_dropout = 0.0
    on_cpu, on_gpu = after_steps(model, "cpu"), after_steps(model, "cuda")
    for name, value in on_cpu.items():
        if name.startswith(("loss 0", "logits 0")):
            torch.testing.assert_close(on_gpu[name], value, atol=2e-3, rtol=2e-3, msg=name)


@pytest.mark.parametrize("rule", ["confidence", "patience"])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_leave_early_on_a_gpu(kind, rule):
    model = make(kind, carry_state=True).eval().cuda() if kind == "al_lstm" else make(kind).eval().cuda()
    ids = torch.randint(4, 60, (24, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.arange(24)[:, None] % 8 + 2).long()
    batch = {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}
    with torch.no_grad():
        logits_KNC = torch.stack(model(**batch, output_exit_logits=True).exit_logits)
    middle = logits_KNC.softmax(-1).amax(-1).quantile(0.5, dim=1)[:-1].tolist()
    model.config.exit_rule = rule
    model.config.exit_temperatures = [1.0] * len(logits_KNC)
    model.config.exit_thresholds = [*(middle if rule == "confidence" else [2] * len(middle)), None]
    out = model.predict(**batch, exit="adaptive", batch_size=5)
    assert out.logits.device == logits_KNC.device
    rows = torch.arange(24, device="cuda")
    torch.testing.assert_close(out.logits, logits_KNC[out.exit_blocks, rows], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_gpu_repeats_to_the_bit(kind, bf16):
    model = make(kind)
    assert same(after_steps(model, "cuda", bf16=bf16), after_steps(model, "cuda", bf16=bf16))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_blocks_end_as_the_same_bits(kind, micro_batches):
    model = make(kind)
    plain, offloaded = (
        after_steps(model, "cuda", offload=offload, micro_batches=micro_batches) for offload in (False, True)
    )
    assert same(plain, offloaded)


def test_cached_states_of_frozen_blocks_train_like_computed_ones(few_tweets, tmp_path):
    found = []
    for cache in (False, True):
        args = hf_al.TrainingArguments(
            output_dir=str(tmp_path / str(cache)), max_steps=6, plots=False, disable_tqdm=True, frozen_blocks=2,
            cache_frozen=cache, model={"num_blocks": 3, "hidden_size": 16, "target_size": 12},
        )  # fmt: skip
        found.append(hf_al.train(args, few_tweets).model.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("optim", ["adamw", "adafactor"])
def test_an_offloaded_run_resumes_to_the_same_bits(optim, few_tweets, tmp_path):
    def run(name: str, steps: int, **values) -> bytes:
        args = hf_al.TrainingArguments(
            output_dir=str(tmp_path / name), max_steps=steps, lr_scheduler_type="constant", optim=optim, plots=False,
            disable_tqdm=True, eval_strategy="steps", eval_steps=2,
            model={"num_blocks": 3, "hidden_size": 16, "target_size": 12}, **values,
        )  # fmt: skip
        hf_al.train(args, few_tweets)
        return (tmp_path / name / "model.safetensors").read_bytes()

    whole = run("whole", 6)
    run("offloaded", 4, offload=True)
    assert run("offloaded", 6, offload=True, resume_from_checkpoint="last") == whole


@pytest.mark.parametrize(
    "values", [{"optim": "adam"}, {"optim": "sgd"}, {"optim": "adafactor"}, {"embedding_optimizer": "sparse_adam"}]
)
@pytest.mark.parametrize("offload", [False, True])
def test_every_optimizer_runs_on_a_gpu(values, offload):
    model = make("al_lstm")
    assert same(after_steps(model, "cuda", offload, **values), after_steps(model, "cuda", **values))


@pytest.mark.parametrize("values", [{"lookahead": 1}, {"lora_r": 2}, {"lookahead": 1, "lora_r": 2}])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_lookahead_and_lora_run_on_a_gpu(kind, values):
    model = make(kind, **values)
    assert same(after_steps(model, "cuda", frozen_blocks=1), after_steps(model, "cuda", True, frozen_blocks=1))
