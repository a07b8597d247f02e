"""Jobs for the processes of a world: undisturbed and disturbed runs. Imported in every process."""

import importlib.util
import itertools
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hooks import hook, named

from hf_al import plots
from hf_al.parallel import launch, transport
from hf_al.parallel.transport import Neighbours
from hf_al.parsing import parse_arguments
from hf_al.training import checkpoint, finish, loop, setup
from hf_al.training.optim import BlockOptimizers
from hf_al.training.stage import Stage

PATCH = pytest.MonkeyPatch()  # never undone: the process ends with its job


def train(stage: int, flags: list[str]) -> dict:
    """A run. Returns what this stage's transport counted, and how long it took."""
    made = []
    hook(PATCH, loop, "connect", after=lambda call: made.append(call.result))
    PATCH.setattr(plots, "PLOTS", {})  # they take half of the time of such a short run
    PATCH.setattr(launch, "REPORT_GRACE", 0.0)  # no launcher here ends the other processes
    PATCH.setattr(transport, "SILENCE", 0.5)
    sent_to: set[int] = set()
    hook(PATCH, dist, "isend", before=lambda call: sent_to.add(call.dst))
    start = time.perf_counter()
    result = loop.train(parse_arguments(flags))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "report": result.report, "sent_to": sent_to, **made[0].statistics()}


