"""Streams: read window by window, the same bits as the data in memory, resumable, and what is wrong is named."""

import gzip
import hashlib
import json
from functools import partial
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset

import hf_al
from hf_al.card import model_card
from hf_al.data.files import stream_file
from hf_al.data.streaming import StreamOrder, Windows, window_of
from hf_al.loading import load_model
from hf_al.parsing import parse_arguments
from hf_al.training import checkpoint

STEPS = 40
SMALL = [
    f"--max_steps={STEPS}", "--per_device_train_batch_size=16", "--eval_strategy=steps", "--eval_steps=11",
    "--save_steps=7", "--save_total_limit=20", "--num_blocks=2", "--hidden_size=16", "--target_size=12",
    "--hidden_dropout_prob=0.2", "--threads=1", "--use_cpu", "--disable_tqdm", "--max_seq_length=24", "--plots=false",
]  # fmt: skip


def rows_of(count: int) -> Dataset:
    return Dataset.from_dict({"text": [f"text {i}" for i in range(count)], "label": [i % 3 for i in range(count)]})


@pytest.fixture
def order():
    """A stream whose rows are their own tokens: order(rows, window) -> StreamOrder of batches of 4."""

    def make(count: int, size: int) -> StreamOrder:
        def encode(rows: Dataset) -> Dataset:
            return rows.map(lambda row: {"input_ids": [int(row["text"].split()[1])] * (1 + row["label"])})

        windows = Windows(rows_of(count).to_iterable_dataset(), size)
        return StreamOrder(windows, encode, None, batch_size=4, seed=1)

    return make


def tokens(order: StreamOrder, first: int, last: int) -> list[list[int]]:
    return [[ids[0] for ids in order[rows]["input_ids"]] for _, rows in order.steps(first, last)]


