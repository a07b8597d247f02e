"""What training starts from: the data, the tokenizer, and a model that is new or that somebody trained before."""

import dataclasses
import hashlib
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from ..arguments import TrainingArguments
from ..data import sources, tokenization
from ..data.batching import BatchOrder, token_lengths
from ..data.labels import encode_labels, label_names, problem_type_of
from ..data.numeric import standards
from ..data.streaming import StreamOrder, Windows, open_windows
from ..loading import difference, load_encoder, load_model, longest_text
from ..messages import some
from ..modeling.blocks import ALBlock
from ..modeling.configuration_al import ALConfig
from ..modeling.limits import REGRESSION, SINGLE
from ..modeling.modeling_al import ALForSequenceClassification
from ..parallel.launch import processes_here
from ..parsing import check_lists, check_model_keys
from ..registration import MODEL_CLASSES
from ..report import reads_pairs
from .local_step import block_randomness
from .memory import TooLarge
from .setup import make_config

logger = logging.getLogger(__name__)

BEFORE_THE_FIRST_STEP = -1
ONLY_LEARNING = (  # config values that no answer depends on, or whose change would not fit the weights
    "num_blocks", "objective", "associated_loss", "class_weights", "label_smoothing", "initialization",
    "initializer_range", "code_scale", "embedding_std", "hidden_dropout_prob", "embedding_dropout_prob",
    "bridge_dropout_prob", "attention_probs_dropout_prob", "lora_dropout",
)  # fmt: skip
OF_NEW_TOKENIZERS = ("tokenizer_type", "tokenizer_vocab_size", "min_frequency", "lowercase", "text_style")


class Start(NamedTuple):
    """What a run starts with.

    Args:
        model, tokenizer: new, or trained before.
        data: the tokenized splits; of a stream, its first window.
        order: of the batches.
        about: what the report says of the rows: the `fingerprint` of each split, whether they are `pairs`, and the
            `numbers` beside them.
    """

    model: ALForSequenceClassification
    tokenizer: PreTrainedTokenizerBase
    data: DatasetDict
    order: BatchOrder | StreamOrder
    about: dict[str, Any]


def load(args: TrainingArguments, datasets: DatasetDict | None, windows: Windows | None = None) -> Start:
    """What a run starts with.

    Args:
        args: of the run.
        datasets: raw splits; with `streaming`, train as a stream or, if its `windows` are given, the first of them.
        windows: of a stream that somebody else reads.

    Raises:
        ValueError: data, a tokenizer or a saved model that cannot be used.
    """
    saved = None
    if args.model_name_or_path:
        saved = load_model(args.model_name_or_path, args.model_revision)
        _take_columns(args, saved[0].config)
    if args.streaming:
        if windows is None:
            windows, datasets = open_windows(args, sources.load_raw(args) if datasets is None else datasets)
        assert datasets is not None
        columns = sources.choose_columns(datasets["train"], args)
    data, fingerprints = sources.load_with_fingerprints(args, datasets, saved[0].config if saved else None)
    about: dict[str, Any] = {"fingerprint": fingerprints, "pairs": "text_pair" in data["train"].column_names}
    name = args.tokenizer_source
    fields = {f.name: f.default for f in dataclasses.fields(args)}
    unused = [n for n in OF_NEW_TOKENIZERS if getattr(args, n) != fields[n]] if name else []
    if unused:
        logger.warning("The tokenizer is that of %s. Without effect: %s.", name, ", ".join(unused))
    if saved is not None:
        model, tokenizer, data = continue_model(args, *saved, data)
    else:
        tokenizer = tokenization.build_tokenizer(args, data["train"])
        if args.word_vectors == "auto":
            args.word_vectors = tokenization.automatic_vectors(args, tokenizer)
        model = build_model(args, tokenizer, data["train"])
    _check_late(args, model.config, about["pairs"])
    before = args.model_name_or_path
    if before and not about["pairs"] and Path(before).is_dir() and reads_pairs(before):  # the Hub is not asked
        logger.warning("%s was trained on pairs of texts, and these are single ones: see text_column_names.", name)
    if args.numeric_column_names:
        about["numbers"] = {"columns": args.numeric_column_names, "block": model.config.numeric_block}
    tokens = tokenization.tokenize(data, tokenizer, args)
    batch = args.global_batch_size
    if windows is None:
        order = BatchOrder(token_lengths(tokens["train"]), batch, args.seed)
        return Start(model, tokenizer, tokens, order, about)
    kind, names = problem_type_of(data["train"]), label_names(data["train"])

    def encode(rows: Dataset) -> Dataset:
        rows = sources.named_columns(rows, *columns, "train", args.numeric_column_names)
        sources.check_rows(rows, "train")
        labelled = encode_labels({"train": rows}, kind, names)
        return tokenization.tokenize(DatasetDict(labelled), tokenizer, args)["train"]

    stream = StreamOrder(windows, encode, tokens["train"].features, batch, args.seed)
    return Start(model, tokenizer, tokens, stream, about)


