"""Graphs as files: ONNX for onnxruntime, and programs of `torch.export`. Each format is written, and opened again."""

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from .graph_lstm import OnnxLSTM, TorchLSTM
from .graphs import TEXT, MakeLSTM, Tensors, base

OPSET = 20  # of ONNX
NOT_OURS = (  # warnings of the exporters about their own code, and that an axis of several inputs has one name
    ".*LeafSpec.* is deprecated",
    "# The axis name: .* shares the same shape constraints with another axis",
)
Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Arrays]
Shapes = dict[str, dict[str, list[str | int]]]


@dataclass(frozen=True)
class Format:
    """A row of `FORMATS`.

    Args:
        ending: of its files.
        packages: that must be installed, by the names by which they are imported.
        lstm: what takes the place of an LSTM layer.
        attention: implementation of the attention, as in transformers; None: that of the model.
        write: (path, program of torch.export, axes of the inputs, names of the outputs) -> None.
        open: path -> a function that computes the graph.
    """

    ending: str
    packages: tuple[str, ...]
    lstm: MakeLSTM
    attention: str | None
    write: Callable[[Path, ExportedProgram, dict[str, Any], list[str]], None]
    open: Callable[[Path], Run]


def write(
    kind: Format,
    path: Path,
    graph: nn.Module,
    given: Tensors,
    outputs: Tensors,
    text_axes: dict[str, int],
    longest: int,
) -> Shapes:
    """Writes a graph for batches of any size, of texts of any length.

    Args:
        kind: the format.
        path: of the file.
        graph: takes tensors by name, and gives tensors by name.
        given: an example of its inputs.
        outputs: what it gives for them.
        text_axes: those of the encoder.
        longest: tokens of the longest text.

    Returns:
        The axes of `inputs` and of `outputs` by name: `batch`, `length` or a number.
    """
    sizes = {"batch": torch.export.Dim("batch", min=1), "length": torch.export.Dim("length", min=1, max=longest)}
    shapes: Shapes = {
        side: {name: _axes(base(name), list(tensor.shape), text_axes) for name, tensor in tensors.items()}
        for side, tensors in (("inputs", given), ("outputs", outputs))
    }
    dynamic = {
        name: {i: sizes[axis] for i, axis in enumerate(named) if isinstance(axis, str)}
        for name, named in shapes["inputs"].items()
    }
    settings: Any = torch.fx.experimental._config
    # sizes of 1 are like others: else torch.export refuses to make one graph for all, as the exporter to ONNX knows
    with warnings.catch_warnings(), settings.patch(backed_size_oblivious=True):
        for message in NOT_OURS:
            warnings.filterwarnings("ignore", message)
        program = torch.export.export(
            _Named(graph, list(given)).eval(), (), given, dynamic_shapes=dynamic,
            prefer_deferred_runtime_asserts_over_guards=True,
        )  # fmt: skip
        kind.write(path, program, dynamic, list(outputs))
    return shapes


class _Named(nn.Module):
    """A graph whose parameters are the names of its inputs: torch.export binds axes of any size to parameters, and
    fails for `**given`."""

    def __init__(self, graph: nn.Module, names: list[str]):
        super().__init__()
        self.of = graph  # "graph" is taken in what torch makes of it

        def forward(**given: torch.Tensor) -> Tensors:
            return graph(**given)

        parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward


def _axes(name: str, shape: list[int], text_axes: dict[str, int]) -> list[str | int]:
    named: list[str | int] = list(shape)
    named[text_axes.get(name, 0)] = "batch"
    if name in (*TEXT, "hidden"):
        named[1] = "length"
    return named


# --- ONNX


def _write_onnx(path: Path, program: ExportedProgram, dynamic: dict[str, Any], outputs: list[str]) -> None:
    """One file with its weights; those above 2 GB are in a second one beside it: a protocol buffer holds no more."""
    with _at_error("torch.onnx._internal.exporter._registration"):  # says that torchvision is not installed
        written = torch.onnx.export(
            program, opset_version=OPSET, input_names=list(dynamic), output_names=outputs, dynamic_shapes=dynamic,
            custom_translation_table={torch.ops.aten.sort.stable: _sort}, dynamo=True, verbose=False,
        )  # fmt: skip
    assert written is not None
    written.save(path)


def _sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """For the exporter, which only knows the other kind: of equal numbers, TopK takes the first one first, too."""
    from onnxscript import opset20 as op

    return op.TopK(x, op.Shape(x, start=dim, end=dim + 1), axis=dim, largest=int(descending), sorted=1)


def _open_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs, outputs = ([value.name for value in side] for side in (session.get_inputs(), session.get_outputs()))
    return lambda given: dict(zip(outputs, session.run(outputs, {name: given[name] for name in inputs}), strict=True))


def quantize(path: Path, to: Path) -> None:
    """The ONNX graph with int8 weights. The inputs of its matmuls and LSTMs are made int8 while it computes."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _at_error(None):  # recommends a step that the exporter has done: to simplify the graph
        quantize_dynamic(path, to, weight_type=QuantType.QInt8)


@contextmanager
def _at_error(name: str | None) -> Iterator[None]:
    """Only errors are logged by that name; None: by the root."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# --- torch.export


def _write_program(path: Path, program: ExportedProgram, dynamic: dict[str, Any], outputs: list[str]) -> None:
    """What `torch.export.load` reads without hf_al."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.find_nodes(op="call_function", target=torch.ops.aten._assert_scalar.default):
                module.graph.erase_node(node)  # that sizes are not 1: true of the example, and nothing depends on it
            module.graph.eliminate_dead_code()
            module.recompile()
    torch.export.save(program, path)


def _open_program(path: Path) -> Run:
    program = torch.export.load(path)
    module, names = program.module(), program.graph_signature.user_inputs

    def run(given: Arrays) -> Arrays:
        with torch.inference_mode():
            out = module(**{name: torch.from_numpy(given[name]) for name in names})
        return {name: tensor.numpy() for name, tensor in out.items()}

    return run


FORMATS = {
    # eager: where a text may look at nothing, other attention gives nan in ONNX
    "onnx": Format(".onnx", ("onnx", "onnxruntime", "onnxscript"), OnnxLSTM, "eager", _write_onnx, _open_onnx),
    "torch_export": Format(".pt2", (), TorchLSTM, None, _write_program, _open_program),
}
