"""Timetables: nothing is used before it exists, no stage does two things at once, and known totals come out."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_al.parallel import schedule

PIPELINES = [schedule.gpipe, schedule.one_f_one_b, schedule.zero_bubble]
counts = st.integers(1, 5)
durations = st.floats(0.01, 10)


def same(seconds):
    return lambda stage, task: seconds[task.kind]


@given(counts, st.integers(1, 9), st.integers(1, 3), durations, durations)
def test_the_stream_takes_one_slot_for_each_batch_and_stage(stages, batches, parts, forward, local):
    spans = schedule.simulate(schedule.stream(stages, batches, parts), same({"forward": forward, "local": local}))
    total = spans[-1][-1].end
    assert total == pytest.approx(parts * batches * (forward + local) + (stages - 1) * forward)


@given(counts, st.integers(1, 9), durations, durations, durations)
def test_gpipe_and_1f1b_take_the_time_of_their_bubble(stages, parts, forward, backward, update):
    seconds = same({"forward": forward, "backward": backward, "update": update})
    for make in (schedule.gpipe, schedule.one_f_one_b):
        spans = schedule.simulate(make(stages, 1, parts), seconds)
        assert spans[0][-1].end == pytest.approx((parts + stages - 1) * (forward + backward) + update)


@given(st.integers(2, 5), st.integers(2, 9))
def test_zero_bubble_fills_gaps_with_gradients_of_weights(stages, parts):
    whole = same({"forward": 1.0, "backward": 2.0, "update": 0.0})
    halves = same({"forward": 1.0, "backward": 1.0, "weights": 1.0, "update": 0.0})
    plain = schedule.simulate(schedule.one_f_one_b(stages, 1, parts), whole)
    filled = schedule.simulate(schedule.zero_bubble(stages, 1, parts), halves)
    ends = [max(row[-1].end for row in spans) for spans in (plain, filled)]
    assert 3 * parts <= ends[1] < ends[0]


@given(
    st.sampled_from([schedule.stream, *PIPELINES]),
    counts,
    st.integers(1, 3),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
    st.floats(0, 5),
    st.floats(0, 2),
)
def test_nothing_is_used_before_it_has_arrived(make, stages, batches, parts, random, sending, latency):
    seconds: dict = {}
    orders = make(stages, batches, parts)
    spans = schedule.simulate(
        orders,
        lambda stage, task: seconds.setdefault((stage, task), random.uniform(0.01, 5)),
        lambda stage, task: sending,
        latency,
    )
    at = {(s, span.task): span for s, row in enumerate(spans) for span in row}
    assert sorted(at) == sorted((s, task) for s, order in enumerate(orders) for task in order), "each once"
    assert all(span.end == pytest.approx(span.start + seconds[key]) for key, span in at.items())
    if make is schedule.zero_bubble:
        for row in spans:
            held = [{"forward": 1, "weights": -1}.get(span.task.kind, 0) for span in row]
            assert max(accumulate(held)) <= max(stages, 1)
    for row in spans:
        assert all(a.end <= b.start for a, b in pairwise(row)), "one thing at a time"
        assert [s.task.batch for s in row] == sorted(s.task.batch for s in row)
    for (stage, task), span in at.items():
        other = {"forward": stage - 1, "backward": stage + 1}.get(task.kind, -1)
        if 0 <= other < stages:
            assert span.start >= at[other, task].end + sending + latency - 1e-9
        before = {"local": "forward", "weights": "backward"}.get(task.kind)
        if before:
            assert span.start >= at[stage, task._replace(kind=before)].end
        if task.kind == "update":
            earlier = [s for s in spans[stage] if s.task.batch == task.batch and s.task != task]
            assert all(s.end <= span.start for s in earlier)


@given(counts, st.lists(durations, min_size=5, max_size=5), st.floats(0, 20))
def test_the_slowest_stage_or_link_sets_the_pace_of_the_stream(stages, seconds, sending):
    spans = schedule.simulate(
        schedule.stream(stages, 4 * stages + 8),
        lambda stage, task: seconds[stage] / 2,
        lambda stage, task: sending,
    )
    pace = max([*seconds[:stages], *([sending] if stages > 1 else [])])
    assert schedule.step_seconds(spans) == pytest.approx(pace)


@given(st.lists(durations, min_size=1, max_size=6), st.floats(0, 10))
def test_sums_of_gradients_hide_behind_the_backward_pass(backward, link):
    forward = [1.0] * len(backward)
    computing = sum(forward) + sum(backward)
    step = schedule.data_parallel(forward, backward, [link] * len(backward), 0.5)
    assert computing + link + 0.5 <= step + 1e-9
    assert step <= computing + link * len(backward) + 0.5 + 1e-9
    assert schedule.data_parallel(forward, backward, [0.0] * len(backward), 0.5) == pytest.approx(computing + 0.5)
