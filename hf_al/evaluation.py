"""Metrics of every exit of a trained model on labelled text."""

from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from .arguments import TrainingArguments
from .data import sources, tokenization
from .data.batching import Collator, token_lengths
from .data.labels import encode_labels
from .data.numeric import VALUES, check_numbers
from .early import check_ending
from .loading import best_device, device_of, load_model, longest_text
from .metrics import exit_metrics
from .modeling.configuration_al import ALConfig
from .modeling.limits import SINGLE
from .modeling.modeling_al import ALForSequenceClassification
from .parallel.placement import place
from .saved.answers import columns
from .saved.prediction import answers_to, readings_of
from .training.stage import Stage


def evaluate(
    model: str | ALForSequenceClassification,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text_column_names: str | None = None,
    label_column_name: str | None = None,
    batch_size: int = 128,
    show_progress: bool = False,
    device: str | torch.device | None = None,
    revision: str | None = None,
    predictions: str | None = None,
) -> dict[str, Any]:
    """Metrics of every exit of `model` on labelled text, in the model's own type.

    Args:
        model: a folder, a Hub id, or a model (then pass its tokenizer).
        dataset: rows with text, label and the columns of numbers that the model reads; labels by name, or by id if
            the model's names are numbers.
        tokenizer: required if the model is passed as an object.
        text_column_names, label_column_name: as in TrainingArguments; guessed if unambiguous.
        batch_size: examples per batch.
        show_progress: show a progress bar on standard error.
        device: where to compute; default: where the model is; for a model that is loaded here, a GPU if there is one.
        revision: branch, tag or commit of a Hub id (default: main).
        predictions: file for the answers of all exits to each row, with its true label: .jsonl, .csv, .tsv or .parquet.

    Returns:
        The metrics of the last exit, `examples`, and `exits`: the metrics of every exit with its `block`.

    Raises:
        ValueError: no model there, a model object without its tokenizer, ambiguous or missing columns, empty texts,
            missing labels or labels that the model lacks, or another ending of `predictions`.
    """
    if predictions is not None:
        check_ending("predictions", predictions)
    if isinstance(model, str):
        model, tokenizer = load_model(model, revision)
        device = device or best_device()
    if tokenizer is None:
        raise ValueError("Expected the model's tokenizer, got none. Pass tokenizer=..., or the model's folder.")
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    found = answer_exits(model, tokenizer, dataset, text_column_names, label_column_name, batch_size, show_progress)
    if predictions is not None:
        _write_predictions(predictions, found.logits, found.rows, model.config)
    exits = exit_metrics(found.logits, found.labels, model.config.resolved_problem_type)
    last = {name: value for name, value in exits[-1].items() if name != "block"}
    return {**last, "examples": len(found.rows), "exits": exits}


class ExitAnswers(NamedTuple):
    """What every exit answers to labelled text.

    Args:
        logits: (N, C) of each exit, by block.
        labels: class ids (N,), multi-hot rows (N, C), or values.
        rows: the text and label of each row, labels as ids or numbers.
        tokens: the same rows as ids of tokens.
    """

    logits: dict[int, np.ndarray]
    labels: np.ndarray
    rows: Dataset
    tokens: Dataset

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row (N,)."""
        return token_lengths(self.tokens)


def answer_exits(
    model: ALForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    text_column_names: str | None = None,
    label_column_name: str | None = None,
    batch_size: int = 128,
    show_progress: bool = False,
) -> ExitAnswers:
    """One pass over labelled text. Arguments and errors are those of `evaluate`."""
    rows, data, labels = labelled_tokens(model.config, tokenizer, dataset, text_column_names, label_column_name)
    collator = Collator(tokenizer.pad_token_id, model.config.classes)
    stage = Stage(model, place(model.config.units), device_of(model), collator)
    logits = stage.evaluate(data, batch_size, show_progress)
    return ExitAnswers(logits, labels, rows, data)


def labelled_tokens(
    config: ALConfig,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    text_column_names: str | None = None,
    label_column_name: str | None = None,
) -> tuple[Dataset, Dataset, np.ndarray]:
    """The rows of labelled text with their labels as ids or numbers, their tokens, and the labels: ids (N,), multi-hot
    rows (N, C), or values. Arguments and errors are those of `evaluate`."""
    args = TrainingArguments(
        text_column_names=text_column_names,
        label_column_name=label_column_name,
        numeric_column_names=None if VALUES in dataset.column_names else config.numeric_columns,  # read already
        problem_type=config.resolved_problem_type,
        max_seq_length=longest_text(config, tokenizer),
    )
    check_numbers(dataset.column_names, args.numeric_column_names or [])
    named = sources.choose_columns(dataset, args)
    dataset = sources.named_columns(dataset, *named, "test", args.numeric_column_names)
    sources.check_rows(dataset, "test")
    encoded = encode_labels({"test": dataset}, args.problem_type, config.label_names)
    data = tokenization.tokenize(DatasetDict(encoded), tokenizer, args)["test"]
    return encoded["test"], data, Collator(tokenizer.pad_token_id, config.classes).all_labels(data)


def _write_predictions(path: str, logits: dict[int, np.ndarray], rows: Dataset, config: ALConfig) -> None:
    """A row for each text: its true label, and the answer of every exit."""
    names = config.label_names

    def true(label: Any) -> str:
        return ",".join(names[i] for i in label) if isinstance(label, list) else str(np.float32(label))

    single = config.resolved_problem_type == SINGLE
    labels = [names[label] if single else true(label) for label in rows["label"][:]]
    by_exit = {k: readings_of(torch.from_numpy(values), config, all_scores=False) for k, values in logits.items()}
    last = by_exit[max(by_exit)]
    texts = [name for name in ("text", "text_pair") if name in rows.column_names]
    answers = [
        {"true": label, **text, **last[i], "exits": [{"block": k, **r[i]} for k, r in by_exit.items()]}
        for i, (label, text) in enumerate(zip(labels, rows.select_columns(texts), strict=True))
    ]
    with answers_to(path, columns(config, None, False, ["true", *texts])) as write:
        write(answers)
