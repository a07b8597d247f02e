"""`hf-al export --format onnx` and `torch_export`: a trained model as graphs that run without hf_al.

Every file is opened again and compared with the model before the folder gets its name. What is said about how right the
files are is measured on the files themselves.

Legend: N batch, T tokens, C classes.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from .atomic import export
from .data.batching import Collator, evaluation_batches, token_lengths
from .evaluation import labelled_tokens
from .loading import longest_text
from .messages import table
from .metrics import compute_metrics
from .modeling.blocks import walk
from .modeling.modeling_al import ALForSequenceClassification
from .ranges import METRIC_NAMES
from .report import without_nan
from .saved.graph_files import FORMATS, OPSET, Arrays, Format, Run, quantize, write
from .saved.graphs import Tensors, block_graphs, exit_graph, outputs_of

TOLERANCE = 1e-4  # how far a float32 file may be from the model; relative where numbers are above 1
LONGEST_CHECKED = 512  # tokens
BATCH_SIZE = 32  # of labelled text
README = """# Graphs of {model}

Written by `hf-al export --format {format}` of hf_al {version}, for programs that need neither hf_al nor its code.

- `block_K`: block K and its exit. Block 0 reads token ids, every other one what the block before it gave. A program can
  stop after any of them.
- `exit_K`: the whole model as far as the exit of block K.
- `export.json`: inputs, outputs, labels; what the logits of each graph are divided by, and when a text may leave after
  each block.
- `tokenizer.json`: makes token ids of text.

Axes called `batch` and `length` may have any size, `length` up to {longest}. Padding, where `attention_mask` is 0, may
be on either side.

{text}

