"""AL models for transformers: `ALLstmForSequenceClassification`, `ALTransformerForSequenceClassification`.

Legend: N batch, T tokens, D hidden size, C classes, K blocks.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput, can_return_tuple, logging

from .blocks import ALBlock, TargetLayer, layout, never_empty, refuse_gradients, refuse_not_finite, truncate, walk
from .configuration_al import ALConfig, ALLstmConfig, ALTransformerConfig
from .early_exit import last_block, predict_texts
from .encoders import Encoder, Inputs, LstmEncoder, TransformerEncoder, text_mask
from .late import resize_late, set_late_apart
from .limits import MULTI, REGRESSION
from .numeric import numeric_inputs
from .objectives import OBJECTIVES, Boundary, first_target, label_loss

logger = logging.get_logger(__name__)


@dataclass
class ALSequenceClassifierOutput(ModelOutput):
    """Output of an AL classifier.

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, with labels): in training the sum of the local losses, else
            the loss of the exit that `logits` come from, in the units of the labels.
        logits (`torch.FloatTensor` of shape `(N, C)`): of the last exit, or of `exit_block`. Never squashed.
        local_losses (`tuple(torch.FloatTensor)`, *optional*, in training with labels): K scalars, entry k is the whole
            loss of block k, still attached to its graph; None for an end-to-end objective (`backprop`).
        exit_logits (`tuple(torch.FloatTensor)`, *optional*, with `output_exit_logits=True`): logits (N, C) of each exit
            up to the one asked for; one entry if only the last block has an exit.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, with `output_hidden_states=True`): s_k (N, T, D), one
            per block that was run.
        attentions (`tuple(torch.FloatTensor)`, *optional*, with `output_attentions=True`): weights (N, heads, T, T),
            one per transformer layer that was run; empty unless the model has `attn_implementation="eager"`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    local_losses: tuple[Tensor, ...] | None = None
    exit_logits: tuple[Tensor, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class ALPreTrainedModel(PreTrainedModel):
    """What the models share: initialization, loading, saving, and which parameters only training needs."""

    config: ALConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # let Trainer divide the loss by the accumulation steps
    _no_split_modules = ["ALBlock"]  # noqa: RUF012  (transformers reads a list)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | TargetLayer):
            self._init_matrix(module.weight, getattr(module, "scale_at_start", 1.0))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LSTM):
            for name, parameter in module.named_parameters():
                gates = torch.zeros_like(parameter).chunk(4)  # input, forget, cell, output: each is a matrix of its own
                if name.startswith("weight"):
                    for gate in gates:
                        self._init_matrix(gate)
                elif name.startswith("bias_ih"):
                    gates[1].fill_(1.0)  # remember at first (Jozefowicz et al., ICML 2015)
                init.copy_(parameter, torch.cat(gates))  # copied whole, so that a loaded parameter is left alone
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=self.config.embedding_std)
            if module.padding_idx is not None:
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def _init_matrix(self, weight: Tensor, scale: float = 1.0) -> None:
        kind = self.config.initialization
        if kind == "xavier":
            init.xavier_uniform_(weight, scale)
        elif kind == "kaiming":  # for linear layers, with as many inputs as columns
            init.normal_(weight, std=scale / weight.shape[1] ** 0.5)
        elif kind == "orthogonal":
            init.orthogonal_(weight, scale)
        else:
            init.normal_(weight, std=scale * self.config.initializer_range)

    def _wants(self, what: str, said: bool | None) -> bool:
        return bool(getattr(self.config, what, False) if said is None else said)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, but from safetensors only: pickled weights can run any code when they are read.

        Weights on a CPU are moved to 64-byte boundaries: in a mapped file they can start anywhere, and the same matmul
        would then round differently from that of the trained model.

        Raises:
            ValueError: `use_safetensors=False`, or weights that are not finite.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("Expected use_safetensors=True, got False: pickled weights can run any code when read.")
        kwargs["use_safetensors"] = True  # None, which transformers has, would also take others
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        refuse_not_finite(model.state_dict(), ". Copy them again, or train again.")
        for parameter in model.parameters():
            if parameter.device.type == "cpu" and parameter.data_ptr() % 64:
                parameter.data = parameter.data.clone()
        return loaded

    def save_pretrained(self, save_directory, *, inference_only: bool = False, **kwargs) -> None:  # type: ignore
        """As in transformers. `inference_only=True` leaves out what only training needs: every `encode_target` and all
        bridges but the last. The result loads without a warning and gives the same logits; it cannot be trained and
        has one exit."""
        base = getattr(self, "base_class", None)
        if base and base._auto_class:  # so that AutoModel finds its class without hf_al
            name = f"{base.__module__.split('.')[-1]}.{base.__name__}"
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), base._auto_class: name}
        if not inference_only:
            super().save_pretrained(save_directory, **kwargs)
            return
        state_dict = {n: t for n, t in self.plain_state_dict().items() if not self.is_training_only(n)}
        full, self.config = self.config, self.config.for_inference()
        try:
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        finally:
            self.config = full

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As in transformers; the rows for late text as well."""
        resized = super().resize_token_embeddings(*args, **kwargs)
        resize_late(self, resized.num_embeddings)
        return resized

    def plain_state_dict(self) -> dict[str, Tensor]:
        """`state_dict`, with what was only added for training merged into the weights."""
        return self.state_dict()

    def is_training_only(self, name: str) -> bool:
        """Whether the parameter `name` (as in `state_dict`) does not contribute to the model's answer."""
        parts = name.removeprefix("model.").split(".")
        last = str(self.config.num_blocks - 1)
        return "encode_target" in parts or (parts[1] != last and ("bridge" in parts or "lookahead" in parts))


