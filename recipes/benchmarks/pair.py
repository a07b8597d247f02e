"""Two processes that hold several ways of training the same network, and take turns at running them.

`Pair` starts them, each with one thread, on this machine's loopback or, with `link`, in a network namespace of its own:
the two are then joined by a pair of virtual interfaces whose rate `tc` limits. Both disappear with the processes.
"""

import ctypes
import multiprocessing
import os
import subprocess
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

CLONE_NEWNET = 0x40000000
WARM, COOL = 3, 4  # steps of a turn before its clock starts, and after it has stopped
PATIENCE = 600.0  # seconds that a turn may take
ADDRESSES = ("10.77.0.1", "10.77.0.2")


class Turn(NamedTuple):
    """What one process did in its turn: when each step ended, by `time.monotonic`, which both processes share; and the
    seconds of the later ones that it waited."""

    ends: list[float]
    waited: float


Arm = Callable[[int], Any]  # takes that many steps; most return a Turn
MakeArm = Callable[[int, dict[str, Any]], Arm]  # process number, spec


class Pair:
    """Use as a context: the processes end with it.

    Args:
        make_arm: called in both processes, in the same order; a function of a module.
        link: join them by a link of its own. Needs the right to make network namespaces.
    """

    def __init__(self, make_arm: MakeArm, link: bool = False):
        self.make_arm, self.link = make_arm, link
        self.folder = tempfile.TemporaryDirectory(prefix="hf_al_pair_")
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []

    def __enter__(self) -> "Pair":
        context = multiprocessing.get_context("spawn")
        try:
            for number in (0, 1):
                here, there = context.Pipe()
                process = context.Process(
                    target=_work, args=(number, there, self.make_arm, self.link, self.folder.name)
                )
                process.start()
                there.close()  # or its end would not be seen
                self.pipes.append(here)
                self.processes.append(process)
            if self.link:
                self._both("namespace")
                self._ask(0, "join", self.processes[1].pid)
                self._ask(1, "up")
            self._both("meet")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()

    def make(self, name: str, spec: dict[str, Any]) -> None:
        self._both("make", name, spec)

    def drop(self, name: str) -> None:
        self._both("drop", name)

    def limit(self, mbit: float | None) -> None:
        """Sets the rate of the link, in both directions; None for no limit."""
        self._both("limit", mbit)

    def run(self, name: str, steps: int) -> list[Turn]:
        """One turn of an arm, with so many steps that count: what each process did."""
        return self.ask_both(name, WARM + steps + COOL)

    def ask_both(self, name: str, number: int) -> list[Any]:
        """What an arm returns for a number, in both processes at the same time."""
        return self._both("run", name, number)

    def _both(self, *request: Any) -> list[Any]:
        return self._answers({0: request, 1: request})

    def _ask(self, number: int, *request: Any) -> Any:
        return self._answers({number: request})[0]

    def _answers(self, requests: dict[int, tuple]) -> list[Any]:
        """Of the processes in order; the first failure ends it."""
        pipes = {self.pipes[number]: number for number in requests}
        for pipe, number in pipes.items():
            pipe.send(requests[number])
        found: dict[int, Any] = {}
        while len(found) < len(requests):
            ready: list[Any] = wait([pipe for pipe in pipes if pipes[pipe] not in found], PATIENCE)
            if not ready:
                raise TimeoutError(f"No answer to {next(iter(requests.values()))} for {PATIENCE:g} seconds.")
            for pipe in ready:
                number = pipes[pipe]
                try:
                    good, found[number] = pipe.recv()
                except EOFError:
                    raise RuntimeError(f"Process {number} ended.") from None
                if not good:
                    raise RuntimeError(f"Process {number} failed:\n{found[number]}")
        return [found[number] for number in requests]


def _work(number: int, pipe: Connection, make_arm: MakeArm, link: bool, folder: str) -> None:
    arms: dict[str, Arm] = {}

    def meet() -> None:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "wire" if link else "lo"
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)

    actions: dict[str, Callable[..., Any]] = {
        "namespace": _own_network,
        "join": _join,
        "up": lambda: _up(1),
        "meet": meet,
        "limit": _limit,
        "make": lambda name, spec: arms.update({name: make_arm(number, spec)}),
        "drop": lambda name: arms.pop(name) and None,
        "run": lambda name, steps: arms[name](steps),
    }
    while True:
        what, *values = pipe.recv()
        try:
            pipe.send((True, actions[what](*values)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


# --- a network of their own


def _own_network() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "no right to make a network namespace")
    _run("ip", "link", "set", "lo", "up")


def _join(other: int) -> None:
    _run("ip", "link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", str(other))
    _up(0)


def _up(number: int) -> None:
    _run("ip", "address", "add", f"{ADDRESSES[number]}/24", "dev", "wire")
    _run("ip", "link", "set", "wire", "up")


def _limit(mbit: float | None) -> None:
    subprocess.run(["tc", "qdisc", "del", "dev", "wire", "root"], capture_output=True, check=False)
    if mbit is not None:
        rate = ["rate", f"{mbit:g}mbit", "burst", "64kb", "latency", "400ms"]
        _run("tc", "qdisc", "add", "dev", "wire", "root", "tbf", *rate)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def can_limit() -> str | None:
    """Why links cannot be made and limited here; None if they can."""
    link = "ip link add wire type veth peer name other"
    limit = "tc qdisc add dev wire root tbf rate 1mbit burst 32kb latency 1s"
    try:
        done = subprocess.run(["unshare", "--net", "sh", "-c", f"{link} && {limit}"], capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip()
