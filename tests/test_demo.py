"""The page of `hf-al demo` and of a Space in a real browser: an answer at every exit, files, and messages."""

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import closing

import pytest
from conftest import assert_mistake
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

import hf_al
from hf_al.data import columns
from hf_al.loading import load_model

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
TEXTS = ["thank you so much", "you lost my bag", "which gate"]

pytestmark = [
    pytest.mark.medium,
    pytest.mark.timeout(150),
    # gradio's own, on import
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        assert "CI" not in os.environ, "CI installs chromium"
        pytest.skip("no chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play, closing(play.chromium.launch(executable_path=CHROMIUM, args=QUIET)) as chromium:
        yield chromium


@pytest.fixture
def port() -> int:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def try_the_page(browser, port: int, tmp_path, name: str) -> None:
    """What a visitor does: types a text, types none, uploads files."""
    page = browser.new_page()
    elsewhere, errors = [], []
    page.on("request", lambda request: elsewhere.append(request.url) if "127.0.0.1" not in request.url else None)
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(f"http://127.0.0.1:{port}")
    page.fill("#text textarea", "you lost my bag")
    assert name in page.inner_text("h1")
    page.click("#classify")
    page.wait_for_selector("#exit-1 >> text=%")
    for exit_block in ("#exit-0", "#exit-1"):
        assert {"negative", "neutral", "positive"} <= set(page.inner_text(exit_block).split())
        assert " ms" in page.inner_text(exit_block)
    assert "settled after block" in page.inner_text("#verdict")
    page.fill("#text textarea", "  ")
    page.click("#classify")
    page.wait_for_selector("#verdict >> text=Type a text first.")
    page.click("text=The crew was lovely")
    page.wait_for_selector("#exit-1 >> text=%")
    page.click("text=A file:")
    (tmp_path / "numbers.csv").write_text("a,b\n1,2\n")
    page.set_input_files("#file input[type=file]", tmp_path / "numbers.csv")
    page.wait_for_selector("#message >> text=Expected one column named like text")
    page.click("#file [aria-label=Clear]")
    (tmp_path / "texts.csv").write_text("id,text\n" + "".join(f'{i},"{TEXTS[i % 3]}"\n' for i in range(200)))
    page.set_input_files("#file input[type=file]", tmp_path / "texts.csv")
    page.wait_for_selector("#message >> text=200 rows")
    with page.expect_download() as download:
        page.click("#answers a")
    lines = download.value.path().read_text(encoding="utf-8").splitlines()
    assert lines[0] == "text,answer,score,settled after block"
    assert len(lines) == 201
    assert not elsewhere
    assert not errors
    page.close()


def test_a_model_can_be_tried_in_a_browser(browser, port, trained, start, tmp_path):
    program = start("demo", str(trained[0]), "--server_port", str(port))
    assert any(b"in a browser" in line for line in program.stderr)
    try_the_page(browser, port, tmp_path, "run")


@pytest.mark.slow
def test_a_space_answers_where_hf_al_is_not_installed(browser, port, trained, shell, tmp_path):
    space = tmp_path / "space"
    status, _, err = shell("demo", str(trained[0]), "--space", str(space))
    assert status == 0, err
    code = "import sys, runpy; sys.modules['hf_al'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "HF_HOME": str(tmp_path / "cache")}
    app = subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(space / "app.py")], env=environment, stdout=subprocess.PIPE
    )
    try:
        assert any(b"Running on local URL" in line for line in app.stdout)
        try_the_page(browser, port, tmp_path, "run")
    finally:
        app.kill()
        app.communicate()


@pytest.fixture(scope="module")
def pairs(few_tweets, tmp_path_factory):
    """A model that was trained on pairs."""
    folder = tmp_path_factory.mktemp("pairs") / "run"
    rows = [{**row, "text_pair": row["text"][::-1]} for row in few_tweets["train"]]
    model = {"num_blocks": 2, "hidden_size": 16, "target_size": 12}
    small = {"max_steps": 1, "threads": 1, "use_cpu": True, "plots": False, "disable_tqdm": True}
    data = DatasetDict({"train": Dataset.from_list(rows)})
    hf_al.train(hf_al.TrainingArguments(output_dir=str(folder), model=model, **small), data)
    return folder


def test_a_model_of_pairs_asks_for_both_texts(pairs, trained, tmp_path):
    from hf_al.report import reads_pairs
    from hf_al.saved.demo_page import build

    assert (reads_pairs(str(pairs), None), reads_pairs(str(trained[0]), None)) == (True, False)
    page = build(*load_model(str(pairs)), "pairs", [], pairs=True)
    functions = {function.name: function.fn for function in page.fns.values()}
    for second in ("", "  ", None):
        said, *labels = functions["classify"]("a text", second)
        assert said == "**Type the second text, too: this model classifies pairs.**"
        assert not any(label.value for label in labels)
    said, *labels = functions["classify"]("a text", "another")
    assert "settled after block" in said
    assert all(label.value for label in labels)
    (box,) = [block for block in page.blocks.values() if getattr(block, "elem_id", None) == "second"]
    assert (box.show_label, type(box.parent).__name__) == (True, "Form")  # not in an Accordion
    (tmp_path / "one.csv").write_text("text\na\n")
    (tmp_path / "two.csv").write_text("text,text_pair\na,b\n")
    said, *_ = functions["classify_file"](str(tmp_path / "one.csv"))
    assert "Expected the columns text and text_pair in one.csv" in said
    said, table, _ = functions["classify_file"](str(tmp_path / "two.csv"))
    assert (said, table.headers[:2]) == ("1 rows.", ["text", "text_pair"])


