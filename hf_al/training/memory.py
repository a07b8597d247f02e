"""A batch that does not fit into memory: one message with what helps, instead of an allocator's."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

SHORTAGES = ("can't allocate memory", "CUDA error: out of memory")  # where torch raises a plain RuntimeError


class TooLarge(ValueError):
    """A model or a batch needs more memory than there is."""


@contextmanager
def shortage_explained(where: Callable[[], str], kind: str, can_offload: bool) -> Iterator[None]:
    """Turns the errors of torch's and Python's allocators into one that says what to change.

    Args:
        where: what the run was doing.
        kind: of the batches, train or eval; or model, where there are none.
        can_offload: whether --offload is left to try.

    Raises:
        TooLarge: there was not enough memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_shortage = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not is_shortage and not any(text in str(error) for text in SHORTAGES):
            raise
        if kind == "model":
            advice = ["a smaller --hidden_size", "a smaller vocabulary"]
        else:
            advice = [f"a smaller --per_device_{kind}_batch_size", "a shorter --max_seq_length"]
        if kind == "train":
            advice[0] += " (with --gradient_accumulation_steps the batch stays the same)"
        if can_offload:
            advice.append("--offload")
        raise TooLarge(f"Ran out of memory at {where()}. Pass {', '.join(advice[:-1])} or {advice[-1]}.") from error
