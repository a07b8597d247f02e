"""One AdamW and schedule a block: values, factors, clipping block by block, and state by name."""

import math

import pytest
import torch
from accelerate import Accelerator

from hf_al import TrainingArguments
from hf_al.training.optim import LABEL_SIDE, BlockOptimizers, make_schedule


@pytest.fixture(autouse=True)
def _accelerator():
    """Optimizers of accelerate refuse to be made before an Accelerator."""
    Accelerator(cpu=True)


def arguments(**values) -> TrainingArguments:
    return TrainingArguments(**{"output_dir": "unused", "lr_scheduler_type": "constant", **values})


def optimizers_of(model, args, total_steps=100) -> BlockOptimizers:
    return BlockOptimizers(dict(enumerate(model.model.blocks)), model.config.units, args, total_steps)


def set_gradients(model, seed=0, scale=1e-3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale


def update_all(model, optimizers, step=0) -> dict:
    return {unit[-1]: float(optimizers.update(unit, step)) for unit in model.config.units}


def copies(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


# --- schedule


@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        ("linear", 0, {0: 1.0, 5: 0.5, 9: 0.1, 10: 0.0}),
        ("linear", 4, {0: 0.25, 3: 1.0, 4: 1.0, 7: 0.5, 10: 0.0}),
        ("linear", 0.4, {0: 0.25, 3: 1.0, 4: 1.0, 7: 0.5}),
        ("linear", 0.25, {0: 1 / 3, 2: 1.0, 3: 1.0}),
        ("cosine", 0, {0: 1.0, 5: 0.5, 10: 0.0}),
        ("cosine", 2, {0: 0.5, 2: 1.0, 6: 0.5, 10: 0.0}),
        ("constant", 0, {0: 1.0, 9: 1.0, 100: 1.0}),
        ("constant", 2, {0: 0.5, 1: 1.0, 9: 1.0}),
        ("linear", 10, {0: 0.1, 9: 1.0}),
    ],
)
def test_schedule_values(kind, warmup, expected):
    args = arguments(lr_scheduler_type=kind, warmup_steps=warmup)
    for step, factor in expected.items():
        assert make_schedule(args, 10)(step) == pytest.approx(factor, abs=1e-12), step


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 3, 0.2, 50])
def test_every_step_of_a_run_learns(kind, warmup):
    args = arguments(lr_scheduler_type=kind, warmup_steps=warmup)
    factor = make_schedule(args, 20)
    assert all(0 < factor(step) <= 1 for step in range(20))


def test_the_schedule_reaches_the_update(make_model):
    """Adam's first step has the size of the learning rate."""
    args = arguments(learning_rate=0.1, lr_scheduler_type="linear", warmup_steps=4, max_grad_norm=0)
    model = make_model()
    optimizers = optimizers_of(model, args)
    before = copies(model)
    set_gradients(model)
    update_all(model, optimizers, step=1)
    change = (model.model.blocks[1].bridge.layers[0].weight - before["model.blocks.1.bridge.layers.0.weight"]).abs()
    assert change.median().item() == pytest.approx(0.05, rel=1e-3)
    assert optimizers.learning_rates(1) == pytest.approx({0: 0.05, 1: 0.05, 2: 0.05})


# --- groups


def test_label_side_and_embedding_have_their_factors(make_model):
    args = arguments(
        learning_rate=0.1, target_learning_rate_factor=3.0, embedding_learning_rate_factor=0.5, max_grad_norm=0
    )
    model = make_model()
    before = copies(model)
    set_gradients(model)
    update_all(model, optimizers_of(model, args))
    for name, parameter in model.named_parameters():
        part = name.split(".")[3]
        expected = 0.1 * (3.0 if part in LABEL_SIDE else 0.5 if "word_embeddings" in name else 1.0)
        assert (parameter - before[name]).abs().median().item() == pytest.approx(expected, rel=1e-3), name


def test_a_factor_of_zero_freezes_the_embedding_rows(make_model):
    model = make_model()
    before = copies(model)
    set_gradients(model)
    update_all(model, optimizers_of(model, arguments(embedding_learning_rate_factor=0.0, weight_decay=0.1)))
    same = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert same == {name for name in before if "word_embeddings" in name}