`difference` is the largest one between what a file and the model in float32 give, relative where numbers are above 1.
"""


@dataclass
class File:
    """A graph that was written: what export.json says of it, and how it is computed."""

    path: Path
    row: dict[str, Any]
    run: Run


@dataclass
class Files:
    """Those of one number format: each block, and the whole model as far as some exits."""

    blocks: list[File]
    exits: list[File]

    def __iter__(self) -> Iterator[File]:
        return iter([*self.blocks, *self.exits])

    def answers(self, batch: Arrays) -> list[Arrays]:
        """What each file gives for a batch: the blocks one after the other, then the whole models."""
        found: list[Arrays] = []
        known = dict(batch)
        for file in self.blocks:
            found.append(file.run(known))
            known |= found[-1]
        return [*found, *(file.run(batch) for file in self.exits)]


def export_graphs(
    model: ALForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    name: str,
    format: str = "onnx",
    exits: Iterable[int] | None = None,
    int8: bool = False,
    labelled: Dataset | None = None,
    text_column_names: str | None = None,
    label_column_name: str | None = None,
) -> dict[str, Any]:
    """Writes a graph of each block, and one of the whole model as far as each of `exits`, in float32.

    Args:
        model: of a finished run; it is put into float32, on the CPU, in evaluation mode.
        tokenizer: of the same run.
        folder: new or empty.
        name: of the model, for people.
        format: a row of `FORMATS`.
        exits: blocks after whose exits a whole model stops (default: the last one).
        int8: also write each graph with int8 weights; only for `onnx`.
        labelled: rows with text and label, on which each file is measured; if None, nothing is.
        text_column_names, label_column_name: as in TrainingArguments; guessed if unambiguous.

    Returns:
        What export.json holds.

    Raises:
        ValueError: a model that cannot be written in this format, a file that does not give the numbers of the model,
            or rows that `evaluate` would refuse.
    """
    config = model.config
    model.float().cpu().eval()
    rows = None
    if labelled is not None:
        _, *rows = labelled_tokens(config, tokenizer, labelled, text_column_names, label_column_name)
    batches = check_batches(model, tokenizer)
    with export(folder) as aside:
        files = _write(model, aside, FORMATS[format], batches[1], config.exits()[-1:] if exits is None else exits)
        kinds = [files]
        _compare(model, files, batches, TOLERANCE)
        if int8:
            kinds.append(Files([_small(f) for f in files.blocks], [_small(f) for f in files.exits]))
            _compare(model, kinds[1], batches, None)
        if rows is not None:
            for kind in kinds:
                _measure(model, tokenizer, kind, *rows)
        found = without_nan(
            {
                "model": name,
                "format": format,
                "model_type": config.model_type,
                "problem_type": config.resolved_problem_type,
                "labels": config.label_names,
                "max_length": longest_text(config, tokenizer),
                "pad_token_id": config.pad_token_id,
                "exit_rule": config.exit_rule,
                "measured_rows": None if rows is None else len(rows[0]),
                "opset": OPSET if format == "onnx" else None,
                "versions": {package: version(package) for package in ("hf_al", "torch", *FORMATS[format].packages)},
                "blocks": [file.row for file in files.blocks],
                "exits": [file.row for file in files.exits],
            }
        )
        tokenizer.save_pretrained(aside)
        (aside / "export.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        readme = README.format(
            model=name, format=format, version=version("hf_al"), longest=found["max_length"],
            text=as_text(found, markdown=True),
        )  # fmt: skip
        (aside / "README.md").write_text(readme, encoding="utf-8")
    return found


# --- writing


def _write(
    model: ALForSequenceClassification, folder: Path, kind: Format, example: Tensors, exits: Iterable[int]
) -> Files:
    config, answers = model.config, by_block(model, example)
    text_axes, longest = model.model.encoder_class.text_axes, config.max_position_embeddings
    temperatures = config.exit_temperatures or [1.0] * config.num_blocks

    def written(name: str, block: int, graph: nn.Module, given: Tensors, outputs: Tensors) -> File:
        path = folder / f"{name}_{block}{kind.ending}"
        try:
            shapes = write(kind, path, graph, given, outputs, text_axes, longest)
        except OSError:
            raise
        except Exception as error:  # each step of an exporter raises its own
            why = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            raise ValueError(
                f"Expected a model that can be written as {path.name}, got {why.rstrip('.: ')}. Pass another --format."
            ) from error
        row = {"file": path.name, "block": block, **shapes, "bytes": _bytes(path), "temperature": temperatures[block]}
        return File(path, row, kind.open(path))

    blocks = []
    for k, graph in enumerate(block_graphs(model, kind.lstm, kind.attention)):
        given = example if k == 0 else {"attention_mask": example["attention_mask"], **_without_logits(answers[k - 1])}
        blocks.append(written("block", k, graph, given, answers[k]))
        blocks[k].row["threshold"] = (config.exit_thresholds or [None] * config.num_blocks)[k]
    wholes = [
        written("exit", k, exit_graph(model, k, kind.lstm, kind.attention), example, {"logits": answers[k]["logits"]})
        for k in exits
    ]
    return Files(blocks, wholes)


def _small(file: File) -> File:
    """The same graph with int8 weights; its row becomes part of that of the other."""
    path = file.path.with_suffix(".int8.onnx")
    quantize(file.path, path)
    row = file.row["int8"] = {"file": path.name, "block": file.row["block"], "bytes": _bytes(path)}
    return File(path, row, FORMATS["onnx"].open(path))


def _bytes(path: Path) -> int:
    """Of a file, with the weights that may lie beside it."""
    return sum(part.stat().st_size for part in path.parent.glob(f"{path.name}*"))


# --- comparing


def check_batches(model: ALForSequenceClassification, tokenizer: PreTrainedTokenizerBase) -> list[Tensors]:
    """Batches of texts made of the tokenizer's words: one short text, seven ragged ones, the longest, padding on the
    left, and pairs if the model knows them."""
    words = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    rng, longest = np.random.default_rng(0), longest_text(model.config, tokenizer)

    def text(tokens: int) -> str:
        return str(tokenizer.decode(rng.choice(words, tokens)))

    def batch(*lengths: int, pairs: bool = False, side: str = "right") -> Tensors:
        columns = [[text(tokens) for tokens in lengths] for _ in range(1 + pairs)]
        rows = tokenizer(*columns, truncation=True, max_length=longest)["input_ids"]
        ids = [torch.tensor(row, dtype=torch.long) for row in rows]
        masks = [torch.ones_like(row) for row in ids]
        return inputs_of(
            model,
            tokenizer,
            pad_sequence(ids, True, model.config.pad_token_id, side),
            pad_sequence(masks, True, 0, side),
        )

    found = [batch(1), batch(4, 1, 9, 2, 7, 3, 5), batch(min(longest, LONGEST_CHECKED), 2), batch(3, 6, side="left")]
    return found if model.config.sep_token_id is None else [*found, batch(3, 8, pairs=True)]


def inputs_of(
    model: ALForSequenceClassification, tokenizer: PreTrainedTokenizerBase, input_ids: Tensor, mask: Tensor
) -> Tensors:
    """What a graph that reads text takes: `token_type_ids` as well if the tokenizer makes them and the model reads
    them."""
    given = {"input_ids": input_ids, "attention_mask": mask}
    if "token_type_ids" in tokenizer.model_input_names:
        prepared = model.model.prepare_inputs(**given)
        given |= {name: prepared[name] for name in ("token_type_ids",) if name in prepared}
    return given


@torch.no_grad()
def by_block(model: ALForSequenceClassification, batch: Tensors) -> list[Tensors]:
    """What the graph of each block is to give."""
    inputs = model.model.prepare_inputs(**batch)
    outs = walk(model.model.blocks, {}, inputs, exits=model.config.exits())
    return [outputs_of(out, block.index) for block, out in outs]


def _compare(model: ALForSequenceClassification, files: Files, batches: list[Tensors], tolerance: float | None) -> None:
    """Notes how far each file is from the model, and refuses one that is further than `tolerance`."""
    for batch in batches:
        wanted = by_block(model, batch)
        wanted += [{"logits": wanted[file.row["block"]]["logits"]} for file in files.exits]
        for file, expected, got in zip(files, wanted, files.answers(_arrays(batch)), strict=True):
            difference = max(_difference(tensor, got[name], batch) for name, tensor in expected.items())
            file.row["difference"] = max(file.row.get("difference", 0.0), difference)
            if tolerance is not None and not difference <= tolerance:
                raise ValueError(
                    f"Expected {file.path.name} to give the numbers of the model up to {tolerance:g}, got a difference "
                    f"of {difference:.1e}. Nothing is kept. Try another --format, or another version of its packages."
                )


def _difference(expected: Tensor, got: np.ndarray, batch: Tensors) -> float:
    """The largest one, relative where numbers are above 1. What stands on padding does not count."""
    if got.shape != expected.shape:
        return float("inf")
    apart = np.abs(got - expected.numpy()) / expected.abs().clamp(min=1).numpy()
    if apart.ndim == 3 and apart.shape[:2] == batch["attention_mask"].shape:
        apart = apart[batch["attention_mask"].numpy() > 0]
    return float(apart.max())


def _arrays(tensors: Tensors) -> Arrays:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def _without_logits(answer: Tensors) -> Tensors:
    return {name: tensor for name, tensor in answer.items() if name != "logits"}


# --- measuring


def _measure(
    model: ALForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    files: Files,
    data: Dataset,
    labels: np.ndarray,
) -> None:
    """Notes the metrics of each file that gives logits."""
    config = model.config
    collator = Collator(config.pad_token_id, config.classes)
    logits: dict[Path, np.ndarray] = {}
    for rows in evaluation_batches(token_lengths(data), BATCH_SIZE):
        batch = collator(data, rows)
        given = inputs_of(model, tokenizer, batch["input_ids"], batch["attention_mask"])
        for file, answer in zip(files, files.answers(_arrays(given)), strict=True):
            if "logits" in answer:
                logits.setdefault(file.path, np.empty((len(data), config.classes)))[rows] = answer["logits"]
    for file in files:
        if file.path in logits:
            file.row["metrics"] = compute_metrics(logits[file.path], labels, config.resolved_problem_type)


# --- for people


def as_text(found: dict[str, Any], markdown: bool = False) -> str:
    """A table of the files, and what is not known about them."""
    metric = METRIC_NAMES[found["problem_type"]][0]
    files = [file for graph in (*found["blocks"], *found["exits"]) for file in (graph, graph.get("int8")) if file]
    rows = [
        {
            "file": file["file"],
            "MiB": f"{file['bytes'] / 2**20:.2f}",
            "difference": f"{file['difference']:.1e}",
            **({metric: file.get("metrics", {}).get(metric)} if found["measured_rows"] else {}),
        }
        for file in files
    ]
    if found["measured_rows"]:
        measured = f"The {metric} is that of the files on {found['measured_rows']} rows."
    else:
        measured = "How right the files are was not measured; --validation_file FILE does that."
    return f"{table(rows, markdown)}\n\n{measured}"
