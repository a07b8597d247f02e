"""`hf-al serve`: the answers of `hf-al predict` over HTTP, to many clients at a time, within limits, until it stops."""

import functools
import itertools
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from conftest import assert_mistake, slow

from hf_al.cli import build_parser
from hf_al.loading import load_model
from hf_al.saved import serving_app
from hf_al.saved.answers import flat
from hf_al.saved.prediction import predict
from hf_al.saved.request_body import LONGEST_TEXT
from hf_al.saved.serving import bound
from hf_al.saved.serving_app import Limits, build

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
LIMITS = {"max_batch_size": 16, "max_wait_ms": 5, "max_waiting": 256, "max_body_kib": 512}
MODEL_CALLS = "hf_al_batch_size_count"

pytestmark = [pytest.mark.medium, pytest.mark.timeout(120)]


# --- a server


@pytest.fixture(scope="module")
def texts(few_tweets) -> list[str]:
    return few_tweets["test"]["text"][:40]


@pytest.fixture(scope="module")
def calibrated(trained, texts, tmp_path_factory) -> Path:
    """A model that is sure of half of the texts after its first block."""
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    shutil.copytree(trained[0], folder, ignore=shutil.ignore_patterns("checkpoints"))
    scores = sorted(answer["score"] for answer in answers(trained[0], [(text,) for text in texts], exit_block=0))
    config = json.loads((folder / "config.json").read_text())
    config |= {"exit_temperatures": [1.0, 1.0], "exit_thresholds": [(scores[19] + scores[20]) / 2, None]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@functools.cache
def loaded(folder: Path):
    return load_model(str(folder))


def answers(folder: Path, rows: list, **options) -> list[dict]:
    return [answer for chunk in predict(*loaded(folder), rows, **options) for answer in chunk]


def assert_equal(found: list[dict], expected: list[dict]) -> None:
    """But for the rounding of other batches."""
    for one, other in zip(found, expected, strict=True):
        assert flat(one) == pytest.approx(flat(other), abs=1e-5)


@contextmanager
def serving(folder: Path, exit: int | str = "adaptive", http: str = "auto", **limits):
    """A client of a server in a thread. uvicorn has two readers of HTTP: h11, and httptools where it is installed."""
    app = build(*load_model(str(folder)), "run", exit, Limits(**{**LIMITS, **limits}))
    listener = bound("127.0.0.1", 0)
    listener.listen()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, http=http, log_config=None, log_level="critical", lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        # No idle connection is closed while another thread is given it: httpcore's pool does that above its limit.
        limits = httpx.Limits(keepalive_expiry=None)
        with httpx.Client(base_url=address, timeout=60, trust_env=False, limits=limits) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(calibrated):
    with serving(calibrated) as client:
        yield client


def metrics(client: httpx.Client) -> dict[str, float]:
    lines = client.get("/metrics").raise_for_status().text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def wait_for_texts(client: httpx.Client, waiting: int) -> None:
    """Until so many texts wait for the model."""
    deadline = time.monotonic() + 30
    while metrics(client)["hf_al_waiting_texts"] != waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def held(monkeypatch):
    """A model that starts to answer, and then waits: (event that it has started, event that lets it go on)."""
    started, go_on = threading.Event(), threading.Event()

    def hold(*args):
        started.set()
        assert go_on.wait(60)
        return predict(*args)

    monkeypatch.setattr(serving_app, "predict", hold)
    yield started, go_on
    go_on.set()


# --- answers


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, ["--exit=adaptive"]),
        ({"exit": "adaptive", "all_scores": True}, ["--exit=adaptive", "--all_scores"]),
        ({"exit": 0}, ["--exit=0"]),
        ({"exit": 1, "all_scores": True}, ["--exit=1", "--all_scores"]),
    ],
    ids=str,
)
def test_answers_are_those_of_hf_al_predict(options, flags, client, calibrated, texts, shell, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    status, out, err = shell("predict", str(calibrated), "--input", str(rows), "--threads=1", *flags)
    assert status == 0, err
    expected = [json.loads(line) for line in out.splitlines()]
    found = client.post("/predict", json={"texts": texts, **options}).raise_for_status().json()["answers"]
    assert_equal(found, expected)
    if options.get("exit", "adaptive") == "adaptive":
        assert {answer["exit"] for answer in found} == {0, 1}


def test_texts_and_pairs_of_a_request_keep_their_order(client, calibrated):
    body = {"texts": ["one", ["two", "three"], "four", ["five", "six"]], "exit": 1}
    found = client.post("/predict", json=body).raise_for_status().json()["answers"]
    expected = [
        answers(calibrated, [row], exit_block=1)[0] for row in [("one",), ("two", "three"), ("four",), ("five", "six")]
    ]
    assert_equal(found, expected)


def test_a_single_text_needs_no_list(client):
    one, several = (client.post("/predict", json=body).json() for body in ({"text": "late"}, {"texts": ["late"]}))
    assert one.keys() == {"answers"}
    assert_equal(one["answers"], several["answers"])


def test_many_clients_are_answered_together(calibrated, texts):
    rows = [(text,) for text in texts]
    expected = {exit: answers(calibrated, rows, exit_block=exit) for exit in ("adaptive", 0)}

    def ask(i: int) -> None:
        which, exit = [(i + step) % len(texts) for step in range(1 + i % 3)], (0 if i % 5 == 0 else "adaptive")
        response = client.post("/predict", json={"texts": [texts[j] for j in which], "exit": exit})
        assert response.status_code == 200, response.text
        assert_equal(response.json()["answers"], [expected[exit][j] for j in which])

    with serving(calibrated) as client, ThreadPoolExecutor(64) as clients:
        for done in [clients.submit(ask, i) for i in range(320)]:
            done.result()
        counted = metrics(client)
    assert counted['hf_al_requests_total{status="200"}'] == 320
    assert counted["hf_al_batch_size_sum"] == sum(1 + i % 3 for i in range(320))
    assert counted[MODEL_CALLS] < 160
    assert counted['hf_al_batch_size_bucket{le="16.0"}'] == counted[MODEL_CALLS]


# --- limits


def test_overload_is_refused_at_once_and_the_server_recovers(calibrated, held):
    started, go_on = held
    with serving(calibrated, max_batch_size=1, max_waiting=2) as client, ThreadPoolExecutor(2) as clients:
        try:
            under_way = clients.submit(client.post, "/predict", json={"text": "one"})
            assert started.wait(30)
            queued = clients.submit(client.post, "/predict", json={"texts": ["two", "three"]})
            wait_for_texts(client, 2)
            refused = client.post("/predict", json={"text": "four"})
            assert refused.status_code == 503
            assert int(refused.headers["Retry-After"]) > 0
            assert "Expected at most 2 texts to wait, got more." in refused.json()["error"]
            assert client.get("/health").json()["status"] == "ok"
        finally:
            go_on.set()
        assert [done.result().status_code for done in (under_way, queued)] == [200, 200]
        assert client.post("/predict", json={"texts": ["four", "five"]}).status_code == 200
        counted = metrics(client)
    assert (counted['hf_al_requests_total{status="200"}'], counted['hf_al_requests_total{status="503"}']) == (3, 1)
    assert counted["hf_al_waiting_texts"] == 0


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "Expected a json object"),
        (b"text=late", 400, "Expected a json object"),
        (b'{"text": "late"', 400, "Expected a json object"),
        (b'{"text": "\xff"}', 400, "Expected a json object"),
        (b"[" * 100_000, 400, "Expected a json object"),
        (b'["late"]', 422, "Expected a json object"),
        (b"{}", 422, "Expected a text, got none. Send {"),
        (b'{"texts": []}', 422, "Expected a text, got none. Send {"),
        (b'{"texts": null}', 422, "Expected a text, got none. Send {"),
        (b'{"text": null}', 422, "Expected a text, got none. Send {"),
        (b'{"text": "late", "texts": ["late"]}', 422, "got both"),
        (b'{"text": ["late", "lost"]}', 422, "Expected text to be one text, got a list"),
        (b'{"texts": "late"}', 422, "Expected texts to be a list"),
        (b'{"texts": ["late", " "]}', 422, "Expected a text, got an empty one. This is texts[1]"),
        (b'{"texts": ["late", 3]}', 422, "got int. This is texts[1]: leave it out, or send a string"),
        (b'{"texts": [null]}', 422, "Expected a text, got none. This is texts[0]"),
        (b'{"texts": ["\\ud800"]}', 422, "Expected text in UTF-8"),
        (b'{"texts": [["a", "b", "c"]]}', 422, "got a list of 3"),
        (b'{"texts": [["a", ""]]}', 422, "got an empty one"),
        (b'{"text": "late", "exit": 2}', 422, "Expected exit to be 'adaptive' or one of [0, 1], got 2"),
        (b'{"text": "late", "exit": true}', 422, "got true"),
        (b'{"text": "late", "exit": 1.0}', 422, "got 1.0"),
        (b'{"text": "late", "exit": "early"}', 422, 'got "early"'),
        (b'{"text": "late", "exit": ["x", "x", "x", "x", "x", "x", "x", "x", "x", "x"]}', 422, "..."),
        (b'{"text": "late", "all_scores": 1}', 422, "Expected all_scores to be true or false"),
        (b'{"txt": "late"}', 422, "Did you mean text?"),
        (json.dumps({"texts": ["late"] * 257}).encode(), 413, "Expected at most 256 texts, got 257"),
        (json.dumps({"text": "a" * (LONGEST_TEXT + 1)}).encode(), 422, f"Expected at most {LONGEST_TEXT} characters"),
        (b" " * (512 * 1024 + 1), 413, "Expected a body of at most 512 KiB"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_request_that_cannot_be_answered_says_what_to_do(body, status, said, client):
    response = client.post("/predict", content=body)
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    assert said in response.json()["error"]
    assert response.json()["error"].startswith("Expected ")


@pytest.mark.parametrize("http", ["h11", "auto"])
def test_a_body_without_end_is_not_read_to_its_end(http, calibrated):
    with serving(calibrated, http=http) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port), timeout=30) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000000\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")
        response = client.post("/predict", content=itertools.repeat(b" " * 1024))
        assert response.status_code == 413
        assert client.get("/health").status_code == 200


