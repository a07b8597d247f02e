"""`hf-al serve` under load, beside the same model behind a plain transformers pipeline.

    python recipes/benchmarks/serve.py --set imdb --data_dir FOLDER --json recipes/benchmarks/serve.json

Trains `recipes/{set}_transformer.yaml` with 6 blocks, calibrates it on validation, and serves it three times, each time
by a process with one thread for the model:

    adaptive   hf-al serve: texts of many requests answered together, each leaving where it may
    full       hf-al serve --exit 5: answered together, all by the last exit
    pipeline   FastAPI and uvicorn, too, but each request goes by itself through `pipeline("text-classification")`

`--clients` ask for `--seconds` in all, one text of 5 to 400 words at a time, cut from the test split; each client asks
again when it has its answer. The servers take turns at being asked. Then more clients than may wait ask at once, and
bodies that are no requests are sent.
"""

import argparse
import asyncio
import io
import itertools
import json
import math
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import numpy as np
from common import data_flags, in_turns, write_results

import hf_al
from hf_al.data import sources
from hf_al.exits import calibrate_exits
from hf_al.flags import set_up_output
from hf_al.messages import table
from hf_al.parsing import parse_arguments

RECIPES = Path(__file__).parents[1]
BLOCKS = 6
WORDS = (5, 400)
TURNS = 3
PATIENCE = 120  # seconds for a server to start or an answer to come
BAD = {
    "no json": b"texts",
    "no text": b"{}",
    "a number as text": b'{"text": 5}',
    "an exit too deep": b'{"text": "a", "exit": 99}',
    "too large": b'{"text": "' + b"a" * 2**21 + b'"}',
}


class Answer(NamedTuple):
    status: int
    seconds: float


# --- servers


