"""Columns of numbers beside the text: blocks from `numeric_block` on read them, those before answer without."""

import csv
import json
import math
import random
from pathlib import Path

import pytest
import torch
from conftest import assert_mistake
from datasets import Dataset
from transformers import pipeline

import hf_al
from hf_al.data.numeric import with_values
from hf_al.data.sources import load_text_datasets
from hf_al.data.tokenization import tokens_digest
from hf_al.evaluation import answer_exits
from hf_al.loading import load_model
from hf_al.modeling.objectives import OBJECTIVES
from hf_al.parsing import parse_arguments
from hf_al.saved.inspection import load_config
from hf_al.saved.prediction import predict
from hf_al.saved.pruning import prune
from hf_al.saved.request_body import Refused, read_body

BLOCK = 1
COLUMNS = {"numeric_columns": ["age", "price"], "numeric_means": [40.0, 3.0], "numeric_stds": [10.0, 2.0]}
KINDS = [("al_lstm", {}), ("al_lstm", {"embedding_block": False, "embedding_size": 6}), ("al_transformer", {})]
MISSING = math.nan
SMALL = [
    "--hidden_size=16", "--target_size=12", "--threads=1", "--use_cpu", "--disable_tqdm", "--word_vectors=none",
    "--learning_rate=0.02", "--eval_strategy=no",
]  # fmt: skip


@pytest.fixture(params=KINDS, ids=str)
def model(request, make_model):
    model_type, config = request.param
    return make_model(model_type, numeric_block=BLOCK, objective="al_ce", **COLUMNS, **config).eval()


@torch.no_grad()
def exits(model, batch: dict, values: torch.Tensor | None) -> list[torch.Tensor]:
    batch = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return list(model(**batch, numeric_values=values, output_exit_logits=True).exit_logits)


def some_values(rows: int) -> torch.Tensor:
    return torch.randn(rows, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 10 + 30


# --- the model


def test_exits_before_the_block_do_not_depend_on_the_numbers_and_the_others_do(model, make_batch):
    batch, values = make_batch(), some_values(4)
    before, after = exits(model, batch, values), exits(model, batch, values + 1)
    assert [torch.equal(one, two) for one, two in zip(before, after, strict=True)] == [True, False, False]


@pytest.mark.parametrize(("model_type", "config"), KINDS)
def test_in_block_0_all_exits_depend_on_them(model_type, config, make_model, make_batch):
    model = make_model(model_type, **COLUMNS, **config).eval()
    pairs = zip(*(exits(model, make_batch(), some_values(4) + more) for more in (0, 1)), strict=True)
    assert not any(torch.equal(one, two) for one, two in pairs)


def test_a_missing_value_counts_as_the_mean(model, make_batch):
    batch, values = make_batch(), some_values(4)
    values[1, 0] = 40.0
    expected = exits(model, batch, values)
    values[1, 0] = MISSING
    for one, two in zip(expected, exits(model, batch, values), strict=True):
        assert torch.equal(one, two)
    means = torch.tensor([[40.0, 3.0]]).expand(4, 2)
    for one, two in zip(exits(model, batch, means), exits(model, batch, None), strict=True):
        assert torch.equal(one, two)


def test_numbers_are_standardised_by_the_config(model, make_batch):
    batch = make_batch()
    inputs = model.model.prepare_inputs(batch["input_ids"], numeric_values=torch.tensor([[50.0, -1.0]] * 4))
    assert inputs["numeric"].tolist() == [[1.0, -2.0]] * 4


def test_large_numbers_keep_their_differences(make_model):
    """Seconds since 1970, a minute apart, are the same number in float32."""
    seconds = {"numeric_columns": ["time"], "numeric_means": [1.7e9], "numeric_stds": [60.0]}
    values = torch.tensor([[1.7e9], [1.7e9 + 60]], dtype=torch.float64)
    model = make_model(**seconds)
    assert model.model.prepare_inputs(torch.ones(2, 3).long(), numeric_values=values)["numeric"].tolist() == [[0], [1]]


def test_padding_changes_no_answer(model, make_batch):
    batch, values = make_batch(), some_values(4)
    for side in ((0, 5), (5, 0)):
        padded = {n: torch.nn.functional.pad(t, side) for n, t in batch.items() if n != "labels"}
        for one, two in zip(exits(model, batch, values), exits(model, padded, values), strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "backprop"])
