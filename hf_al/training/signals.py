"""Ctrl-C, SIGTERM (sent by clusters before they take a machine away) and SIGHUP (a terminal that is gone): the step is
finished and saved first."""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType
from typing import Any

from ..parallel.launch import is_launched, reports_here

REPEATED = 2.0  # seconds in which a launcher may pass on a Ctrl-C that the terminal has sent to every process already
NOTE = b"\nStopping after this step, with a checkpoint. Send the same signal again to stop at once.\n"


class StopSignals:
    """Inside the context, the first SIGINT, SIGTERM or SIGHUP is only noted in `received`; the second acts as usual.

    Changes nothing outside the main thread, where Python allows no handlers, nor for signals that are ignored
    (`nohup`).
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN):  # None: a handler that is not Python's cannot be restored
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
        if reports_here():
            with suppress(OSError):
                os.write(2, NOTE)  # a logger may be holding its lock

    def _restore(self) -> None:
        while self._before:
            number, before = self._before.popitem()
            signal.signal(number, before)

    def raise_received(self) -> None:
        """KeyboardInterrupt for Ctrl-C, SystemExit with 143 or 129 for SIGTERM or SIGHUP; nothing without one."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)
