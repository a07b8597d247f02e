"""The batch order: every row once per epoch, the same for the same seed and epoch, little padding, resumable."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import List as ListFeature
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_al.data.batching import BatchOrder, Collator, evaluation_batches, micro_batches, token_lengths

orders = st.builds(
    lambda lengths, size, seed: BatchOrder(np.array(lengths), size, seed),
    st.lists(st.integers(1, 40), min_size=1, max_size=300),
    st.integers(1, 33),
    st.integers(0, 2**32),
)
relaxed = settings(deadline=None, max_examples=50)


def real_lengths(rows: int = 14_000) -> np.ndarray:
    """As skewed as the lengths of real texts."""
    return np.random.default_rng(0).lognormal(3, 0.6, rows).clip(2, 128).astype(int)


@given(orders, st.integers(0, 5))
@relaxed
def test_every_row_comes_exactly_once_an_epoch(order, epoch):
    batches = order.epoch(epoch)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(len(order.lengths)))
    assert len(batches) == len(order)
    assert sorted(map(len, batches))[1:] == [order.batch_size] * (len(order) - 1)


@given(orders, st.integers(0, 5))
@relaxed
def test_the_order_follows_from_seed_and_epoch_alone(order, epoch):
    np.random.seed(0)
    first = order.epoch(epoch)
    np.random.seed(1)
    again = BatchOrder(order.lengths.copy(), order.batch_size, order.seed).epoch(epoch)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@given(st.integers(0, 2**32), st.integers(0, 50))
@relaxed
def test_another_seed_or_epoch_has_another_order(seed, epoch):
    lengths = real_lengths(200)

    def rows(seed, epoch):
        return np.concatenate(BatchOrder(lengths, 16, seed).epoch(epoch)).tolist()

    orders = [rows(seed, epoch), rows(seed + 1, epoch), rows(seed, epoch + 1), rows(epoch, seed + 99)]
    assert len({tuple(order) for order in orders}) == 4


@given(orders, st.integers(0, 40), st.integers(0, 40))
@relaxed
def test_a_run_that_starts_in_the_middle_sees_the_same_batches(order, first, count):
    from_the_start = list(order.steps(0, first + count))[first:]
    resumed = list(order.steps(first, first + count))
    assert [step for step, _ in resumed] == list(range(first, first + count))
    for (a, rows), (b, again) in zip(from_the_start, resumed, strict=True):
        assert a == b
        assert np.array_equal(rows, again)


def test_steps_go_through_the_epochs():
    order = BatchOrder(real_lengths(50), 16, 3)
    steps = list(order.steps(0, 10))
    assert len(order) == 4
    for step, rows in steps:
        assert np.array_equal(rows, order.epoch(step // 4)[step % 4])


@given(st.integers(1, 100), st.integers(1, 12))
@relaxed
def test_micro_batches_are_of_equal_count_up_to_one_row(rows, parts):
    batch = np.arange(rows)[::-1]
    cut = micro_batches(batch, parts)
    sizes = [len(part.rows) for part in cut]
    assert np.array_equal(np.concatenate([part.rows for part in cut]), batch)
    assert len(cut) == min(parts, rows)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 5))
@relaxed
def test_replicas_share_a_batch_and_each_has_something_to_do(rows, parts, replicas):
    batch = np.arange(rows)
    shares = [micro_batches(batch, parts, replica, replicas) for replica in range(replicas)]
    counted = [part for share in shares for part in share if part.weight]
    assert sorted(np.concatenate([part.rows for part in counted])) == list(batch)
    assert all(part.weight == len(part.rows) / rows for part in counted)
    assert all(1 <= len(share) <= parts for share in shares)
    assert all(len(part.rows) == 1 for share in shares for part in share if not part.weight)


def padding_share(lengths, batches) -> float:
    slots = sum(len(rows) * lengths[rows].max() for rows in batches)
    return 1 - lengths.sum() / slots


@pytest.mark.parametrize("epoch", [0, 1])
def test_there_is_far_less_padding_than_in_random_order(epoch):
    lengths = real_lengths()
    rows = np.random.default_rng(1).permutation(len(lengths))
    at_random = padding_share(lengths, [rows[i : i + 32] for i in range(0, len(rows), 32)])
    ours = padding_share(lengths, BatchOrder(lengths, 32, 42).epoch(epoch))
    assert at_random > 0.4
    assert ours < at_random / 5


def test_lengths_are_mixed_over_an_epoch():
    """Not sorted from short to long: the mean lengths of neighbouring batches are unrelated."""
    lengths = real_lengths()
    means = [lengths[rows].mean() for rows in BatchOrder(lengths, 32, 42).epoch(0)]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2


def test_a_batch_of_one_epoch_is_not_a_batch_of_the_next():
    order = BatchOrder(real_lengths(), 32, 42)
    first, second = ({tuple(sorted(rows)) for rows in order.epoch(e)} for e in (0, 1))
    assert not first & second


@given(st.lists(st.integers(0, 40), min_size=1, max_size=100), st.integers(1, 20))
@relaxed
def test_evaluation_batches_hold_every_row_once_short_ones_first(lengths, size):
    lengths = np.array(lengths)
    batches = evaluation_batches(lengths, size)
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(len(lengths)))
    assert all(lengths[a].max() <= lengths[b].min() for a, b in pairwise(batches))


def split_of(texts, labels, label_feature) -> Dataset:
    features = Features({"input_ids": ListFeature(Value("int32")), "label": label_feature})
    return Dataset.from_dict({"input_ids": texts, "label": labels}, features=features)


TEXTS = [[5, 6, 7], [8], [9, 10], [11]]


def test_token_lengths_are_those_of_the_rows():
    data = split_of(TEXTS, [0, 1, 0, 1], ClassLabel(names=["a", "b"]))
    assert token_lengths(data).tolist() == [3, 1, 2, 1]
    assert token_lengths(data.select([2, 0])).tolist() == [2, 3]


def test_the_collator_pads_to_the_longest_text_of_the_batch():
    data = split_of(TEXTS, [0, 1, 0, 1], ClassLabel(names=["a", "b"]))
    batch = Collator(pad_token_id=2, num_labels=2)(data, np.array([2, 1]))
    assert batch["input_ids"].tolist() == [[9, 10], [8, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["labels"].tolist() == [0, 1]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_a_text_that_contains_the_padding_token_is_not_masked():
    data = split_of([[2, 5, 2]], [0], ClassLabel(names=["a", "b"]))
    assert Collator(2, 2)(data, np.array([0]))["attention_mask"].tolist() == [[1, 1, 1]]


def test_a_text_without_tokens_is_all_padding():
    data = split_of([[]], [0], ClassLabel(names=["a", "b"]))
    batch = Collator(2, 2)(data, np.array([0]))
    assert batch["input_ids"].tolist() == [[2]]
    assert batch["attention_mask"].tolist() == [[0]]


def test_labels_of_every_kind_become_tensors():
    rows = np.array([3, 0])
    multi = split_of(TEXTS, [[0, 2], [1], [], []], ListFeature(ClassLabel(names=["a", "b", "c"])))
    assert Collator(0, 3)(multi, rows)["labels"].tolist() == [[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]
    values = split_of(TEXTS, [0.5, 1.0, 2.0, -3.25], Value("float32"))
    labels = Collator(0, 1)(values, rows)["labels"]
    assert labels.tolist() == [-3.25, 0.5]
    assert labels.dtype == torch.float32