class ALModel(ALPreTrainedModel):
    """The blocks. As an encoder (`AutoModel`) it returns the hidden states; the classifier adds losses and exits."""

    encoder_class: ClassVar[type[Encoder]]  # what its blocks do with the text

    def __init__(self, config):
        super().__init__(config)
        self.gradient_checkpointing = False
        self.blocks = nn.ModuleList(ALBlock(config, k, self.encoder_class) for k in range(config.num_blocks))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.blocks[0].encode.input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.blocks[0].encode.embeddings.word_embeddings = value

    def prepare_inputs(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        numeric_values: Tensor | None = None,
    ) -> Inputs:
        """What every block knows about a batch: ids or embeddings, mask, labels, and what the encoder adds to them.

        Args:
            input_ids (`torch.LongTensor` of shape `(N, T)`, *optional*): token ids.
            attention_mask (`torch.Tensor` of shape `(N, T)`, *optional*): 1 for text, 0 for padding; without it,
                padding is where the ids equal `pad_token_id`.
            inputs_embeds (`torch.FloatTensor` of shape `(N, T, E)`, *optional*): instead of `input_ids`.
            labels, token_type_ids, numeric_values (*optional*): as in [`ALForSequenceClassification`].
            lengths (`torch.LongTensor` of shape `(N,)`, *optional*): tokens of each text, on the CPU; only for callers
                that know that all padding is on the right. If None, read from the mask, which waits for its device.

        Returns:
            Tensors by name, and `padding`: `none`, `right` or `mixed`. Texts of more than `max_position_embeddings`
            tokens are cut.

        Raises:
            ValueError: both `input_ids` and `inputs_embeds`, or neither; no `input_ids` where late text is that of
                pairs; `numeric_values` that do not fit the model.
        """
        inputs: Inputs = {}
        if input_ids is not None and inputs_embeds is None:
            inputs["input_ids"] = input_ids
            mask_NT = text_mask(self.config, input_ids) if attention_mask is None else attention_mask
        elif inputs_embeds is not None and input_ids is None:
            inputs["inputs_embeds"] = inputs_embeds
            mask_NT = torch.ones_like(inputs_embeds[..., 0]) if attention_mask is None else attention_mask
        else:
            raise ValueError("Expected either input_ids or inputs_embeds, got both or neither. Pass one of them.")
        inputs["attention_mask"] = never_empty(mask_NT)
        inputs |= {n: t for n, t in (("labels", labels), ("token_type_ids", token_type_ids)) if t is not None}
        inputs |= numeric_inputs(self.config, numeric_values, mask_NT)
        longest = self.config.max_position_embeddings
        inputs = truncate(inputs, longest, self.config.sep_token_id)
        inputs |= layout(inputs["attention_mask"], None if lengths is None else lengths.clamp(1, longest))
        if self.config.late_block is not None:
            inputs = set_late_apart(self.config, inputs, self.encoder_class)
        return self.encoder_class.prepare_inputs(self.config, inputs)

    def initial_boundary(self, labels: Tensor | None = None) -> Boundary:
        """What block 0 receives: t_0 (N, C) in training, otherwise nothing."""
        return {} if labels is None else {"target": first_target(labels, self.config).to(self.dtype)}

    def _wants_attentions(self, said: bool | None) -> bool:
        if not self._wants("output_attentions", said):
            return False
        if not self.encoder_class.has_attention:
            raise ValueError(
                f"Expected output_attentions=False, got True: the blocks of {self.config.model_type} have no attention."
            )
        if self.config._attn_implementation != "eager":
            logger.warning_once(
                f"{self.config._attn_implementation} attention returns no weights: `attentions` stays empty. Call "
                "model.set_attn_implementation('eager') first."
            )
        return True

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        numeric_values: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple | BaseModelOutput:
        """`last_hidden_state` (N, T, D) of the last block; with `output_hidden_states` and `output_attentions`
        (default: as in the config) also those of [`ALSequenceClassifierOutput`]. The other arguments are those of
        `prepare_inputs`. Nothing is cut here: gradients cross the blocks, for a head of your own."""
        wants_attentions = self._wants_attentions(output_attentions)
        texts = (input_ids, attention_mask, inputs_embeds, None, token_type_ids)
        inputs = self.prepare_inputs(*texts, numeric_values=numeric_values)
        outs = [out for _, out in walk(self.blocks, {}, inputs, output_attentions=wants_attentions)]
        hidden_states = tuple(out.boundary["hidden"] for out in outs)
        return BaseModelOutput(
            last_hidden_state=hidden_states[-1],
            hidden_states=hidden_states if self._wants("output_hidden_states", output_hidden_states) else None,
            attentions=tuple(weights for out in outs for weights in out.attentions) if wants_attentions else None,
        )