def test_the_layer_of_the_numbers_learns_by_the_loss_of_its_block_alone(objective, make_model, make_batch):
    model = make_model("al_lstm", objective=objective, numeric_block=BLOCK, **COLUMNS)
    losses = model(**make_batch(), numeric_values=some_values(4)).local_losses
    weight = model.model.blocks[BLOCK].encode.numeric.weight
    grads = [torch.autograd.grad(loss, weight, retain_graph=True, allow_unused=True)[0] for loss in losses]
    assert [grad is not None and bool(grad.any()) for grad in grads] == [False, True, False]


def test_texts_that_leave_early_keep_their_numbers(model, make_batch):
    batch, values = make_batch(rows=23, tokens=9), some_values(23)
    expected = exits(model, batch, values)
    sure = [sorted(logits.softmax(1).amax(1).tolist()) for logits in expected]
    model.config.exit_temperatures, model.config.exit_thresholds = [1.0] * 3, [sure[0][15], sure[1][11], None]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    out = model.predict(ids, mask, exit="adaptive", batch_size=4, numeric_values=values.tolist())
    assert len(out.exit_blocks.unique()) > 1
    for row, block in enumerate(out.exit_blocks.tolist()):
        torch.testing.assert_close(out.logits[row], expected[block][row], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("late", "block"), [(2, 1), (1, 1), (1, 2), (1, 0)])
def test_numbers_may_come_before_late_text_with_it_and_after_it(late, block, make_model, make_batch):
    model = make_model("al_transformer", late_block=late, late_from=3, numeric_block=block, **COLUMNS).eval()
    batch, values = make_batch(), some_values(4)
    before, after = exits(model, batch, values), exits(model, batch, values + 1)
    same = [torch.equal(one, two) for one, two in zip(before, after, strict=True)]
    assert same == [k < block for k in range(3)]


def test_numbers_of_any_type_are_read_alike_and_far_ones_leave_the_answers_finite(model, make_batch):
    batch, whole = make_batch(), torch.tensor([[10, 90], [31, 2], [7, 0], [1, 1]])
    for one, two in zip(exits(model, batch, whole), exits(model, batch, whole.double()), strict=True):
        assert torch.equal(one, two)
    for far in (3e38, 1e300, math.inf, -math.inf):
        assert all(
            logits.isfinite().all() for logits in exits(model, batch, torch.full((4, 2), far, dtype=torch.float64))
        )


def test_a_saved_model_gives_the_same_logits(model, make_batch, tmp_path):
    batch, values = make_batch(), some_values(4)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.config.numeric_columns == ["age", "price"]
    for one, two in zip(exits(model, batch, values), exits(loaded, batch, values), strict=True):
        assert torch.equal(one, two)


def test_fewer_blocks_keep_the_numbers_only_if_one_reads_them(model, make_batch):
    batch, values = make_batch(), some_values(4)
    expected = exits(model, batch, values)
    assert torch.equal(exits(prune(model, 2), batch, values)[-1], expected[1])
    first = prune(model, 1)
    assert first.config.numeric_columns is None
    assert torch.equal(exits(first, batch, None)[-1], expected[0])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"numeric_block": 3, **COLUMNS}, "Expected numeric_block to be at most 2"),
        ({"numeric_block": -1, **COLUMNS}, "Expected numeric_block to be at least 0"),
        ({**COLUMNS, "numeric_means": [1.0]}, "Expected 2 values in numeric_means"),
        ({**COLUMNS, "numeric_stds": [1.0, 0.0]}, "above 0 for numeric_stds"),
        ({**COLUMNS, "numeric_columns": ["age", "age"]}, "Name each column once"),
    ],
)
def test_config_values_that_cannot_be_are_refused(config, said, make_model):
    with pytest.raises(Exception, match=said):
        make_model("al_lstm", **config)