def trained(known: argparse.Namespace, more: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Leaves a calibrated model in `--output_dir`. Returns the texts of the test split, and what calibration says."""
    recipe = str(RECIPES / f"{known.set}_transformer.yaml")
    flags = [*data_flags(known.data_dir, known.set), f"--num_blocks={BLOCKS}", f"--output_dir={known.output_dir}"]
    args = parse_arguments(["--config", recipe, *flags, "--overwrite_output_dir", "--plots=false", *more])
    result = hf_al.train(args)
    data = sources.load_text_datasets(args)
    found = calibrate_exits(result.model, result.tokenizer, data["validation"])
    result.model.save_pretrained(known.output_dir)
    shares = " ".join(f"{row['share']:.0%}" for row in found["exits"])
    said = {"validation, adaptive": found["accuracy"], "validation, full": found["last_accuracy"], "left after": shares}
    return list(data["test"]["text"]), said


@contextmanager
def served(arm: str, folder: str) -> Iterator[str]:
    """The address of a server, which ends with the context."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = [sys.executable, "-m", "hf_al_program", "serve", folder, f"--port={port}", "--threads=1"]
    command = {
        "adaptive": [*ours, "--exit=adaptive"],
        "full": [*ours, f"--exit={BLOCKS - 1}"],
        "pipeline": [sys.executable, __file__, "--serve_plainly", folder, str(port)],
    }[arm]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers_at(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"The server did not start: {' '.join(command)}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/predict"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        finally:
            process.kill()


def answers_at(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def serve_plainly(folder: str, port: int) -> None:
    """What one would write without hf_al: a pipeline behind an address, one thread of torch."""
    import torch
    import uvicorn
    from fastapi import Body, FastAPI
    from transformers import pipeline

    torch.set_num_threads(1)
    app, classify = FastAPI(), pipeline("text-classification", folder)

    @app.post("/predict")
    async def predict(text: str = Body(embed=True)) -> dict[str, Any]:
        return {"answers": classify(text, truncation=True)}

    uvicorn.run(app, port=port, log_level="error")


# --- clients


async def ask(session: aiohttp.ClientSession, address: str, body: bytes) -> Answer:
    start = time.perf_counter()
    headers = {"Content-Type": "application/json"}
    try:
        async with session.post(address, data=io.BytesIO(body), headers=headers) as response:
            await response.read()
            return Answer(response.status, time.perf_counter() - start)
    except (aiohttp.ClientError, TimeoutError):
        return Answer(0, time.perf_counter() - start)


async def load(address: str, bodies: list[bytes], clients: int, seconds: float) -> list[Answer]:
    """The answers that so many clients get in that time, each asking again when it has its answer."""
    found: list[Answer] = []
    end, following = time.monotonic() + seconds, itertools.cycle(bodies)
    async with session_for(clients) as session:

        async def client() -> None:
            while time.monotonic() < end:
                answer = await ask(session, address, next(following))
                is_late = time.monotonic() > end  # slow servers are not credited with what they do afterwards
                if not is_late or answer.status != 200:
                    found.append(answer)

        await asyncio.gather(*(client() for _ in range(clients)))
    return found


async def at_once(address: str, bodies: list[bytes]) -> list[Answer]:
    async with session_for(len(bodies)) as session:
        return await asyncio.gather(*(ask(session, address, body) for body in bodies))


def session_for(clients: int) -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=clients), timeout=timeout)


def requests(texts: list[str], count: int) -> list[bytes]:
    """Bodies with one text each, of any number of words between the shortest and the longest, in equal shares: the
    first words of a text, or of as many texts of the split as it takes."""
    generator, bodies = np.random.default_rng(0), []
    for wanted in generator.integers(WORDS[0], WORDS[1] + 1, count):
        words: list[str] = []
        while len(words) < wanted:
            words += texts[int(generator.integers(len(texts)))].split()
        bodies.append(json.dumps({"text": " ".join(words[:wanted])}).encode())
    return bodies


# --- what is measured


def row_of(arm: str, turns: list[list[Answer]], seconds: float) -> dict[str, Any]:
    answers = [answer for turn in turns for answer in turn]
    right = [[answer.seconds for answer in turn if answer.status == 200] for turn in turns]  # a refusal is no answer
    p50, p99 = np.quantile([*itertools.chain(*right)] or [math.nan], [0.5, 0.99])
    rates = sorted(len(turn) / seconds for turn in right)
    return {
        "server": arm,
        "texts/s": statistics.median(rates),
        "slowest": rates[0],
        "fastest": rates[-1],
        "p50 ms": 1000 * p50,
        "p99 ms": 1000 * p99,
        "answers": len(answers),
        "errors": sum(answer.status != 200 for answer in answers),
    }


def overload(address: str, bodies: list[bytes]) -> dict[str, Any]:
    """Twice as many requests as may wait, all at once; then one more, and what is no request."""
    found = asyncio.run(at_once(address, bodies))
    refused = [answer.seconds for answer in found if answer.status == 503]
    (after,) = asyncio.run(at_once(address, bodies[:1]))
    bad = asyncio.run(at_once(address, list(BAD.values())))
    return {
        "asked at once": len(found),
        **{f"status {status}": count for status, count in sorted(Counter(a.status for a in found).items())},
        "slowest refusal, ms": 1000 * max(refused, default=0.0),
        "slowest answer, ms": 1000 * max(answer.seconds for answer in found if answer.status == 200),
        "then": after.status,
        **{name: answer.status for name, answer in zip(BAD, bad, strict=True)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="tweets", help="data set (default: tweets)")
    parser.add_argument("--data_dir", metavar="FOLDER", help="a folder for each data set")
    parser.add_argument("--json", metavar="FILE", help="where to keep machine, rows and ratios")
    parser.add_argument("--output_dir", default="out/serve", help="folder of the model (default: out/serve)")
    parser.add_argument("--clients", type=int, default=64, help="that ask at a time (default: 64)")
    parser.add_argument("--seconds", type=float, default=60, help="that each server is asked for (default: 60)")
    parser.add_argument("--serve_plainly", nargs=2, metavar=("FOLDER", "PORT"), help=argparse.SUPPRESS)
    known, more = parser.parse_known_args()  # further flags are those of hf-al train
    if known.serve_plainly:
        folder, port = known.serve_plainly
        return serve_plainly(folder, int(port))
    set_up_output()
    texts, calibrated = trained(known, more)
    bodies = requests(texts, 4096)
    turns: dict[str, list[list[Answer]]] = {"adaptive": [], "full": [], "pipeline": []}
    with (
        served("adaptive", known.output_dir) as adaptive,
        served("full", known.output_dir) as full,
        served("pipeline", known.output_dir) as plain,
    ):
        addresses = {"adaptive": adaptive, "full": full, "pipeline": plain}
        for address in addresses.values():
            asyncio.run(load(address, bodies, known.clients, min(2, known.seconds)))  # warm
        for _, arm in in_turns(turns, TURNS):
            turns[arm].append(asyncio.run(load(addresses[arm], bodies, known.clients, known.seconds / TURNS)))
        strained = overload(adaptive, bodies[:512])
    rows = [row_of(arm, found, known.seconds / TURNS) for arm, found in turns.items()]
    print(table(rows, markdown=True))
    print(table([strained], markdown=True))
    print(table([calibrated], markdown=True))
    rates = {row["server"]: row["texts/s"] for row in rows}
    ratios = {
        "serve_over_plain_pipeline_throughput": rates["adaptive"] / rates["pipeline"],
        "serve_full_over_plain_pipeline_throughput": rates["full"] / rates["pipeline"],
    }
    write_results(known.json, [*rows, strained, calibrated], ratios)
    for name, value in ratios.items():
        print(f"{name}: {value:.4g}")


if __name__ == "__main__":
    main()
