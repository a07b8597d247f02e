"""Shared by all tests: no network, one cache for the run, small real text."""

import os
import tempfile

_cache = tempfile.mkdtemp(prefix="hf_al_tests_")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=_cache,
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
)

import pytest
import torch
from datasets import DatasetDict

import hf_al
from hf_al.data import sources
from hf_al.modeling import objectives

# All that there are, so that a new one is tested without being named here
ARCHITECTURES = tuple(hf_al.MODEL_CLASSES)
OBJECTIVES = tuple(objectives.OBJECTIVES)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors are faster on one thread, and rounding is the same for all tests."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tweets() -> DatasetDict:
    """The embedded tweets: splits train, validation and test with columns text and label (string)."""
    return sources.load_tweets()


@pytest.fixture(scope="session")
def few_tweets(tweets) -> DatasetDict:
    """A few hundred of them, quick to train on."""
    sizes = {"train": 400, "validation": 80, "test": 80}
    return DatasetDict({name: tweets[name].select(range(size)) for name, size in sizes.items()})


@pytest.fixture
def make_model():
    """A tiny model: make_model("al_lstm", objective="al_ce", num_blocks=3, ...)."""

    def make(model_type: str = "al_lstm", seed: int = 0, **config):
        config_class, _, model_class = hf_al.MODEL_CLASSES[model_type]
        values = {"vocab_size": 60, "hidden_size": 16, "target_size": 12, "num_blocks": 3, "num_labels": 3}
        if model_type == "al_transformer":
            values["num_attention_heads"] = 2
        torch.manual_seed(seed)
        return model_class(config_class(**{**values, **config}))

    return make


@pytest.fixture
def make_batch():
    """Ragged token ids with mask and labels: make_batch(rows=4, tokens=7) -> dict of tensors."""

    def make(rows: int = 4, tokens: int = 7, classes: int = 3, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(1, 60, (rows, tokens), generator=generator)
        lengths = torch.randint(2, tokens + 1, (rows,), generator=generator)
        lengths[0] = tokens
        mask = (torch.arange(tokens) < lengths[:, None]).long()
        labels = torch.randint(0, classes, (rows,), generator=generator)
        return {"input_ids": input_ids * mask, "attention_mask": mask, "labels": labels}

    return make