def _check_late(args: TrainingArguments, config: Any, pairs: bool) -> None:
    """ValueError if no block would ever read late text."""
    block, start = config.late_block, config.late_from
    if block is not None and start is None and not pairs:
        advice = "Pass late_from=64, for example, to have the rest of each text late."
        if args.model_name_or_path:
            advice = "Name both of their columns in --text_column_names."
        raise ValueError(
            f"Expected pairs of texts with late_block={block}, whose second text is late, got single texts. {advice}"
        )
    if start is not None and start >= config.max_position_embeddings:
        raise ValueError(
            f"Expected late_from below {config.max_position_embeddings}, the longest text, got {start}: nothing would "
            "be late. Pass less, or more --max_seq_length."
        )


def build_model(
    args: TrainingArguments, tokenizer: PreTrainedTokenizerBase, train: Dataset
) -> ALForSequenceClassification:
    """A new model: vocabulary, labels and problem type follow from tokenizer and data, the weights of a block from
    `args.seed` and its number."""
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "sep_token_id": tokenization.pair_separator(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        **_label_values(train),
        **args.model,
    }
    if args.numeric_column_names:
        names = args.numeric_column_names
        values |= {"numeric_columns": names, **standards(train, names)}
    if args.encoder:
        return _from_encoder(args, values)
    rows = None
    if args.word_vectors:
        rows = tokenization.embedding_rows(tokenizer, args.word_vectors, args.seed)
        wanted = values.setdefault("embedding_size", rows.shape[1])
        if wanted != rows.shape[1]:
            raise ValueError(
                f"Expected embedding_size={rows.shape[1]}, the word vectors' width, got {wanted}. Leave it out."
            )
    model = new_model(_config(args, values), args.seed, args)
    if rows is not None:
        for block in model.model.blocks:
            if (table := block.encode.input_embeddings()) is not None:
                table.weight.data.copy_(torch.from_numpy(rows))
    return model


def _from_encoder(args: TrainingArguments, values: dict[str, Any]) -> ALForSequenceClassification:
    """A pretrained encoder, cut into blocks."""
    assert args.encoder is not None
    config = _config(args, values)
    if values["vocab_size"] > config.vocab_size:
        raise ValueError(
            f"Expected a tokenizer of at most {config.vocab_size} tokens, the embedding rows of {args.encoder}, got "
            f"{values['vocab_size']}. They are of different models: save the encoder's own tokenizer beside it."
        )
    model: Any = new_model(config, args.seed, args)
    model.copy_encoder(load_encoder(args.encoder))
    return model


def _take_columns(args: TrainingArguments, saved: ALConfig) -> None:
    """Takes the columns of numbers from the saved model. ValueError if others are named."""
    theirs, named = saved.numeric_columns, args.numeric_column_names
    if named and named != theirs:
        raise ValueError(
            f"Expected numeric_column_names={','.join(theirs or []) or None}, those of {args.model_name_or_path}, got "
            f"{','.join(named)}. Leave them out."
        )
    if not theirs and args.model.get("numeric_block"):
        raise ValueError(
            f"Expected no numeric_block for {args.model_name_or_path}, which reads text alone, got "
            f"{args.model['numeric_block']}. Leave it out."
        )
    args.numeric_column_names = theirs