def test_adaptive_exits_of_a_model_that_is_not_calibrated_are_refused(trained):
    with serving(trained[0], exit=1) as client:
        response = client.post("/predict", json={"text": "late", "exit": "adaptive"})
        assert (response.status_code, "without calibration" in response.text) == (422, True)
        assert client.post("/predict", json={"text": "late"}).json()["answers"][0]["exits"][-1]["block"] == 1


@pytest.mark.parametrize("http", ["h11", "auto"])
def test_the_texts_of_a_client_that_leaves_are_dropped(http, calibrated, held):
    started, go_on = held
    with serving(calibrated, http=http, max_batch_size=1) as client, ThreadPoolExecutor(1) as clients:
        try:
            under_way = clients.submit(client.post, "/predict", json={"text": "one"})
            assert started.wait(30)
            body = b'{"texts": ["two", "three"]}'
            with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
                connection.sendall(
                    b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
                )
                wait_for_texts(client, 2)
            wait_for_texts(client, 0)
        finally:
            go_on.set()
        assert under_way.result().status_code == 200
        counted = metrics(client)
    assert counted["hf_al_batch_size_sum"] == 1
    assert counted['hf_al_requests_total{status="499"}'] == 1


def test_an_error_in_the_model_is_one_line_and_the_server_lives_on(calibrated, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of memory in /home/me/secret.py")

    with serving(calibrated) as client:
        with monkeypatch.context() as patch:
            patch.setattr(serving_app, "predict", fail)
            response = client.post("/predict", json={"texts": ["one", "two"]})
        assert response.status_code == 500
        assert response.json() == {"error": "The model failed: RuntimeError. See the server's log."}
        assert client.post("/predict", json={"texts": ["one", "two"]}).status_code == 200


# --- health and metrics


def test_health_and_links(client):
    said = {"status": "ok", "model": "run", "exits": [0, 1], "exit": "adaptive", "numbers": []}
    assert client.get("/health").json() == said
    assert client.head("/health").status_code == 200
    for link in client.get("/").json().values():
        assert client.get(link).status_code == (405 if link == "/predict" else 200)
    assert client.get("/openapi.json").json()["paths"]["/predict"]["post"]["requestBody"]
    response = client.get("/nothing")
    assert (response.status_code, "Expected POST /predict" in response.json()["error"]) == (404, True)


def test_metrics_count(calibrated, texts):
    with serving(calibrated) as client:
        found = client.post("/predict", json={"texts": texts}).json()["answers"]
        client.post("/predict", json={"texts": texts[:3], "exit": 1})
        client.post("/predict", json={})
        counted = metrics(client)
    left = [answer["exit"] for answer in found]
    assert counted['hf_al_texts_total{exit="0"}'] == left.count(0)
    assert counted['hf_al_texts_total{exit="1"}'] == left.count(1) + 3
    assert counted['hf_al_requests_total{status="200"}'] == 2
    assert counted['hf_al_requests_total{status="422"}'] == 1
    assert counted["hf_al_request_seconds_count"] == 3
    assert counted["hf_al_batch_size_sum"] == len(texts) + 3
    assert counted["hf_al_waiting_texts"] == 0


# --- the command


@pytest.fixture
def port() -> int:
    with closing(bound("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT)])
def test_a_stop_finishes_what_is_under_way(number, calibrated, port, start):
    program = start("serve", str(calibrated), f"--port={port}", "--threads=1", "--max_wait_ms=3000")
    assert any(f"Serving run at http://127.0.0.1:{port}, exit adaptive".encode() in line for line in program.stderr)
    address = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as client, ThreadPoolExecutor(1) as clients:
        for link in ("/", "/health", "/metrics", "/openapi.json"):
            assert str(calibrated.parent) not in client.get(link).text
        asked = clients.submit(client.post, "/predict", json={"text": "you lost my bag"})
        wait_for_texts(client, 1)
        program.send_signal(number)
        assert_equal(
            asked.result().json()["answers"], answers(calibrated, [("you lost my bag",)], exit_block="adaptive")
        )
        assert program.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            client.get("/health")
    assert program.stderr.read() == b""


def test_a_port_that_is_taken_is_one_message(shell, trained):
    with closing(bound("127.0.0.1", 0)) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert_mistake(
            shell("serve", str(trained[0]), f"--port={port}"), f"got 127.0.0.1:{port}: ", "Pass another --port"
        )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port=0"], "from 1 to 65535"),
        (["--host=no.invalid"], "got no.invalid:8000: "),
        (["--exit=2"], "from 0 to 1"),
        (["--exit=adaptive"], "Run hf-al calibrate"),
        (["--max_waiting=16"], "Expected max_waiting of at least max_batch_size, 32, got 16"),
        (["--max_wait_ms=-1"], "expected a number of at least 0, got '-1'"),
        (["--max_batch_size=0"], "expected a number of at least 1, got '0'"),
    ],
    ids=str,
)
def test_mistakes_are_one_message(flags, said, shell, trained):
    assert_mistake(shell("serve", str(trained[0]), *flags), said)


def test_a_missing_package_is_named(shell, trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert_mistake(shell("serve", str(trained[0])), "Expected the package uvicorn", "Run: pip install fastapi uvicorn")


# --- what the documentation shows


def test_the_clients_of_the_documentation_work(client, capsys, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    address = f"127.0.0.1:{client.base_url.port}"
    code = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)[0]  # the other one: test_exporting
    exec(code.replace("127.0.0.1:8000", address), {})
    labels = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert len(labels) == 2
    if shutil.which("curl"):
        (command,) = re.findall(r"^curl .*$", DOCS, re.MULTILINE)
        argv = shlex.split(command.replace("127.0.0.1:8000", address))
        done = subprocess.run([*argv, "--silent"], capture_output=True, text=True, timeout=60)
        assert [answer["label"] for answer in json.loads(done.stdout)["answers"]] == labels


def test_the_container_file_copies_what_there_is_and_starts_the_server():
    text = (ROOT / "recipes" / "serve" / "Dockerfile").read_text(encoding="utf-8")
    copied = [name for names in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in names.split()]
    assert all((ROOT / name).exists() for name in copied)
    ignored = (ROOT / "recipes" / "serve" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:] for line in ignored if line.startswith("!")} == set(copied)
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    program, command, *argv = json.loads(entry)
    assert (program, command) == ("hf-al", "serve")
    flags = build_parser()[1]["serve"].parse_args(argv)
    assert (flags.model, flags.host, flags.port) == ("/model", "0.0.0.0", 8000)
    assert f"127.0.0.1:{flags.port}/health" in text
    assert re.search(r"^USER (?!root)", text, re.MULTILINE)
