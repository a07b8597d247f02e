"""A Hub on loopback, and a client process that knows it."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import hub_jobs as jobs
import pytest
from server import TOKEN, serve_in_thread


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub, and a client process that knows it: hub.run(job, ...), hub.state, hub.endpoint."""
    endpoint, server, app = serve_in_thread(tmp_path_factory.mktemp("hub"))
    home = tmp_path_factory.mktemp("home")
    values = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_TOKEN": TOKEN}
    with (
        pytest.MonkeyPatch.context() as patch,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        patch.delenv("HF_HUB_OFFLINE")
        for name, value in values.items():
            patch.setenv(name, value)
        pool.submit(jobs.set_token, TOKEN).result(100)  # starts it, with this environment

        def run(job, *args, **options):
            return pool.submit(job, *args, **options).result(100)

        yield SimpleNamespace(run=run, state=app.state, endpoint=endpoint, environment=values)
        server.should_exit = True


@pytest.fixture(autouse=True)
def _cold(hub, tmp_path):
    hub.state.log.clear()
    hub.state.faults.clear()
    hub.run(jobs.set_token, TOKEN)
    hub.run(jobs.cold_cache, str(tmp_path / "cache"))
