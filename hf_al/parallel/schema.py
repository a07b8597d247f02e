"""What a boundary between stages looks like on the wire: its tensors, one after the other, in one buffer.

Legend: N batch, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..modeling.objectives import Boundary

PROTOCOL = 0x414C01
ALIGNMENT = 64  # bytes: the same matmul rounds differently on tensors that start elsewhere
KINDS = ("train", "evaluate", "cache")
PROBES = ((2, 3), (5, 7))  # (rows, tokens) of the two throw-away batches, unless texts are shorter


@dataclass(frozen=True)
class Message:
    """Which boundary this is. Both sides know it in advance and compare it on receipt."""

    kind: str
    step: int
    micro_batch: int
    rows: int
    tokens: int

    def header(self, signal: int) -> list[int]:
        """Eight numbers in front of the tensors; `signal` is the one that makes all stages stop, or 0."""
        return [PROTOCOL, KINDS.index(self.kind), self.step, self.micro_batch, self.rows, self.tokens, signal, 0]


@dataclass(frozen=True)
class Entry:
    """One tensor of a boundary. Its dimensions are numbers, "N" or "T"; `wire` is its type on the wire."""

    name: str
    dtype: torch.dtype
    wire: torch.dtype
    dims: tuple[int | str, ...]

    def shape(self, rows: int, tokens: int) -> list[int]:
        sizes = {"N": rows, "T": tokens}
        return [sizes[d] if isinstance(d, str) else d for d in self.dims]


def round_to_wire(boundary: Boundary, wire: torch.dtype) -> Boundary:
    """The boundary as the next stage will see it. Applied in every placement, so that placement changes no result."""
    if wire == torch.float32:
        return boundary
    return {n: t.to(wire).to(t.dtype) if t.dtype == torch.float32 else t for n, t in boundary.items()}


class Schema(tuple[Entry, ...]):
    """The tensors of a boundary, in order, after a header."""

    @classmethod
    def of(cls, run: Callable[[int, int], Boundary], wire: torch.dtype, longest: int = PROBES[1][1]) -> "Schema":
        """Inferred from two throw-away batches: a dimension that grows with N or T is N or T. So a user's objectives
        and encoders need not declare what they send.

        Args:
            run: (rows, tokens) -> the boundary that is sent for such a batch.
            wire: the type that float32 tensors travel as.
            longest: tokens that a text can have.

        Raises:
            ValueError: a dimension that depends on anything else, or strides that would be lost on the wire.
        """
        (few, short), (many, long) = PROBES
        probes = ((few, max(1, min(short, longest - 1))), (many, min(long, longest)))
        small, large = (run(*probe) for probe in probes)
        symbols = dict(zip(zip(*probes, strict=True), "NT", strict=True))
        entries = []
        if small.keys() != large.keys():
            raise ValueError(
                f"Expected the same tensors to leave a block for every batch, got {sorted(small)} for a batch of "
                f"{probes[0]} and {sorted(large)} for one of {probes[1]}."
            )
        for name, tensor in small.items():
            if not isinstance(tensor, Tensor) or tensor.ndim != large[name].ndim:
                raise ValueError(
                    f"Expected {name} to leave its block as a tensor with the same dimensions for every batch, got "
                    f"{getattr(tensor, 'shape', tensor)} and {getattr(large[name], 'shape', large[name])}."
                )
            if not tensor.is_contiguous():
                raise ValueError(
                    f"Expected {name} to leave its block contiguous, got strides {tensor.stride()}: dropout in the "
                    "next block follows the order of memory. Send .contiguous()."
                )
            sizes = list(zip(tensor.shape, large[name].shape, strict=True))
            if any(a != b and (a, b) not in symbols for a, b in sizes):
                raise ValueError(
                    f"Expected {name} to have dimensions of batch, tokens and constants, got "
                    f"{tuple(tensor.shape)} and {tuple(large[name].shape)} for batches of {probes[0]} and {probes[1]}. "
                    "Pad it to one of them."
                )
            dims = tuple(symbols.get(pair, pair[0]) for pair in sizes)
            entries.append(Entry(name, tensor.dtype, wire if tensor.dtype == torch.float32 else tensor.dtype, dims))
        return cls(entries)

    def as_json(self) -> list[Any]:
        return [[e.name, str(e.dtype).split(".")[1], str(e.wire).split(".")[1], list(e.dims)] for e in self]

    @classmethod
    def from_json(cls, rows: list[Any]) -> "Schema":
        return cls(Entry(name, getattr(torch, a), getattr(torch, b), tuple(dims)) for name, a, b, dims in rows)

    def size(self, rows: int, tokens: int) -> int:
        """Bytes of the header and the tensors, each on a boundary of `ALIGNMENT`."""
        return self._layout(rows, tokens)[1]

    def zeros(self, rows: int, tokens: int, device: torch.device) -> Boundary:
        """A throw-away boundary."""
        return {e.name: torch.zeros(e.shape(rows, tokens), dtype=e.dtype, device=device) for e in self}

    def write(self, boundary: Boundary, buffer: Tensor, rows: int, tokens: int) -> None:
        """Copies the tensors into the buffer, after the header."""
        if boundary.keys() != {entry.name for entry in self}:
            raise ValueError(
                f"Expected {sorted(entry.name for entry in self)} to leave the block, as for the first batch, got "
                f"{sorted(boundary)}."
            )
        for entry, view in self._views(buffer, rows, tokens):
            tensor = boundary[entry.name]
            if tensor.shape != view.shape:
                raise ValueError(
                    f"Expected {entry.name} of shape {tuple(view.shape)} for {rows} rows and {tokens} tokens, got "
                    f"{tuple(tensor.shape)}: dimensions are those of the batch, the tokens, or constants."
                )
            assert tensor.dtype == entry.dtype, f"{entry.name} is {tensor.dtype}, agreed was {entry.dtype}"
            assert tensor.is_contiguous(), f"{entry.name} has strides {tensor.stride()}"
            view.copy_(tensor)

    def read(self, buffer: Tensor, rows: int, tokens: int) -> Boundary:
        """The tensors in the buffer; views of it if they travel in their own type."""
        return {entry.name: view.to(entry.dtype) for entry, view in self._views(buffer, rows, tokens)}

    def _layout(self, rows: int, tokens: int) -> tuple[list[tuple[Entry, list[int], int, int]], int]:
        """(entry, shape, first byte, byte after the last) of each tensor, and the total bytes."""
        places, at = [], ALIGNMENT
        for entry in self:
            shape = entry.shape(rows, tokens)
            size = prod(shape) * entry.wire.itemsize
            places.append((entry, shape, at, at + size))
            at += -(-size // ALIGNMENT) * ALIGNMENT
        return places, at

    def _views(self, buffer: Tensor, rows: int, tokens: int) -> list[tuple[Entry, Tensor]]:
        assert buffer.data_ptr() % ALIGNMENT == 0
        places, _ = self._layout(rows, tokens)
        return [(entry, buffer[a:b].view(entry.wire).view(shape)) for entry, shape, a, b in places]


class Ring:
    """Buffers that are used in turn, and grow to the largest boundary."""

    def __init__(self, count: int, device: torch.device):
        self.buffers = [torch.empty(0, dtype=torch.uint8, device=device)] * count
        self.turn = 0

    def next(self, size: int) -> Tensor:
        self.turn = (self.turn + 1) % len(self.buffers)
        if len(self.buffers[self.turn]) < size:
            self.buffers[self.turn] = torch.empty(size, dtype=torch.uint8, device=self.buffers[0].device)
        return self.buffers[self.turn][:size]
