"""`--dispatch_data`: only the first stage reads the data, and sends the other processes its rows.

Everything else is as if each process had read them: each makes the same tokens, batches and labels of them.
"""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict
from datasets.table import InMemoryTable

from ..arguments import TrainingArguments
from ..data.sources import SPLITS, check_given_once, load_raw
from ..data.streaming import Windows, open_windows
from ..parallel.alone import ROWS, Alone


def read(
    args: TrainingArguments, given: DatasetDict | None, transport: Alone
) -> tuple[DatasetDict | None, Windows | None]:
    """The raw splits, and with `streaming` the windows of train, in every process; what each one reads by itself is
    None.

    Raises:
        ValueError: data that cannot be read.
    """
    check_given_once(args, given)
    if not args.dispatch_data or transport.main == 0:
        return given, None
    transport.connect_all()
    reads = transport.process == transport.first_of(0)

    def look() -> tuple[Windows | None, Any]:
        if not reads:
            return None, {}
        splits = load_raw(args) if given is None else given
        return open_windows(args, splits) if args.streaming else (None, splits)

    windows, splits = transport.together(look)
    names = [name for name in SPLITS if name in splits]
    names = json.loads(_broadcast(json.dumps(names).encode() if reads else None, transport))
    rows = DatasetDict({name: _rows(splits.get(name), transport) for name in names})
    transport.wait_sent(ROWS)
    return rows, SentWindows(windows, args.streaming_buffer_size, transport) if args.streaming else None


class SentWindows(Windows):
    """The windows of a stream, as the process that reads them sends them.

    Args:
        windows: in that process; None in the others.
        size: rows of a window.
        transport: between them.
    """

    def __init__(self, windows: Windows | None, size: int, transport: Alone):
        self.windows, self.size, self.transport = windows, size, transport
        self.total: int | None = None

    def __iter__(self) -> Iterator[Dataset]:
        source = iter(self.windows) if self.windows else None
        while True:
            rows = _rows(next(source) if source else None, self.transport)
            total = json.dumps(self.windows.total).encode() if self.windows else None
            self.total = json.loads(_broadcast(total, self.transport))
            yield rows


def _rows(rows: Dataset | None, transport: Alone) -> Dataset:
    """The rows of the process that reads them, in every process."""
    content = None
    if rows is not None:
        table = rows.with_format("arrow")[:].replace_schema_metadata(rows.features.arrow_schema.metadata)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        content = sink.getvalue().to_pybytes()
    with pa.ipc.open_stream(_broadcast(content, transport)) as reader:
        return Dataset(InMemoryTable(reader.read_all()))


def _broadcast(content: bytes | None, transport: Alone) -> bytes:
    """`content` of the process that reads the data, in every process."""
    if content is None:
        source = transport.first_of(0)
        size = int.from_bytes(transport.receive_bytes(8, source, ROWS), "little")
        return transport.receive_bytes(size, source, ROWS)
    others = [process for process in range(transport.main + 1) if process != transport.process]
    transport.wait_sent(ROWS)  # at most one is under way
    transport.send_bytes(len(content).to_bytes(8, "little"), others, ROWS)
    transport.send_bytes(content, others, ROWS)
    return content
