"""The pretrained encoders that can be cut into blocks: where each keeps what a block needs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Where an encoder keeps its parts, as attribute paths in its base model (`AutoModel`).

    Args:
        layers: the list of layers.
        embeddings: what turns token ids into rows; only block 0 has it.
        first: further modules of block 0, each a function of one tensor.
        first_or_none: those that may be None, and are None in later blocks.
        last: modules behind the last layer; only the last block has them.
        shared: tables that every layer reads: each block has a copy, frozen, so that the copies stay equal.
        pre_norm: whether hidden states leave a layer without a layer norm.
        causal: whether a token sees only those before it: then the last one stands for the text.
        absolute_positions: whether a token's place in the batch decides its rows: padding on the left must not count.
        positions_after_padding: whether the first position is the one after the padding id (RoBERTa), and not 0.
    """

    layers: str = "encoder.layer"
    embeddings: str = "embeddings"
    first: tuple[str, ...] = ()
    first_or_none: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    pre_norm: bool = False
    causal: bool = False
    absolute_positions: bool = True
    positions_after_padding: bool = False


_DECODER = Layout("layers", "embed_tokens", last=("norm",), pre_norm=True, causal=True, absolute_positions=False)

LAYOUTS = {  # by the model_type of transformers
    "bert": Layout(),
    "roberta": Layout(positions_after_padding=True),
    "xlm-roberta": Layout(positions_after_padding=True),
    "distilbert": Layout("transformer.layer"),
    "electra": Layout(first=("embeddings_project",)),
    "mpnet": Layout(shared=("encoder.relative_attention_bias",), positions_after_padding=True),
    "deberta-v2": Layout(first_or_none=("encoder.conv",), shared=("encoder.rel_embeddings", "encoder.LayerNorm")),
    "modernbert": Layout("layers", last=("final_norm",), pre_norm=True, absolute_positions=False),
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
}
