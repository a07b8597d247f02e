"""The local steps of training on one micro-batch, and the seeding that makes them repeatable anywhere."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..modeling.blocks import ALBlock, BlockOutput, walk
from ..modeling.encoders import Inputs
from ..modeling.objectives import Boundary, cut
from ..parallel.schema import round_to_wire


@contextmanager
def block_randomness(
    device: torch.device, seed: int, block: int, step: int, micro_batch: int, replica: int
) -> Iterator[None]:
    """Random numbers that depend on these five numbers alone, not on the process or on what ran before.

    Seeds the generators directly: `torch.manual_seed` would, each time, queue a call with a stack trace for every kind
    of GPU that is not in use.
    """
    key = hashlib.blake2b(repr((seed, block, step, micro_batch, replica)).encode(), digest_size=8).digest()
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(int.from_bytes(key, "big") >> 1)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def local_steps(
    blocks: Iterable[ALBlock],
    boundary: Boundary,
    inputs: Inputs,
    key: tuple[int, int, int, int],
    device: torch.device,
    bf16: bool = False,
    wire: torch.dtype = torch.float32,
) -> Iterator[tuple[ALBlock, BlockOutput]]:
    """The walk of training over the blocks of a stage, on one micro-batch: see [`walk`].

    Args:
        blocks: in order.
        boundary: what the block before them sent, already cut.
        inputs: what every block knows about the micro-batch.
        key: (run seed, optimizer step, micro-batch, replica).
        device: of the blocks.
        bf16: compute under autocast to bfloat16.
        wire: what float32 tensors are rounded to between units, whether or not the next one is in another process.
    """
    seed, step, micro_batch, replica = key

    @contextmanager
    def around(block: ALBlock) -> Iterator[None]:
        with (
            block_randomness(device, seed, block.index, step, micro_batch, replica),
            torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        ):
            yield

    def leave(leaving: Boundary, block: nn.Module) -> Boundary:
        return round_to_wire(cut(leaving, block), wire)

    return walk(blocks, boundary, inputs, learning=True, around=around, leave=leave)
