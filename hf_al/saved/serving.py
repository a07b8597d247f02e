"""`hf-al serve`: a model behind an HTTP address."""

import logging
import signal
import socket
import sys
from argparse import Namespace
from contextlib import closing, suppress
from pathlib import Path

from ..loading import best_device, load_model
from .prediction import predict

logger = logging.getLogger(__name__)

STOP_SECONDS = 25  # for the answers that are under way; container platforms kill after 30


def serve(flags: Namespace) -> None:
    """Answers requests until SIGTERM or Ctrl-C; then finishes those that it has.

    Raises:
        ValueError: a package is not installed, no model, an exit that does not exist, or an address that cannot be
            used.
    """
    try:
        import uvicorn

        from .serving_app import Limits, build
    except ImportError as error:
        raise ValueError(
            f"Expected the package {error.name} to serve a model, found none. Run: pip install fastapi uvicorn "
            "prometheus_client"
        ) from None

    with closing(bound(flags.host, flags.port)) as listener:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # also what uvicorn calls when it has finished
        model, tokenizer = load_model(flags.model, flags.revision)
        model.to(best_device())  # type: ignore[arg-type]
        exit = flags.exit
        if exit is None:
            exit = "adaptive" if model.config.exit_thresholds is not None else model.config.exits()[-1]
        list(predict(model, tokenizer, [("warming up",)], exit_block=exit))  # refuses an exit that does not exist
        limits = Limits(flags.max_batch_size, flags.max_wait_ms, flags.max_waiting, flags.max_body_kib)
        name = Path(flags.model).resolve().name if Path(flags.model).is_dir() else flags.model
        config = uvicorn.Config(
            build(model, tokenizer, name, exit, limits), log_config=None, log_level="warning", access_log=False,
            lifespan="on", timeout_graceful_shutdown=STOP_SECONDS,
        )  # fmt: skip
        listener.listen()
        host = f"[{flags.host}]" if ":" in flags.host else flags.host
        logger.info("Serving %s at http://%s:%d, exit %s; Ctrl-C ends it.", name, host, flags.port, exit)
        with suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listener])


def bound(host: str, port: int) -> socket.socket:
    """A socket at the address, which accepts nothing yet: a port that is taken is found before the model is loaded.

    Raises:
        ValueError: an address that cannot be used.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not refused for a while after a restart
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ValueError(
            f"Expected a free port and an address of this machine, got {host}:{port}: {error.strerror}. Pass another "
            "--port or --host."
        ) from None
    return listener
