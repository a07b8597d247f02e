"""`--cache_frozen`: what a frozen block makes of each row of train, computed once.

It is the same in every epoch, so it waits in an Arrow file that is mapped into memory. The file has no name, and is
gone with the process, however that ends; a resumed run computes it again.
"""

import mmap
from typing import IO

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from datasets.table import InMemoryTable
from torch import Tensor

SCHEMA = pa.schema([("hidden", pa.large_list(pa.float32()))])  # (tokens, D) of a text, row after row


class FrozenStates:
    """The hidden states that leave one frozen block. First `add` all rows, then `read` any of them.

    Args:
        file: where they are; it may be closed when they are complete.
    """

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.writer = pa.ipc.new_stream(file, SCHEMA)
        self.added: list[np.ndarray] = []
        self.place = np.empty(0, np.int64)  # row -> where it is in `table`
        self.table: Dataset | None = None

    def add(self, rows: np.ndarray, hidden_NTD: Tensor, mask_NT: Tensor) -> None:
        """The states of some rows; those of padding (mask 0) are not kept.

        Raises:
            OSError: no room on the disk.
        """
        values = hidden_NTD[mask_NT.bool()].float().cpu().numpy().ravel()
        ends = np.cumsum(mask_NT.sum(1).cpu().numpy()) * hidden_NTD.shape[2]
        texts = pa.LargeListArray.from_arrays(np.concatenate([[0], ends]), values)
        self.writer.write_batch(pa.record_batch([texts], schema=SCHEMA))
        self.added.append(rows)

    def complete(self) -> int:
        """All rows are there. Returns how many bytes they take."""
        self.writer.close()
        self.file.flush()
        self.place = np.argsort(np.concatenate(self.added))
        mapped = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ)
        table = InMemoryTable(pa.ipc.open_stream(pa.py_buffer(mapped)).read_all())
        self.table = Dataset(table, fingerprint="frozen").with_format("arrow")  # a given one: making one reads all
        return len(mapped)

    def read(self, rows: np.ndarray, mask_NT: Tensor) -> Tensor:
        """The states (N, T, D) of some rows, zero where the mask on the CPU is 0."""
        assert self.table is not None
        values = self.table[self.place[rows]]["hidden"].combine_chunks().flatten().to_numpy()
        width = len(values) // int(mask_NT.sum())
        hidden_NTD = torch.zeros(*mask_NT.shape, width)
        hidden_NTD.numpy()[mask_NT.bool().numpy()] = values.reshape(-1, width)
        return hidden_NTD