def test_a_pretrained_encoder_reads_no_numbers(make_model):
    with pytest.raises(ValueError, match="Expected numeric_columns=None for al_encoder"):
        make_model("al_encoder", **COLUMNS)


def test_numbers_that_do_not_fit_the_model_are_refused(model, make_model, make_batch):
    batch = make_batch()
    with pytest.raises(ValueError, match=r"of shape \(4, 2\), a row for each text with age, price, got \(4, 3\)"):
        model(**batch, numeric_values=torch.zeros(4, 3))
    for texts in (3, 5):
        with pytest.raises(ValueError, match=rf"of shape \(4, 2\), .* got \({texts}, 2\)"):
            model.predict(batch["input_ids"], numeric_values=torch.zeros(texts, 2))
    with pytest.raises(ValueError, match="Expected no numeric_values"):
        make_model("al_lstm")(**batch, numeric_values=torch.zeros(4, 2))


# --- columns


def test_cells_of_every_kind_are_numbers_or_missing():
    rows = Dataset.from_dict({"text": ["x"] * 5, "a": ["1.5", "", " ", "nan", "-2e3"], "b": [1, None, 3, 4, 5]})
    found = with_values(rows, ["b", "a"], "train")
    assert found.column_names == ["text", "numeric_values"]
    expected = torch.tensor([[1, 1.5], [MISSING, MISSING], [3, MISSING], [4, MISSING], [5, -2000.0]])
    torch.testing.assert_close(torch.tensor(found["numeric_values"][:]), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("cell", "said"), [("old", "a number or nothing, got 'old'"), ("-inf", "a finite number up to 3e\\+38, got '-inf'")]
)
def test_a_cell_that_is_no_number_is_named_by_column_and_row(cell, said):
    rows = Dataset.from_dict({"text": ["x"] * 3, "age": ["1", "2", cell]})
    with pytest.raises(ValueError, match=said) as error:
        with_values(rows, ["age"], "validation")
    assert "column 'age' in row 2 (from 0) of the validation split" in str(error.value)


def test_true_and_false_are_one_and_zero_however_a_file_is_read():
    for cells in ([True, False], ["True", "false"], ["TRUE ", "0"]):
        rows = with_values(Dataset.from_dict({"text": ["x"] * 2, "a": cells}), ["a"], "train")
        assert rows["numeric_values"][:] == [[1.0], [0.0]]


def test_a_resumed_run_must_find_the_same_numbers():
    found = set()
    for ages in ([1.0, 2.0], [1.0, 3.0], [1.0, None]):
        rows = Dataset.from_dict({"input_ids": [[1, 2], [3]], "label": [0, 1], "age": ages})
        found.add(tokens_digest(with_values(rows, ["age"], "train")))
    assert len(found) == 3


# --- runs: only the age tells the label