def continue_model(
    args: TrainingArguments,
    saved: ALForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
) -> tuple[ALForSequenceClassification, PreTrainedTokenizerBase, DatasetDict]:
    """The model of `args.model_name_or_path` (`saved`), and its tokenizer, to go on with.

    If the model knows all labels of the data, it keeps its own, in their order. If not, its label side starts anew: the
    layers between labels and target codes, which have one row or column per label. With more `num_blocks` than were
    saved, the others are new.

    Raises:
        ValueError: a model that cannot be trained, config values that do not fit its weights, or labels that frozen
            blocks cannot learn.
    """
    name = args.model_name_or_path
    assert name is not None
    args.word_vectors = None
    if args.model_type not in ("", saved.config.model_type):
        raise ValueError(
            f"Expected model_type={saved.config.model_type}, that of {name}, got {args.model_type}. Leave it out."
        )
    if saved.config.inference_only:
        raise ValueError(
            f"Expected a model with its training-only parameters, got {name}, which was saved with inference_only=True."
        )
    args.model_type = saved.config.model_type
    args.__post_init__()  # what depends on the architecture
    longest = longest_text(saved.config, tokenizer)
    if args.max_seq_length not in (longest, TrainingArguments.max_seq_length):
        logger.warning("max_seq_length=%d has no effect: %s reads %d tokens.", args.max_seq_length, name, longest)
    args.max_seq_length = longest
    check_model_keys(args)
    kind, names = problem_type_of(data["train"]), label_names(data["train"])
    known = saved.config.label_names
    keeps_labels = kind == saved.config.resolved_problem_type and set(names) <= set(known)
    if keeps_labels:
        data = DatasetDict(encode_labels(data, kind, known))
        logger.info("Continuing from %s, with its labels.", name)
    else:
        logger.info(
            "Continuing from %s. Its labels are %s, those of the data are %s: the label side of block 0 starts anew.",
            name, some(known, 8), some(names, 8),
        )  # fmt: skip
    if args.freeze == "blocks":
        _check_frozen(args, saved.config, names if not keeps_labels else [])
    anew = {"class_weights": None, "label_mean": None, "label_deviation": None}
    labels = {} if keeps_labels else {**anew, **_label_values(data["train"])}
    if saved.config.exit_thresholds is not None:
        logger.info("The calibration of %s is left out: run hf-al calibrate on the new model.", name)
    config = _config(args, {**saved.config.uncalibrated().to_dict(), "_name_or_path": "", **labels, **args.model})
    check_lists(args, config.num_blocks)
    model = new_model(config, args.seed, args)

    def is_kept(parameter: str) -> bool:
        k = int(parameter.split(".")[2])
        return k < saved.config.num_blocks and (keeps_labels or not _is_label_side(parameter, model))

    kept, wanted = (
        {n: t for n, t in tensors.items() if is_kept(n)} for tensors in (saved.state_dict(), model.state_dict())
    )
    wrong = difference(*({n: tuple(t.shape) for n, t in tensors.items()} for tensors in (kept, wanted)))
    if wrong:
        raise ValueError(
            f"Expected config values that fit the weights of {name}, got others: {wrong}. Leave them out: those of the "
            "saved model are used."
        )
    model.load_state_dict(kept, strict=False)
    return model, tokenizer, data


