"""A boundary as bytes: what is written can be read, at aligned addresses; what the wire would change is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_al.parallel.schema import ALIGNMENT, Message, Schema, round_to_wire

CPU = torch.device("cpu")


def boundary(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """The boundary of an LSTM with carried state and an odd width, so that tensors are not aligned by chance."""
    generator = torch.Generator().manual_seed(rows * 100 + tokens)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "hidden": normal(rows, tokens, 7),
        "h": normal(2, rows, 3),
        "target": normal(rows, 5),
        "weight": normal(3, 5),
        "half": normal(rows, 3).bfloat16(),
        "ids": torch.arange(rows * tokens).view(rows, tokens),
    }


@pytest.mark.parametrize("longest", [2, 3, 5, 6, 7, 100])
def test_texts_may_be_shorter_than_the_throw_away_ones(longest):
    def cut(rows: int, tokens: int):
        return {"hidden": torch.zeros(rows, min(tokens, longest), 4)}

    (entry,) = Schema.of(cut, torch.float32, longest)
    assert entry.dims == ("N", "T", 4)


@given(st.integers(1, 9), st.integers(1, 9))
def test_what_is_written_is_read_from_aligned_addresses(rows, tokens):
    schema = Schema.of(boundary, torch.float32)
    assert {e.name: e.dims for e in schema} == {
        "hidden": ("N", "T", 7), "h": (2, "N", 3), "target": ("N", 5), "weight": (3, 5), "half": ("N", 3),
        "ids": ("N", "T"),
    }  # fmt: skip
    buffer = torch.empty(schema.size(rows, tokens), dtype=torch.uint8)
    sent = boundary(rows, tokens)
    schema.write(sent, buffer, rows, tokens)
    received = schema.read(buffer, rows, tokens)
    for name, tensor in sent.items():
        assert torch.equal(received[name], tensor)
        assert received[name].data_ptr() % ALIGNMENT == 0
        assert received[name].is_contiguous()


def test_a_schema_survives_json_and_knows_its_bytes():
    schema = Schema.of(boundary, torch.bfloat16)
    assert Schema.from_json(schema.as_json()) == schema
    assert {e.name: e.wire for e in schema}["hidden"] == torch.bfloat16
    assert {e.name: e.wire for e in schema}["ids"] == torch.int64
    assert schema.size(4, 8) < Schema.of(boundary, torch.float32).size(4, 8)


def test_a_narrow_wire_changes_nothing_that_was_rounded():
    schema = Schema.of(boundary, torch.bfloat16)
    sent = round_to_wire(boundary(4, 8), torch.bfloat16)
    assert not torch.equal(sent["hidden"], boundary(4, 8)["hidden"])
    buffer = torch.empty(schema.size(4, 8), dtype=torch.uint8)
    schema.write(sent, buffer, 4, 8)
    for name, tensor in schema.read(buffer, 4, 8).items():
        assert torch.equal(tensor, sent[name])
        assert tensor.dtype == sent[name].dtype


def test_a_strided_tensor_is_refused():
    with pytest.raises(ValueError, match=r"Expected hidden to leave its block contiguous.*Send .contiguous"):
        Schema.of(lambda n, t: {"hidden": torch.zeros(t, n, 4).transpose(0, 1)}, torch.float32)
    schema = Schema.of(lambda n, t: {"hidden": torch.zeros(n, t, 4)}, torch.float32)
    buffer = torch.empty(schema.size(2, 3), dtype=torch.uint8)
    with pytest.raises(AssertionError, match="strides"):
        schema.write({"hidden": torch.zeros(3, 2, 4).transpose(0, 1)}, buffer, 2, 3)


def test_a_lost_alignment_is_noticed():
    schema = Schema.of(lambda n, t: {"hidden": torch.zeros(n, t, 4)}, torch.float32)
    shifted = torch.empty(schema.size(2, 3) + 4, dtype=torch.uint8)[4:]
    with pytest.raises(AssertionError):
        schema.read(shifted, 2, 3)


def test_a_dimension_of_neither_batch_nor_tokens_is_refused():
    with pytest.raises(ValueError, match="Expected hidden to have dimensions of batch, tokens and constants"):
        Schema.of(lambda n, t: {"hidden": torch.zeros(n, 2 * t)}, torch.float32)


def test_headers_tell_messages_apart():
    message = Message("train", 3, 1, 8, 20)
    assert message.header(0) != message.header(15)
    assert message.header(0) != Message("evaluate", 3, 1, 8, 20).header(0)
    assert 8 * len(message.header(0)) == ALIGNMENT
