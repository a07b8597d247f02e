"""Padding: padding around a text changes none of its logits by more than 1e-5."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

TOLERANCE = 1e-5
CASES = {
    **{f"lstm_{how}": ("al_lstm", {"pooling": how}) for how in ("mean", "max", "final")},
    "lstm_carry_state": ("al_lstm", {"carry_state": True, "pooling": "final"}),
    "lstm_merged_embedding": ("al_lstm", {"embedding_block": False, "embedding_size": 6, "layers_per_block": 2}),
    "lstm_local_ce": ("al_lstm", {"objective": "local_ce"}),
    "lstm_late": ("al_lstm", {"late_block": 2, "late_from": 4, "carry_state": True}),
    "lstm_backprop": ("al_lstm", {"objective": "backprop"}),
    **{f"rotary_{how}": ("al_transformer", {"pooling": how}) for how in ("mean", "max", "first")},
    **{
        f"learned_{how}": ("al_transformer", {"pooling": how, "position_embedding_type": "learned"})
        for how in ("mean", "max", "first")
    },
    "transformer_eager": ("al_transformer", {"attn_implementation": "eager"}),
    "transformer_merged_embedding": ("al_transformer", {"embedding_block": False, "embedding_size": 6}),
    "transformer_late": ("al_transformer", {"late_block": 1, "late_from": 2, "embedding_block": False}),
    "transformer_backprop": ("al_transformer", {"objective": "backprop"}),
}

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@pytest.fixture(params=CASES)
def model(request, make_model):
    """Biases are set as if after training: the initial zeros would hide what leaks through them."""
    model_type, config = CASES[request.param]
    model = make_model(model_type, **config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def texts_of(lengths: list[int], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 60, (length,), generator=generator) for length in lengths]


def padded(texts: list[torch.Tensor], left: list[int], width: int) -> dict[str, torch.Tensor]:
    """A batch `width` tokens wide, each text with its own number of padding tokens on the left."""
    input_ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, (text, start) in enumerate(zip(texts, left, strict=True)):
        input_ids[row, start : start + len(text)] = text
        mask[row, start : start + len(text)] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


@torch.no_grad()
def exits(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of every exit, (exits, N, C)."""
    return torch.stack(model(**batch, output_exit_logits=True).exit_logits)


def alone(model, texts: list[torch.Tensor]) -> torch.Tensor:
    """Logits of every exit with each text in a batch of its own, without any padding."""
    return torch.cat([exits(model, padded([text], [0], len(text))) for text in texts], 1)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


few_examples = settings(max_examples=5, deadline=None, derandomize=True, database=None)


def test_adding_padding_changes_no_logit(model):
    @few_examples
    @given(lengths, st.integers(0, 6), st.integers(0, 2**16))
    def check(lengths, extra, seed):
        texts = texts_of(lengths, seed)
        expected = alone(model, texts)
        width = max(lengths) + extra
        for left in ([0] * len(texts), [width - len(text) for text in texts]):
            assert distance(exits(model, padded(texts, left, width)), expected) <= TOLERANCE

    check()


def test_padding_on_both_sides_at_once_changes_no_logit(model):
    @few_examples
    @given(lengths, st.integers(0, 2**16), st.data())
    def check(lengths, seed, data):
        texts = texts_of(lengths, seed)
        width = max(lengths) + 4
        left = [data.draw(st.integers(0, width - len(text))) for text in texts]
        assert distance(exits(model, padded(texts, left, width)), alone(model, texts)) <= TOLERANCE

    check()


def test_the_other_texts_of_a_batch_change_no_logit(model):
    texts = texts_of([3, 9, 1, 5, 5, 2], seed=1)
    together = exits(model, padded(texts, [0] * 6, 9))
    order = [4, 2, 0, 5, 1, 3]
    shuffled = exits(model, padded([texts[i] for i in order], [0] * 6, 9))
    assert distance(shuffled, together[:, order]) <= TOLERANCE
    part = exits(model, padded([texts[i] for i in (0, 2)], [0, 0], 3))
    assert distance(part, together[:, [0, 2]]) <= TOLERANCE


def test_the_ids_under_the_padding_do_not_matter(model):
    texts = texts_of([3, 6], seed=2)
    batch = padded(texts, [0, 0], 8)
    expected = exits(model, batch)
    batch["input_ids"][batch["attention_mask"] == 0] = 7
    assert distance(exits(model, batch), expected) <= TOLERANCE


def test_padding_that_the_mask_takes_for_text_is_noticed(model):
    """The comparison can fail: without a mask the same batch gives other logits."""
    texts = texts_of([3, 6], seed=2)
    batch = padded(texts, [0, 0], 12)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    assert distance(exits(model, batch)[-1], alone(model, texts)[-1]) > 10 * TOLERANCE


def test_a_text_without_a_token_has_finite_logits_that_padding_does_not_change(model):
    empty, text = torch.zeros(0, dtype=torch.long), *texts_of([4], seed=3)
    expected = exits(model, padded([empty], [0], 1))
    assert bool(expected.isfinite().all())
    for width in (4, 9):
        got = exits(model, padded([empty, text], [0, 0], width))
        assert distance(got[:, :1], expected) <= TOLERANCE
        assert distance(got[:, 1:], alone(model, [text])) <= TOLERANCE


def test_padding_changes_no_training_loss(model, make_batch):
    """With dropout off. What a block learns from a text must not depend on the rest of its batch."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, torch.nn.LSTM):
            module.dropout = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    batch = make_batch()
    wide = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (2, 3)),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (2, 3)),
        "labels": batch["labels"],
    }
    model.train()
    with torch.no_grad():
        plain, extended = model(**batch), model(**wide)
    assert distance(extended.loss, plain.loss) <= TOLERANCE
    if model.config.objective != "backprop":
        for a, b in zip(plain.local_losses, extended.local_losses, strict=True):
            assert distance(a, b) <= TOLERANCE