def test_a_space_of_a_model_of_pairs_shows_pairs(pairs, shell, tmp_path):
    (tmp_path / "own.txt").write_text("one\ttwo\n\nthree\tfour\n")
    status, _, err = shell(
        "demo", str(pairs), "--space", str(tmp_path / "space"), "--examples", str(tmp_path / "own.txt")
    )
    assert status == 0, err
    settings = json.loads((tmp_path / "space" / "demo.json").read_text())
    assert (settings["pairs"], settings["examples"]) == (True, [["one", "two"], ["three", "four"]])
    (tmp_path / "own.txt").write_text("one\n")
    found = shell("demo", str(pairs), "--space", str(tmp_path / "other"), "--examples", str(tmp_path / "own.txt"))
    assert_mistake(found, "Expected two texts with a tab between them")


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_every_kind_of_answer_has_words(make_model, trained, kind):
    from hf_al.saved.demo_page import Model, settled

    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    labels = 1 if kind == "regression" else 3
    asked = Model(make_model(problem_type=kind, num_labels=labels, vocab_size=len(tokenizer)), tokenizer)
    rows = asked.readings(TEXTS, TEXTS)
    assert [len(exits) for exits in rows] == [3, 3, 3]
    (one,) = asked.readings(TEXTS[:1], TEXTS[:1])
    assert one[0] == pytest.approx(rows[0][0], abs=1e-5)
    answers = [asked.answer(reading) for reading in one]
    assert all(answers)
    assert 0 <= settled(answers) < 3
    if kind == "regression":
        assert float(answers[-1]) == pytest.approx(next(iter(one[-1].values())), abs=1e-3)
    else:
        assert asked.answer({"a": 0.9, "b": 0.2, "c": 0.6}) == "a, c"
        assert asked.answer({"a": 0.1}) == "no label"


def test_an_answer_has_settled_where_all_later_exits_say_the_same():
    from hf_al.saved.demo_page import settled

    assert [settled(list(said)) for said in ("aaa", "baa", "aba", "abb", "a")] == [0, 1, 2, 1, 0]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.pdf", b"x", "Expected a file .txt"),
        ("a.txt", b"\xff\xfe", "Could not read a.txt"),
        ("a.txt", b"\n\n", "Expected 1 to 10000 rows in a.txt, got 0"),
        ("a.txt", b"x\n" * 10001, "got 10001"),
        ("a.csv", b"text,review\na,b\n", "Expected one column named like text"),
        ("a.jsonl", b"{", "Could not read a.jsonl"),
        ("a.jsonl", b"3\n", "Could not read a.jsonl"),
        ("a.jsonl", b"[" * 100000, "Could not read a.jsonl"),
        ("a.jsonl", b'{"text": null}\n', "Expected a text in row 1"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": 3}\n', "Expected a text in row 2"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half a character"),
        ("a.csv", b"text\nhello, world\n", "as many cells"),
        ("a.csv", b"text,text\na,b\n", "each name once"),
        ("a.csv", b'text\n"open one\nrow two\n', "Could not read a.csv: unexpected end of data"),
        ("a.csv", b"text,id\n ,1\n", "Expected a text in row 1"),
        ("a.csv", b"", "got 0"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, said):
    from hf_al.saved.demo_page import read_texts

    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_texts(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "texts", "seconds"),
    [
        ("a.csv", 'id,Text\n1,"two\nlines"\n', ["two\nlines"], None),
        ("A.CSV", "id;text\n1;hi, there\n", ["hi, there"], None),
        ("b.tsv", "label\treview\nx\ta b\n", ["a b"], None),
        ("c.jsonl", '{"q": "one\u2028two"}\n', ["one\u2028two"], None),
        ("d.txt", "one\x0btwo\r\n\nthree\n", ["one\x0btwo", "three"], None),
        ("e.csv", "premise,hypothesis\na,b\n", ["a"], ["b"]),
    ],
)
def test_text_is_found_by_its_name_or_as_the_only_column(name, content, texts, seconds, tmp_path):
    from hf_al.saved.demo_page import read_texts

    (tmp_path / name).write_bytes(content.encode())
    assert read_texts(tmp_path / name) == (texts, seconds)


def test_mistakes_are_one_message(shell, trained, tmp_path):
    assert_mistake(shell("demo", str(tmp_path)), "Expected a model folder")
    assert_mistake(shell("demo", str(trained[0]), "--space", str(trained[0])), "Expected a new or an empty folder")
    assert_mistake(shell("demo", str(trained[0]), "--examples", str(tmp_path / "none")), "--examples")
    assert_mistake(shell("demo", str(trained[0]), "--server_port=99999"), "--server_port", "from 1 to 65535")
    assert_mistake(shell("demo", str(trained[0]), "--server_name=no.invalid"), "got no.invalid")


def test_a_port_that_is_taken_is_one_message(start, trained):
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        program = start("demo", str(trained[0]), f"--server_port={taken.getsockname()[1]}")
        out, err = program.communicate()
        assert_mistake((program.wait(60), out, err), "Could not serve the page", "--server_port")


def test_the_page_knows_the_columns_that_the_command_line_knows():
    from hf_al.saved import demo_page

    assert demo_page.TEXT_NAMES == columns.TEXT_NAMES
    assert demo_page.PAIR_NAMES == columns.PAIR_NAMES
