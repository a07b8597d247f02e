"""`hf-al predict`: the answers of the model, those of transformers' pipeline, in constant memory."""

import gzip
import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from hf_al.arguments import TrainingArguments
from hf_al.data import tokenization
from hf_al.saved import prediction
from hf_al.saved.prediction import CHUNK_BATCHES, predict
from hf_al.saved.rows import Unusable

KINDS = ("single_label_classification", "multi_label_classification", "regression")


@pytest.fixture(scope="module")
def tokenizer(few_tweets):
    return tokenization.build_tokenizer(TrainingArguments(max_seq_length=40), few_tweets["train"])


@pytest.fixture
def classifier(make_model, tokenizer):
    """classifier("regression", num_labels=1): an untrained model with the names of its classes, ready to answer."""

    def make(problem_type: str = KINDS[0], num_labels: int = 3, **config):
        labels = {i: f"class {i}" for i in range(num_labels)}
        model = make_model(
            vocab_size=len(tokenizer), max_position_embeddings=40, embedding_std=1.0, problem_type=problem_type,
            id2label=labels, label2id={name: i for i, name in labels.items()}, num_labels=num_labels, **config,
        )  # fmt: skip
        return model.eval()

    return make


@pytest.fixture
def texts(few_tweets) -> list[str]:
    """Texts of many lengths, one of them longer than the model accepts."""
    texts = few_tweets["test"]["text"][:39]
    return [*texts[:20], " ".join(texts), *texts[20:]]


def answers(model, tokenizer, rows, **options) -> list[dict]:
    return [answer for chunk in predict(model, tokenizer, rows, **options) for answer in chunk]


# --- what is answered


@pytest.mark.parametrize("model_type", ["al_lstm", "al_transformer"])
@pytest.mark.parametrize("problem_type", KINDS)
def test_scores_and_names_are_those_of_the_pipeline(problem_type, model_type, classifier, tokenizer, texts):
    model = classifier(problem_type, 1 if problem_type == "regression" else 3, model_type=model_type)
    found = answers(model, tokenizer, [(text,) for text in texts], batch_size=4, all_scores=True)
    expected = pipeline("text-classification", model=model, tokenizer=tokenizer, top_k=None, device="cpu")(texts)
    for answer, rows in zip(found, expected, strict=True):
        if problem_type == "regression":
            assert answer["value"] == pytest.approx(rows[0]["score"], abs=1e-5)
            continue
        assert answer["scores"] == pytest.approx({row["label"]: row["score"] for row in rows}, abs=1e-5)
        if problem_type == "single_label_classification":
            assert (answer["label"], answer["score"]) == next(iter(answer["scores"].items()))
            assert answer["label"] == rows[0]["label"]
        else:
            above = [row["label"] for row in rows if row["score"] > 0.5]
            assert [row["label"] for row in answer["labels"]] == above


def test_a_text_without_a_token_is_answered(classifier):
    """A tokenizer may drop punctuation, and add nothing."""
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "fine": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="removed")
    ])  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    model = classifier()
    both = answers(model, tokenizer, [("!!!",), ("fine day",)])
    alone = [*answers(model, tokenizer, [("!!!",)]), *answers(model, tokenizer, [("fine day",)])]
    assert [answer["score"] for answer in both] == pytest.approx([answer["score"] for answer in alone])
    nothing = answers(model, tokenizer, [("!!!",), ("?",)], most_tokens=1024)
    assert [answer["score"] for answer in nothing] == pytest.approx([both[0]["score"]] * 2)


def test_pairs_are_answered_as_the_pipeline_does(classifier, tokenizer):
    model = classifier()
    (answer,) = answers(model, tokenizer, [("thank you", "so much")])
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    expected = classify({"text": "thank you", "text_pair": "so much"})
    assert answer["label"] == expected["label"]
    assert answer["score"] == pytest.approx(expected["score"], abs=1e-6)


def test_the_order_is_that_of_the_input_whatever_the_batches(classifier, tokenizer, texts):
    model = classifier()
    one_by_one = answers(model, tokenizer, [(text,) for text in texts], batch_size=1)
    for batch_size in (2, 7, 64):
        found = answers(model, tokenizer, [(text,) for text in texts], batch_size=batch_size)
        assert [a["label"] for a in found] == [a["label"] for a in one_by_one]
        assert [a["score"] for a in found] == pytest.approx([a["score"] for a in one_by_one], abs=1e-5)


def test_every_exit_answers_as_the_model_that_stops_there(classifier, tokenizer, texts):
    model = classifier()
    found = answers(model, tokenizer, [(text,) for text in texts[:5]])
    for text, answer in zip(texts, found, strict=False):
        assert [row["block"] for row in answer["exits"]] == [0, 1, 2]
        assert {key: answer[key] for key in ("label", "score")}.items() <= answer["exits"][-1].items()
        for row in answer["exits"]:
            inputs = tokenizer(text, return_tensors="pt")
            with torch.no_grad():
                score = model(**inputs, exit_block=row["block"]).logits.softmax(1).max().item()
            assert row["score"] == pytest.approx(score, abs=1e-5)


