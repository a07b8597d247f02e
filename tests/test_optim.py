"""One AdamW and schedule per block: values, factors, clipping block by block, and state by name."""

import math

import pytest
import torch

from hf_al import TrainingArguments
from hf_al.training.optim import LABEL_SIDE, BlockOptimizers, make_schedule


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


@pytest.mark.parametrize("model_type", ["al_lstm", "al_transformer"])
def test_frozen_blocks_keep_their_encoders_and_their_exits_learn(model_type, make_model):
    model = make_model(model_type, embedding_block=False)
    before = copies(model)
    optimizers = optimizers_of(model, arguments(frozen_blocks=2, weight_decay=0.1))
    model.train()
    encoders = [block.encode for block in model.model.blocks]
    assert [encoder.training for encoder in encoders] == [False, False, *[True] * (len(encoders) - 2)]
    assert all(block.bridge.training for block in model.model.blocks)
    set_gradients(model)
    update_all(model, optimizers)
    same = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert same == {name for name in before if ".encode." in name and int(name.split(".")[2]) < 2}
    optimizers.release()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(encoder.training for encoder in (block.train().encode for block in model.model.blocks))


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
    """Loaded into the optimizers of another process, which may group its blocks differently."""
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


@pytest.mark.parametrize("more", [{"embedding_learning_rate_factor": 0}, {"frozen_blocks": 1}], ids=str)
def test_what_is_frozen_from_now_on_needs_no_state(more, make_model):
    model = make_model()
    optimizers = optimizers_of(model, arguments())
    set_gradients(model, seed=0)
    update_all(model, optimizers, 0)
    others = optimizers_of(make_model(), arguments(**more))
    before = optimizers.state(0)
    others.load_state(0, before)
    left = {name: tensor for name, tensor in before.items() if name.rsplit("/", 1)[0] in others.names[0]}
    assert 0 < len(left) < len(before)
    assert others.state(0).keys() == left.keys()
    assert all(torch.equal(tensor, left[name]) for name, tensor in others.state(0).items())


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


# --- kinds of optimizers and schedules, values of each block


def test_amsgrad_may_be_switched_on_when_a_run_goes_on(make_model):
    model = make_model()
    before, after = (optimizers_of(model, arguments(optim_args={"amsgrad": on})) for on in (False, True))
    set_gradients(model, seed=0)
    update_all(model, before, 0)
    for k in range(model.config.num_blocks):
        after.load_state(k, before.state(k))
    set_gradients(model, seed=1)
    update_all(model, after, 1)
    assert all("max_exp_avg_sq" in " ".join(after.state(k)) for k in range(model.config.num_blocks))


@pytest.mark.parametrize(("name", "value"), [("min_lr", 1e-2), ("lr_end", 1e-2)])
def test_a_schedule_does_not_end_above_its_peak(name, value):
    kind = "polynomial" if name == "lr_end" else "cosine_with_min_lr"
    given = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": {name: value}}
    with pytest.raises(ValueError, match=rf"{name} is above the learning rate, 0\.001"):
        make_schedule(arguments(learning_rate=1e-3, **given), 100)
    args = arguments(model_name_or_path="a/model", **given)
    assert args.learning_rate is None  # that of the model is not known yet
    make_schedule(args, 100)


