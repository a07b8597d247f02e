"""`--offload`: the weights and the optimizer state of a block are in fast memory only while that block computes.

On a GPU they wait in pinned host memory: those of the next block come in on a stream of their own while this one
computes, and go back on it. On a CPU they live in a file that is mapped into memory, so that nothing is copied: the
kernel is asked to read the next block's pages ahead and to let go of those of the block that is done. The file has no
name from the start, and is gone with the model or the process, however that ends.

Gradients stay until the update: with several micro-batches per step, those of all blocks.
"""

import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import existing
from ..modeling.blocks import ALBlock
from .optim import BlockOptimizers

ALIGNED = 64  # bytes, as torch allocates: on other addresses, a matmul may round differently


class Offload:
    """Brings the blocks of a stage in and out. Made before the first step, when the blocks are on the CPU.

    Args:
        blocks: of the stage, by number.
        optimizers: of the same blocks.
        device: where they compute.
        folder: on which disk they are if that is a CPU: the weights at once, optimizer state after its first update.

    Raises:
        OSError: no room there.
    """

    def __init__(self, blocks: dict[int, ALBlock], optimizers: BlockOptimizers, device: torch.device, folder: Path):
        self.optimizers = optimizers
        optimizers.device = device
        self.place: Any = PinnedMemory(device) if device.type == "cuda" else MappedFile(folder)
        for block in blocks.values():
            for module in block.modules():  # buffers are small: they stay on the device
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, buffer.to(device))
            self.put_away(block)

    def visit(self, blocks: Iterable[ALBlock], learning: bool = True) -> Iterator[ALBlock]:
        """The blocks, each of them ready to compute until the next one is asked for; those of one unit stay together.

        Args:
            blocks: in order.
            learning: they will be updated, and need their optimizer state.
        """
        here: list[ALBlock] = []
        try:
            for block, following in pairwise([*blocks, None]):
                assert block is not None
                self.place.come(self._tensors(block, learning))
                if following is not None:
                    self.place.expect(self._tensors(following, learning))
                here.append(block)
                for module in block.modules():
                    if isinstance(module, torch.nn.RNNBase):
                        module.flatten_parameters()  # cuDNN wants its weights in one piece; nothing on a CPU
                yield block
                while block.ends_unit and here:
                    self.put_away(here.pop(0), learning)
        finally:
            for block in here:  # the visit was broken off
                self.put_away(block, learning)
            self.place.settle()

    def put_away(self, block: ALBlock, changed: bool = True) -> None:
        """Takes the block out, with its optimizer state if they have `changed`: computed, or read from a checkpoint."""
        self.place.go(self._tensors(block, changed), changed)

    def _tensors(self, block: ALBlock, learning: bool) -> list[Tensor]:
        """Weights, and with `learning` the optimizer's tensors, without the step numbers."""
        state = self.optimizers.state(block.index).values() if learning else ()
        return [*block.parameters(), *(t for t in state if t.ndim > 0)]


class MappedFile:
    """Tensors in a file without a name, mapped into memory. It is no safetensors file: that format lets a tensor start
    at any address, and results would differ in the last bits."""

    def __init__(self, folder: Path):
        self.folder = existing(folder)
        self.regions: dict[int, mmap.mmap] = {}  # by the address of each tensor in them

    def go(self, tensors: list[Tensor], changed: bool) -> None:
        """Lets the kernel take their pages; tensors that are not in the file yet are moved there."""
        new = [t for t in tensors if t.numel() and t.data_ptr() not in self.regions]
        if new:
            self._move(new)
        for region in self._of(tensors):
            region.madvise(mmap.MADV_DONTNEED)  # of a shared mapping: nothing is lost

    def expect(self, tensors: list[Tensor]) -> None:
        """Asks the kernel to read them ahead."""
        for region in self._of(tensors):
            region.madvise(mmap.MADV_WILLNEED)

    def come(self, tensors: list[Tensor]) -> None:
        """Nothing to do: a page comes when it is touched."""

    def settle(self) -> None:
        """Nothing is under way."""

    def _of(self, tensors: list[Tensor]) -> list[mmap.mmap]:
        found = (self.regions.get(t.data_ptr()) for t in tensors)
        return list({id(region): region for region in found if region is not None}.values())

    def _move(self, tensors: list[Tensor]) -> None:
        starts, size = [], 0
        for t in tensors:
            starts.append(size)
            size += -(-t.nbytes // ALIGNED) * ALIGNED
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                reserve(file.fileno(), size)
                region = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise OSError(
                f"Expected {size / 2**20:.0f} MiB in {self.folder} for --offload: {error.strerror}. Make room "
                "there, or make it writable."
            ) from None
        for t, start in zip(tensors, starts, strict=True):
            there = torch.frombuffer(region, dtype=t.dtype, count=t.numel(), offset=start).view(t.shape)
            there.copy_(t.detach())
            t.data = there
            self.regions[t.data_ptr()] = region
        with suppress(OSError, AttributeError):  # of the GNU C library: it keeps what is freed in small pieces
            ctypes.CDLL(None).malloc_trim(0)


def reserve(file: int, size: int) -> None:
    """Gives a file its size, where possible with its space: a full disk is an error now, not a crash at a write."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)


class PinnedMemory:
    """Tensors in host memory that the GPU reads and writes by itself."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.hosts: dict[int, Tensor] = {}  # by the id of a tensor that is on the device: where it came from
        self.coming: dict[int, Tensor] = {}  # by the id of a tensor: its copy on the device
        self.gone = [torch.cuda.Event(), torch.cuda.Event()]  # of the last block that went back, and of the one before

    def expect(self, tensors: list[Tensor]) -> None:
        """Starts to copy them to the device."""
        with torch.cuda.stream(self.stream):
            self.coming |= {id(t): t.data.to(self.device, non_blocking=True) for t in tensors if not t.is_cuda}

    def come(self, tensors: list[Tensor]) -> None:
        """They are on the device, for all that is computed from now on."""
        self.expect([t for t in tensors if id(t) not in self.coming])
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        for t in tensors:
            copy = self.coming.pop(id(t), None)
            if copy is not None:
                copy.record_stream(computing)
                self.hosts[id(t)], t.data = t.data, copy

    def go(self, tensors: list[Tensor], changed: bool) -> None:
        """Starts to copy them back if they have changed, and frees them on the device."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for t in tensors:
                host = self.hosts.pop(id(t), None)
                if host is None or not host.is_pinned():
                    host = torch.empty_like(t.data, device="cpu", pin_memory=True).copy_(t.data)
                elif changed:
                    host.copy_(t.data, non_blocking=True)
                if t.is_cuda:
                    t.data.record_stream(self.stream)
                t.data = host
        self.gone.reverse()
        self.gone[0].record(self.stream)
        self.gone[1].synchronize()  # or the host would run ahead, and more blocks than three be on the device

    def settle(self) -> None:
        """What went back has arrived: the host may read it."""
        self.coming.clear()
        self.gone[0].synchronize()
