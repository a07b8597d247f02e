"""--trace: what each process does, without gaps, and a picture of it."""

import json
from itertools import pairwise

import hf_al

MODEL = {"num_blocks": 3, "hidden_size": 16, "target_size": 12}


def test_laps_add_up_to_the_time_of_the_steps(few_tweets, tmp_path):
    args = hf_al.TrainingArguments(
        output_dir=str(tmp_path), model=MODEL, max_steps=8, trace=5, eval_strategy="steps", eval_steps=2, threads=1,
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    report = hf_al.train(args, few_tweets).report
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    laps = [event for event in spans if not event["name"].startswith("batch ")]
    for before, after in pairwise(laps):
        assert abs(before["ts"] + before["dur"] - after["ts"]) < 2, "microseconds"
    assert {event["args"]["step"] for event in laps} == {1, 2, 3, 4, 5}
    of_a_step = [event["name"] for event in laps if event["args"]["step"] == 2]
    work = [f"{what} {k}" for k in range(3) for what in ("forward", "backward", "update")]
    work.insert(7, "send")  # before the backward pass of the last block
    assert of_a_step == ["inputs", "receive", *work, "log", "evaluation and checkpoint"]
    assert [event["name"] for event in spans[len(laps) :]] == [f"batch {step}" for step in range(1, 6)]
    training = sum(event["dur"] for event in laps if not event["name"].startswith("evaluation")) / 1e6
    assert training < 2 * report["speed"]["train_seconds"] + 1
    assert (tmp_path / "plots" / "timeline.png").stat().st_size > 5000
    assert "](plots/timeline.png)" in (tmp_path / "report.md").read_text()


def test_without_a_trace_there_is_none(few_tweets, tmp_path):
    args = hf_al.TrainingArguments(output_dir=str(tmp_path), model=MODEL, max_steps=2, use_cpu=True, disable_tqdm=True)
    hf_al.train(args, few_tweets)
    assert not (tmp_path / "trace.json").exists()
    assert not (tmp_path / "plots" / "timeline.png").exists()