def write(folder: Path, split: str, count: int) -> None:
    draw = random.Random(split)
    with (folder / f"{split}.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "age", "price", "label"])
        for i in range(count):
            age = draw.randint(1000, 1999)
            text = " ".join(draw.choice(["plane", "bag", "crew", "gate", "seat"]) for _ in range(draw.randint(2, 6)))
            rows.writerow([text, "" if i == 7 else age, 0.1, "old" if age >= 1500 else "young"])


@pytest.fixture(scope="module")
def ages(tmp_path_factory) -> list[str]:
    """Flags that name a train and a validation file."""
    folder = tmp_path_factory.mktemp("ages")
    for split, count in (("train", 160), ("validation", 60)):
        write(folder, split, count)
    return [f"--{split}_file={folder / f'{split}.csv'}" for split in ("train", "validation")]


@pytest.fixture(scope="module")
def run(ages, tmp_path_factory) -> tuple[Path, dict]:
    """A model whose second block reads the numbers, and its report."""
    folder = tmp_path_factory.mktemp("numbers") / "run"
    flags = ["--numeric_column_names=age,price", "--numeric_block=1", "--max_steps=60", f"--output_dir={folder}"]
    hf_al.cli.main(["train", *ages, *SMALL, *flags])
    return folder, json.loads((folder / "report.json").read_text())


def validation_file(ages: list[str]) -> str:
    return ages[1].partition("=")[2]


def test_the_block_that_reads_the_numbers_is_right_and_the_one_before_is_not(run):
    first, second = (row["accuracy"] for row in run[1]["validation"])
    assert first < 0.7 < 0.9 < second


def test_means_and_deviations_are_those_of_train_and_a_constant_column_has_1(run, ages):
    with open(ages[0].partition("=")[2]) as file:
        known = torch.tensor([float(row["age"]) for row in csv.DictReader(file) if row["age"]], dtype=torch.float64)
    config = load_model(str(run[0]))[0].config
    assert config.numeric_means == pytest.approx([known.mean().item(), 0.1])
    assert config.numeric_stds == pytest.approx([known.std(correction=0).item(), 1.0])


def test_report_and_card_say_that_the_model_reads_them(run):
    from hf_al.card import model_card

    said = "The blocks from 1 on also read the columns of numbers age, price; a missing value counts as the mean."
    assert said in (run[0] / "report.md").read_text()
    assert said in str(model_card(run[1], load_model(str(run[0]))[0], "user/name", []))


def test_evaluation_gives_the_numbers_of_the_run(run, ages, shell):
    status, out, err = shell("evaluate", str(run[0]), f"--test_file={validation_file(ages)}")
    assert status == 0, err
    assert json.loads(out)["accuracy"] == run[1]["validation"][-1]["accuracy"]


def test_rows_whose_numbers_were_read_are_answered_alike(run, ages):
    args = parse_arguments([*ages, "--numeric_column_names=age,price", "--output_dir=unused"])
    found = answer_exits(*load_model(str(run[0])), load_text_datasets(args)["validation"])
    assert (found.logits[1].argmax(1) == found.labels).mean() == run[1]["validation"][-1]["accuracy"]


def test_prediction_reads_the_columns_of_a_file(run, tmp_path, shell):
    rows = [("plane bag", "1100", ""), ("plane bag", "1900", "5"), ("plane", "much", "5")]
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "age", "price"), *rows])
    objects = [{"text": text, "age": age, "price": price or None} for text, age, price in rows]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, objects)))
    for name in ("new.csv", "new.jsonl"):
        status, out, err = shell("predict", str(run[0]), "--input", str(tmp_path / name))
        assert status == 0, err
        young, old, wrong = map(json.loads, out.splitlines())
        assert (young["label"], old["label"]) == ("young", "old")
        assert wrong["error"] == "Expected a number or nothing, got 'much'. This is the column 'age'."
        assert young["exits"][0] == old["exits"][0]


def test_texts_without_numbers_are_answered_with_a_warning(run, tmp_path, shell, caplog):
    assert shell("predict", str(run[0]), "plane bag")[0] == 0
    assert "also reads age, price, which lines of text do not have: each counts as its mean" in caplog.text
    (tmp_path / "new.csv").write_text("text,agee\nplane,3\n")
    said = "Expected column 'age', whose numbers the model reads"
    assert_mistake(shell("predict", str(run[0]), f"--input={tmp_path / 'new.csv'}"), said, "Did you mean agee?")


def test_a_pipeline_answers_by_the_means(run):
    answer = pipeline("text-classification", model=str(run[0]), device="cpu")("plane bag")[0]
    ((expected,),) = predict(*load_model(str(run[0])), [("plane bag",)])
    assert answer["score"] == pytest.approx(expected["score"], abs=1e-6)


