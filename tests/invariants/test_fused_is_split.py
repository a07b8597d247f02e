"""Fused = split: one optimizer over the sum of the local losses makes the same updates as one optimizer per block."""

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, OBJECTIVES, slow
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import Trainer
from transformers import TrainingArguments as HFTrainingArguments

import hf_al
from hf_al.data.batching import Collator, micro_batches
from hf_al.modeling import objectives
from hf_al.parallel.placement import place
from hf_al.training import local_step
from hf_al.training.optim import BlockOptimizers
from hf_al.training.stage import Stage

ROWS, BATCH, STEPS, SEED = 24, 4, 6, 7
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "embedding_dropout_prob": 0.0, "bridge_dropout_prob": 0.0}
LEARNING_RATE = 1e-2


class FusedOptimizers(BlockOptimizers):
    """One optimizer over all blocks, updated after the backward pass of the last one."""

    def __init__(self, blocks, units, args, total_steps):
        super().__init__(blocks, [range(len(blocks))], args, total_steps)

    def update(self, unit, step):
        whole = next(iter(self.by_unit))
        return super().update(whole, step) if unit[-1] == whole[-1] else torch.zeros(())


@pytest.fixture
def data() -> Dataset:
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 60, rng.integers(1, 9)).tolist() for _ in range(ROWS)]
    features = Features({"input_ids": List(Value("int64")), "label": ClassLabel(names=["a", "b", "c"])})
    return Dataset.from_dict({"input_ids": texts, "label": rng.integers(0, 3, ROWS).tolist()}, features)


def batches() -> list[np.ndarray]:
    return [np.arange(start, start + BATCH) for start in range(0, ROWS, BATCH)][:STEPS]


def own_loop(model, data, optimizers_class=BlockOptimizers, parts: int = 1, **values) -> dict[str, torch.Tensor]:
    """Weights after one pass of hf_al's loop over the data."""
    constants = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "learning_rate": LEARNING_RATE}
    args = hf_al.TrainingArguments(output_dir="unused", **{**constants, **values})
    blocks = dict(enumerate(model.model.blocks))
    optimizers = optimizers_class(blocks, model.config.units, args, STEPS)
    collator = Collator(model.config.pad_token_id, model.config.classes)
    stage = Stage(model.train(), place(model.config.units), torch.device("cpu"), collator, optimizers)
    steps = ((step, micro_batches(rows, parts)) for step, rows in enumerate(batches()))
    for step, inputs in stage.batches(data, steps):
        stage.train_batch(inputs, step, SEED)
    return model.state_dict()


def through_trainer(model, data, folder, **values) -> dict[str, torch.Tensor]:
    """Weights after one pass of transformers' Trainer over the same batches in the same order."""
    collator = Collator(model.config.pad_token_id, model.config.classes)
    args = HFTrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": BATCH,
            "num_train_epochs": 1,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "weight_decay": 0.0,
            "optim": "adamw_torch_fused",
            "train_sampling_strategy": "sequential",
            "remove_unused_columns": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **values,
        },
    )
    numbered = Dataset.from_dict({"row": list(range(ROWS))})
    trainer = Trainer(
        model,
        args,
        train_dataset=numbered,
        data_collator=lambda rows: collator(data, np.array([r["row"] for r in rows])),
    )
    trainer.train()
    return model.state_dict()


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return furthest(a, b) == 0.0


def still(make_model, model_type: str, **config):
    attention = {"attention_probs_dropout_prob": 0.0} if model_type == "al_transformer" else {}
    return make_model(model_type, **NO_DROPOUT, **attention, **config)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_transformers_trainer_makes_the_updates_of_our_loop(model_type, objective, make_model, data, tmp_path):
    start = still(make_model, model_type, objective=objective).state_dict()
    ours = own_loop(still(make_model, model_type, objective=objective), data)
    theirs = through_trainer(still(make_model, model_type, objective=objective), data, tmp_path)
    assert furthest(start, ours) > LEARNING_RATE
    assert furthest(ours, theirs) == 0.0


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_transformers_trainer_accumulates_as_our_loop_does(model_type, make_model, data, tmp_path):
    accumulated = {"per_device_train_batch_size": BATCH // 2, "gradient_accumulation_steps": 2}
    ours = own_loop(still(make_model, model_type), data, parts=2)
    theirs = through_trainer(still(make_model, model_type), data, tmp_path, **accumulated)
    assert furthest(ours, theirs) == 0.0


@pytest.mark.parametrize("parts", [slow(1), 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_one_optimizer_is_one_optimizer_a_block_with_dropout_on(model_type, objective, parts, make_model, data):
    config = {"objective": objective, "hidden_dropout_prob": 0.3, "layers_per_block": 2}
    schedule = {"lr_scheduler_type": "linear", "warmup_steps": 2}
    split = own_loop(make_model(model_type, **config), data, parts=parts, **schedule)
    fused = own_loop(make_model(model_type, **config), data, FusedOptimizers, parts=parts, **schedule)
    assert equal(split, fused)


def test_dropout_is_on_and_seeded_by_the_run(make_model, data, monkeypatch):
    """The comparison above detects dropout: weights differ with another seed, and are equal with the same one."""
    weights = own_loop(make_model(hidden_dropout_prob=0.3), data)
    assert equal(weights, own_loop(make_model(hidden_dropout_prob=0.3), data))
    monkeypatch.setattr("test_fused_is_split.SEED", SEED + 1)
    assert not equal(weights, own_loop(make_model(hidden_dropout_prob=0.3), data))


def test_the_randomness_of_a_block_does_not_depend_on_what_ran_before(make_model, data):
    weights = own_loop(make_model(hidden_dropout_prob=0.3), data)
    model = make_model(hidden_dropout_prob=0.3)
    torch.manual_seed(12345)
    torch.rand(17)
    assert equal(weights, own_loop(model, data))


def test_decoders_that_travel_without_a_copy_are_noticed(make_model, data, monkeypatch):
    """al_ce reads earlier decoders as they were before this batch's update; a shared one makes the orders differ."""
    fused = own_loop(make_model(objective="al_ce"), data, FusedOptimizers)
    monkeypatch.setattr(local_step, "cut", lambda boundary, block: objectives.cut(boundary))
    assert not equal(own_loop(make_model(objective="al_ce"), data), fused)
