"""What config values may be. Without torch, so that `hf-al train` answers a mistake before that is imported.

A config is anything with the values as attributes. `check_shared` passes over those that it lacks or that are None.
"""

import difflib
import math
from typing import Any

ACTIVATIONS = ("tanh", "sigmoid", "elu", "gelu", "layer_norm", "identity")
INITIALIZATIONS = ("xavier", "kaiming", "orthogonal", "normal")
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
PROBLEM_TYPES = (SINGLE, MULTI, REGRESSION)
EXIT_RULES = ("confidence", "entropy", "patience")
CALIBRATED = ("exit_rule", "exit_temperatures", "exit_thresholds", "exit_speedup")  # what hf-al calibrate sets
OBJECTIVE_NAMES = ("associated", "al_ce", "local_ce", "supcon", "deinfo", "predsim", "backprop")
MOST_LAYERS = 1000  # each is a module: very many would fill the memory before anybody looks at a weight


def one_of(config: Any, name: str, allowed: tuple[str, ...]) -> None:
    """ValueError, with the nearest one, unless the value is one of those allowed."""
    value = getattr(config, name, None)
    if value is not None and value not in allowed:
        nearest = difflib.get_close_matches(str(value), allowed, 1, 0.5)
        advice = f"Did you mean {nearest[0]}?" if nearest else f"Pass {allowed[0]!r}, for example."
        raise ValueError(f"Expected {name} to be one of {', '.join(allowed)}, got {value!r}. {advice}")


def at_least(config: Any, name: str, minimum: int) -> None:
    value = getattr(config, name, None)
    if value is not None and value < minimum:
        raise ValueError(f"Expected {name} to be at least {minimum}, got {value}. Pass {name}={minimum} or more.")


def at_most(config: Any, name: str, maximum: int) -> None:
    value = getattr(config, name, None)
    if value is not None and value > maximum:
        raise ValueError(f"Expected {name} to be at most {maximum}, got {value}. Pass {name}={maximum} or less.")


def probability(config: Any, name: str) -> None:
    value = getattr(config, name, None)
    if value is not None and not 0 <= value < 1:
        raise ValueError(
            f"Expected {name} in [0, 1), got {value}. Pass {name}=0.1, for example, or 0.0 to switch it off."
        )


def positive(config: Any, name: str, usual: float) -> None:
    value = getattr(config, name, None)
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"Expected {name} to be a positive number, got {value}. Pass {name}={usual}, for example.")


def check_shared(config: Any, objectives: tuple[str, ...]) -> None:
    """The values that all architectures share, each by itself. `objectives`: the names of those that are known."""
    one_of(config, "objective", objectives)
    one_of(config, "associated_loss", ("mse", "cosine"))
    one_of(config, "label_activation", ACTIVATIONS)
    one_of(config, "bridge_activation", ACTIVATIONS)
    one_of(config, "initialization", INITIALIZATIONS)
    one_of(config, "problem_type", PROBLEM_TYPES)
    for name in ("vocab_size", "hidden_size", "embedding_size", "target_size", "max_position_embeddings"):
        at_least(config, name, 1)
    for name in ("late_block", "late_from", "num_blocks", "layers_per_block", "bridge_layers"):
        at_least(config, name, 1)
    at_least(config, "numeric_block", 0)
    late, blocks = (getattr(config, name, None) for name in ("late_block", "num_blocks"))
    if blocks is not None:
        at_most(config, "numeric_block", blocks - 1)
    if late is not None and blocks is not None:
        at_most(config, "late_block", blocks)
    if late is None and getattr(config, "late_from", None) is not None:
        raise ValueError(
            f"Expected late_block with late_from={config.late_from}, got none. Pass the first block that is to read "
            "the late tokens, late_block=1 for example."
        )
    for name in ("num_blocks", "layers_per_block", "bridge_layers"):
        at_most(config, name, MOST_LAYERS)
    for name in ("hidden_dropout_prob", "embedding_dropout_prob", "bridge_dropout_prob", "label_smoothing"):
        probability(config, name)
    for name, usual in (("initializer_range", 0.02), ("code_scale", 1.0), ("embedding_std", 0.1)):
        positive(config, name, usual)
    one_of(config, "exit_rule", EXIT_RULES)
    weights = getattr(config, "class_weights", None)
    if weights is not None and (any(not (w >= 0 and math.isfinite(w)) for w in weights) or not any(weights)):
        raise ValueError(
            f"Expected class_weights that are finite and not negative, got {weights}. Pass a weight of 0 or more for "
            "each class, not all 0."
        )


