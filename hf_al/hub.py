"""Finished runs on a Hub: one commit each, with all that `from_pretrained` needs, the card, results and plots."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from .card import model_card, shared_arguments
from .loading import load_model
from .report import read_report

STALE = ["*.safetensors", "*.safetensors.index.json", "plots/*", "*.py"]  # of an earlier push, unless pushed again


def push(
    folder: str,
    repo_id: str,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    inference_only: bool = False,
    language: str | None = None,
    license: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Puts a finished run on the Hub in one commit; files that are there unchanged are not sent again.

    Args:
        folder: `output_dir` of the run.
        repo_id: `user/name`; the repository is created if there is none.
        private: make the repository private if it is created.
        revision: the branch; created if there is none. Default: main.
        create_pr: open a pull request instead of committing.
        inference_only: leave out the parameters that only training needs.
        language, license: for the card, as the Hub names them.
        commit_message: its first line.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: a folder that is not a finished run, a name that is not a repo id, no token or one that may not
            write, or a Hub that refuses or cannot be reached. The repository is then unchanged.
    """
    report = read_report(folder)
    with tempfile.TemporaryDirectory(prefix="hf_al_push_") as made:
        prepare(report, folder, repo_id, Path(made), inference_only, language, license)
        api = HfApi()
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=made, revision=revision, create_pr=create_pr, delete_patterns=STALE,
                commit_message=commit_message or f"{report['model_type']}, objective {report['objective']}",
            )  # fmt: skip
        except HFValidationError as error:
            raise ValueError(f"Expected a repo id as user/name, got {repo_id!r}: {error}") from None
        except LocalTokenNotFoundError:
            raise ValueError("Expected a token of the Hub, found none. Run: hf auth login, or set HF_TOKEN.") from None
        except HfHubHTTPError as error:
            raise ValueError(_refused(repo_id, error)) from error
        except Exception as error:  # network errors: the client's transport raises its own
            raise ValueError(
                f"Could not reach the Hub at {api.endpoint}: {error}. Push again later: hf-al push {folder} {repo_id}"
            ) from error
    return str(commit.pr_url or commit.commit_url)


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
) -> None:
    """Writes the shared files of a run into an empty folder, without any path or name of this machine."""
    model, tokenizer = load_model(folder)
    model.save_pretrained(into, inference_only=inference_only)
    tokenizer.save_pretrained(into)
    plots = sorted(path.stem for path in (Path(folder) / "plots").glob("*.png"))
    if plots:
        shutil.copytree(Path(folder) / "plots", into / "plots", ignore=shutil.ignore_patterns("*.tmp.png"))
    arguments = shared_arguments(report["arguments"])
    report = {**report, "arguments": arguments}
    (into / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    text = yaml.safe_dump(arguments, sort_keys=False, allow_unicode=True)
    (into / "training_config.yaml").write_text(text, encoding="utf-8")
    if inference_only:
        model = type(model).from_pretrained(into)
    model_card(report, model, repo_id, plots, language, license).save(into / "README.md")