@pytest.mark.parametrize(("count", "size"), [(20, 8), (20, 7), (20, 20), (20, 100), (3, 2), (1, 5)])
def test_every_row_comes_once_per_pass_and_never_far_from_its_place(count, size, order):
    stream = order(count, size)
    windows = -(-count // size)
    batches = windows - 1 and (windows - 1) * -(-size // 4)
    batches += -(-(count - (windows - 1) * size) // 4)
    for number in range(3):
        seen = [i for batch in tokens(stream, number * batches, (number + 1) * batches) for i in batch]
        assert sorted(seen) == list(range(count))
        assert all(abs(place - i) < size for place, i in enumerate(seen))


def test_steps_are_the_same_wherever_reading_starts(order):
    whole = tokens(order(50, 12), 0, 60)
    for first in (0, 1, 13, 29, 59):
        assert tokens(order(50, 12), first, 60) == whole[first:]


def test_a_place_whose_window_was_given_up_is_read_again(order):
    """As for the checkpoint before one that turns out to be damaged."""
    stream, whole = order(50, 4), tokens(order(50, 4), 0, 40)
    known = stream.read_up_to(40)
    assert stream.read_up_to(10) == known[:10]
    assert stream.examples(10) == 40
    assert tokens(stream, 10, 40) == whole[10:]


def test_the_lengths_of_rows_are_known_ahead(order):
    stream = order(50, 12)
    ahead = stream.steps(0, 30)
    for _, rows in stream.steps(0, 28):
        next(ahead)
        assert stream.lengths[rows].tolist() == [len(ids) for ids in stream[rows]["input_ids"]]


def test_no_more_is_read_than_is_used():
    read = []

    def rows():
        for i in range(10_000):
            read.append(i)
            yield {"text": f"text {i}", "label": i % 2}

    stream = StreamOrder(Windows(IterableDataset.from_generator(rows), 50), lambda r: r.add_column(
        "input_ids", [[1]] * len(r)), None, 10, 0)  # fmt: skip
    for _ in stream.steps(0, 12):
        pass
    assert len(read) < 200


def weights(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def streamed(tweet_files, tmp_path_factory):
    """The folder of a streamed run over 300 rows in windows of 90, with all of its checkpoints."""
    folder = tmp_path_factory.mktemp("streamed") / "run"
    flags = ["--streaming", "--streaming_buffer_size=90", "--max_train_samples=300", f"--output_dir={folder}"]
    hf_al.train(parse_arguments([*tweet_files, *SMALL, *flags]))
    return folder


@pytest.mark.medium
def test_a_stream_of_one_window_trains_as_the_data_in_memory(tweet_files, tmp_path):
    for name, more in (("stream", ["--streaming"]), ("memory", [])):
        hf_al.train(parse_arguments([*tweet_files, *SMALL, *more, f"--output_dir={tmp_path / name}"]))
    assert weights(tmp_path / "stream") == weights(tmp_path / "memory")


@pytest.mark.medium
@pytest.mark.parametrize("step", [7, 21, 35])
def test_a_stream_resumes_at_any_step(step, streamed, tweet_files, tmp_path):
    start = checkpoint.checkpoint_path(streamed, step)
    flags = ["--streaming", "--streaming_buffer_size=90", "--max_train_samples=300", f"--output_dir={tmp_path / 'run'}"]
    hf_al.train(parse_arguments([*tweet_files, *SMALL, *flags, f"--resume_from_checkpoint={start}"]))
    last = [checkpoint.checkpoint_path(run, STEPS) for run in (streamed, tmp_path / "run")]
    files = sorted(path.name for path in last[0].glob("*.safetensors"))
    assert files
    assert all((last[0] / name).read_bytes() == (last[1] / name).read_bytes() for name in files)


def test_examples_and_rows_are_counted_as_they_are(order):
    stream = order(10, 6)  # windows of 6 and 4 rows: batches of 4, 2 and 4
    for _ in stream.steps(0, 6):
        pass
    assert [stream.examples(steps) for steps in range(1, 7)] in ([4, 6, 10, 14, 16, 20], [2, 6, 10, 12, 16, 20],
        [4, 6, 10, 12, 16, 20], [2, 6, 10, 14, 16, 20])  # fmt: skip
    assert stream.rows(6) == 10


@pytest.mark.medium
def test_a_stream_whose_rows_have_changed_is_not_resumed(streamed, tweet_files, tmp_path):
    path = tmp_path / "train.jsonl"
    lines = Path(tweet_files[0].partition("=")[2]).read_text(encoding="utf-8").splitlines()
    lines[150], lines[151] = lines[151], lines[150]  # in the second window
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = [f"--train_file={path}", *tweet_files[1:]]
    flags = ["--streaming", "--streaming_buffer_size=90", "--max_train_samples=300", f"--output_dir={tmp_path / 'run'}"]
    resume = f"--resume_from_checkpoint={checkpoint.checkpoint_path(streamed, 14)}"
    with pytest.raises(ValueError, match="got other rows before step 14"):
        hf_al.train(parse_arguments([*data, *SMALL, *flags, resume]))
    assert not (tmp_path / "run").exists()


@pytest.mark.medium
def test_another_window_is_another_run(streamed, tweet_files, shell):
    flags = ["--streaming", "--streaming_buffer_size=80", "--max_train_samples=300", f"--output_dir={streamed}"]
    status, _, err = shell("train", *tweet_files, *SMALL, *flags, "--resume_from_checkpoint=last")
    assert status == 2
    assert "Expected the data of" in err


@pytest.mark.medium
def test_the_report_says_that_train_was_streamed(streamed, tweet_files):
    report = hf_al.report.read_report(str(streamed))
    assert report["data"]["streamed"]
    assert report["data"]["rows"]["train"] == 300  # two passes and a bit
    assert "rows for train (of a stream)" in (streamed / "report.md").read_text()
    first = tweet_files[0].removeprefix("--train_file=")
    rows = [json.loads(line) for line in Path(first).read_text(encoding="utf-8").splitlines()[:90]]
    lines = "".join(json.dumps([row["text"], row["label"]]) + "\n" for row in rows)
    assert report["data"]["fingerprint"]["train"] == hashlib.sha256(lines.encode()).hexdigest()
    card = model_card(report, load_model(str(streamed))[0], "user/name", []).text
    assert "(of the stream: its first 90 rows)" in card


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["csv", "parquet", "parquet.gz", "jsonl.gz"])
def test_every_kind_of_file_streams(kind, few_tweets, tweet_files, tmp_path):
    path, rows = tmp_path / f"train.{kind}", few_tweets["train"].map(lambda row: {"text": row["text"].splitlines()[0]})
    write = {"csv": rows.to_csv, "parquet": rows.to_parquet, "jsonl.gz": partial(rows.to_json, compression="gzip")}
    if kind == "parquet.gz":
        rows.to_parquet(tmp_path / "plain")
        path.write_bytes(gzip.compress((tmp_path / "plain").read_bytes()))
    else:
        write[kind](path)
    flags = [*tweet_files[1:], f"--train_file={path}", *SMALL, "--max_steps=3", "--streaming"]
    result = hf_al.train(parse_arguments([*flags, f"--output_dir={tmp_path / 'run'}"]))
    assert result.report["steps"] == 3


def test_a_stream_can_be_given_in_python(few_tweets, tmp_path):
    splits = {**few_tweets, "train": few_tweets["train"].to_iterable_dataset()}
    args = parse_arguments([*SMALL, "--max_steps=3", "--streaming", f"--output_dir={tmp_path}"])
    assert hf_al.train(args, splits).report["steps"] == 3


def args_with(tmp_path, *flags: str) -> hf_al.TrainingArguments:
    return parse_arguments([*SMALL, "--streaming", f"--output_dir={tmp_path}", *flags])


def test_a_column_that_changes_its_type_within_a_window_is_text_there(tmp_path):
    cells = [str(i) for i in range(12_000)]
    cells[11_000] = "many"
    (tmp_path / "a.csv").write_text("text,age,label\n" + "".join(f"t,{cell},a\n" for cell in cells))
    (columns,) = stream_file(str(tmp_path / "a.csv")).iter(12_000)
    window = window_of(columns, None)
    assert window["age"][:] == cells
    assert window["text"][:] == ["t"] * 12_000


def test_a_label_that_comes_late_is_named_with_its_place(few_tweets, tmp_path):
    late = Dataset.from_dict({"text": ["hi there"] * 90, "label": ["good", "bad"] * 40 + ["ugly"] * 10})
    splits = {"train": late.to_iterable_dataset(), "validation": late.select(range(20))}
    with pytest.raises(ValueError, match="got \\['ugly'\\] too") as caught:
        hf_al.train(args_with(tmp_path, "--streaming_buffer_size=30"), splits)
    (note,) = caught.value.__notes__
    assert "In rows 60 to 89 of the stream" in note
    assert "first 30 rows" in note
    assert "--streaming_buffer_size" in note


@pytest.mark.parametrize(
    ("train", "validation", "said"),
    [
        (rows_of(9), rows_of(9), "Expected an IterableDataset as train with streaming"),
        (rows_of(9).to_iterable_dataset(), None, "Expected a validation split with streaming"),
        (rows_of(9).to_iterable_dataset().filter(lambda row: False), rows_of(9), "Expected rows in the train split"),
    ],
    ids=["in_memory", "no_validation", "no_rows"],
)
def test_data_that_cannot_be_streamed_is_named(train, validation, said, tmp_path):
    splits = {"train": train} | ({} if validation is None else {"validation": validation})
    with pytest.raises(ValueError, match=said):
        hf_al.train(args_with(tmp_path), splits)


@pytest.mark.parametrize("flags", [["--max_steps=-1"], ["--eval_strategy=epoch"]])
def test_a_stream_has_no_epochs(flags):
    steps = ["--streaming", "--max_steps=10", "--eval_strategy=no", "--output_dir=out"]
    with pytest.raises(ValueError, match="nobody knows where an epoch of a stream ends"):
        parse_arguments([*steps, *flags])
