"""Each objective against a few lines of plain arithmetic, written from the equations and not from the code."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, OBJECTIVES

from hf_al.modeling.blocks import walk
from hf_al.modeling.objectives import label_loss, unstandardise

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "embedding_dropout_prob": 0.0, "bridge_dropout_prob": 0.0}
ACTIVATIONS = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "gelu": F.gelu,
    "layer_norm": lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
    "identity": lambda x: x,
}
PROBLEMS = {
    "single_label": {},
    "weighted": {"class_weights": [0.5, 2.0, 1.0]},
    "smoothed": {"label_smoothing": 0.2},
    "weighted_and_smoothed": {"class_weights": [0.5, 2.0, 1.0], "label_smoothing": 0.2},
    "multi_label": {"problem_type": "multi_label_classification"},
    "multi_label_weighted": {"problem_type": "multi_label_classification", "class_weights": [0.5, 2.0, 1.0]},
    "regression": {
        "problem_type": "regression", "num_labels": 2, "label_mean": [10.0, -1.0], "label_deviation": [4.0, 0.5],
    },
}  # fmt: skip


@pytest.fixture
def make_still_model(make_model):
    """A model without dropout in training mode."""

    def make(model_type: str = "al_lstm", **config):
        attention = {"attention_probs_dropout_prob": 0.0} if model_type == "al_transformer" else {}
        return make_model(model_type, **NO_DROPOUT, **attention, **config).train()

    return make


def labels_of(problem: str) -> torch.Tensor:
    if problem == "regression":
        return torch.tensor([[12.0, -1.5], [8.0, 0.0], [10.0, -1.0], [3.0, 2.0]])
    if problem.startswith("multi_label"):
        return torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])
    return torch.tensor([0, 2, 1, 1])


def class_loss(logits: torch.Tensor, labels: torch.Tensor, problem: str) -> torch.Tensor:
    """The loss of logits against labels, by the definition of each problem type; the mean over the examples."""
    config = PROBLEMS[problem]
    weights = torch.tensor(config.get("class_weights", [1.0, 1.0, 1.0]))
    if problem == "regression":
        standardised = (labels - torch.tensor([10.0, -1.0])) / torch.tensor([4.0, 0.5])
        return ((logits - standardised) ** 2).mean()
    if problem.startswith("multi_label"):
        p = logits.sigmoid()
        return -(weights * labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    one_hot = torch.eye(3)[labels]
    share = config.get("label_smoothing", 0.0)
    target = (1 - share) * one_hot + share / 3
    return -(weights * target * logits.log_softmax(-1)).sum(-1).mean()


def first_target(labels: torch.Tensor, problem: str) -> torch.Tensor:
    if problem == "regression":
        return (labels - torch.tensor([10.0, -1.0])) / torch.tensor([4.0, 0.5])
    return labels if problem.startswith("multi_label") else torch.eye(3)[labels]


def linear(layer, x: torch.Tensor) -> torch.Tensor:
    return x @ layer.weight.T + layer.bias


def bridged(model, k: int, hidden: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """bridge_k(mean over the text of s_k)."""
    weights = mask[..., None].float()
    x = (hidden[k] * weights).sum(1) / weights.sum(1)
    bridge = model.model.blocks[k].bridge
    if bridge.norm is not None:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = x * bridge.norm.weight + bridge.norm.bias
    for layer in bridge.layers:
        x = ACTIVATIONS[model.config.bridge_activation](linear(layer, x))
    return x


def decoded(model, k: int, code: torch.Tensor) -> torch.Tensor:
    """Logits from the code of block k: the decoders k .. 0, no activation after the last one."""
    activation = ACTIVATIONS[model.config.label_activation]
    for j in range(k, -1, -1):
        code = linear(model.model.blocks[j].decode_target, code)
        code = activation(code) if j else code
    return code


def distance(a: torch.Tensor, b: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "cosine":
        return (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)).clamp(min=1e-8)).mean()
    return ((a - b) ** 2).mean()


@torch.no_grad()
def expected_losses(model, batch: dict, labels: torch.Tensor, problem: str) -> list[dict[str, torch.Tensor]]:
    """A_k, R_k and the loss of the exit for every block."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = copy.deepcopy(model).eval()(**inputs, output_hidden_states=True).hidden_states
    activation = ACTIVATIONS[model.config.label_activation]
    target, losses = first_target(labels, problem), []
    for k, block in enumerate(model.model.blocks):
        guess = bridged(model, k, hidden, batch["attention_mask"])
        if model.config.objective == "local_ce":
            losses.append({"exit": class_loss(linear(block.decode_target, guess), labels, problem)})
            continue
        code = activation(linear(block.encode_target, target))
        back = linear(block.decode_target, code)
        losses.append(
            {
                "associated": distance(guess, code, model.config.associated_loss),
                "reconstruction": ((activation(back) - target) ** 2).mean() if k else class_loss(back, labels, problem),
                "exit": class_loss(decoded(model, k, guess), labels, problem),
            }
        )
        target = code
    return losses


