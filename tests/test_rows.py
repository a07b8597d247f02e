"""Text to classify is read row by row; an unusable row stays in its place."""

import io
import json

import pytest

from hf_al.saved.rows import AS_TEXT, LONGEST_ROW, Unusable, choose_text_columns, read_rows


def opened(data: bytes) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(data), **AS_TEXT)


def read(data: bytes, kind: str = "text", named: str | None = None) -> list:
    """The rows; an unusable one is shown as the last words of its reason."""
    rows = read_rows(opened(data), kind, named)
    return [f"!{row.reason}" if isinstance(row, Unusable) else row for row in rows]


def test_a_line_is_a_text():
    assert read("one day\ntwo days\r\nthree é".encode()) == [("one day",), ("two days",), ("three é",)]


@pytest.mark.parametrize("kind", ["text", "csv"])
def test_lines_may_end_as_on_old_macs(kind):
    assert read(b"text\rone\rtwo\r", kind)[-2:] == [("one",), ("two",)]


@pytest.mark.parametrize("delimiter", [",", " ", "e", "o"])
def test_the_end_of_a_file_is_no_row_whatever_the_delimiter(delimiter):
    lines = "\n".join(delimiter.join(row) for row in (("id", "t", "l"), ("1", "fin", "x"), ("2", "bad", "y")))
    assert list(read_rows(opened(lines.encode()), "csv", "t", delimiter=delimiter)) == [("fin",), ("bad",)]


def test_a_byte_order_mark_is_no_part_of_the_text():
    assert read(b"\xef\xbb\xbfone\ntwo") == [("one",), ("two",)]
    assert read(b"\xef\xbb\xbftext\none", "csv") == [("one",)]


def test_an_empty_line_and_wrong_bytes_are_rows_with_a_reason():
    empty, wrong = "!Expected a text, got an empty one.", "!Expected text in UTF-8, got other bytes."
    assert read(b"one\n\n \nbad \xff\ntwo\n") == [("one",), empty, empty, wrong, ("two",)]


def test_utf_16_is_refused_line_by_line():
    found = read("one\r\ntwo\r\n".encode("utf-16"))
    assert all(isinstance(row, str) and row.startswith("!Expected") for row in found)
    assert any("as of UTF-16. Save it as UTF-8" in row for row in found)


def test_a_row_without_an_end_is_not_read_whole():
    long = b"x" * (3 * LONGEST_ROW)
    found = read(b"one\n" + long + b"\ntwo\n")
    assert [found[0], found[2]] == [("one",), ("two",)]
    assert found[1].startswith(f"!Expected a row of at most {LONGEST_ROW} characters")
    found = read(b"text\none\n" + long + b"\ntwo\n", "csv")
    assert [found[0], found[2]] == [("one",), ("two",)]