def weights_digest(model: ALForSequenceClassification) -> str:
    """A digest of all weights, to compare those that processes start from."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _label_values(train: Dataset) -> dict[str, Any]:
    """The config values that follow from the labels."""
    names, kind = label_names(train), problem_type_of(train)
    values: dict[str, Any] = {
        "problem_type": kind,
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
    if kind == REGRESSION:
        labels = np.asarray(train["label"][:], np.float64)
        if labels.std() == 0:
            raise ValueError(
                f"Expected labels that differ, got {labels[0]:g} in all {len(labels)} rows of train. Add rows with "
                "other values, or name the label column: --label_column_name."
            )
        values |= {"label_mean": [float(labels.mean())], "label_deviation": [float(labels.std())]}
    return values


def _config(args: TrainingArguments, values: dict[str, Any]) -> ALConfig:
    if values.get("label_smoothing") and values["problem_type"] != SINGLE:
        kind = values["problem_type"]
        logger.warning("label_smoothing spreads one label over the classes: it is not used for %s.", kind)
        values = {**values, "label_smoothing": 0.0}
    return make_config(args, values)


def new_model(config: ALConfig, seed: int, args: TrainingArguments | None = None) -> ALForSequenceClassification:
    """A model whose weights follow from the seed. `args`: of the run (None: of one process on a CPU).

    Raises:
        ValueError: it does not fit.
    """
    with torch.device("meta"):
        model: Any = MODEL_CLASSES[config.model_type][2](config)
    _check_fits(model, args)
    for k in range(config.num_blocks):
        model.model.blocks[k] = new_block(model, k, seed)
    return model


def _check_fits(model: ALForSequenceClassification, args: TrainingArguments | None) -> None:
    """Refuses a model whose training cannot fit this machine, before any memory is taken.

    Raises:
        TooLarge: more than the memory of the machine: the weights, of which each process here first has all; and unless
            they are elsewhere, gradients and two moments of an optimizer, of which each stage has its own.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    is_elsewhere = args is not None and (args.offload or (torch.cuda.is_available() and not args.use_cpu))
    processes, stages = processes_here(), args.stages if args else 1
    needed = 4 * processes * (count + (0 if is_elsewhere else 3 * learning // stages))
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        state, more = ("", "") if is_elsewhere else (" with gradients and optimizer state", ", or --offload")
        state += f" in {processes} processes" if processes > 1 else ""
        smaller = "a smaller hidden_size, num_blocks or vocabulary"
        if model.config.model_type == "al_encoder":
            smaller = "a smaller encoder, or --lora_r"
        raise TooLarge(
            f"Expected a model whose training fits the {there / 2**30:.0f} GiB of this machine, got one of {count:,} "
            f"parameters, which needs {needed / 2**30:,.0f} GiB{state}. Pass {smaller}{more}."
        )


def _check_frozen(args: TrainingArguments, saved: ALConfig, others: list[str]) -> None:
    """Refuses to freeze blocks whole that have yet to learn, or whose answers would change. `others`: labels that the
    saved model does not have."""
    name, blocks = args.model_name_or_path, saved.num_blocks
    if others:
        raise ValueError(
            f"Expected labels that {name} knows with freeze=blocks, {some(saved.label_names, 8)}, got "
            f"{some(others, 8)}: the blocks that are frozen cannot learn others. Pass data with those labels, or hf-al "
            f"train --model_name_or_path {name} --num_blocks {args.model.get('num_blocks', blocks)} --frozen_blocks "
            f"{args.frozen_blocks} --freeze encoders."
        )
    moved = [n for n, v in args.model.items() if n not in ONLY_LEARNING and v != getattr(saved, n, v)]
    if moved:
        raise ValueError(
            f"Expected no other {moved[0]} than {getattr(saved, moved[0])!r}, that of {name}, with freeze=blocks, got "
            f"{args.model[moved[0]]!r}: the exits of frozen blocks would answer otherwise. Leave it out."
        )
    if args.frozen_blocks > blocks:
        raise ValueError(
            f"Expected frozen_blocks of at most {blocks}, the blocks of {name}, with freeze=blocks, got "
            f"{args.frozen_blocks}: new blocks have yet to learn. Pass fewer."
        )


def _is_label_side(name: str, model: ALForSequenceClassification) -> bool:
    """Whether the parameter `name`, perhaps of a block that `model` lacks, has a row or a column for each label."""
    _, _, k, part = name.split(".")[:4]
    blocks = model.model.blocks
    return part in ("encode_target", "decode_target") and int(k) < len(blocks) and blocks[int(k)].reads_labels


def new_block(model: ALForSequenceClassification, k: int, seed: int) -> ALBlock:
    """Block k with the weights that follow from (seed, k), whoever builds it and beside how many others."""
    with block_randomness(torch.device("cpu"), seed, k, BEFORE_THE_FIRST_STEP, micro_batch=0, replica=0):
        block = ALBlock(model.config, k, model.model.encoder_class)
        block.apply(model._initialize_weights)  # but for a pretrained encoder's part, which did so itself
    return block


def keep_blocks(model: ALForSequenceClassification, owned: list[int], device: torch.device) -> None:
    """Moves the owned blocks to the device and frees the weights of all others: their names and shapes stay, on the
    device "meta"."""
    for block in model.model.blocks:
        block.to(device if block.index in owned else "meta")