@pytest.mark.parametrize(
    ("optim", "optim_args", "theirs"),
    [
        ("adam", {}, lambda p: torch.optim.Adam(p, lr=0.01)),
        ("sgd", {"momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)),
        ("adafactor", {}, lambda p: torch.optim.Adafactor(p, lr=0.01)),
    ],
)
def test_each_optimizer_is_that_of_torch_and_continues_from_its_state(optim, optim_args, theirs, make_model):
    args = arguments(optim=optim, optim_args=optim_args, learning_rate=0.01, max_grad_norm=0)
    ours, reference = make_model(seed=1), make_model(seed=1)
    optimizers = optimizers_of(ours, args)
    reference_optimizer = theirs(reference.parameters())
    for step in range(4):
        if step == 2:  # another process takes over
            state = {k: {n: t.clone() for n, t in optimizers.state(k).items()} for k in range(3)}
            optimizers = optimizers_of(ours, args)
            for k in range(3):
                optimizers.load_state(k, state[k])
        for model in (ours, reference):
            set_gradients(model, seed=step)
        update_all(ours, optimizers, step)
        reference_optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), name


def test_every_schedule_of_transformers_can_be_named():
    from transformers import SchedulerType

    from hf_al.ranges import SCHEDULES

    assert set(SCHEDULES) == {kind.value for kind in SchedulerType} - {"greedy"}  # greedy keeps a state of its own
    needed = {"warmup_stable_decay": {"num_decay_steps": 5}, "cosine_with_min_lr": {"min_lr_rate": 0.1},
              "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1}}  # fmt: skip
    for kind in SCHEDULES:
        args = arguments(lr_scheduler_type=kind, lr_scheduler_kwargs=needed.get(kind, {}), warmup_steps=3)
        factor = make_schedule(args, 20)
        assert all(0 < factor(step) <= 1 for step in range(20)), kind


def test_schedule_values_are_passed_on():
    args = arguments(lr_scheduler_type="polynomial", lr_scheduler_kwargs="power=2,lr_end=0")
    assert make_schedule(args, 10)(5) == pytest.approx(0.25)


def test_the_last_rate_of_a_schedule_is_the_one_that_was_asked_for(make_model):
    """By transformers' names, whatever the peak is; the label side ends at the same share of its own."""
    for kind, given in (("cosine_with_min_lr", "min_lr=1e-4"), ("polynomial", "lr_end=1e-4")):
        args = arguments(lr_scheduler_type=kind, lr_scheduler_kwargs=given, learning_rate=1e-2)
        assert 1e-2 * make_schedule(args, 20)(20) == pytest.approx(1e-4, rel=1e-6)
    plateau = arguments(lr_scheduler_type="reduce_lr_on_plateau", learning_rate=1e-2,
                        lr_scheduler_kwargs="min_lr=5e-3,patience=0,factor=0.1")  # fmt: skip
    optimizers = optimizers_of(make_model(), plateau)
    for _ in range(4):
        optimizers.observe(dict.fromkeys(range(3), 0.5))
    assert optimizers.learning_rates(9) == pytest.approx(dict.fromkeys(range(3), 5e-3))


@pytest.mark.parametrize(
    "values",
    [
        {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"speed": 3}},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"mode": "max"}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-5}, "learning_rate": [1e-3] * 3},
        {"lr_scheduler_type": "warmup_stable_decay"},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"factor": 2.0}},
    ],
)
def test_values_that_a_schedule_does_not_take_are_refused(values):
    with pytest.raises(ValueError, match=r"Expected lr_scheduler_kwargs of .*, got .*says? what each schedule takes"):
        make_schedule(arguments(**values), 10)


def test_values_that_an_optimizer_does_not_take_are_refused(make_model):
    with pytest.raises(ValueError, match=r"Expected optim_args of torch's SGD, got .*speed"):
        optimizers_of(make_model(), arguments(optim="sgd", optim_args="speed=3"))
    with pytest.raises(ValueError, match=r"Expected optim_args of torch's AdamW, got .*foreach"):
        optimizers_of(make_model(), arguments(optim_args="foreach=true"))
    with pytest.raises(ValueError, match=r"weight_decay has a flag of its own, --weight_decay"):
        optimizers_of(make_model(), arguments(optim_args="weight_decay=0.5"))