def test_exit_block_stops_there(classifier, tokenizer):
    model = classifier()
    (whole,) = answers(model, tokenizer, [("thank you",)])
    (early,) = answers(model, tokenizer, [("thank you",)], exit_block=1)
    assert early["exits"] == whole["exits"][:2]
    assert early["score"] == whole["exits"][1]["score"]
    with pytest.raises(ValueError, match=r"Expected exit_block to be one of \[0, 1, 2\], got 3"):
        predict(model, tokenizer, [], exit_block=3)


def test_a_model_with_one_exit_answers_with_that_one(classifier, tokenizer):
    (answer,) = answers(classifier(objective="backprop"), tokenizer, [("thank you",)])
    assert [row["block"] for row in answer["exits"]] == [2]


@pytest.mark.parametrize(("problem_type", "exit"), [*((kind, None) for kind in KINDS), (KINDS[0], "adaptive")])
def test_a_model_whose_weights_are_not_finite_gives_no_answer(problem_type, exit, classifier, tokenizer):
    model = classifier(problem_type)
    if exit == "adaptive":
        model.config.exit_temperatures, model.config.exit_thresholds = [1.0] * 3, [0.5, 0.5, None]
    torch.nn.init.constant_(next(model.parameters()), math.nan)
    with pytest.raises(ValueError, match="Expected a model that answers with numbers, got NaN"):
        answers(model, tokenizer, [("thank you",)], exit_block=exit)


def test_several_values_are_named(classifier, tokenizer):
    (answer,) = answers(classifier("regression", 2), tokenizer, [("thank you",)])
    assert answer["values"].keys() == {"class 0", "class 1"}
    assert answer["exits"][-1] == {"block": 2, "values": answer["values"]}


def test_an_unusable_row_is_an_error_in_its_place(classifier, tokenizer):
    rows = [Unusable("no text"), ("one",), ("two",), Unusable("no text")]
    found = answers(classifier(), tokenizer, rows, batch_size=1)
    assert (found[0], found[3]) == ({"row": 0, "error": "no text"}, {"row": 3, "error": "no text"})
    assert all("label" in answer for answer in found[1:3])
    assert answers(classifier(), tokenizer, [Unusable("a")] * 3)[2] == {"row": 2, "error": "a"}


def test_rows_are_taken_a_chunk_at_a_time(classifier, tokenizer):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield ("thank you",)

    chunks = predict(classifier(), tokenizer, endless(), batch_size=2)
    for n in (1, 2, 3):
        assert len(next(chunks)) == 2 * CHUNK_BATCHES
        assert len(taken) == 2 * CHUNK_BATCHES * n


def test_a_chunk_of_long_texts_is_shorter(classifier, tokenizer, monkeypatch):
    monkeypatch.setattr(prediction, "CHUNK_CHARACTERS", 1000)
    rows = [("x" * 300,)] * 10
    assert [len(chunk) for chunk in predict(classifier(), tokenizer, rows, batch_size=64)] == [4, 4, 2]


# --- from and to files

TEXTS = ["thank you so much", "you lost my bag", "which gate"]


@pytest.fixture
def inputs(tmp_path) -> dict[str, Path]:
    """The same three texts in every format."""
    written = {
        "text.txt": "\n".join(TEXTS),
        "rows.csv": "id,text\n" + "\n".join(f"{i},{t}" for i, t in enumerate(TEXTS)),
        "rows.tsv": "id\ttext\n" + "\n".join(f"{i}\t{t}" for i, t in enumerate(TEXTS)),
        "rows.jsonl": "\n".join(json.dumps({"text": t}) for t in TEXTS),
    }
    for name, text in written.items():
        (tmp_path / name).write_text(text)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    return {path.name: path for path in tmp_path.iterdir()}


@pytest.mark.medium
def test_every_format_gives_the_same_answers(trained, inputs, shell, tmp_path):
    results = {}
    for name, path in inputs.items():
        status, out, err = shell("predict", str(trained[0]), "--input", str(path), "--threads=1")
        assert status == 0, err
        results[name] = [json.loads(line) for line in out.splitlines()]
    expected = results["text.txt"]
    assert len(expected) == 3
    assert [row.keys() for row in expected] == [{"label", "score", "exits"}] * 3
    assert all(result == expected for result in results.values())
    tabs = tmp_path / "tabs.TXT"  # no header of columns of one name
    tabs.write_text("good\tgood\n")
    assert shell("predict", str(trained[0]), "--input", str(tabs), "--threads=1")[0] == 0
    other = tmp_path / "rows.data"
    other.write_bytes(inputs["rows.csv"].read_bytes())
    status, out, _ = shell("predict", str(trained[0]), "--input", str(other), "--input_format=csv", "--threads=1")
    assert [json.loads(line) for line in out.splitlines()] == expected


