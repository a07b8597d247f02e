"""Configurations of the Associated Learning (AL) models.

One AL block, k = 1 .. K (code counts from 0). The papers' letters stand only in this drawing:

      s_{k-1} --encode (f)--> s_k --> next block          encode, bridge:            associated loss A_k
                               |                          encode_target,
                          bridge (b)                      decode_target:             reconstruction loss R_k
                               |
                               v  A_k = mse(bridge(pool(s_k)), sg[t_k])
      t_{k-1} --encode_target (g)--> t_k --> next block
         ^                            |
         +----decode_target (h)-------+  R_k = mse(decode_target(t_k), sg[t_{k-1}]), cross-entropy on y for k = 1

No gradient crosses from one block to the next. Exit k reads a prediction off block k:
decode_target_1( ... decode_target_k( bridge_k( pool(s_k) ) ) ).

Sources: Kao & Chen, Neural Computation 33(1), 2021, arXiv 1906.05560; Wu, Lin, Chen & Chen, ICLR 2022.
"""

import copy
from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .limits import (
    CALIBRATED,
    REGRESSION,
    SINGLE,
    check_exits,
    check_lstm,
    check_numeric,
    check_shared,
    check_transformer,
    one_of,
    standard,
)
from .objectives import OBJECTIVES


@strict
class ALConfig(PreTrainedConfig):
    """What the architectures share. Use [`ALLstmConfig`], [`ALTransformerConfig`] or a subclass of your own.

    The defaults were found by hand, on validation, and no study has shown better ones (model_cards/study.md). Those of
    the papers are `objective="associated"`, `embedding_block=True`.

    Args:
        vocab_size (`int`, defaults to 30000): rows of the embedding table.
        hidden_size (`int`, defaults to 128): D, width of the hidden states between blocks.
        embedding_size (`int`, *optional*): width of the embedding rows; `hidden_size` if None.
        num_blocks (`int`, defaults to 2): K, blocks with a local objective, including the embedding block.
        layers_per_block (`int`, defaults to 1): LSTM or transformer layers inside each block.
        embedding_block (`bool`, defaults to False): block 0 is the embedding alone, as in the papers; False merges the
            embedding with the first encoder block.
        target_size (`int`, defaults to 128): V, width of the target codes t_k.
        objective (`str`, defaults to `"al_ce"`): `associated`, `al_ce`, `local_ce`, `supcon`, `deinfo`,
            `predsim`, `backprop` or one of your own, a name in `OBJECTIVES` of `objectives.py`.
        associated_loss (`str`, defaults to `"mse"`): distance of bridge and target code, `mse` or `cosine`
            (1 - cosine similarity). Read by `associated` and `al_ce`.
        label_activation (`str`, defaults to `"tanh"`): activation of the target codes. Class logits have none.
        bridge_activation (`str`, defaults to `"tanh"`): activation of the bridge.
        bridge_layers (`int`, defaults to 1): linear layers in a bridge.
        pooling (`str`, defaults to `"mean"`): how the bridge combines the T hidden states of a text, padding excluded.
        hidden_dropout_prob (`float`, defaults to 0.1): dropout inside the encoders.
        embedding_dropout_prob (`float`, defaults to 0.2): dropout on the input of the first encoder layer.
        bridge_dropout_prob (`float`, defaults to 0.1): dropout on the input of a bridge.
        initialization (`str`, defaults to `"xavier"`): `xavier`, `kaiming`, `orthogonal` or `normal`
            (std `initializer_range`) for the matrices of linear layers and LSTMs.
        initializer_range (`float`, defaults to 0.02): std of `initialization="normal"`.
        code_scale (`float`, defaults to 1.0): factor of the weights of `encode_target` at the start, so that of the
            target codes before their activation.
        embedding_std (`float`, defaults to 0.1): std of the embedding rows at the start.
        class_weights (`list[float]`, *optional*): one weight per class: the loss is mean(weight[y] * cross-entropy);
            for multi-label, the weight of the positive term.
        label_smoothing (`float`, defaults to 0.0): share of the target spread evenly over the classes (single label).
        label_mean, label_deviation (`list[float]`, *optional*): for regression, one per output: labels are standardised
            for training; `logits` are in the original units.
        max_position_embeddings (`int`, defaults to 512): longest text in tokens. The model itself cuts a longer one
            (see [`truncate`]), so that a `pipeline`, which does not truncate, works.
        pad_token_id (`int`, defaults to 0): token id of padding.
        sep_token_id (`int`, *optional*): token id after each text of a pair, `[CLS] a [SEP] b [SEP]`, so that a
            long pair is cut the way its tokenizer cuts it.
        late_block (`int`, *optional*): the first block that reads late text; the blocks before it answer without.
            `late_from` says what is late.
        late_from (`int`, *optional*): late are the tokens of a text from this one on, counted from 0; if None, the
            second text of a pair is.
        numeric_columns (`list[str]`, *optional*): names of columns of numbers that the model reads beside the text, as
            `numeric_values`. Set by the argument `numeric_column_names` of `hf-al train`, as are the next but one.
        numeric_block (`int`, defaults to 0): the first block that reads the columns of numbers; the blocks before it
            answer without.
        numeric_means, numeric_stds (`list[float]`, *optional*): of each of these columns, by which the model
            standardises them; a missing value counts as the mean.
        exit_rule (`str`, defaults to `"confidence"`): when a text leaves early, by `exit_thresholds`: `confidence` (the
            largest probability is at least the threshold; of several labels, that of the least sure one), `entropy` (in
            nats, is at most the threshold) or `patience` (so many exits in a row gave the same answer).
        exit_temperatures (`list[float]`, *optional*): what the logits of each exit are divided by, so that their
            softmax can be trusted. Set by `hf-al calibrate`, as are the next two.
        exit_thresholds (`list[float | None]`, *optional*): of each block; None where no text leaves early, and for the
            last one.
        exit_speedup (`float`, *optional*): how many times as fast as by the last exit texts were answered when these
            were set.
        inference_only (`bool`, defaults to False): set by `save_pretrained(..., inference_only=True)`: the model has
            no training-only parameters (encode_target of every block, bridges of all blocks but the last).
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["local_losses", "exit_logits", "hidden_states", "attentions"]
    decided: ClassVar[tuple[str, ...]] = ()  # fields that follow from others, and are no flags of `hf-al train`
    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "num_blocks"}  # the name that tools expect

    vocab_size: int = 30000
    hidden_size: int = 128
    embedding_size: int | None = None
    num_blocks: int = 2
    layers_per_block: int = 1
    embedding_block: bool = False
    target_size: int = 128
    objective: str = "al_ce"
    associated_loss: str = "mse"
    label_activation: str = "tanh"
    bridge_activation: str = "tanh"
    bridge_layers: int = 1
    pooling: str = "mean"
    hidden_dropout_prob: float | int = 0.1
    embedding_dropout_prob: float | int = 0.2
    bridge_dropout_prob: float | int = 0.1
    initialization: str = "xavier"
    initializer_range: float | int = 0.02
    code_scale: float | int = 1.0
    embedding_std: float | int = 0.1
    class_weights: list[float | int] | None = None
    label_smoothing: float | int = 0.0
    label_mean: list[float | int] | None = None
    label_deviation: list[float | int] | None = None
    max_position_embeddings: int = 512
    pad_token_id: int = 0
    sep_token_id: int | None = None
    late_block: int | None = None
    late_from: int | None = None
    numeric_columns: list[str] | None = None
    numeric_block: int = 0
    numeric_means: list[float | int] | None = None
    numeric_stds: list[float | int] | None = None
    exit_rule: str = "confidence"
    exit_temperatures: list[float | int] | None = None
    exit_thresholds: list[float | int | None] | None = None
    exit_speedup: float | int | None = None
    inference_only: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.problem_type is None and self.num_labels == 1:
            self.problem_type = REGRESSION  # set here, because `pipeline` applies a sigmoid if it is None

    def validate_values(self):
        check_shared(self, tuple(OBJECTIVES))
        check_numeric(self)
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"Expected pad_token_id in [0, {self.vocab_size}), the vocabulary, got {self.pad_token_id}. "
                "Pass the tokenizer's pad_token_id and its len() as vocab_size."
            )
        check_exits(self, len(self.exits()))

    def validate_labels(self):
        kind = self.resolved_problem_type
        if self.num_labels < 1:
            raise ValueError(
                f"Expected num_labels to be at least 1, got {self.num_labels}. Pass num_labels=2 or more, or id2label."
            )
        if self.class_weights is not None:
            if kind == REGRESSION:
                raise ValueError("Expected no class_weights for regression, got a list. Pass class_weights=None.")
            if len(self.class_weights) != self.num_labels:
                raise ValueError(
                    f"Expected {self.num_labels} class_weights (num_labels), got {len(self.class_weights)}. "
                    "Pass one weight per class."
                )
        if self.label_smoothing and kind != SINGLE:
            raise ValueError(
                f"Expected label_smoothing=0.0 with problem_type={kind!r}, got {self.label_smoothing}. "
                "Smoothing spreads one label over the classes: pass label_smoothing=0.0."
            )
        for name in ("label_mean", "label_deviation"):
            values = getattr(self, name)
            if values is None:
                continue
            if kind != REGRESSION:
                raise ValueError(f"Expected no {name} with problem_type={kind!r}, got {values}. Pass {name}=None.")
            if len(values) != self.num_labels:
                raise ValueError(
                    f"Expected {self.num_labels} values in {name} (num_labels), got {len(values)}. "
                    "Pass one value for each output."
                )
            advice = "Pass the labels' mean and standard deviation; a constant target cannot be learned."
            standard(name, values, "label_deviation", advice)

    @property
    def resolved_problem_type(self) -> str:
        """`problem_type`, or the one that transformers would infer: regression for one output, else single label."""
        if self.problem_type is not None:
            return self.problem_type
        return REGRESSION if self.num_labels == 1 else SINGLE

    @property
    def classes(self) -> int:
        """C, width of the logits: `num_labels`."""
        assert self.num_labels is not None
        return self.num_labels

    @property
    def has_padding_token(self) -> bool:
        """Whether `pad_token_id` marks padding; if not, it is a token like others."""
        return True

    @property
    def label_names(self) -> list[str]:
        """The names in `id2label`, by id."""
        names: dict = self.id2label or {}
        return [names[i] for i in range(self.classes)]

    @property
    def units(self) -> list[range]:
        """The runs of blocks that are trained together: gradients are cut between units, never inside one.

        One block each, except for an end-to-end objective (`backprop`), where the whole network is one unit.
        """
        if OBJECTIVES[self.objective].end_to_end:
            return [range(self.num_blocks)]
        return [range(k, k + 1) for k in range(self.num_blocks)]

    def exits(self) -> list[int]:
        """Blocks after which a prediction can be read: only the last if end-to-end or inference-only, otherwise all."""
        if OBJECTIVES[self.objective].end_to_end or self.inference_only:
            return [self.num_blocks - 1]
        return list(range(self.num_blocks))

    def for_inference(self):
        """The config of a model that is saved with `inference_only=True`."""
        config = copy.deepcopy(self).uncalibrated()
        config.inference_only = True
        return config

    def first_blocks(self, count: int):
        """The config of the first `count` blocks of this model, as a model of their own."""
        config = copy.deepcopy(self).uncalibrated()
        config.num_blocks = count
        if config.late_block is not None:
            config.late_block = min(config.late_block, count)
        if config.numeric_block >= count:  # none of them reads the numbers
            config.numeric_block, config.numeric_columns = 0, None
            config.numeric_means = config.numeric_stds = None
        return config

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; values in place of the saved ones are checked with the others. With another number of
        blocks, what `hf-al calibrate` measured is left out."""
        found = super().from_dict(config_dict, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        if config.num_blocks != config_dict.get("num_blocks", config.num_blocks):
            config.uncalibrated()
        config.validate()
        return found

    def uncalibrated(self):
        """This config, without what `hf-al calibrate` sets: for weights that are not those it has measured."""
        for name in CALIBRATED:
            setattr(self, name, getattr(ALConfig, name))
        return self

    def validate_encoder(self):
        """Checks of one architecture; overridden below."""


@strict
class ALLstmConfig(ALConfig):
    """Configuration of [`ALLstmForSequenceClassification`]: bidirectional LSTM blocks.

    Args:
        carry_state (`bool`, defaults to False): an LSTM block starts from the final (h, c) of the block before it,
            in both training and inference; if False, each starts from zeros.
        initialization (`str`, defaults to `"kaiming"`): see [`ALConfig`].
        pooling: `mean`, `max` or `final` (last forward and first backward state; the embedding block takes the mean).

    The other arguments are those of [`ALConfig`]; `hidden_size` must be even: half of it for each direction.
    """

    model_type = "al_lstm"
    initialization: str = "kaiming"
    carry_state: bool = False

    def validate_encoder(self):
        check_lstm(self)


@strict
class ALTransformerConfig(ALConfig):
    """Configuration of [`ALTransformerForSequenceClassification`]: pre-norm transformer blocks.

    Args:
        num_attention_heads (`int`, defaults to 4): heads; `hidden_size` must be a multiple of it.
        intermediate_size (`int`, *optional*): width inside the feed-forward part; 4 * `hidden_size` if None.
        hidden_act (`str`, defaults to `"gelu"`): activation of the feed-forward part, a name in transformers' `ACT2FN`.
        attention_probs_dropout_prob (`float`, defaults to 0.1): dropout on the attention weights.
        position_embedding_type (`str`, defaults to `"rotary"`): `rotary` or `learned`.
        rotary_base (`float`, defaults to 10000.0): base of the rotary wavelengths.
        layer_norm_eps (`float`, defaults to 1e-5): epsilon of the layer norms.
        pooling: `mean`, `max` or `first` (the first token).

    The other arguments are those of [`ALConfig`].
    """

    model_type = "al_transformer"
    num_attention_heads: int = 4
    intermediate_size: int | None = None
    hidden_act: str = "gelu"
    attention_probs_dropout_prob: float | int = 0.1
    position_embedding_type: str = "rotary"
    rotary_base: float | int = 10000.0
    layer_norm_eps: float | int = 1e-5

    def validate_encoder(self):
        from transformers.activations import ACT2FN

        check_transformer(self)
        one_of(self, "hidden_act", tuple(ACT2FN))