def test_a_request_may_have_numbers(run):
    model, tokenizer = load_model(str(run[0]))
    body = {"texts": ["plane bag"] * 3, "numbers": [{"age": 1100}, {"price": 5, "age": 1900}, {"age": None}]}
    asked = read_body(json.dumps(body).encode(), model.config, 1, most=8)
    ((young, old, missing),) = predict(model, tokenizer, asked.texts)
    assert (young["label"], old["label"]) == ("young", "old")
    ((alone,),) = predict(model, tokenizer, [("plane bag",)])
    assert missing["score"] == pytest.approx(alone["score"], abs=1e-6)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ([{"agee": 3}], 'Expected the columns age, price in numbers[0], got "agee". Did you mean age?'),
        ([{"age": "much"}], "got 'much'. This is in numbers[0]."),
        ([], "Expected numbers to be a list of 1 objects"),
        ([3], "Expected an object with age, price as numbers[0], got 3."),
    ],
)
def test_a_request_with_other_numbers_is_refused(numbers, said, run):
    body = json.dumps({"text": "plane", "numbers": numbers}).encode()
    with pytest.raises(Refused) as error:
        read_body(body, load_config(str(run[0])), 1, most=8)
    assert said in str(error.value)


def test_exits_are_calibrated_with_the_numbers(run, ages, shell, tmp_path):
    folder = tmp_path / "calibrated"
    assert shell("export", str(run[0]), str(folder))[0] == 0
    status, out, err = shell("calibrate", str(folder), f"--validation_file={validation_file(ages)}")
    assert status == 0, err
    status, out, err = shell("predict", str(folder), "--exit=adaptive", f"--input={validation_file(ages)}")
    assert status == 0, err
    with open(validation_file(ages)) as file:
        truth = [row["label"] for row in csv.DictReader(file)]
    right = [json.loads(line)["label"] == label for line, label in zip(out.splitlines(), truth, strict=True)]
    assert sum(right) > 0.9 * len(truth)


def test_a_grown_model_reads_what_it_has_read(run, ages, shell, tmp_path):
    status, _, err = shell(
        "grow", str(run[0]), *ages, "--add_blocks=1", "--max_steps=2", "--threads=1", "--use_cpu", "--cache_frozen",
        f"--output_dir={tmp_path / 'grown'}",
    )  # fmt: skip
    assert status == 0, err
    before, after = run[1]["validation"], json.loads((tmp_path / "grown" / "report.json").read_text())["validation"]
    assert [row["accuracy"] for row in after[:2]] == [row["accuracy"] for row in before]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--numeric_column_names=agee"], "Did you mean age?"),
        (["--numeric_column_names=age,label", "--label_column_name=label"], "Name each column once"),
        (["--numeric_column_names=text,age"], "Cannot tell the text column"),
        (["--numeric_column_names=age", "--numeric_block=2"], "Expected numeric_block to be at most 1"),
        (["--numeric_block=1"], "Expected numeric_column_names with numeric_block=1"),
    ],
)
def test_columns_that_cannot_be_are_refused(flags, said, ages, shell, tmp_path):
    assert_mistake(shell("train", *ages, *flags, f"--output_dir={tmp_path / 'run'}"), said)


def test_what_cannot_read_numbers_says_so(run, ages, encoder_folder, shell, tmp_path):
    status, _, err = shell(
        "train", *ages, f"--encoder={encoder_folder}", "--numeric_column_names=age", f"--output_dir={tmp_path / 'a'}"
    )
    assert (status, "a pretrained encoder reads text alone" in err) == (2, True), err
    result = shell("export", str(run[0]), str(tmp_path / "graphs"), "--format=torch_export")
    assert_mistake(result, "Expected a model that reads text alone with --format torch_export")
    flags = ["--model_name_or_path", str(run[0]), "--numeric_column_names=price", f"--output_dir={tmp_path / 'b'}"]
    status, _, err = shell("train", *ages, *flags, "--use_cpu")
    assert (status, "Expected numeric_column_names=age,price, those of" in err) == (2, True), err