@pytest.mark.medium
def test_standard_input_is_text_lines_unless_said(trained, inputs, start):
    lines = start("predict", str(trained[0]), "--threads=1")
    table = start("predict", str(trained[0]), "--threads=1", "--input_format=csv", "--text_column_names=text")
    out, err = lines.communicate("\n".join(TEXTS))
    assert table.communicate(inputs["rows.csv"].read_text())[0] == out
    assert lines.wait(60) == table.wait(60) == 0
    assert len(out.splitlines()) == 3
    assert err == "3 rows, none with an error.\n"


@pytest.mark.medium
def test_unusable_rows_give_an_error_each_and_status_0(trained, tmp_path, shell, caplog):
    (tmp_path / "in.csv").write_bytes(b"text,label\none,1\ntwo\n,1\n\xff,1\nfive,1\n")
    output = tmp_path / "out.jsonl"
    flags = ["--input", str(tmp_path / "in.csv"), "--output", str(output), "--threads=1"]
    status, out, _ = shell("predict", str(trained[0]), *flags)
    assert (status, out) == (0, "")
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer.get("row") for answer in found] == [None, 1, 2, 3, None]
    assert all("Expected" in answer["error"] for answer in found[1:4])
    assert "5 rows, 3 with an error." in caplog.text
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.medium
def test_an_output_that_is_no_plain_file_stays_what_it_is(trained, inputs, tmp_path, shell):
    def predict(output: Path) -> None:
        flags = ["--input", str(inputs["text.txt"]), "--output", str(output), "--threads=1"]
        assert shell("predict", str(trained[0]), *flags)[0] == 0

    plain = tmp_path / "plain.jsonl"
    mine = tmp_path / "plain.jsonl.tmp"
    mine.write_text("a file of the user's own")
    predict(plain)
    expected = plain.read_text()
    assert len(expected.splitlines()) == 3
    assert mine.read_text() == "a file of the user's own"

    link = tmp_path / "link.jsonl"
    plain.write_text("old")
    plain.chmod(0o640)
    link.symlink_to(plain)
    predict(link)
    assert link.is_symlink()
    assert plain.read_text() == expected
    assert plain.stat().st_mode & 0o777 == 0o640

    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        predict(fifo)
        assert os.read(reader, 2**16).decode() == expected
    finally:
        os.close(reader)
    assert fifo.is_fifo()

    main, terminal = os.openpty()
    try:
        device = Path(os.ttyname(terminal))
        before = device.stat().st_rdev
        predict(device)
        assert device.stat().st_rdev == before
        assert os.read(main, 2**16)
    finally:
        os.close(main)
        os.close(terminal)

    descriptor = os.open(tmp_path / "kept", os.O_CREAT | os.O_RDWR)
    try:
        predict(Path(f"/dev/fd/{descriptor}"))
        assert os.fstat(descriptor).st_nlink == 1
        assert (tmp_path / "kept").read_text() == expected
    finally:
        os.close(descriptor)


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "content", "flags", "said"),
    [
        ("in.csv", b"text,label\none,1\n", ["--text_column_names=body"], "Expected column 'body'"),
        ("in.csv", b"a,b\none,1\n", [], "Cannot tell the text column"),
        ("in.txt", b"", [], "Expected rows in"),
        ("in.txt.gz", b"no gzip", [], "Expected .* to be a gzip file"),
        ("in.txt.gz", gzip.compress(b"one\n" * 1000, mtime=0)[:-10], [], "Expected .* to be a gzip file"),
        ("in.txt", b"one\n", ["--exit_block=7"], r"Expected exit_block from 0 to 1, the blocks of .*, got 7\."),
    ],
)
def test_an_input_that_cannot_be_read_is_one_message_and_status_2(name, content, flags, said, trained, tmp_path, shell):
    (tmp_path / name).write_bytes(content)
    status, _, err = shell("predict", str(trained[0]), "--input", str(tmp_path / name), *flags, "--threads=1")
    assert status == 2
    assert re.search(said, err)
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory from /proc")
def test_memory_does_not_grow_with_the_input(trained, start):
    """Rows are sent through an endless pipe, each chunk only after the answers to the one before."""
    process = start("predict", str(trained[0]), "--batch_size=16", "--threads=1")
    chunk = b"".join(b"row %d is a text of some length, and then some\n" % i for i in range(16 * CHUNK_BATCHES))

    def answer(chunks: int) -> int:
        """Sends this many chunks, and returns the memory of the process in KiB afterwards."""
        for _ in range(chunks):
            process.stdin.write(chunk)
            process.stdin.flush()
            for _ in range(16 * CHUNK_BATCHES):
                assert b"label" in process.stdout.readline()
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1])

    before = answer(20)
    after = answer(100)
    process.stdin.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b"30720 rows, none with an error.\n"
    sent = 100 * len(chunk) // 1024
    assert sent > 1000
    assert after - before < 12 * 1024, f"grew by {after - before} KiB while {sent} KiB were sent"