def test_a_quote_that_is_never_closed_does_not_swallow_the_rest():
    lines = b"a line of text\n" * (LONGEST_ROW // 15 + 10)
    found = read(b'text\n"open\n' + lines, "csv")
    assert "field larger than field limit" in found[0]
    assert found[-1] == ("a line of text",)


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_quote_that_is_open_at_the_end_is_a_mistake(end):
    """It takes all rows behind it for one cell, and training refuses such a file."""
    rows = read_rows(opened(b'text\none\n"two\nthree' + end), "csv")
    assert next(rows) == ("one",)
    with pytest.raises(ValueError, match=r"Expected a quote that is closed.* begins with 'two\\nthree"):
        next(rows)


@pytest.mark.parametrize(("kind", "mark"), [("csv", ","), ("tsv", "\t")])
def test_csv_has_a_header_quotes_and_line_ends_inside_a_cell(kind, mark):
    data = f'label{mark}text\n1{mark}"He said ""no"",{mark} and\nleft"\n\n0{mark}NA\n'.encode()
    assert read(data, kind) == [(f'He said "no",{mark} and\nleft',), ("NA",)]


def test_a_csv_row_with_another_number_of_cells_is_unusable():
    data = b"text,label\none,1\ntwo\nthree,1,2\n,1\nfour,\xff\nfive \xff,1\nsix,1"
    assert read(data, "csv") == [
        ("one",),
        "!Expected 2 cells, as the header has, got 1.",
        "!Expected 2 cells, as the header has, got 3.",
        "!Expected a text, got an empty one.",
        ("four",),
        "!Expected text in UTF-8, got other bytes.",
        ("six",),
    ]


def test_json_lines_are_objects():
    lines = [
        '{"text": "one", "label": 1}', "{broken", "", '["two"]', '{"label": 1}', '{"text": null}', '{"text": 3}',
        '{"text": "\\ud800"}', '{"text": "caf\\u00e9"}', "[" * 100_000,
    ]  # fmt: skip
    found = read("\n".join(lines).encode(), "jsonl")
    assert found[0] == ("one",)
    assert found[1].startswith("!Expected a json object, got none")
    assert found[2:8] == [
        "!Expected a json object, got list.",
        "!Expected a text, got none.",
        "!Expected a text, got none.",
        "!Expected a text, got int.",
        "!Expected text in UTF-8, got other bytes.",
        ("café",),
    ]
    assert found[8].startswith("!Expected a json object")
    assert len(found) == 9


def test_json_rows_before_the_first_with_the_column_are_unusable_not_the_end():
    lines = ["{broken", json.dumps({"id": 1, "label": 2, "note": 3}), json.dumps({"what": "one"})]
    assert read("\n".join(lines).encode(), "jsonl", "what")[1:] == ["!Expected a text, got none.", ("one",)]


def test_an_id_is_no_text():
    (row,) = read_rows(opened(b'{"id": "7"}\n'), "jsonl", id_column="id")
    assert row == Unusable("Expected a text, got none.", "7")


@pytest.mark.parametrize(
    ("data", "kind", "shown"),
    [(b"id,text\ncaf\xe9,hello\nb,world\n", "csv", "caf\\udce9"),
     (b'{"id": "\\ud800", "text": "hello"}\n{"id": "b", "text": "world"}\n', "jsonl", "\\ud800")],
)  # fmt: skip
def test_an_id_that_cannot_be_written_is_a_row_with_a_reason(data, kind, shown):
    wrong, row = read_rows(opened(data), kind, id_column="id")
    assert wrong == Unusable("Expected an id in UTF-8, got other bytes.", shown)
    assert (row, row.id) == (("world",), "b")


@pytest.mark.parametrize(("data", "kind"), [(b"text,label\none,1\n", "csv"), (b'{"text": "one"}\n', "jsonl")])
def test_a_text_may_be_its_own_id(data, kind):
    (row,) = read_rows(opened(data), kind, "text", id_column="text")
    assert (row, row.id) == (("one",), "one")


def test_json_lines_without_any_object_are_rows_with_a_reason():
    assert [row[0] for row in read(b"{\n{\n", "jsonl")] == ["!", "!"]


def test_pairs_come_from_two_columns():
    data = b"premise,hypothesis,label\na man,a person,1\na man,,1\n"
    assert read(data, "csv") == [("a man", "a person"), "!Expected a text, got an empty one."]
    assert read(b"a,b,c\n1,2,3\n", "csv", "c, a") == [("3", "1")]


@pytest.mark.parametrize(
    ("columns", "text"),
    [
        (["id", "text", "label"], ["text"]),
        (["label", "Review"], ["Review"]),
        (["label", "what"], ["what"]),
        (["headline"], ["headline"]),
        (["sentence1", "sentence2", "label"], ["sentence1", "sentence2"]),
        (["question", "sentence"], ["question", "sentence"]),
    ],
)
def test_the_text_column_is_guessed_where_there_is_one_reading(columns, text):
    assert choose_text_columns(columns, []) == text


@pytest.mark.parametrize(
    ("data", "kind", "named", "said"),
    [
        (b"a,b\n1,2\n", "csv", None, "Cannot tell the text column among"),
        (b"text,label\n1,2\n", "csv", "body", "Expected column 'body', got the columns"),
        (b'{"text": "one"}\n', "jsonl", "body", "Expected column 'body', got the columns"),
        (b'{"a": 1, "b": 2}\n', "jsonl", None, "Cannot tell the text column among"),
        (b'[{"text": "one"}]', "jsonl", None, "Expected a json object in each line, got an array"),
        (
            b'[{"text": "%s"}]' % (b"a" * LONGEST_ROW),
            "jsonl",
            None,
            "Expected a json object in each line, got an array",
        ),
        (b'\n[\n{"text": "one"}\n]\n', "jsonl", None, "Expected a json object in each line, got an array"),
        (b"text\n", "csv", "a,b,c", "Expected one or two text columns"),
        (b"one\n", "text", "body", "Pass --input_format csv or jsonl"),
        (b"", "csv", None, "Expected a header line"),
        (b"text\xff,label\n", "csv", None, "Expected a header in UTF-8"),
    ],
)
def test_a_wrong_column_is_said_before_the_first_row(data, kind, named, said):
    with pytest.raises(ValueError, match=said):
        read_rows(opened(data), kind, named)


def test_no_more_is_read_than_is_asked_for():
    """Flow control: an endless stream is not read ahead."""
    for kind, line in (("text", "one\n"), ("csv", "text\n"), ("jsonl", '{"text": "one"}\n')):
        stream = io.StringIO(line * 1000)
        rows = read_rows(stream, kind)
        for _ in range(3):
            next(rows)
        assert stream.tell() <= 4 * len(line)
