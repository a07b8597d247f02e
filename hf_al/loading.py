"""A saved model, checked before its weights are read: safetensors only, with the tensors that its config describes.

transformers would find the same faults, but only after allocating memory for the weights, and in many lines.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import registration
from .early import check_model_name
from .messages import last_line
from .modeling.configuration_al import ALConfig
from .modeling.modeling_al import ALForSequenceClassification
from .modeling.pretrained import load_pretrained
from .own import hint

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Of a Hub repository: config, weights, tokenizer, arguments of the run; no pickles. Nothing in folders: checkpoints
WANTED = ["*.json", "training_config.yaml", "*.safetensors", "*.txt", "*.model"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MIXED = "Config and weights are from different models: copy both from one run."
Shapes = dict[str, tuple[int, ...]]


def load_model(name: str, revision: str | None = None) -> tuple[ALForSequenceClassification, PreTrainedTokenizerBase]:
    """A trained model and its tokenizer from a folder or a Hub id.

    Args:
        name: a folder, or a Hub id.
        revision: branch, tag or commit of a Hub id (default: main).

    Raises:
        ValueError: a folder that is not a model, a model of another library, weights that are pickled, corrupt or not
            those that config.json describes (the file and the first tensor that differs are named).
    """
    folder = local_copy(name, revision)
    try:
        values = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"Expected {folder / 'config.json'} to hold the values of a model, got {type(error).__name__}: {error}. "
            "Copy it again from the run."
        ) from None
    if values.get("model_type") not in registration.MODEL_CLASSES:
        raise ValueError(
            f"Expected an AL model in {name}, got one of type {values.get('model_type')!r}."
            f"{hint(folder) or ' Pass the output_dir of a finished run.'}"
        )
    saved = _saved_shapes(folder)
    _check_counts(values, {n: shape for shapes in saved.values() for n, shape in shapes.items()}, folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each library raises its own
        raise ValueError(f"Could not load {name}: {last_line(error)}{hint(folder)}") from error
    try:
        with torch.device("meta"):
            empty = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"Could not load {name}: {last_line(error)}") from error
    _check_shapes(empty, saved, folder)
    try:
        model = type(empty).from_pretrained(folder, use_safetensors=True)
    except Exception as error:
        raise ValueError(f"Could not load {name}: {error}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        file = folder / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"Expected {file}, found none. Save the tokenizer there, too.") from error
        reason = last_line(error).rstrip(".")
        raise ValueError(f"Could not load the tokenizer of {name}, from {file}: {reason}. Copy it again.") from error
    _check_bytes(folder)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"Expected a tokenizer of at most {config.vocab_size} tokens (vocab_size) in {name}, got {len(tokenizer)}. "
            "Model and tokenizer are from different runs: copy both from one."
        )
    return model, tokenizer


def load_encoder_config(name: str) -> PreTrainedConfig:
    """The config of a pretrained encoder from a folder or a Hub id.

    Raises:
        ValueError: nothing there that can be read.
    """
    return _of_encoder(name, partial(AutoConfig.from_pretrained, trust_remote_code=False))


def load_encoder(name: str) -> PreTrainedModel:
    """A pretrained encoder in float32, without its head, from a folder or a Hub id; errors as above, and pickles."""
    folder = local_copy(name, None)
    _saved_shapes(folder)  # a message for each way in which they can be wrong
    return _of_encoder(str(folder), load_pretrained)


def _of_encoder(name: str, load: Callable) -> Any:
    check_model_name(name)
    try:
        return load(name)
    except Exception as error:  # files, the Hub, code that is not transformers' own: each raises its own
        raise ValueError(f"Could not load the encoder {name}: {last_line(error)}") from error


def parameter_counts(model: ALForSequenceClassification) -> dict[str, int]:
    """How many parameters an answer needs (`inference`), and how many only training does (`training_only`)."""
    names = dict(model.named_parameters())
    training_only = sum(p.numel() for name, p in names.items() if model.is_training_only(name))
    return {"inference": sum(p.numel() for p in names.values()) - training_only, "training_only": training_only}


def weights_sha256(folder: Path) -> dict[str, str]:
    """Hashes of the weight files of a saved model, by name, for the report."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _check_bytes(folder: Path) -> None:
    """Refuses weights that are not those of the report beside them. A report without hashes, or none, is no mistake."""
    try:
        written = json.loads((folder / "report.json").read_text(encoding="utf-8"))["weights"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    now = weights_sha256(folder)
    wrong = next((name for name, digest in written.items() if now.get(name) != digest), None)
    if wrong:
        raise ValueError(
            f"Expected in {folder / wrong} the bytes that the run wrote, got others: the file is damaged, or from "
            "another run. Copy it again. If you changed the weights yourself, delete report.json, which is not about "
            "them."
        )


def best_device() -> str:
    """Where a model that was just loaded answers fastest."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_of(model: ALForSequenceClassification) -> torch.device:
    """The device for a model's inputs, even if its blocks are offloaded (`device_map`)."""
    device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    device = torch.device(model.device if device in (None, "disk") else device)
    return torch.device("cpu") if device.type == "meta" else device


def longest_text(config: ALConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest text that a model reads."""
    return min(tokenizer.model_max_length, config.max_position_embeddings)


def local_copy(name: str, revision: str | None) -> Path:
    """The folder itself, or the local copy of a Hub repository's safetensors and text files."""
    check_model_name(name, revision)
    if Path(name).exists():
        return Path(name)
    try:
        copy = Path(snapshot_download(name, revision=revision, allow_patterns=WANTED, ignore_patterns=["*/*"]))
    except Exception as error:  # no network, no such repository, no permission to read it
        raise ValueError(
            f"Found no folder {name} here, and could not load a model of that name from the Hub: {last_line(error)}"
        ) from error
    if not (copy / "config.json").is_file():
        raise ValueError(f"Expected a model with config.json on the Hub, got {name}.")
    if not any(copy.glob("*.safetensors")):
        _refuse_without_weights(name, HfApi().list_repo_files(name, revision=revision))
    return copy


def _saved_shapes(folder: Path) -> dict[Path, Shapes]:
    """The weight files of a model folder, with the shapes of their tensors."""
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        try:
            names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            if any(Path(name).name != name for name in names):
                raise ValueError("a file elsewhere")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"Expected an index of weight files in {folder / INDEX}, got {error}.") from None
        files = [folder / name for name in sorted(names)]
    else:
        _refuse_without_weights(str(folder), [path.name for path in folder.iterdir()])
    return {file: read_header(file) for file in files}


def _refuse_without_weights(name: str, files: list[str]) -> NoReturn:
    pickles = sorted(file for file in files if Path(file).suffix in PICKLES)
    raise ValueError(
        f"Expected {WEIGHTS} in {name}, got {', '.join(pickles) or 'no weights'}. "
        + ("Pickled weights can run any code when they are read; save the model as safetensors." if pickles else "")
        + ("" if pickles else "Pass the output_dir of a finished run.")
    )


def read_header(file: Path) -> Shapes:
    """Names and shapes of the tensors in a safetensors file; reads only its header.

    Raises:
        ValueError: a file that is missing, cut off, corrupt, or somebody else's.
    """
    if file.is_file() and not os.access(file, os.R_OK):  # safetensors says that there is no such file
        raise ValueError(f"Expected a file that may be read, got {file}, which is somebody else's. Change its mode.")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Expected a whole safetensors file at {file}, got {type(error).__name__}: {error}. "
            "It is missing, cut off or corrupt: copy it again."
        ) from None