def check_numeric(config: Any) -> None:
    """The columns of numbers beside the text."""
    names = config.numeric_columns or []
    if len(set(names)) < len(names):
        raise ValueError(f"Expected numeric_columns with names of their own, got {names}. Name each column once.")
    for field in ("numeric_means", "numeric_stds"):
        values = getattr(config, field) or []
        if len(values) != len(names):
            raise ValueError(
                f"Expected {len(names)} values in {field}, one for each of numeric_columns, got {len(values)}. Pass "
                "those of the train split."
            )
        standard(field, values, "numeric_stds", "Pass 1 for a constant column.")


def standard(name: str, values: list[float], deviations: str, advice: str) -> None:
    """Means or deviations by which numbers are standardised; they are the latter if `name` is `deviations`."""
    if not all(math.isfinite(value) and (value > 0 or name != deviations) for value in values):
        raise ValueError(f"Expected finite values in {name}, above 0 for {deviations}, got {values}. {advice}")


def check_exits(config: Any, exits: int) -> None:
    """The values that `hf-al calibrate` sets. `exits`: how many the model has."""
    again = f"Pass None for {', '.join(CALIBRATED)} (null in config.json), and run hf-al calibrate again."
    for name in ("exit_temperatures", "exit_thresholds"):
        values = getattr(config, name)
        if values is None:
            continue
        if exits < config.num_blocks or config.resolved_problem_type == REGRESSION:
            raise ValueError(
                f"Expected no {name} for a model with one exit, or of regression, got {values}. Pass {name}=None."
            )
        if len(values) != config.num_blocks:
            raise ValueError(f"Expected {config.num_blocks} {name} (num_blocks), got {len(values)}. {again}")
    temperatures, thresholds = config.exit_temperatures, config.exit_thresholds
    if temperatures is not None and not all(t > 0 and math.isfinite(t) for t in temperatures):
        raise ValueError(f"Expected exit_temperatures that are finite and above 0, got {temperatures}. {again}")
    if thresholds is None:
        return
    low, high = {"confidence": (0, 1), "entropy": (0, math.inf), "patience": (1, math.inf)}[config.exit_rule]
    if thresholds[-1] is not None or not all(t is None or (low <= t <= high and t < math.inf) for t in thresholds):
        raise ValueError(
            f"Expected exit_thresholds from {low} to {high} with exit_rule={config.exit_rule!r}, None for exits that "
            f"are not used and for the last one, got {thresholds}. {again}"
        )
    if temperatures is None:
        raise ValueError(f"Expected exit_temperatures with exit_thresholds, got None. {again}")


def check_lstm(config: Any) -> None:
    """Those of `al_lstm`."""
    one_of(config, "pooling", ("mean", "max", "final"))
    if config.hidden_size % 2:
        raise ValueError(
            f"Expected an even hidden_size (half for each LSTM direction), got {config.hidden_size}. "
            f"Pass hidden_size={config.hidden_size + 1}."
        )


def check_transformer(config: Any) -> None:
    """Those of `al_transformer`."""
    one_of(config, "pooling", ("mean", "max", "first"))
    one_of(config, "position_embedding_type", ("rotary", "learned"))
    probability(config, "attention_probs_dropout_prob")
    for name in ("num_attention_heads", "intermediate_size"):
        at_least(config, name, 1)
    positive(config, "rotary_base", 10000.0)
    positive(config, "layer_norm_eps", 1e-5)
    heads = config.num_attention_heads
    head_size, rest = divmod(config.hidden_size, heads)
    if rest:
        raise ValueError(
            f"Expected hidden_size to be a multiple of num_attention_heads, got {config.hidden_size} and {heads}. "
            f"Pass hidden_size={heads * (head_size + 1)}, for example."
        )
    if config.position_embedding_type == "rotary" and head_size % 2:
        raise ValueError(
            f"Expected an even hidden_size / num_attention_heads for rotary positions, got {head_size}. "
            "Pass fewer heads, or position_embedding_type='learned'."
        )


def check_encoder(config: Any) -> None:
    """Those of `al_encoder` that do not depend on the encoder."""
    one_of(config, "pooling", ("mean", "max", "first", "last"))
    positive(config, "layer_norm_eps", 1e-5)
    at_least(config, "lookahead", 0)
    at_least(config, "lora_r", 0)
    at_least(config, "lora_alpha", 1)
    probability(config, "lora_dropout")


OF_ARCHITECTURES = {"al_lstm": check_lstm, "al_transformer": check_transformer, "al_encoder": check_encoder}
