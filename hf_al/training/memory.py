"""A batch that does not fit into memory: one message with what helps, instead of an allocator's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

CPU_ALLOCATOR = "can't allocate memory"  # torch raises a plain RuntimeError there


@contextmanager
def shortage_explained(where: Callable[[], str]) -> Iterator[None]:
    """Turns the errors of torch's and Python's allocators into one that says what to change.

    Args:
        where: what the run was doing.

    Raises:
        ValueError: there was not enough memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and CPU_ALLOCATOR not in str(error):
            raise
        raise ValueError(
            f"Ran out of memory at {where()}. Pass a smaller --per_device_train_batch_size (with "
            "--gradient_accumulation_steps the batch stays the same), a shorter --max_seq_length, more --num_blocks, "
            "or --offload."
        ) from error
