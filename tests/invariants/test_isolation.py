"""Isolation: the loss of a block reaches no parameter outside the block, nor the wrong side inside it."""

import pytest
import torch
from conftest import ARCHITECTURES, EVERY_OBJECTIVE

from hf_al.modeling import blocks, objectives
from hf_al.modeling.blocks import walk
from hf_al.training import local_step

CUTTING = [name for name in EVERY_OBJECTIVE if name != "backprop"]
VARIANTS = {
    "default": {},
    "merged_embedding": {"embedding_block": False},
    "cosine": {"associated_loss": "cosine"},
    "two_layers": {"layers_per_block": 2, "bridge_layers": 2},
    "regression": {"num_labels": 1, "problem_type": "regression"},
    "multi_label": {"problem_type": "multi_label_classification"},
}
SIDES = {
    "associated": ("encode", "bridge"),
    "reconstruction": ("encode_target", "decode_target"),
}


def labels_for(config, batch: dict) -> torch.Tensor:
    kind = config.resolved_problem_type
    if kind == "multi_label_classification":
        return torch.nn.functional.one_hot(batch["labels"], 3).float()
    return batch["labels"].float() if kind == "regression" else batch["labels"]


def losses_of_forward(model, batch: dict) -> list[torch.Tensor]:
    return list(model(**batch).local_losses)


def losses_of_loop(model, batch: dict) -> list[torch.Tensor]:
    """The same losses, computed by hf_al's own loop, with no update in between."""
    inputs = model.model.prepare_inputs(**batch)
    boundary = model.model.initial_boundary(inputs["labels"])
    steps = local_step.local_steps(model.model.blocks, boundary, inputs, (0, 0, 0, 0), torch.device("cpu"))
    return [out.loss for _, out in steps]


def reached(loss: torch.Tensor, model) -> set[str]:
    """Names of the parameters to which the loss gives a gradient other than None and 0."""
    if not loss.requires_grad:
        return set()
    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {name for name, grad in zip(names, grads, strict=True) if grad is not None and bool(grad.any())}


def parameters_of(model, k: int, *parts: str) -> set[str]:
    prefixes = tuple(f"model.blocks.{k}.{part}." for part in parts) or f"model.blocks.{k}."
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def named_losses(model, batch: dict) -> list[dict[str, torch.Tensor]]:
    """The losses of each block by name, attached to their graph."""
    inputs = model.model.prepare_inputs(**batch)
    boundary = model.model.initial_boundary(inputs["labels"])
    return [out.losses for _, out in walk(model.model.blocks, boundary, inputs, learning=True)]


@pytest.mark.parametrize("losses_of", [losses_of_forward, losses_of_loop])
@pytest.mark.parametrize("objective", CUTTING)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_loss_reaches_all_of_its_block_and_nothing_else(
    variant, model_type, objective, losses_of, make_model, make_batch
):
    model = make_model(model_type, objective=objective, **VARIANTS[variant]).train()
    batch = make_batch()
    batch["labels"] = labels_for(model.config, batch)
    losses = losses_of(model, batch)
    assert len(losses) == model.config.num_blocks
    for k, loss in enumerate(losses):
        assert reached(loss, model) == parameters_of(model, k)


@pytest.mark.parametrize("objective", CUTTING)
def test_a_carried_lstm_state_carries_no_gradient(objective, make_model, make_batch):
    model = make_model(objective=objective, carry_state=True, num_blocks=4).train()
    for k, loss in enumerate(losses_of_forward(model, make_batch())):
        assert reached(loss, model) == parameters_of(model, k)


@pytest.mark.parametrize("objective", ["associated", "al_ce"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_each_loss_reaches_its_own_side_of_the_block(model_type, objective, make_model, make_batch):
    model = make_model(model_type, objective=objective).train()
    sides = {**SIDES, "exit": ("encode", "bridge")} if objective == "al_ce" else SIDES
    for k, losses in enumerate(named_losses(model, make_batch())):
        assert set(losses) == set(sides)
        for name, loss in losses.items():
            assert reached(loss, model) == parameters_of(model, k, *sides[name]), name


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("owner", [blocks, local_step])
@pytest.mark.parametrize("objective", CUTTING)
def test_a_missing_cut_between_blocks_is_noticed(objective, owner, model_type, make_model, make_batch, monkeypatch):
    monkeypatch.setattr(owner, "cut", lambda boundary, block: boundary)
    model = make_model(model_type, objective=objective).train()
    losses = (losses_of_forward if owner is blocks else losses_of_loop)(model, make_batch())
    for k in range(1, model.config.num_blocks):
        assert reached(losses[k], model) & parameters_of(model, k - 1)


@pytest.mark.parametrize("objective", ["associated", "al_ce"])
def test_a_missing_cut_inside_a_block_is_noticed(objective, make_model, make_batch, monkeypatch):
    monkeypatch.setattr(objectives, "cut", lambda boundary: boundary)
    model = make_model(objective=objective).train()
    for k, losses in enumerate(named_losses(model, make_batch())):
        assert reached(losses["associated"], model) & parameters_of(model, k, "encode_target")
        if objective == "al_ce":
            assert reached(losses["exit"], model) & parameters_of(model, k, "decode_target")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_backprop_reaches_every_block_from_its_one_loss(model_type, make_model, make_batch):
    model = make_model(model_type, objective="backprop").train()
    got = reached(model(**make_batch()).loss, model)
    for k in range(model.config.num_blocks):
        assert parameters_of(model, k, "encode", "decode_target") <= got
    assert parameters_of(model, model.config.num_blocks - 1, "bridge") <= got
