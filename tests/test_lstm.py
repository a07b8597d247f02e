"""The LSTM for CPUs: torch's results, and no work for gradients that are not needed."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hf_al.modeling.lstm import BidirectionalLSTM, bidirectional, packed, sort_by_length, traceable


def make(width=6, hidden=5, dtype=torch.float64) -> BidirectionalLSTM:
    torch.manual_seed(0)
    return BidirectionalLSTM(width, hidden).to(dtype)


def texts(lengths, width=6, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(len(lengths), max(lengths), width, dtype=dtype, generator=generator)
    return x, torch.tensor(lengths)


def outcome(run, lstm, x, lengths, state):
    """Outputs, and the gradients of everything that went in, under a loss that reads every output."""
    x = x.clone().requires_grad_(True)
    state = None if state is None else tuple(s.clone().requires_grad_(True) for s in state)
    lstm.zero_grad()
    y, (h, c) = run(lstm, x, lengths, state)
    (y.square().sum() + h.pow(3).sum() + c.sin().sum()).backward()
    inputs = [x, *(state or ())]
    return [y, h, c, *(t.grad for t in inputs), *(p.grad.clone() for p in lstm.parameters())]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    with_state=st.booleans(),
    run=st.sampled_from([bidirectional, traceable]),
)
def test_results_and_gradients_are_those_of_torch(lengths, with_state, run):
    lstm = make()
    x, n = texts(lengths)
    generator = torch.Generator().manual_seed(2)
    shape = (2, len(lengths), 5)
    state = tuple(torch.randn(shape, dtype=x.dtype, generator=generator) for _ in "hc") if with_state else None
    expected = outcome(packed, lstm, x, sort_by_length(n, x.device), state)
    for ours, theirs in zip(outcome(run, lstm, x, n, state), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-11)


def test_no_two_parameters_share_a_gradient():
    """Clipping scales gradients in place: a shared one would be scaled twice."""
    lstm = make()
    x, n = texts([3, 2])
    bidirectional(lstm, x, n)[0].sum().backward()
    spans = sorted((p.grad.data_ptr(), p.grad.data_ptr() + p.grad.nbytes) for p in lstm.parameters())
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_an_input_that_needs_no_gradient_costs_none():
    lstm = make(width=64, hidden=8, dtype=torch.float32)
    x, n = texts([12, 12], width=64, dtype=torch.float32)
    flops = []
    for wanted in (True, False):
        given_ = x.clone().requires_grad_(wanted)
        with FlopCounterMode(display=False) as counter:
            bidirectional(lstm, given_, n)[0].sum().backward()
        flops.append(counter.get_total_flops())
    input_gradient = 2 * 2 * 24 * 32 * 64  # directions, multiply and add, tokens, gates, width
    assert flops[0] - flops[1] == input_gradient


def test_autocast_computes_in_its_type():
    lstm = make(dtype=torch.float32)
    x, n = texts([5, 3], dtype=torch.float32)
    exact, _ = bidirectional(lstm, x, n)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, _ = bidirectional(lstm, x, n)
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(exact, rounded.float(), atol=0.02)
    rounded.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in lstm.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_padding_is_zero_and_changes_nothing(training):
    lstm = make().train(training)
    x, n = texts([4, 2])
    longer = torch.cat([x, torch.full((2, 3, 6), 1e3, dtype=x.dtype)], 1)
    y, state = bidirectional(lstm, x, n)
    z, other = bidirectional(lstm, longer, n)
    assert torch.allclose(z[:, :4], y)
    assert not z[:, 4:].any()
    assert not y[1, 2:].any()
    assert all(torch.allclose(a, b) for a, b in zip(state, other, strict=True))
