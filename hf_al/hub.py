"""Finished runs on a Hub: one commit each, with all that `from_pretrained` needs, the card, results and plots."""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from .atomic import BEST_CHECKPOINT, CODE, LAST_CHECKPOINT, WEIGHTS, removed_if_broken
from .card import eval_results, model_card, shared_arguments, shared_name
from .early import NO_TOKEN, no_repo_id
from .loading import load_model, weights_sha256
from .metadata import check_metadata
from .modeling.objectives import OBJECTIVES
from .plots import PLOTS
from .report import find_report, read_report, rows_used

logger = logging.getLogger(__name__)

CHECKPOINTS = [f"{LAST_CHECKPOINT}/*", f"{BEST_CHECKPOINT}/*"]
# What earlier pushes may have left, by the names that hf_al writes: the repository may hold files of its owner's
STALE = [
    *WEIGHTS, *CHECKPOINTS, ".eval_results/hf_al.yaml", *(f"plots/{name}.png" for name in ("timeline", *PLOTS)), *CODE,
]  # fmt: skip


class PublicRepository(ValueError):
    """What was to be private would be public."""


def push(
    folder: str,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    inference_only: bool = False,
    language: str | None = None,
    license: str | None = None,
    baseline: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Puts a finished run on the Hub in one commit; files that are there unchanged are not sent again.

    Args:
        folder: `output_dir` of the run.
        repo_id: `user/name`; the repository is created if there is none.
        private: the repository is private: created so if there is none, refused if there is a public one.
        revision: the branch; created if there is none. Default: main.
        create_pr: open a pull request instead of committing.
        inference_only: leave out the parameters that only training needs.
        language, license: for the card, as the Hub names them.
        baseline: `output_dir` or Hub id of a run by backpropagation on the same data: the card compares the two.
        commit_message: its first line.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: a folder that is not a finished run, a license or language that the Hub does not know, a name that
            is not a repo id, no token or one that may not write, a public repository where `private` is wanted, or a
            Hub that refuses or cannot be reached. The repository is then unchanged.
    """
    check_metadata(language, license)
    report = read_report(folder)
    twin = None if baseline is None else _read_baseline(baseline, report)
    api = HfApi()
    if "/" not in repo_id:
        with _refusals(repo_id):
            repo_id = f"{api.whoami()['name']}/{repo_id}"
    with tempfile.TemporaryDirectory(prefix="hf_al_push_") as made:
        prepare(report, folder, repo_id, Path(made), inference_only, language, license, twin)
        with _refusals(repo_id):
            _create(api, repo_id, private)
            with nullcontext() if revision is None else _branch(api, repo_id, revision):
                commit = api.upload_folder(
                    repo_id=repo_id, folder_path=made, revision=revision, create_pr=create_pr, delete_patterns=STALE,
                    commit_message=commit_message or f"{report['model_type']}, objective {report['objective']}",
                )  # fmt: skip
    return str(commit.pr_url or commit.commit_url)


def push_or_warn(folder: str, repo_id: str, private: bool) -> None:
    """`push` when training ends: a finished run does not fail because of a network."""
    try:
        logger.info("Pushed to %s.", push(folder, repo_id, private))
    except Exception as error:
        logger.warning("%s The run is in %s. To push it later: hf-al push %s %s", error, folder, folder, repo_id)


class Checkpoints:
    """Sends the newest checkpoint of a running training to a Hub, in the background, and the best one with it: a run
    that goes on from there needs both. What fails is a warning.

    One is sent at a time. Those that are written meanwhile are left out, except for the last one.
    """

    def __init__(self, repo_id: str, private: bool):
        self.repo_id, self.private, self.api = repo_id, private, HfApi()
        self.sending: Future | None = None
        self.waiting: tuple[Path, Path] | None = None

    def send(self, last: Path, best: Path) -> None:
        """Sends these checkpoints, which may be the same, unless others are on their way."""
        self.waiting = last, best
        if self.sending is None or self.sending.done():
            self._start()

    def finish(self) -> None:
        """Waits for what is on its way, and for the last checkpoint."""
        while self.sending is not None:
            self.sending.result()
            self._start()

    def _start(self) -> None:
        paths, self.waiting, self.sending = self.waiting, None, None
        if paths is None:
            return
        last, best = paths
        try:  # training may delete the checkpoints while they are sent
            with removed_if_broken(last.with_name(f"tmp-hub-{last.name}")) as aside:
                shutil.copytree(last, aside / LAST_CHECKPOINT, copy_function=_link)
                if best != last:
                    shutil.copytree(best, aside / BEST_CHECKPOINT, copy_function=_link)
        except OSError as error:
            logger.warning("%s is not on the Hub (%s); training goes on.", last.name, error)
            return
        self.sending = self.api.run_as_future(self._send, aside, last.name)

    def _send(self, aside: Path, name: str) -> None:
        try:
            with _refusals(self.repo_id):
                repo_id = _create(self.api, self.repo_id, self.private)
                self.api.upload_folder(
                    repo_id=repo_id, folder_path=aside, delete_patterns=CHECKPOINTS,
                    commit_message=f"Training: {name}",
                )  # fmt: skip
        except ValueError as error:
            logger.warning("%s %s is not on the Hub; training goes on.", error, name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """A copy, without a second one of the bytes where the file system can do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _create(api: HfApi, repo_id: str, private: bool) -> str:
    """Creates the repository if there is none; its full name.

    Raises:
        PublicRepository: `private`, and there is a public one, which `create_repo` would leave public without a word.
    """
    found: str = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
    if private and not api.repo_info(found).private:
        raise PublicRepository(
            f"Expected a private repository (--private, hub_private_repo), got {found}, which exists and is public. "
            "Make it private in its settings, leave the flag out, or push to another name."
        )
    return found


@contextmanager
def _branch(api: HfApi, repo_id: str, name: str) -> Iterator[None]:
    """A branch to commit to: it is created if there is none, and goes again if nothing comes of the commit."""
    try:
        api.create_branch(repo_id, branch=name)
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code != 409:
            raise
        yield  # it was there before
        return
    try:
        yield
    except BaseException:
        with suppress(Exception):
            api.delete_branch(repo_id, branch=name)
        raise


@contextmanager
def _refusals(repo_id: str) -> Iterator[None]:
    """What a Hub refuses, or the way to it, as a ValueError that names the fix."""
    try:
        yield
    except PublicRepository:
        raise
    except HFValidationError as error:
        raise no_repo_id(repo_id, error) from None
    except LocalTokenNotFoundError:
        raise ValueError(NO_TOKEN) from None
    except HfHubHTTPError as error:
        raise ValueError(_refused(repo_id, error)) from error
    except Exception as error:  # of the network: the client's transport has errors of its own
        if isinstance(error.__cause__, HfHubHTTPError):  # a file that was refused
            raise ValueError(_refused(repo_id, error.__cause__)) from error
        raise ValueError(f"Could not reach the Hub at {constants.ENDPOINT}: {error}. Push again later.") from error


def _refused(repo_id: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else None
    reason = error.server_message or str(error).splitlines()[0]
    if status in (401, 403):
        return (
            f"Expected a token that may write to {repo_id}, got one that is refused: {reason}. Run: hf auth login, or "
            "set HF_TOKEN."
        )
    return f"The Hub refused the push to {repo_id} ({status}): {reason}."


def prepare(
    report: dict[str, Any],
    folder: str,
    repo_id: str,
    into: Path,
    inference_only: bool,
    language: str | None,
    license: str | None,
    baseline: dict[str, Any] | None = None,
) -> None:
    """Writes the shared files of a run into an empty folder, without any path or name of this machine."""
    model, tokenizer = load_model(folder)
    model.save_pretrained(into, inference_only=inference_only)
    tokenizer.save_pretrained(into)
    if (Path(folder) / "plots").is_dir():
        shutil.copytree(Path(folder) / "plots", into / "plots", ignore=shutil.ignore_patterns("*.tmp.png"))
    plots = sorted(path.stem for path in (into / "plots").glob("*.png"))
    arguments = shared_arguments(report["arguments"])
    data = {**report["data"], "name": shared_name(report["data"]["name"])}
    report = {**report, "arguments": arguments, "data": data, "weights": weights_sha256(into)}
    (into / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    text = yaml.safe_dump(arguments, sort_keys=False, allow_unicode=True)
    (into / "training_config.yaml").write_text(text, encoding="utf-8")
    if inference_only:
        model = type(model).from_pretrained(into)
    model_card(report, model, repo_id, plots, language, license, baseline).save(into / "README.md")
    results = eval_results(report)
    if results:
        (into / ".eval_results").mkdir()
        (into / ".eval_results" / "hf_al.yaml").write_text(yaml.safe_dump(results, sort_keys=False), encoding="utf-8")


def _read_baseline(folder: str, report: dict[str, Any]) -> dict[str, Any]:
    """The report of a run that may stand beside `report`."""
    twin = find_report(folder)
    if not OBJECTIVES[twin["objective"]].end_to_end:
        raise ValueError(f"Expected a run by backpropagation as baseline, got {twin['objective']} in {folder}.")
    if rows_used(twin) != rows_used(report):
        raise ValueError(
            f"Expected a baseline on the same rows, got others in {folder}. Train it on the same files, with the same "
            "limits and validation_seed."
        )
    return twin
