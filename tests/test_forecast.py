"""`hf-al plan`: what blocks cost, and what follows from it for each way of splitting them."""

import json

import pytest
import torch

import hf_al
from hf_al.cli import main
from hf_al.forecast import Link, over_depth, quantity, rows_of
from hf_al.training.costs import Cost, backprop_costs, local_costs

CPU = torch.device("cpu")
FAST = Link(rate=1e15, latency=0.0)
MIB = 2**20
SHAPE = "--model_type al_transformer --num_blocks 4 --hidden_size 16 --num_attention_heads 2 --target_size 8"
SMALL = [*SHAPE.split(" "), *["--tokenizer_vocab_size", "50", "--per_device_train_batch_size", "4"]]


def cost(**changes):
    values = {
        "forward": 1.0, "backward": 2.0, "to_input": 1.0, "update": 0.5, "copy": 0.0, "kept": 10 * MIB,
        "weights": 4 * MIB, "gradients": 4 * MIB, "state": 8 * MIB, "sent": MIB, "sent_in_bf16": MIB // 2,
    }  # fmt: skip
    return Cost(**(values | changes))


def planned(stages, link=FAST, blocks=4, batch=8, **arguments):
    args = hf_al.TrainingArguments(output_dir="unused", **arguments)
    local = [cost(backward=1.0, to_input=0.0)] * blocks
    backprop = {
        m: [cost(forward=1 / m, backward=2 / m, to_input=1 / m, kept=10 * MIB // m, sent=MIB // m)] * blocks
        for m in (1, 2, 4)
    }
    return {row["way"]: row for row in rows_of(stages, args, local, backprop, link, batch)}


def test_one_stage_takes_the_time_of_all_blocks():
    rows = planned(1)
    assert rows["Associated Learning"]["step_ms"] == pytest.approx(1000 * 4 * 2.5)
    assert rows["backpropagation"]["step_ms"] == pytest.approx(1000 * 4 * 3.5)
    assert rows["backpropagation"]["texts_per_second"] == pytest.approx(8 / 14)
    assert rows["Associated Learning"]["waiting"] == rows["backpropagation"]["waiting"] == 0


def test_the_stream_has_no_bubble_and_pipelines_have_theirs():
    rows = planned(2)
    assert rows["Associated Learning"]["step_ms"] == pytest.approx(1000 * 2 * 2.5)
    assert rows["Associated Learning"]["waiting"] == pytest.approx(0, abs=1e-9)
    assert rows["GPipe"]["micro_batches"] == 4
    assert rows["GPipe"]["step_ms"] == pytest.approx(1000 * (5 * 6 / 4 + 1.0))  # four slots, and one to fill
    assert rows["zero bubble"]["step_ms"] < rows["1F1B"]["step_ms"] == pytest.approx(rows["GPipe"]["step_ms"])
    assert rows["data parallel"]["step_ms"] == pytest.approx(1000 * (4 * 1.5 + 4 * 0.5))


def test_a_link_that_is_slower_than_a_stage_decides():
    slow = Link(rate=8 * MIB / 7.0, latency=0.0)  # 7 s for a boundary
    rows = planned(2, slow)
    assert rows["Associated Learning"]["step_ms"] == pytest.approx(7000)
    assert planned(2, slow, wire_dtype="bf16")["Associated Learning"]["step_ms"] == pytest.approx(5000)
    assert rows["data parallel"]["step_ms"] > 1000 * 4 * 4 * 7
    assert rows["Associated Learning"]["sent_mib"] == [1, 0]
    assert rows["1F1B"]["sent_mib"] == [1, 1]  # hidden states down, their gradients back
    assert rows["data parallel"]["sent_mib"] == [4 * 4] * 2


def test_memory_is_that_of_what_a_stage_holds_at_once():
    rows = planned(2)
    assert rows["Associated Learning"]["memory_mib"] == [2 * 12 + 4 + 10 + 3] * 2
    assert rows["GPipe"]["memory_mib"] == [2 * 16 + 2 * 10] * 2
    assert rows["1F1B"]["memory_mib"] == [2 * 16 + 2 * 2 * 10 / 4, 2 * 16 + 2 * 10 / 4]
    assert rows["zero bubble"]["memory_mib"] == [2 * 16 + 2 * 2 * 10 / 4] * 2
    assert rows["data parallel"]["memory_mib"] == [4 * (16 + 5)] * 2


def test_time_grows_with_depth_only_where_blocks_wait_for_each_other():
    rows = over_depth(cost(backward=1.0), cost(forward=1 / 8, backward=2 / 8), cost(), FAST, 8)
    first, last = rows[0], rows[-1]
    assert (first["blocks"], last["blocks"]) == (1, 32)
    assert first["stream"] == pytest.approx(64 * 2.5)
    assert last["stream"] == pytest.approx(64 * 2.5 + 31)  # a forward pass for each stage to fill
    assert last["backprop"] == pytest.approx(32 * 64 * 3.5)
    assert last["stream"] < last["1f1b"] < last["backprop"]


@pytest.mark.parametrize("model_type", ["al_lstm", "al_transformer"])
def test_costs_count_every_weight_once(model_type, make_model):
    model = make_model(model_type)
    args = hf_al.TrainingArguments(output_dir="unused")
    local = local_costs(model, args, CPU, rows=3, tokens=5, rounds=2)
    whole = backprop_costs(make_model(model_type, objective="backprop"), args, CPU, rows=3, tokens=5, rounds=2)
    size = 4 * sum(p.numel() for p in model.parameters())
    assert sum(c.weights for c in local) == sum(c.weights for c in whole) == size
    assert all(c.state == pytest.approx(2 * c.gradients, rel=0.05) for c in local), "two moments of AdamW"
    assert all(c.gradients == c.weights for c in local)
    assert all(c.forward > 0 and c.backward > 0 and c.update > 0 and c.kept > 0 for c in [*local, *whole])
    assert [c.to_input > 0 for c in whole] == [False] + [True] * (len(whole) - 1), "words have no gradient"
    hidden = 4 * 3 * 5 * model.config.hidden_size
    assert [c.sent for c in whole[:-1]] == [hidden] * (len(whole) - 1)
    assert all(c.sent > hidden for c in local[:-1]), "target codes travel, too"


def test_more_texts_keep_more_for_the_backward_pass(make_model):
    model, args = make_model("al_transformer"), hf_al.TrainingArguments(output_dir="unused")
    few, many = (local_costs(model, args, CPU, rows, tokens=5, rounds=2)[-1].kept for rows in (2, 8))
    assert many == pytest.approx(4 * few, rel=0.1)


@pytest.mark.parametrize(
    ("text", "units", "value"),
    [
        ("10Gbit", "bit", 1e10),
        ("100 Mbit/s", "bit", 1e8),
        ("2.5e3kbit", "bit", 2.5e6),
        ("50us", "s", 5e-5),
        ("1s", "s", 1),
    ],
)
def test_quantities_are_read_with_their_units(text, units, value):
    assert quantity(text, units) == pytest.approx(value)


@pytest.mark.parametrize(
    ("text", "units"), [("10", "bit"), ("10GB", "bit"), ("0ms", "s"), ("fast", "bit"), ("1.2.3s", "s")]
)
def test_other_quantities_are_refused(text, units):
    with pytest.raises(ValueError, match=r"Expected a number above 0 with its unit, such as .*, got"):
        quantity(text, units)


def test_the_command_plans_without_data(tmp_path, capsys):
    main(
        [
            "plan",
            *SMALL,
            "--tokens",
            "6",
            "--stages",
            "1,2",
            "--bandwidth",
            "1Gbit",
            "--plot",
            str(tmp_path / "plan.png"),
        ]
    )
    shown = capsys.readouterr().out
    assert "4 blocks, 4 texts of 6 tokens in a step" in shown
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    main(["plan", *SMALL, "--tokens", "6", "--stages", "4", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [row["way"] for row in found["rows"]] == [
        "Associated Learning",
        "GPipe",
        "1F1B",
        "zero bubble",
        "data parallel",
    ]
    assert all(row["step_ms"] > 0 and 0 <= row["waiting"] < 1 for row in found["rows"])


def test_the_command_plans_the_run_of_its_data(tmp_path, capsys):
    file = tmp_path / "train.csv"
    file.write_text("text,label\n" + "".join(f"{word} is what we read today,{word}\n" for word in ("good", "bad") * 20))
    main(["plan", *SMALL, "--train_file", str(file), "--word_vectors", "none", "--stages", "2"])
    assert "4 blocks, 4 texts of 8 tokens in a step" in capsys.readouterr().out


def test_the_command_plans_a_pretrained_encoder(encoder_folder, capsys):
    flags = ["--encoder", str(encoder_folder), "--num_blocks", "2", "--tokens", "6", "--threads", "1"]
    main(["plan", *flags, "--cuts", "balanced", "--per_device_train_batch_size", "6", "--stages", "2"])
    shown = capsys.readouterr().out
    assert "2 blocks, 6 texts of 6 tokens in a step" in shown
    assert "GPipe" in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--stages", "5"], "Expected 1 to 4 stages"),
        (["--objective", "backprop"], "Expected a local objective, got backprop"),
        (["--replicas", "2"], "Expected replicas=1 with hf-al plan, got 2"),
        (["--gradient_accumulation_steps", "2"], "Expected gradient_accumulation_steps=1 with hf-al plan, got 2"),
        (["--offload"], "Expected offload=False with hf-al plan, got True"),
        (["--plot", "nowhere/plan.png"], "Expected a folder for --plot"),
        (["--bandwidth", "10"], "Expected a number above 0 with its unit"),
        (["--stages", "two"], "expected list[int], got 'two'"),
        (["--tokens", "0"], "expected a number of at least 1"),
    ],
)
def test_what_cannot_be_planned_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *SMALL, "--tokens", "6", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