def train_own(stage: int, flags: list[str]) -> dict:
    """A run with the documentation's own objective and encoder."""
    for path in sorted((Path(__file__).parents[2] / "docs" / "examples").glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    return train(stage, flags)


def count_evaluations(stage: int, flags: list[str]) -> int:
    """How often `on_evaluation` is called in this process."""
    PATCH.setattr(plots, "PLOTS", {})
    heard: list[str] = []
    loop.train(parse_arguments(flags), on_evaluation=lambda metric, history: heard.append(metric))
    return len(heard)


def train_with_statistics(stage: int, flags: list[str]) -> dict:
    """A run whose blocks keep running statistics of what they see."""
    from torch import nn

    from hf_al.modeling.encoders import LstmEncoder

    make, forward = LstmEncoder.__init__, LstmEncoder.forward

    def make_with_norm(self, config, index):
        make(self, config, index)
        self.norm = nn.BatchNorm1d(self.output_size)

    def normalized(self, boundary, inputs):
        out = forward(self, boundary, inputs)
        return {**out, "hidden": self.norm(out["hidden"].transpose(1, 2)).transpose(1, 2).contiguous()}

    PATCH.setattr(LstmEncoder, "__init__", make_with_norm)
    PATCH.setattr(LstmEncoder, "forward", normalized)
    seen: list[Any] = []
    hook(PATCH, loop.Run, "fit", after=lambda call: seen.append(call.self.stage))
    found = train(stage, flags)
    named = {f"{k}.{n}": b.tolist() for k, block in seen[0].blocks.items() for n, b in block.named_buffers()}
    return {**found, "statistics": named}


def train_twice(stage: int, folder: str, flags: list[str]) -> list[dict]:
    return [train(stage, [*flags, f"--seed={seed}", f"--output_dir={folder}/{seed}"]) for seed in (1, 2)]


def in_folders_of_their_own(stage: int, folders: list[str], job: str, *args: Any) -> Any:
    """The same relative output_dir in another working folder, as on another machine."""
    os.chdir(folders[stage])
    return globals()[job](stage, *args)


def read_by_the_last_stage(stage: int, flags: list[str]) -> dict:
    """The tensors that this process reads from checkpoints."""
    read = []
    hook(PATCH, checkpoint, "_verified_weights", after=lambda call: read.append(list(call.result)))
    hook(PATCH, checkpoint, "load", after=lambda call: read.append(list(call.result)))
    train(stage, flags)
    return {"read": [name for names in read for name in names]}


DEATHS = {  # what the stage is doing, and which call of it is its last
    "at the start": (loop, "load", lambda call, number: True),
    "in a step": (BlockOptimizers, "update", lambda call, number: call.step == 31),
    "while saving": (checkpoint, "save_file", lambda call, number: "00000026" in str(call.filename)),
    "in an evaluation": (Stage, "evaluate", lambda call, number: number == 2),
    "while exporting": (finish, "export", lambda call, number: True),
}


def dies(stage: int, when: str, how: str, flags: list[str]) -> dict:
    """The first stage (while exporting: the last one) ends with an error, silently or for lack of memory, or hangs; if
    while saving, with half of a file written."""
    owner, name, is_last = DEATHS[when]
    number = itertools.count(1)

    def die(call):
        if not is_last(call, next(number)):
            return
        if when == "while saving":
            Path(call.filename).write_bytes(b"half of")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stopped":
            time.sleep(1)  # until what it has sent is on the wire, or it is missed one step earlier
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "memory":
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
            torch.empty(2**34)
        raise ValueError("Died on purpose")

    if stage == (parse_arguments(flags).stages - 1 if when == "while exporting" else 0):
        hook(PATCH, owner, name, before=die)
    return train(stage, flags)


def killed_after(stage: int, victim: int, seconds: float, flags: list[str]) -> dict:
    """A stage is killed, wherever it is by then."""
    if stage == victim:
        threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return train(stage, flags)


def sends_after_the_update(stage: int, flags: list[str]) -> dict:
    """The stage sends what it computes from the weights after the update, when the decoders have changed already."""
    send, late = Neighbours.send, []

    def keep(*args, **kwargs):
        call = named(send, args, kwargs)
        if call.message.kind == "train":
            late.append(call)
        else:
            send(*args, **kwargs)

    def send_kept(call):
        now = {n: t for b in call.self.blocks.values() for n, t in b.decoders({}).items()}
        for kept in late:
            kept.boundary = {n: now.get(n, t).detach() for n, t in kept.boundary.items()}
            send(**vars(kept))
        late.clear()

    PATCH.setattr(Neighbours, "send", keep)
    hook(PATCH, Stage, "train_batch", after=send_kept)
    return train(stage, flags)


def signalled_in_step(stage: int, number: int, step: int, where: int, flags: list[str]) -> tuple[int, int]:
    """A signal at stage `where`, before its update `step` (from 1); (status, step of the last checkpoint)."""
    sent = []

    def send(call):
        if call.step + 1 == step and stage == where and not sent:
            sent.append(step)
            os.kill(os.getpid(), number)

    PATCH.setattr(transport, "ASK_EVERY", 0.0)
    hook(PATCH, BlockOptimizers, "update", before=send)
    try:
        train(stage, flags)
    except (SystemExit, KeyboardInterrupt) as stop:
        time.sleep(0.5)  # the last stage commits
        path = checkpoint.complete_checkpoints(Path(parse_arguments(flags).output_dir))[-1]
        return getattr(stop, "code", 130), checkpoint.read_manifest(path)["progress"]["step"]
    return 0, -1


def signalled_at_the_end(stage: int, steps: int, flags: list[str]) -> int:
    """SIGTERM at the first stage, which is done, while the last one still writes the last checkpoint; its status."""

    def later(call):
        if stage == 0 and call.step + 1 == steps:
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()

    def slowly(call):
        if stage > 0 and call.path.name.endswith(str(steps)):
            time.sleep(2.0)

    hook(PATCH, Stage, "train_batch", after=later)
    hook(PATCH, checkpoint, "save_checkpoint", before=slowly)
    try:
        train(stage, flags)
    except SystemExit as stop:
        return stop.code
    return 0


def another_order_at_the_first_stage(stage: int, flags: list[str]) -> dict:
    """The batch order differs; the handshake, which would notice first, is switched off."""
    for module in (loop, setup):
        PATCH.setattr(module, "check_same", lambda *args, **kwargs: None)
    return other_flags_at_the_first_stage(stage, ["--seed=43"], flags)


def other_flags_at_the_first_stage(stage: int, other: list[str], flags: list[str]) -> dict:
    return train(stage, [*flags, *other] if stage == 0 else flags)