def difference(expected: Shapes, got: Shapes) -> str | None:
    """The first tensor, in the order of `expected`, that `got` lacks or has in another shape, else an extra one."""
    for name, shape in expected.items():
        if name not in got:
            return f"{name} of shape {list(shape)} is missing"
        if got[name] != shape:
            return f"{name} has shape {list(got[name])} instead of {list(shape)}"
    extra = sorted(got.keys() - expected.keys())
    return f"{extra[0]} of shape {list(got[extra[0]])} belongs to no part of the model" if extra else None


def _check_counts(values: dict[str, Any], saved: Shapes, folder: Path) -> None:
    """Refuses an impossible depth, which would take long to build (width would not): each layer has a tensor."""

    def count(key: str, default: int) -> int:
        return values[key] if isinstance(values.get(key), int) else default

    blocks, layers = count("num_blocks", 1), count("layers_per_block", 1)
    entries = sum(math.prod(shape) for shape in saved.values())
    deepest = max(blocks, (blocks - 1) * layers, count("bridge_layers", 1))
    if deepest > len(saved) or count("num_labels", 0) > entries:
        raise ValueError(
            f"Expected the weights that {folder / 'config.json'} describes ({blocks} blocks of {layers} layers, "
            f"{count('bridge_layers', 1)} in a bridge), got {len(saved)} tensors. {MIXED}"
        )


def _check_shapes(empty: ALForSequenceClassification, saved: dict[Path, Shapes], folder: Path) -> None:
    def plain(shapes: Shapes) -> Shapes:  # the encoder alone is saved without the classifier's prefix
        return {name.removeprefix("model."): shape for name, shape in shapes.items()}

    expected = plain({name: tuple(t.shape) for name, t in empty.state_dict().items()})
    got: Shapes = {}
    for file, shapes in saved.items():
        got |= plain(shapes)
        here = difference({n: s for n, s in expected.items() if n in plain(shapes)}, plain(shapes))
        if here:
            raise ValueError(_differ(file, here, folder))
    missing = difference(expected, got)
    if missing:
        raise ValueError(_differ(folder / INDEX if len(saved) > 1 else next(iter(saved)), missing, folder))


def _differ(file: Path, what: str, folder: Path) -> str:
    return f"Expected in {file} the weights that {folder / 'config.json'} describes, got others: {what}. {MIXED}"