def named_losses(model, batch: dict) -> list[dict[str, torch.Tensor]]:
    inputs = model.model.prepare_inputs(**batch)
    boundary = model.model.initial_boundary(inputs["labels"])
    return [out.losses for _, out in walk(model.model.blocks, boundary, inputs, learning=True)]


# --- the losses


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("associated_loss", ["mse", "cosine"])
@pytest.mark.parametrize("objective", ["associated", "al_ce"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_losses_follow_the_equations(model_type, objective, associated_loss, problem, make_still_model, make_batch):
    model = make_still_model(model_type, objective=objective, associated_loss=associated_loss, **PROBLEMS[problem])
    batch = {**make_batch(), "labels": labels_of(problem)}
    expected = expected_losses(model, batch, batch["labels"], problem)
    local = model(**batch).local_losses
    for got, total, wanted in zip(named_losses(model, batch), local, expected, strict=True):
        if objective == "associated":
            wanted.pop("exit")
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(got[name].detach(), value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(total.detach(), sum(wanted.values()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_local_ce_is_the_loss_of_a_head_of_its_own(model_type, problem, make_still_model, make_batch):
    model = make_still_model(model_type, objective="local_ce", **PROBLEMS[problem])
    batch = {**make_batch(), "labels": labels_of(problem)}
    expected = expected_losses(model, batch, batch["labels"], problem)
    for got, wanted in zip(model(**batch).local_losses, expected, strict=True):
        torch.testing.assert_close(got.detach(), wanted["exit"], rtol=1e-5, atol=1e-6)
    assert all(block.encode_target is None for block in model.model.blocks)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_codes_and_bridges_use_the_activation_of_the_config(activation, make_still_model, make_batch):
    model = make_still_model(label_activation=activation, bridge_activation=activation, bridge_layers=2)
    batch = make_batch()
    expected = expected_losses(model, batch, batch["labels"], "single_label")
    for got, wanted in zip(named_losses(model, batch), expected, strict=True):
        for name in got:
            torch.testing.assert_close(got[name].detach(), wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["associated", "al_ce"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_exits_are_read_through_the_decoders_of_all_blocks_before(model_type, objective, make_still_model, make_batch):
    model = make_still_model(model_type, objective=objective).eval()
    batch = make_batch()
    with torch.no_grad():
        output = model(**batch, output_exit_logits=True, output_hidden_states=True)
        for k, logits in enumerate(output.exit_logits):
            guess = bridged(model, k, output.hidden_states, batch["attention_mask"])
            torch.testing.assert_close(logits, decoded(model, k, guess), rtol=1e-5, atol=1e-6)


# --- al_ce


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_al_ce_gives_the_gradient_of_its_exit_to_encode_and_bridge_only(model_type, make_still_model, make_batch):
    """A plain associated model differs by exactly the gradient of the exit's loss, decoders held constant."""
    batch = make_batch()
    gradients = {}
    for objective in ("associated", "al_ce"):
        model = make_still_model(model_type, objective=objective)
        model(**batch).loss.backward()
        gradients[objective] = {name: p.grad for name, p in model.named_parameters()}
    model = make_still_model(model_type, objective="al_ce")
    exits = named_losses(model, batch)
    parameters = dict(model.named_parameters())
    own = torch.autograd.grad(sum(losses["exit"] for losses in exits), list(parameters.values()), allow_unused=True)
    for (name, plain), extra in zip(gradients["associated"].items(), own, strict=True):
        both = gradients["al_ce"][name]
        if ".encode_target." in name or ".decode_target." in name:
            assert extra is None
            assert torch.equal(both, plain), name
        else:
            assert bool(extra.any()), name
            torch.testing.assert_close(both, plain + extra, rtol=1e-4, atol=1e-6)


def test_al_ce_reads_its_exit_through_the_decoders_from_before_the_update(make_still_model, make_batch):
    model = make_still_model(objective="al_ce")
    batch = make_batch()
    expected = [float(losses["exit"]) for losses in expected_losses(model, batch, batch["labels"], "single_label")]
    inputs = model.model.prepare_inputs(**batch)
    boundary = model.model.initial_boundary(inputs["labels"])
    for block, out in walk(model.model.blocks, boundary, inputs, learning=True):
        assert out.losses["exit"].item() == pytest.approx(expected[block.index], rel=1e-5)
        with torch.no_grad():
            for parameter in block.parameters():
                parameter.add_(1.0)


# --- backprop


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_backprop_is_one_loss_at_the_last_exit_of_the_same_network(model_type, problem, make_still_model, make_batch):
    model = make_still_model(model_type, objective="backprop", **PROBLEMS[problem])
    batch = {**make_batch(), "labels": labels_of(problem)}
    expected = expected_losses(model, batch, batch["labels"], problem)[-1]["exit"]
    output = model(**batch)
    torch.testing.assert_close(output.loss.detach(), expected, rtol=1e-5, atol=1e-6)
    if problem == "single_label":
        exit_loss = model.eval()(**batch).loss
        torch.testing.assert_close(output.loss.detach(), exit_loss.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_backprop_has_the_gradients_of_the_network_without_cuts(model_type, make_still_model, make_batch):
    model = make_still_model(model_type, objective="backprop")
    batch = make_batch()
    model(**batch).loss.backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    hidden = model.eval()(**inputs, output_hidden_states=True).hidden_states
    guess = bridged(model, 2, hidden, batch["attention_mask"])
    F.cross_entropy(decoded(model, 2, guess), batch["labels"]).backward()
    rows = model.get_input_embeddings().weight
    assert any(bool(got[name].any()) for name, p in model.named_parameters() if p is rows)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_all_objectives_but_local_ce_have_the_same_parameters(make_model):
    """The baseline is the same network, and with the same seed it starts from the same weights."""
    states = {objective: make_model(objective=objective).state_dict() for objective in OBJECTIVES}
    for objective in ("al_ce", "backprop"):
        assert states[objective].keys() == states["associated"].keys()
        assert all(torch.equal(states[objective][name], tensor) for name, tensor in states["associated"].items())


# --- objectives that compare examples with each other


COMPARING = ("supcon", "deinfo", "predsim")


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    length = (a.norm() * b.norm()).item()
    return (a @ b).item() / length if length else 0.0


def likeness(a: torch.Tensor, b: torch.Tensor, problem: str) -> float:
    if problem.startswith("multi_label") and not a.any() and not b.any():
        return 1.0  # neither has a label: so they agree
    return math.exp(-((a - b) ** 2).sum().item() / 2) if problem == "regression" else cosine(a, b)


def compared(objective: str, guess: torch.Tensor, target: torch.Tensor, problem: str) -> dict[str, float]:
    """The losses of a block from what its bridge says (N, V) and t_0 (N, C), text by text."""
    rows = range(len(guess))
    alike = {(i, j): likeness(target[i], target[j], problem) for i in rows for j in rows}
    if objective == "supcon":
        total = 0.0
        for i in rows:
            powers = {j: math.exp(cosine(guess[i], guess[j]) / 0.1) for j in rows if j != i}
            weight = sum(alike[i, j] for j in powers)
            shares = sum(alike[i, j] * math.log(powers[j] / sum(powers.values())) for j in powers)
            total -= shares / weight if weight else 0.0
        return {"contrast": total / len(guess)}
    if objective == "predsim":
        guess = guess - guess.mean(1, keepdim=True)
        squares = [(cosine(guess[i], guess[j]) - value) ** 2 for (i, j), value in alike.items()]
        return {"similarity": 0.99 * sum(squares) / len(squares)}
    covariance = torch.cov(guess.T)
    width = len(covariance)
    return {
        "variance": sum(max(0.0, 1 - math.sqrt(covariance[d, d].item() + 1e-4)) for d in range(width)) / width,
        "invariance": sum((cosine(guess[i], guess[j]) - alike[i, j]) ** 2 for i in rows for j in rows)
        / len(guess) ** 2,
        "covariance": sum(covariance[d, e].item() ** 2 for d in range(width) for e in range(width) if d != e) / width,
    }


def test_an_answer_in_half_precision_is_as_exact_as_its_standardised_value():
    config = SimpleNamespace(label_mean=[1990.0], label_deviation=[10.0])
    values = torch.linspace(-2, 2, 9)[:, None]
    for dtype, mean in ((torch.bfloat16, 1990.0), (torch.float16, 250_000.0)):
        config.label_mean = [mean]
        found = unstandardise(values.to(dtype), config)
        assert torch.allclose(found, mean + 10 * values, rtol=0, atol=0.1)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("objective", COMPARING)
def test_texts_are_compared_as_the_papers_say(objective, problem, make_still_model, make_batch):
    model = make_still_model(objective=objective, **PROBLEMS[problem])
    batch = {**make_batch(), "labels": labels_of(problem)}
    exits = {"supcon": 1.0, "deinfo": 0.001, "predsim": 0.01}
    with torch.no_grad():
        hidden = copy.deepcopy(model).eval()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        ).hidden_states  # fmt: skip
        for k, losses in enumerate(named_losses(model, batch)):
            guess = bridged(model, k, hidden, batch["attention_mask"])
            head = class_loss(linear(model.model.blocks[k].decode_target, guess), batch["labels"], problem)
            wanted = {
                **compared(objective, guess, first_target(batch["labels"], problem), problem),
                "exit": exits[objective] * head,
            }
            assert losses.keys() == wanted.keys()
            for name, value in wanted.items():
                assert losses[name].item() == pytest.approx(float(value), rel=1e-4, abs=1e-6), (k, name)


def test_only_the_last_head_of_supcon_reaches_its_bridge(make_still_model, make_batch):
    model = make_still_model(objective="supcon")
    for k, losses in enumerate(named_losses(model, make_batch())):
        bridge = model.model.blocks[k].bridge.layers[0].weight
        (gradient,) = torch.autograd.grad(losses["exit"], bridge, allow_unused=True, retain_graph=True)
        assert (gradient is not None) == (k == len(model.model.blocks) - 1)
        assert torch.autograd.grad(losses["contrast"], bridge)[0].abs().sum() > 0


@pytest.mark.parametrize("objective", COMPARING)
def test_a_text_without_a_partner_gives_finite_losses(objective, make_model, make_batch):
    model = make_model(objective=objective)
    batch = {name: tensor[:1] for name, tensor in make_batch().items()}
    model(**batch).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


# --- weights of examples


@pytest.mark.parametrize("objective", ["associated", "al_ce", "local_ce", "backprop"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_loss_of_a_batch_is_the_weighted_mean_of_its_parts(problem, objective, make_still_model, make_batch):
    model = make_still_model(objective=objective, **PROBLEMS[problem])
    batch = {**make_batch(), "labels": labels_of(problem)}
    parts = [{name: tensor[rows] for name, tensor in batch.items()} for rows in (slice(0, 1), slice(1, 4))]
    with torch.no_grad():
        whole = model(**batch).loss
        pieces = sum(len(part["labels"]) / 4 * model(**part).loss for part in parts)
    torch.testing.assert_close(whole, pieces, rtol=1e-5, atol=1e-6)


def test_class_weights_are_not_divided_out_again(make_model):
    """PyTorch divides by the sum of the weights, so that micro-batches of rare classes would count for too much."""
    config = make_model(class_weights=[0.5, 2.0, 1.0]).config
    logits, labels = torch.zeros(1, 3), torch.tensor([1])
    assert label_loss(logits, labels, config).item() == pytest.approx(2.0 * torch.tensor(3.0).log().item())


@pytest.mark.parametrize("labels", [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[1.0], [2.0], [3.0]])])
def test_regression_of_one_value_takes_flat_labels_and_columns(labels, make_model):
    config = make_model(num_labels=1, label_mean=[2.0], label_deviation=[0.5]).config
    assert label_loss(torch.zeros(3, 1), labels, config).item() == pytest.approx(8 / 3)


def test_training_can_follow_what_inference_mode_has_computed(make_model, make_batch):
    model, batch = make_model(class_weights=[1.0, 2.0, 3.0]), make_batch()
    with torch.inference_mode():
        model(**batch)
    model(**batch).loss.backward()
    assert model.get_input_embeddings().weight.grad is not None
