"""--cache_frozen: frozen blocks compute each row of train once, and training ends where it would without."""

from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import pytest
import torch
from conftest import slow
from safetensors.torch import load_file

import hf_al
from hf_al.training import stage
from hf_al.training.frozen import FrozenStates

SMALL = {"num_blocks": 3, "hidden_size": 16, "target_size": 12, "bridge_dropout_prob": 0.2}


def run(data, folder: Path, model_type: str, encoder: Path, **values) -> dict[str, torch.Tensor]:
    """The weights after two epochs."""
    model = {"cuts": [1, 3], "lookahead": 1} if model_type == "al_encoder" else SMALL
    args = hf_al.TrainingArguments(**{
        "output_dir": str(folder), "model_type": model_type, "model": model, "num_train_epochs": 2, "frozen_blocks": 2,
        "per_device_train_batch_size": 16, "threads": 1, "use_cpu": True, "disable_tqdm": True, "plots": False,
        "encoder": str(encoder) if model_type == "al_encoder" else None, "early_stopping_patience": 0, **values,
    })  # fmt: skip
    hf_al.train(args, data)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("al_lstm", {"gradient_accumulation_steps": 2}),
        ("al_transformer", {"offload": True}),
        slow("al_encoder", {"max_seq_length": 12}),
        slow("al_transformer", {"model": {**SMALL, "late_block": 1, "late_from": 6}}),
    ],
)
def test_cached_states_train_like_computed_ones(model_type, values, few_tweets, encoder_folder, tmp_path):
    computed = run(few_tweets, tmp_path / "computed", model_type, encoder_folder, **values)
    cached = run(few_tweets, tmp_path / "cached", model_type, encoder_folder, cache_frozen=True, **values)
    assert computed.keys() == cached.keys()
    for name, tensor in computed.items():
        torch.testing.assert_close(cached[name], tensor, atol=1e-4, rtol=1e-3)
    assert not list((tmp_path / "cached").glob("tmp*"))


def test_frozen_encoders_do_not_run_in_training(few_tweets, encoder_folder, monkeypatch, tmp_path):
    seen = []
    train_batch = stage.Stage.train_batch

    def watched(self, parts, step, seed):
        hooks = [block.encode.register_forward_hook(lambda *_, k=k: seen.append(k)) for k, block in self.blocks.items()]
        found = train_batch(self, parts, step, seed)
        for hook in hooks:
            hook.remove()
        return found

    monkeypatch.setattr(stage.Stage, "train_batch", watched)
    for cache in (False, True):
        seen.clear()
        run(few_tweets, tmp_path / str(cache), "al_lstm", encoder_folder, cache_frozen=cache, max_steps=3)
        assert seen == ([2] if cache else [0, 1, 2]) * 3


def test_states_come_back_as_they_were_without_those_of_padding(tmp_path):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 5, 2, 4, 3, 3, 2])
    texts = [torch.randn(int(n), 6, generator=generator) for n in lengths]

    def batch(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.nn.utils.rnn.pad_sequence([texts[i] for i in rows], batch_first=True)
        mask = torch.arange(hidden.shape[1])[None] < lengths[rows][:, None]
        return hidden, mask.long()

    with TemporaryFile(dir=tmp_path) as file:
        states = FrozenStates(file)
        for rows in (np.array([0, 2, 6]), np.array([4, 5, 3]), np.array([1])):
            hidden, mask = batch(rows)
            states.add(rows, hidden + (mask == 0)[..., None] * 7, mask)
        assert states.complete() > lengths.sum() * 6 * 4
    for rows in (np.array([1, 0, 5]), np.array([3]), np.array([6, 2, 1, 4])):
        hidden, mask = batch(rows)
        assert torch.equal(states.read(rows, mask), hidden)


def test_a_block_that_sends_more_than_hidden_states_is_refused(few_tweets, encoder_folder, tmp_path):
    model = {**SMALL, "carry_state": True}
    with pytest.raises(ValueError, match="Expected carry_state=False with cache_frozen, got True"):
        run(few_tweets, tmp_path / "out", "al_lstm", encoder_folder, model=model, cache_frozen=True)
    assert not (tmp_path / "out").exists()
