"""What a run reports while it trains: history, trackers, messages. The main process reports each fact once."""

import logging
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .. import report as reporting
from ..messages import duration
from ..parallel.alone import Alone
from . import trackers
from .plan import Plan
from .progress import Progress
from .window import Window

SETTLED = 3.0  # seconds after the first step, until the pace of a run is known
WORTH_SAYING = 5.0  # seconds

logger = logging.getLogger(__name__)


class Record:
    """Collects the rows of this stage and those of the stages before it; the main process writes them.

    Args:
        plan: the run.
        progress: rows are added to its history.
        accelerator: its trackers.
        transport: over which rows travel forward.
    """

    def __init__(self, plan: Plan, progress: Progress, accelerator: Accelerator, transport: Alone):
        self.plan, self.progress, self.accelerator, self.transport = plan, progress, accelerator, transport
        self.window = Window()
        self.warned: set[str] = set()
        self.window_start, self.clock = (0.0, 0.0), 0.0  # examples and training time
        self.began, self.waited = 0.0, 0.0  # training time and waiting before this start
        self.first: tuple[int, float] | None = None  # the first step, which warms up, and the training time at its end
        self.estimated = False

    def start(self) -> None:
        """Starts the trackers and the clock."""
        if self.transport.is_main:
            first = self.progress.step + 1
            trackers.start(self.accelerator, self.plan.output_dir, self.plan.args.to_dict(), first)
        self.window_start = self.plan.order.examples(self.progress.step), self.progress.seconds
        self.began, self.waited = self.progress.seconds, self._waited()  # rows may have been waited for
        self.start_clock()

    def start_clock(self) -> None:
        self.clock = time.perf_counter()

    def stop_clock(self) -> None:
        """Adds the time since the clock was last started or stopped to the training time."""
        now = time.perf_counter()
        self.progress.seconds, self.clock = self.progress.seconds + now - self.clock, now

    def add(self, losses: dict[int, dict[str, Tensor]], norms: dict[range, Tensor]) -> None:
        """The scalars of one step, or of the units that were updated so far."""
        self.window.add(losses, norms)
        if self.transport.is_main and not self.estimated:
            self._estimate(self.progress.seconds + time.perf_counter() - self.clock)

    def _estimate(self, trained: float) -> None:
        """Says once, after `trained` seconds without evaluations, how long the run will take."""
        step, before = self.first = self.first or (self.progress.step, trained)
        if trained - before > SETTLED:
            self.estimated = True
            to_go = (trained - before) / (self.progress.step - step) * (self.plan.total_steps - self.progress.step)
            if to_go > WORTH_SAYING:
                logger.info("About %s to go, evaluations not counted.", duration(to_go))

    def log(self, rates: dict[int, float]) -> dict[str, float]:
        """Writes means since the last log to history and trackers; returns the total of the local losses, for the bar.

        Args:
            rates: the learning rates of this stage's units, by their last block.

        Raises:
            FloatingPointError: a loss that is not finite, naming block and step.
        """
        if not self.window.rows:
            return {}
        step, (examples_before, seconds_before) = self.progress.step, self.window_start
        values: dict[str, float] = self.window.means(step)
        self.stop_clock()  # only after reading the values, which waits for the device
        self.window_start = self.plan.order.examples(step), self.progress.seconds
        examples, seconds = self.window_start[0] - examples_before, self.window_start[1] - seconds_before
        mine = {"values": values, "rates": list(rates.items()), "memory": self._peak_memory()}
        stages = self.transport.pass_on([mine])
        if stages is None:
            return {}
        values = {name: value for stage in stages for name, value in stage["values"].items()}
        rates = {k: rate for stage in stages for k, rate in stage["rates"]}
        same = len(set(rates.values())) == 1
        row = {
            "step": step,
            **values,
            **{"learning_rate" if same else f"learning_rate/{k}": rate for k, rate in rates.items()},
            "examples_per_second": examples / max(seconds, 1e-9),
            "peak_memory_mib": max(stage["memory"] for stage in stages),
        }
        self.progress.history.append(row)
        self._track({k: v for k, v in row.items() if k != "step"}, step)
        return {"loss": round(sum(value for name, value in values.items() if name.startswith("loss")), 4)}

    def work_done(self) -> list[dict[str, Any]]:
        """What each process did in the training steps since the run was started, for the report."""
        counted, seconds = self.transport.statistics(), self.progress.seconds - self.began
        wait = (self._waited() - self.waited) / max(seconds, 1e-9)
        mine = {
            "process": self.transport.who(),
            "busy": 1 - wait,
            "wait": wait,
            "sent_mib": counted.get("boundary_bytes", 0) / 2**20,
            "summed_mib": counted.get("summed_bytes", 0) / 2**20,
            "peak_memory_mib": self._peak_memory(),
        }
        return self.transport.gather(mine)

    def _waited(self) -> float:
        """Seconds of waiting in training."""
        counted = self.transport.statistics()
        return sum(counted.get(f"waited_{what}", 0.0) for what in ("receive", "send", "sum", "rows"))

    def _peak_memory(self) -> float:
        return reporting.peak_memory_mib(torch.device(self.accelerator.device))

    def evaluation(self, stages: list[dict[str, Any]], better: bool) -> None:
        """Writes metrics, codes and warnings of all stages after one evaluation to history, trackers and the screen."""
        progress, metric = self.progress, self.plan.metric
        exits, codes, warnings = ([x for s in stages for x in s[what]] for what in ("exits", "codes", "warnings"))
        self.warn(warnings)
        progress.history.append({"step": progress.step, "validation": exits, "codes": codes})
        flat = {f"validation/{row['block']}/{n}": v for row in exits for n, v in row.items() if n != "block"}
        flat |= {f"codes/{row['block']}/{n}": row[n] for row in codes for n in ("spread", "rank", "separation")}
        self._track(flat, progress.step)
        shown = " ".join(f"{row[metric]:.4f}" for row in exits)
        logger.info(
            "%s: validation %s by exit %s%s",
            self.plan.order.place(progress.step), metric, shown, " (best)" if better else "",
        )  # fmt: skip

    def _track(self, values: dict[str, Any], step: int) -> None:
        """Tells the trackers. One that cannot be reached is no reason to stop training, or to leave out the others."""
        for tracker in self.accelerator.trackers:
            try:
                tracker.log(values, step=step)
            except Exception as error:
                said = f"The tracker {tracker.name} refuses values, and training goes on without them"
                self.warn([f"{said} ({type(error).__name__}: {error})"])

    def warn(self, messages: list[str]) -> None:
        """Logs each warning once, even if its numbers change."""
        for message in messages:
            what = message.split("(")[0]
            if what not in self.warned:
                self.warned.add(what)
                logger.warning(message)
