"""What the processes of a world do: a whole run, and runs that are disturbed. Imported in every process."""

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path


def train(stage: int, flags: list[str]) -> dict:
    """A run; what this stage's transport counted, and how long it took."""
    from hf_al import plots
    from hf_al.parallel import transport
    from hf_al.training import loop
    from hf_al.training.parsing import parse_arguments

    made = []
    connect = transport.connect

    def remember(*args):
        made.append(connect(*args))
        return made[-1]

    loop.connect = remember
    plots.PLOTS = {}  # half of the time of so short a run
    start = time.perf_counter()
    result = loop.train(parse_arguments(flags))
    return {"seconds": time.perf_counter() - start, "report": result.report, **made[0].statistics()}


def train_own(stage: int, flags: list[str]) -> dict:
    """A run with what the documentation shows as one's own."""
    for path in sorted((Path(__file__).parents[2] / "docs" / "examples").glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    return train(stage, flags)


def dies_in_step(stage: int, step: int, how: str, flags: list[str]) -> dict:
    """The first stage ends before its update `step`, with an error or without a word."""
    from hf_al.training.optim import BlockOptimizers

    update = BlockOptimizers.update

    def update_or_die(self, unit, now):
        if now == step and stage == 0:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("Killed on purpose")
        return update(self, unit, now)

    BlockOptimizers.update = update_or_die
    return train(stage, flags)


def sends_after_the_update(stage: int, flags: list[str]) -> dict:
    """What leaves is read from the weights after the update: the decoders that travel have changed by then."""
    from hf_al.parallel.stage import Stage
    from hf_al.parallel.transport import Neighbours

    send, train_batch = Neighbours.send, Stage.train_batch
    late = []

    def keep(self, message, boundary):
        if message.kind == "train":
            late.append((self, message, boundary))
        else:
            send(self, message, boundary)

    def then_send(self, *args):
        result = train_batch(self, *args)
        for transport, message, boundary in late:
            now = {n: t for b in self.blocks.values() for n, t in b.decoders({}).items()}
            send(transport, message, {n: now.get(n, t).detach() for n, t in boundary.items()})
        late.clear()
        return result

    Neighbours.send, Stage.train_batch = keep, then_send
    return train(stage, flags)


def signalled_in_step(stage: int, step: int, where: int, flags: list[str]) -> tuple[int, int]:
    """SIGTERM at stage `where`, before its update `step` (from 1); (status, step of the last checkpoint)."""
    from hf_al.parallel import transport
    from hf_al.training import checkpoint
    from hf_al.training.optim import BlockOptimizers
    from hf_al.training.parsing import parse_arguments

    update, sent = BlockOptimizers.update, []
    transport.ASK_EVERY = 0.0

    def signal_and_update(self, unit, now):
        if now + 1 == step and stage == where and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, unit, now)

    BlockOptimizers.update = signal_and_update
    try:
        train(stage, flags)
    except SystemExit as stop:
        time.sleep(0.5)  # the last stage commits
        path = checkpoint.find_checkpoint("last", Path(parse_arguments(flags).output_dir))
        return stop.code, checkpoint.read_manifest(path)["progress"]["step"]
    return 0, -1


def another_order_at_the_first_stage(stage: int, flags: list[str]) -> dict:
    """Which the handshake would notice first, if it were asked."""
    from hf_al.training import loop

    loop._check_same = lambda plan, transport: None
    return other_flags_at_the_first_stage(stage, ["--seed=43"], flags)


def other_flags_at_the_first_stage(stage: int, other: list[str], flags: list[str]) -> dict:
    return train(stage, [*flags, *other] if stage == 0 else flags)
