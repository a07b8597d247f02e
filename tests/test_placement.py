"""Which blocks go where."""

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hf_al
from hf_al.parallel.placement import balanced_cuts, place
from hf_al.training.measure import unit_seconds

times = st.lists(st.floats(0.01, 10), min_size=1, max_size=7)


def slowest(cuts, seconds, wire):
    def stage(a, b):
        return sum(seconds[a:b]) + (wire[a - 1] if a else 0) + (wire[b - 1] if b < len(seconds) else 0)

    return max(stage(a, b) for a, b in pairwise(cuts))


@given(times, st.integers(1, 7), st.floats(0, 3))
def test_no_other_split_has_a_faster_slowest_stage(seconds, stages, wire):
    stages, wires = min(stages, len(seconds)), [wire] * len(seconds)
    cuts = balanced_cuts(seconds, stages, wires)
    assert len(cuts) == stages + 1
    others = [[0, *inner, len(seconds)] for inner in combinations(range(1, len(seconds)), stages - 1)]
    assert slowest(cuts, seconds, wires) == min(slowest(other, seconds, wires) for other in others)


@given(st.integers(1, 12), st.data(), st.sampled_from(["equal", "balanced"]))
def test_every_block_is_placed_once_and_in_order(blocks, data, how):
    stages = data.draw(st.integers(1, blocks))
    seconds = data.draw(st.lists(st.floats(0.01, 5), min_size=blocks, max_size=blocks))
    placement = place([range(k, k + 1) for k in range(blocks)], stages, how, seconds)
    assert [k for s in range(stages) for k in placement.blocks(s)] == list(range(blocks))
    assert all(placement.blocks(s) for s in range(stages))


def test_a_list_places_as_it_says():
    placement = place([range(k, k + 1) for k in range(6)], 3, "0-2,3,4-5")
    assert [placement.blocks(s) for s in range(3)] == [[0, 1, 2], [3], [4, 5]]


@pytest.mark.parametrize(
    "text", ["0-1,3-5", "0-2,2-5", "0-5", "0-2,3-6", "1-2,3-5", "3-5,0-2", "fast", "0-2,,3-5", "0-1-2,3-5", "2-0,3-5"]
)
def test_a_list_with_a_gap_is_refused(text):
    with pytest.raises(ValueError, match=r"Expected placement as .* the blocks 0 to 5 of 2 stages.*example: 0-2,3-5"):
        place([range(k, k + 1) for k in range(6)], 2, text)


@pytest.mark.parametrize("model_type", ["al_lstm", "al_transformer"])
def test_timing_leaves_model_and_generator_as_they_were(model_type, make_model):
    model = make_model(model_type)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    args = hf_al.TrainingArguments(per_device_train_batch_size=4, embedding_optimizer="sparse_adam")
    seconds, copies = unit_seconds(model, args, torch.device("cpu"), torch.tensor([3, 5, 9]).numpy())
    assert len(seconds) == len(copies) == 3
    assert all(value > 0 for value in seconds)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