def test_each_block_and_side_has_its_own_values(make_model):
    args = arguments(
        learning_rate=[0.1, 0.2, 0.3], target_learning_rate_factor=[1, 2, 3], optim="sgd", max_grad_norm=0,
        weight_decay=[0.0, 0.5, 0.5], target_weight_decay=[0.0, 0.0, 1.0],
    )  # fmt: skip
    model = make_model("al_transformer", embedding_block=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
            parameter.grad = torch.full_like(parameter, 0.01)
    optimizers = optimizers_of(model, args)
    update_all(model, optimizers)
    for name, parameter in model.named_parameters():
        k, part = int(name.split(".")[2]), name.split(".")[3]
        label = part in LABEL_SIDE
        rate = [0.1, 0.2, 0.3][k] * ([1, 2, 3][k] if label else 1)
        decay = ([0.0, 0.0, 1.0] if label else [0.0, 0.5, 0.5])[k]
        decay = decay if parameter.ndim > 1 and "word_embeddings" not in name else 0.0
        assert parameter.flatten()[-1].item() == pytest.approx(1 - rate * (0.01 + decay)), name
    assert optimizers.learning_rates(0) == pytest.approx({0: 0.1, 1: 0.2, 2: 0.3})


def test_clipping_limits_may_differ_by_block(make_model):
    model = make_model()
    optimizers = optimizers_of(model, arguments(optim="sgd", learning_rate=1.0, max_grad_norm=[0.5, 0, 0.1]))
    before = copies(model)
    set_gradients(model, scale=1.0)
    norms = update_all(model, optimizers)
    moved = {
        k: math.sqrt(
            sum(
                float((p.detach() - before[n]).square().sum())
                for n, p in model.named_parameters()
                if f".blocks.{k}." in n
            )
        )
        for k in range(3)
    }
    assert moved == pytest.approx({0: 0.5, 1: norms[1], 2: 0.1}, rel=1e-4)


# --- plateau


def test_each_block_slows_down_by_its_own_exit(make_model):
    args = arguments(lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs="factor=0.5,patience=0",
                     learning_rate=0.1)  # fmt: skip
    optimizers = optimizers_of(make_model(), args)
    for metrics in ({0: 0.5, 1: 0.5, 2: 0.5}, {0: 0.6, 1: 0.5, 2: 0.4}, {0: 0.7, 1: 0.6, 2: 0.4}):
        optimizers.observe(metrics)
    assert optimizers.learning_rates(7) == pytest.approx({0: 0.1, 1: 0.05, 2: 0.025})


def test_a_smaller_loss_is_a_gain_for_the_plateau(make_model):
    args = arguments(lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs="patience=0", learning_rate=1.0)
    model = make_model()
    optimizers = BlockOptimizers(dict(enumerate(model.model.blocks)), model.config.units, args, 10, False)
    for value in (3.0, 2.0, 1.0):
        optimizers.observe(dict.fromkeys(range(3), value))
    assert set(optimizers.learning_rates(0).values()) == {1.0}


def test_a_plateau_is_remembered_with_its_block(make_model):
    args = arguments(lr_scheduler_type="reduce_lr_on_plateau", lr_scheduler_kwargs="patience=1", learning_rate=1.0)
    first, second = optimizers_of(make_model(), args), optimizers_of(make_model(), args)
    for value in (0.5, 0.4):
        first.observe(dict.fromkeys(range(3), value))
    for k in range(3):
        second.load_state(k, first.state(k))
    for optimizers in (first, second):
        optimizers.observe(dict.fromkeys(range(3), 0.4))
    assert first.learning_rates(0) == second.learning_rates(0) == pytest.approx({0: 0.1, 1: 0.1, 2: 0.1})


# --- sparse embedding rows


def step_on(model, optimizers, batch, step=0) -> None:
    losses = model(**batch).local_losses or [model(**batch).loss]
    sum(losses).backward()
    for unit in model.config.units:
        optimizers.update(unit, step)


@pytest.mark.parametrize("objective", ["al_ce", "backprop"])
@pytest.mark.parametrize("embedding_block", [True, False])
def test_sparse_adam_touches_the_rows_of_the_batch_only(objective, embedding_block, make_model, make_batch):
    model = make_model(objective=objective, embedding_block=embedding_block)
    args = arguments(embedding_optimizer="sparse_adam", learning_rate=0.1)
    optimizers = optimizers_of(model, args)
    before = copies(model)["model.blocks.0.encode.embeddings.word_embeddings.weight"]
    batches = [make_batch(rows=2, tokens=4, seed=s) for s in (1, 2)]
    for step, batch in enumerate(batches):
        step_on(model, optimizers, batch, step)
    touched = {int(i) for batch in batches for i in batch["input_ids"].unique()} - {0}
    rows = model.get_input_embeddings().weight
    moved = {int(i) for i in (rows != before).any(1).nonzero()}
    assert moved == touched


def test_the_first_sparse_step_is_that_of_adam(make_model, make_batch):
    """Rows of the batch get what dense Adam gives them; clipping counts the same norm."""
    after = []
    for kind in ("same", "sparse_adam"):
        model = make_model(hidden_dropout_prob=0, embedding_dropout_prob=0, bridge_dropout_prob=0)
        args = arguments(embedding_optimizer=kind, learning_rate=0.1, max_grad_norm=0.01, adam_epsilon=1e-14)
        step_on(model, optimizers_of(model, args), make_batch())
        after.append(model.get_input_embeddings().weight.detach())
    assert torch.allclose(after[0], after[1], atol=1e-5)


def test_sparse_state_continues(make_model, make_batch):
    args = arguments(embedding_optimizer="sparse_adam", learning_rate=0.01)
    model, other = make_model().eval(), make_model(seed=3).eval()
    model.train(), other.train()
    for m in (model, other):
        for module in m.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    optimizers = optimizers_of(model, args)
    for step in range(3):
        step_on(model, optimizers, make_batch(seed=step), step)
    other.load_state_dict(model.state_dict())
    others = optimizers_of(other, args)
    for k in range(3):
        others.load_state(k, {n: t.clone() for n, t in optimizers.state(k).items()})
    for m, o in ((model, optimizers), (other, others)):
        step_on(m, o, make_batch(seed=9), 3)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_released_models_have_dense_gradients_again(make_model, make_batch):
    model = make_model()
    optimizers = optimizers_of(model, arguments(embedding_optimizer="sparse_adam", embedding_learning_rate_factor=0.5))
    optimizers.release()
    model(**make_batch()).loss.backward()
    assert not model.get_input_embeddings().weight.grad.is_sparse
    frozen = make_model()
    optimizers_of(frozen, arguments(embedding_learning_rate_factor=0)).release()
    assert frozen.get_input_embeddings().weight.requires_grad