def test_weight_decay_is_for_matrices_only(make_model):
    """With gradients of zero, decay is all that moves a weight."""
    model = make_model("al_transformer", embedding_block=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    update_all(model, optimizers_of(model, arguments(learning_rate=0.1, weight_decay=0.5)))
    for name, parameter in model.named_parameters():
        decayed = parameter.ndim > 1 and "word_embeddings" not in name
        assert parameter.flatten()[0].item() == pytest.approx(0.95 if decayed else 1.0), name


# --- clipping


def test_clipping_is_per_block(make_model):
    """A huge gradient in one block changes no other block's update."""
    after = []
    for scale in (1.0, 1e6):
        model = make_model(seed=0)
        optimizers = optimizers_of(model, arguments(max_grad_norm=0.1))
        for step in range(3):
            set_gradients(model, seed=step)
            model.model.blocks[1].bridge.layers[0].weight.grad *= scale
            update_all(model, optimizers, step)
        after.append(copies(model))
    for name in after[0]:
        same = torch.equal(after[0][name], after[1][name])
        assert same == (".blocks.1." not in name), name


def test_clipping_scales_the_gradient_to_the_limit(make_model):
    """Seen in Adam's first moment, which is (1 - beta1) times the clipped gradient."""
    model = make_model()
    optimizers = optimizers_of(model, arguments(max_grad_norm=0.5))
    set_gradients(model, scale=1.0)
    expected = {k: math.sqrt(sum(float(p.grad.square().sum()) for p in block.parameters()))
                for k, block in enumerate(model.model.blocks)}  # fmt: skip
    norms = update_all(model, optimizers)
    assert norms == pytest.approx(expected, rel=1e-5)
    for k in range(3):
        moments = [tensor for name, tensor in optimizers.state(k).items() if name.endswith("/exp_avg")]
        norm = math.sqrt(sum(float(m.square().sum()) for m in moments)) / 0.1
        assert norm == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("limit", [0.0, 100.0])
def test_small_gradients_and_a_limit_of_zero_are_not_clipped(limit, make_model):
    model = make_model()
    optimizers = optimizers_of(model, arguments(max_grad_norm=limit))
    set_gradients(model, scale=1e-2)
    gradient = model.model.blocks[0].decode_target.weight.grad.clone()
    update_all(model, optimizers)
    assert torch.allclose(optimizers.state(0)["decode_target.weight/exp_avg"], gradient * 0.1)


def test_backprop_clips_the_network_as_a_whole(make_model):
    model = make_model(objective="backprop")
    optimizers = optimizers_of(model, arguments(max_grad_norm=0.5))
    set_gradients(model, scale=1.0)
    total = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert update_all(model, optimizers) == pytest.approx({2: total}, rel=1e-5)
    moments = [t for k in range(3) for name, t in optimizers.state(k).items() if name.endswith("/exp_avg")]
    assert math.sqrt(sum(float(m.square().sum()) for m in moments)) / 0.1 == pytest.approx(0.5, rel=1e-4)


# --- the update


def test_updates_are_those_of_adamw(make_model):
    args = arguments(
        learning_rate=0.01, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6, max_grad_norm=0,
        lr_scheduler_type="linear",
    )  # fmt: skip
    ours, theirs = make_model(seed=1), make_model(seed=1)
    optimizers = optimizers_of(ours, args, total_steps=8)
    decayed = [p for n, p in theirs.named_parameters() if p.ndim > 1 and "word_embeddings" not in n]
    rest = [p for n, p in theirs.named_parameters() if p.ndim == 1 or "word_embeddings" in n]
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=0.01, betas=(0.8, 0.95), eps=1e-6,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: 1 - step / 8)
    for step in range(5):
        for model in (ours, theirs):
            set_gradients(model, seed=step)
        update_all(ours, optimizers, step)
        adamw.step()
        schedule.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name


def test_gradients_are_freed_after_the_update(make_model):
    model = make_model()
    optimizers = optimizers_of(model, arguments())
    set_gradients(model)
    optimizers.update(range(1, 2), 0)
    freed = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is None}
    assert freed == {"1"}


def test_a_part_without_a_gradient_stays_as_it_is(make_model):
    model = make_model()
    before = copies(model)
    set_gradients(model)
    for parameter in model.model.blocks[1].bridge.parameters():
        parameter.grad = None
    update_all(model, optimizers_of(model, arguments(weight_decay=0.5)))
    same = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert same == {name for name in before if ".blocks.1.bridge." in name}


# --- state


@pytest.mark.parametrize("objective", ["associated", "backprop"])
def test_state_by_name_continues_the_run(objective, make_model):
    """Loaded into the optimizers of another process, whose blocks may be grouped in another way."""
    args = arguments(max_grad_norm=0)
    model = make_model(objective=objective)
    optimizers = optimizers_of(model, args)
    for step in range(3):
        set_gradients(model, seed=step)
        update_all(model, optimizers, step)
    other = make_model(objective=objective, seed=5)
    other.load_state_dict(model.state_dict())
    others = BlockOptimizers(dict(enumerate(other.model.blocks)), [range(3)], args, 100)
    for k in range(3):
        state = {name: tensor.clone() for name, tensor in optimizers.state(k).items()}
        assert {name.rsplit("/", 1)[1] for name in state} == {"exp_avg", "exp_avg_sq", "step"}
        assert {name.rsplit("/", 1)[0] for name in state} == dict(model.model.blocks[k].named_parameters()).keys()
        others.load_state(k, state)
    for step in range(3, 5):
        for each in (model, other):
            set_gradients(each, seed=step)
        update_all(model, optimizers, step)
        others.update(range(3), step)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_loaded_state_is_a_copy(make_model):
    model, other = make_model(), make_model()
    optimizers, others = optimizers_of(model, arguments()), optimizers_of(other, arguments())
    set_gradients(model)
    update_all(model, optimizers)
    for k in range(3):
        others.load_state(k, optimizers.state(k))
    before = optimizers.state(0)["decode_target.weight/exp_avg"].clone()
    set_gradients(other, seed=9)
    update_all(other, others, 1)
    assert torch.equal(optimizers.state(0)["decode_target.weight/exp_avg"], before)


def test_state_before_the_first_update_is_empty(make_model):
    assert optimizers_of(make_model(), arguments()).state(0) == {}