class ALForSequenceClassification(ALPreTrainedModel):
    """A text classifier of AL blocks, trained block by block; predictions can be read at any depth."""

    base_class: type[ALModel] = ALModel
    predict = predict_texts

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = self.base_class(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        exit_block: int | None = None,
        output_exit_logits: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        numeric_values: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple | ALSequenceClassifierOutput:
        """Logits, and with labels the loss: the sum of the local losses in training mode, else the loss of the exit.

        Args:
            input_ids (`torch.LongTensor` of shape `(N, T)`): token ids.
            attention_mask (`torch.Tensor` of shape `(N, T)`, *optional*): 1 for text, 0 for padding, on either side.
            inputs_embeds (`torch.FloatTensor` of shape `(N, T, E)`, *optional*): instead of `input_ids`.
            labels (`torch.Tensor`, *optional*): class ids (N,), multi-hot rows (N, C), or values (N,) or (N, C).
            token_type_ids (`torch.LongTensor` of shape `(N, T)`, *optional*): of pairs; if None, found by separators.
            exit_block (`int`, *optional*): the block to stop at, counted from 0; later blocks are not run.
            output_exit_logits (`bool`, defaults to False): return the logits of every exit on the way.
            output_hidden_states, output_attentions (`bool`, *optional*): see [`ALSequenceClassifierOutput`].
            numeric_values (`torch.Tensor` of shape `(N, F)`, *optional*): of the columns `config.numeric_columns`, in
                their own units, NaN where one is missing; all are missing if None.

        Raises:
            ValueError: an exit that does not exist, or one in training; what `prepare_inputs` refuses; training an
                inference-only model, or attentions of a model that has none; in the backward pass, a loss made of
                logits in training mode without labels.
        """
        config = self.config
        if labels is not None and config.problem_type is None:  # from the labels, as transformers' own classifiers do
            multi_label = config.classes > 1 and labels.is_floating_point()
            kind = MULTI if multi_label else config.resolved_problem_type
            config.problem_type = kind  # type: ignore[assignment]
            config.validate_labels()  # label_smoothing is for one class a text, for example
        learning = self.training and labels is not None
        last = last_block(config, exit_block, learning)
        wants_attentions = self.model._wants_attentions(output_attentions)
        texts = (input_ids, attention_mask, inputs_embeds, labels, token_type_ids)
        inputs = self.model.prepare_inputs(*texts, numeric_values=numeric_values)
        boundary = self.model.initial_boundary(labels if learning else None)
        exits = [k for k in range(last + 1) if k == last or (output_exit_logits and k in config.exits())]
        losses, hidden_states, exit_logits = [], [], []
        attentions: list[Tensor] = []
        blocks = self.model.blocks[: last + 1]
        for _, out in walk(blocks, boundary, inputs, learning, exits, output_attentions=wants_attentions):
            hidden_states.append(out.boundary["hidden"])
            attentions += out.attentions
            if out.losses:
                losses.append(out.loss)
            if out.logits is not None:
                exit_logits.append(out.logits)
        end_to_end = OBJECTIVES[config.objective].end_to_end
        if self.training and not learning and not end_to_end:
            refuse_gradients([*exit_logits, *hidden_states], config.objective)
        loss = None
        if labels is not None:
            here = exit_logits[-1].device  # blocks may be on several devices
            total = torch.stack([loss.to(here) for loss in losses]).sum() if learning else None
            loss = self._plain_loss(exit_logits[-1], labels.to(here)) if total is None else total
        return ALSequenceClassifierOutput(
            loss=loss,
            logits=exit_logits[-1],
            local_losses=tuple(losses) if learning and not end_to_end else None,
            exit_logits=tuple(exit_logits) if output_exit_logits else None,
            hidden_states=tuple(hidden_states) if self._wants("output_hidden_states", output_hidden_states) else None,
            attentions=tuple(attentions) if wants_attentions else None,
        )

    def _plain_loss(self, logits_NC: Tensor, labels: Tensor) -> Tensor:
        if self.config.resolved_problem_type == REGRESSION:
            return nn.functional.mse_loss(logits_NC.float(), labels.view_as(logits_NC).float())
        return label_loss(logits_NC, labels, self.config)


class ALLstmModel(ALModel):
    """Bidirectional LSTM blocks without the losses; see [`ALModel`]."""

    config: ALLstmConfig
    encoder_class = LstmEncoder
    supports_gradient_checkpointing = False


class ALTransformerModel(ALModel):
    """Transformer blocks without the losses; see [`ALModel`]."""

    config: ALTransformerConfig
    encoder_class = TransformerEncoder


class ALLstmForSequenceClassification(ALForSequenceClassification):
    """Text classifier of bidirectional LSTM blocks; see [`ALForSequenceClassification`]."""

    config: ALLstmConfig
    base_class = ALLstmModel
    supports_gradient_checkpointing = False


class ALTransformerForSequenceClassification(ALForSequenceClassification):
    """Text classifier of pre-norm transformer blocks; see [`ALForSequenceClassification`]."""

    config: ALTransformerConfig
    base_class = ALTransformerModel


__all__ = [
    "ALForSequenceClassification", "ALLstmForSequenceClassification", "ALLstmModel", "ALModel", "ALPreTrainedModel",
    "ALSequenceClassifierOutput", "ALTransformerForSequenceClassification", "ALTransformerModel",
]  # fmt: skip
