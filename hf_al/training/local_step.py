"""One unit on one micro-batch: forward and local loss; and the seeding that makes it repeatable anywhere."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from ..modeling.blocks import ALBlock, Inputs, run_block
from ..modeling.objectives import Boundary, Losses, cut
from ..parallel.schema import round_to_wire


@contextmanager
def block_randomness(
    device: torch.device, seed: int, block: int, step: int, micro_batch: int, replica: int
) -> Iterator[None]:
    """Random numbers that depend on these five numbers alone, not on which process asks, nor on what ran before.

    On the generators themselves: `torch.manual_seed` would queue a call with a stack trace for every GPU kind that is
    not in use, each time.
    """
    key = hashlib.blake2b(repr((seed, block, step, micro_batch, replica)).encode(), digest_size=8).digest()
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(int.from_bytes(key, "big") >> 1)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def forward_unit(
    blocks: list[ALBlock],
    boundary: Boundary,
    inputs: Inputs,
    accelerator: Accelerator,
    key: tuple[int, int, int, int],
    wire: torch.dtype = torch.float32,
) -> tuple[Boundary, Tensor, Losses]:
    """Forward of one unit on one micro-batch.

    Args:
        blocks: the unit's blocks, in order.
        boundary: what the unit before it sent, already cut.
        inputs: what every block knows of the micro-batch.
        accelerator: for mixed precision.
        key: (run seed, optimizer step, micro-batch, replica).
        wire: what float32 tensors are rounded to between units, whether or not the next one is in another process.

    Returns:
        The boundary for the next unit, cut, with values from before this batch's update; the unit's loss, attached;
        and the named local losses it is the sum of, detached.
    """
    seed, step, micro_batch, replica = key
    losses: Losses = {}
    for block in blocks:
        with (
            block_randomness(accelerator.device, seed, block.index, step, micro_batch, replica),
            accelerator.autocast(),
        ):
            boundary, losses = run_block(block, boundary, inputs)
    return round_to_wire(cut(boundary), wire), torch.stack(list(losses.values())).sum(), cut(losses)
