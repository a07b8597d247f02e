"""What arguments of a run may be, each by itself and together."""

import math
from itertools import chain
from typing import Any

from .config_fields import known_fields
from .messages import nearest
from .modeling.limits import MULTI, REGRESSION, SINGLE
from .values import numbers

SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
)  # fmt: skip
METRIC_NAMES = {  # the first one chooses the checkpoint unless another is named
    SINGLE: ("accuracy", "macro_f1", "log_loss", "ece"),
    MULTI: ("f1_micro", "f1_macro", "accuracy", "log_loss"),
    REGRESSION: ("mse", "pearson"),
}
TRACKERS = (  # those of accelerate, and codecarbon
    "aim", "tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab", "codecarbon",
)  # fmt: skip


def check_ranges(args: Any) -> None:
    """ValueError for the first argument that cannot be, or cannot be together with another one."""
    positive = (
        "learning_rate adam_epsilon num_train_epochs per_device_train_batch_size per_device_eval_batch_size "
        "gradient_accumulation_steps logging_steps max_seq_length tokenizer_vocab_size save_total_limit "
        "min_frequency threads eval_steps save_steps max_train_samples max_eval_samples "
        "max_predict_samples target_learning_rate_factor bridge_learning_rate_factor preprocessing_num_workers "
        "stages replicas ddp_timeout streaming_buffer_size"
    )
    for name in positive.split():
        value = getattr(args, name)
        if not all(v > 0 and math.isfinite(v) for v in numbers(value)):
            raise ValueError(f"Expected {name} above 0, got {value}.")
    from_zero = (
        "weight_decay target_weight_decay max_grad_norm warmup_steps word_vectors_extra_words trace "
        "embedding_learning_rate_factor frozen_blocks seed validation_seed label_noise_seed early_stopping_patience"
    )
    for name in from_zero.split():
        if not all(v >= 0 and math.isfinite(v) for v in numbers(getattr(args, name))):
            raise ValueError(f"Expected {name} to be 0 or more, got {getattr(args, name)}.")
    for name in ("seed", "validation_seed", "label_noise_seed"):
        if getattr(args, name) >= 2**32:
            raise ValueError(f"Expected {name} below 2**32, got {getattr(args, name)}.")
    for name in ("adam_beta1", "adam_beta2", "validation_fraction", "label_noise"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"Expected {name} in [0, 1), got {getattr(args, name)}.")
    choices = {
        "model_type": ("", *known_fields()),
        "tokenizer_type": ("word", "wordpiece", "bpe", "unigram"),
        "text_style": ("plain", "tweets"),
        "optim": ("adamw", "adam", "sgd", "adafactor"),
        "embedding_optimizer": ("same", "sparse_adam"),
        "lr_scheduler_type": SCHEDULES,
        "eval_strategy": ("epoch", "steps", "no"),
        "freeze": ("encoders", "blocks"),
        "wire_dtype": ("float32", "bf16"),
        "hub_strategy": ("end", "checkpoint"),
        "problem_type": (None, *METRIC_NAMES),
        "metric_for_best_model": (None, *dict.fromkeys(chain(*METRIC_NAMES.values()))),
    }
    for name, allowed in choices.items():
        _check_choice(name, getattr(args, name), allowed)
    for tracker in args.trackers:
        _check_choice("report_to", tracker, (*TRACKERS, "all", "none"))
    if (args.eval_strategy == "steps") != (args.eval_steps is not None):
        raise ValueError(
            "Expected eval_steps if, and only if, eval_strategy='steps', got "
            f"eval_strategy={args.eval_strategy!r} and eval_steps={args.eval_steps}."
        )
    needs_evaluation = {
        "early_stopping_patience": args.early_stopping_patience or None,
        "lr_scheduler_type": "reduce_lr_on_plateau" if args.lr_scheduler_type == "reduce_lr_on_plateau" else None,
    }
    for name, value in needs_evaluation.items():
        if value and args.eval_strategy == "no":
            other = "0" if isinstance(value, int) else "'linear'"
            raise ValueError(
                f"Expected an eval_strategy for {name}={value!r}, got 'no'. Pass eval_strategy='epoch', or "
                f"{name}={other}."
            )
    if args.lr_scheduler_kwargs and args.lr_scheduler_type in ("constant", "constant_with_warmup"):
        raise ValueError(
            f"Expected no lr_scheduler_kwargs for lr_scheduler_type={args.lr_scheduler_type!r}. Leave them out."
        )
    if args.max_steps == 0 or args.max_steps < -1:
        raise ValueError(f"Expected max_steps above 0, or -1 for num_train_epochs, got {args.max_steps}.")
    if args.csv_delimiter is not None and len(args.csv_delimiter) != 1:
        raise ValueError(f"Expected csv_delimiter to be one character, got {args.csv_delimiter!r}.")
    if args.streaming and (args.max_steps < 1 or args.eval_strategy == "epoch"):
        raise ValueError(
            "Expected max_steps, and an eval_strategy of steps or no, with streaming: nobody knows where an epoch "
            f"of a stream ends. Got max_steps={args.max_steps} and eval_strategy={args.eval_strategy!r}. Pass "
            "--max_steps 10000 --eval_strategy steps --eval_steps 1000, for example."
        )
    if args.streaming and args.label_noise:
        raise ValueError(
            "Expected no label_noise with streaming, got it: the rows are not known. Leave one of them out."
        )
    for name, given in (("cache_frozen", args.cache_frozen), ("freeze", args.freeze == "blocks")):
        if given and not args.frozen_blocks:
            raise ValueError(f"Expected frozen_blocks above 0 with {name}, got 0. Pass it, or leave {name} out.")
    if args.freeze == "blocks" and not args.model_name_or_path:
        raise ValueError(
            "Expected model_name_or_path with freeze='blocks', got none: the bridges and label sides of new blocks "
            "have yet to learn. Pass it, or leave freeze out."
        )
    for name in ("streaming", "bf16"):
        if args.cache_frozen and getattr(args, name):
            raise ValueError(f"Expected no {name} with cache_frozen, got it: leave one of them out.")
    if args.trace > 1000:
        raise ValueError(f"Expected trace of at most 1000 steps, got {args.trace}. Pass a smaller number.")
    if args.replicas > 1 and args.embedding_optimizer == "sparse_adam":
        raise ValueError(
            "Expected embedding_optimizer='same' with replicas, got 'sparse_adam': gradients are summed densely. "
            "Leave it out."
        )
    if args.overwrite_output_dir and args.resume_from_checkpoint:
        raise ValueError(
            "Expected either overwrite_output_dir or resume_from_checkpoint, got both. Pass the one that you want."
        )
    if not args.push_to_hub and (args.hub_model_id or args.hub_private_repo or args.hub_strategy != "end"):
        raise ValueError(
            "Expected push_to_hub with hub_model_id, hub_strategy or hub_private_repo, got none. Pass "
            "--push_to_hub as well."
        )
    named = args.word_vectors not in (None, "auto")
    if args.word_vectors_extra_words and not (named and args.tokenizer_type == "word"):
        raise ValueError(
            "Expected the name of word_vectors and tokenizer_type='word' with word_vectors_extra_words, got "
            "others. Leave it out, or pass them."
        )


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        known = [a for a in allowed if a]
        raise ValueError(f"Expected {name} to be one of {', '.join(known)}, got {value!r}.{nearest(str(value), known)}")
