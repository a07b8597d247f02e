"""Ctrl-C and SIGTERM, which clusters send before they take a machine away: the step is finished and saved first."""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from ..parallel.launch import is_launched, speaks

REPEATED = 2.0  # seconds in which a launcher hands on the Ctrl-C that the terminal gave every process already
NOTE = b"\nStopping after this step, with a checkpoint. Send the same signal again to stop at once.\n"


class StopSignals:
    """Inside the context the first SIGINT or SIGTERM is only noted in `received`; the second acts as it did before.

    Elsewhere than in the main thread, where Python allows no handlers, and for signals that are ignored (`nohup`), it
    changes nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN):  # None: a handler that is not Python's cannot be put back
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if time.monotonic() - self._received_at > REPEATED:
                self._restore()
                os.kill(os.getpid(), number)
            return
        self.received, self._received_at = signal.Signals(number), time.monotonic()
        if not is_launched():
            self._restore()
        if speaks():
            with suppress(OSError):
                os.write(2, NOTE)  # a logger may hold its lock just now

    def _restore(self) -> None:
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before)

    def raise_received(self) -> None:
        """KeyboardInterrupt for Ctrl-C, SystemExit with status 143 for SIGTERM; nothing where no signal came."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)
