"""--trace: what each process does, without gaps, and a picture of it."""

import json
import time
from itertools import pairwise

from hooks import hook

import hf_al
from hf_al.training import loop

MODEL = {"num_blocks": 3, "hidden_size": 16, "target_size": 12}


def test_laps_add_up_to_the_time_of_the_steps(few_tweets, tmp_path, monkeypatch):
    args = hf_al.TrainingArguments(
        output_dir=str(tmp_path), model=MODEL, max_steps=8, trace=8, eval_strategy="steps", eval_steps=2, threads=1,
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    clock = []
    for at in ("before", "after"):
        hook(monkeypatch, loop.Run, "_train_steps", **{at: lambda call: clock.append(time.perf_counter())})
    hf_al.train(args, few_tweets)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    laps = [event for event in spans if not event["name"].startswith("batch ")]
    for before, after in pairwise(laps):
        assert abs(before["ts"] + before["dur"] - after["ts"]) < 2, "microseconds"
    assert {event["args"]["step"] for event in laps} == set(range(1, 9))
    of_a_step = [event["name"] for event in laps if event["args"]["step"] == 2]
    work = [f"{what} {k}" for k in range(3) for what in ("forward", "backward", "update")]
    work.insert(7, "send")  # before the backward pass of the last block
    assert of_a_step == ["inputs", "receive", *work, "log", "evaluation and checkpoint"]
    assert [event["name"] for event in spans[len(laps) :]] == [f"batch {step}" for step in range(1, 9)]
    wall, counted = clock[1] - clock[0], sum(event["dur"] for event in laps) / 1e6
    assert 0.9 * wall < counted <= wall + 1e-3
    assert (tmp_path / "plots" / "timeline.png").stat().st_size > 5000
    assert "](plots/timeline.png)" in (tmp_path / "report.md").read_text()


def test_only_the_first_steps_are_traced(few_tweets, tmp_path):
    args = hf_al.TrainingArguments(
        output_dir=str(tmp_path), model=MODEL, max_steps=4, trace=2, use_cpu=True, disable_tqdm=True, plots=False
    )
    hf_al.train(args, few_tweets)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["args"]["step"] for event in events if event["ph"] == "X"} == {1, 2}
    assert [path.name for path in tmp_path.glob("trace*")] == ["trace.json"]


def test_without_a_trace_there_is_none(few_tweets, tmp_path):
    args = hf_al.TrainingArguments(output_dir=str(tmp_path), model=MODEL, max_steps=2, use_cpu=True, disable_tqdm=True)
    hf_al.train(args, few_tweets)
    assert not (tmp_path / "trace.json").exists()
    assert not (tmp_path / "plots" / "timeline.png").exists()
