"""Jobs for a client of the Hub, in its own process, because huggingface_hub reads the endpoint when it is imported."""

import contextlib
import io
from typing import Any


def cold_cache(folder: str) -> None:
    """From here on nothing has been downloaded."""
    from huggingface_hub import constants

    constants.HF_HUB_CACHE = folder


def push(folder: str, repo_id: str, **options: Any) -> str:
    from hf_al.hub import push

    return push(folder, repo_id, **options)


def push_data(files: dict[str, str], repo_id: str) -> None:
    """A data set of its files, by their names."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset")
    for name, path in files.items():
        api.upload_file(path_or_fileobj=path, path_in_repo=name, repo_id=repo_id, repo_type="dataset")


def push_files(folder: str, repo_id: str) -> None:
    """A model repository of a folder, as it is."""
    from huggingface_hub import HfApi

    HfApi().create_repo(repo_id)
    HfApi().upload_folder(repo_id=repo_id, folder_path=folder)


def validate(card: str) -> None:
    """ValueError if the Hub refuses the metadata of a model's card."""
    from huggingface_hub import ModelCard

    ModelCard(card).validate()


def reconnect() -> None:
    """Drops connections that a fault has left half closed."""
    from huggingface_hub import close_session

    close_session()


def peak_memory_mib() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def files(repo_id: str, revision: str | None = None) -> dict[str, bytes]:
    """Name -> bytes of a repository."""
    from pathlib import Path

    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(repo_id, revision=revision))
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def commits(repo_id: str, revision: str | None = None) -> list[str]:
    """Newest first."""
    from huggingface_hub import HfApi

    return [commit.commit_id for commit in HfApi().list_repo_commits(repo_id, revision=revision)]


def branches(repo_id: str) -> list[str]:
    from huggingface_hub import HfApi

    return sorted(branch.name for branch in HfApi().list_repo_refs(repo_id).branches)


def answers(name: str, texts: list[str], revision: str | None = None) -> dict[str, Any]:
    """The answers of the Auto classes and of a pipeline for a folder or a repo id."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    import hf_al  # noqa: F401

    torch.set_num_threads(1)  # another number rounds differently
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    model = AutoModelForSequenceClassification.from_pretrained(name, revision=revision)
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0].tolist() for text in texts]
    classify = pipeline("text-classification", model=name, revision=revision, device="cpu")
    return {"logits": logits, "pipeline": classify(texts), "inference_only": model.config.inference_only}


def shell(*argv: str) -> tuple[int, str, str]:
    """`hf-al ARGV`: (status, standard output, standard error)."""
    import logging

    from hf_al.cli import main

    logging.getLogger().handlers.clear()  # each call writes to its own standard error
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(argv))
        except SystemExit as stop:
            status = int(stop.code or 0)
    return status, out.getvalue(), err.getvalue()


def run_code(code: str) -> str:
    """What a page's Python prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    return out.getvalue()


def set_token(token: str | None) -> None:
    import os

    if token is None:
        os.environ.pop("HF_TOKEN", None)
    else:
        os.environ["HF_TOKEN"] = token


def interrupted(step: int, *argv: str) -> tuple[int, str, str]:
    """`hf-al ARGV`, with Ctrl-C at an optimizer step."""
    import os
    import signal

    import pytest
    from hooks import hook

    from hf_al.training.stage import Stage

    with pytest.MonkeyPatch.context() as patch:
        hook(patch, Stage, "train_batch", before=lambda call: call.step == step and os.kill(os.getpid(), signal.SIGINT))
        return shell(*argv)


def download(repo_id: str) -> str:
    """The folder of a local copy."""
    from huggingface_hub import snapshot_download

    return snapshot_download(repo_id)
