"""The model card of a finished run: its page on a Hub, filled from report.json, config and tokenizer alone."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from .arguments import TrainingArguments, named
from .messages import some, table
from .modeling.configuration_al import ALConfig
from .modeling.limits import MULTI, REGRESSION, SINGLE
from .modeling.modeling_al import ALForSequenceClassification
from .modeling.objectives import OBJECTIVES
from .report import differences, energy, flat_arguments, numbers, split_sizes
from .values import names_in

PAIR = ("The crew was lovely!", "Everyone on board was kind.")
TEMPLATE = Path(__file__).with_name("model_card.md")
HUB_METRICS = {"accuracy": "accuracy", "macro_f1": "f1", "f1_micro": "f1", "mse": "mse"}  # hf_al's names -> the Hub's
USES = {
    SINGLE: "It assigns each {unit} one of the classes {names}.",
    MULTI: "It assigns each {unit} any number of the labels {names}.",
    REGRESSION: "It predicts a value for each {unit}: {names}.",
}


def model_card(
    report: dict[str, Any],
    model: ALForSequenceClassification,
    repo_id: str,
    plots: list[str],
    language: str | None = None,
    license: str | None = None,
    baseline: dict[str, Any] | None = None,
    complete: bool = True,
) -> ModelCard:
    """The card.

    Args:
        report: of the run, its arguments as `shared_arguments` gives them.
        model: the chosen one, as it is shared.
        repo_id: `user/name`.
        plots: names of the plots in plots/.
        language, license: of the model, as the Hub names them (`en`, `apache-2.0`); left out if None.
        complete: whether the other files of a push are beside the card.
        baseline: the report of a run by backpropagation on the same data, to compare with.
    """
    split = "test" if "test" in report else "validation"
    differing = _differing(report, baseline) if baseline else []
    exits = [row for row in report[split] if row["block"] in model.config.exits()]
    machine, pairs = report["machine"], bool(report["data"].get("pairs"))
    use = USES[report["problem_type"]].format(
        unit="pair of texts" if pairs else "text", names=some(report["label_names"], 20)
    )
    return ModelCard.from_template(
        card_data(report, exits[-1], split, repo_id, language, license),
        template_path=str(TEMPLATE),
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        report=report,
        end_to_end=OBJECTIVES[report["objective"]].end_to_end,
        architecture=_architecture(model),
        picture=picture(model.config, "pair" if pairs else "text"),
        own_decoders=not OBJECTIVES[report["objective"]].target_codes,
        complete=complete,
        split=split,
        rows=report["data"]["rows"],
        exits=exits,
        calibration=_calibration(model.config),
        exits_table=table([{**row, **_cost(model, report, row["block"])} for row in exits], True),
        comparison=table([_in_short(r, split) for r in (report, baseline)], True) if baseline else None,
        differing=table(differing, True) if differing else None,
        tokens=report["exit_speeds"][0]["tokens"],
        pairs=pairs,
        unit="pair" if pairs else "text",
        example=", ".join(json.dumps(text) for text in (PAIR if pairs else PAIR[:1])),
        question=json.dumps(dict(zip(("text", "text_pair"), PAIR, strict=True)) if pairs else PAIR[0]),
        use=use,
        numbers=numbers(report["data"]),
        max_length=model.config.max_position_embeddings,
        split_sizes=split_sizes(report["data"]),
        fingerprints=", ".join(f"{name} `{mark[:16]}`" for name, mark in report["data"]["fingerprint"].items()),
        hardware=machine["gpu"] or f"{machine['processor']} (threads: {machine['threads']})",
        arguments_table=table(_chosen(report["arguments"]), True),
        energy=energy(report),
        vectors=report["arguments"]["word_vectors"],
        stages=report["arguments"].get("stages", 1),
        top=", top_k=None" if report["problem_type"] == MULTI else "",
        start=started_from(report["arguments"]),
        plots=plots,
        versions=", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers")),
    )


def card_data(
    report: dict[str, Any], last: dict[str, float], split: str, repo_id: str, language: str | None, license: str | None
) -> ModelCardData:
    """The metadata, with the metrics of the last exit as `model-index`."""
    args = report["arguments"]
    dataset = _hub_id(args["dataset_name"])
    local = [] if OBJECTIVES[report["objective"]].end_to_end else ["associated-learning", "local-learning"]
    metrics = {ours: last[ours] for ours in HUB_METRICS if ours in last}
    return ModelCardData(
        model_name=repo_id.split("/")[-1],
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=[*local, "hf_al", report["model_type"]],
        base_model=_hub_id(started_from(args)),
        datasets=[dataset] if dataset else None,
        language=language,
        license=license,
        metrics=[HUB_METRICS[name] for name in metrics],
        eval_results=[
            EvalResult(
                task_type="text-classification",
                dataset_type=dataset or "text",
                dataset_name=report["data"]["name"],
                dataset_split=split,
                metric_type=HUB_METRICS[name],
                metric_name=name,  # which of several averages
                metric_value=value,
            )
            for name, value in metrics.items()
        ],
    )


def eval_results(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The test result as the Hub's `.eval_results/*.yaml` holds it; empty without a test split of a Hub data set."""
    dataset = _hub_id(report["arguments"]["dataset_name"])
    if "test" not in report or dataset is None:
        return []
    metric, rows = report["metric"], report["data"]["rows"]["test"]
    entry = EvalResultEntry(
        dataset_id=dataset,
        task_id=report["arguments"]["dataset_config_name"] or "default",
        value=report["test"][-1][metric],
        notes=f"{metric} of the last exit on {rows} test rows",
    )
    return eval_result_entries_to_yaml([entry])


def picture(config: ALConfig, unit: str = "text") -> str:
    """The blocks and exits of a model, drawn in text; `unit`: what goes in."""
    last = config.num_blocks - 1
    drawn = list(range(last + 1)) if last < 4 else [0, 1, None, last]  # None: those left out
    arrow = "->" if OBJECTIVES[config.objective].end_to_end else "-/->"

    def line(part: str, start: str, join: str, numbered: bool = True) -> str:
        width = len(f"encode {last}")
        names = ["..." if k is None and part == "encode" else f"{part} {k}" if numbered else part for k in drawn]
        shown = [name if part == "encode" or k in config.exits() else "" for k, name in zip(drawn, names, strict=True)]
        return (start + join.join(name.center(width) for name in shown)).rstrip()

    start, between = f"{unit} -> ", f" {arrow} "
    left, gap = " " * len(start), " " * len(between)
    bar = line("|", left, gap, numbered=False)
    return "\n".join([line("encode", start, between), bar, line("bridge", left, gap), bar, line("exit", left, gap)])


def _calibration(config: ALConfig) -> dict[str, Any] | None:
    """How texts leave a calibrated model early: the rule, the measured speed-up, a table of the exits."""
    if config.exit_temperatures is None or config.exit_thresholds is None:
        return None
    pairs = zip(config.exit_temperatures, config.exit_thresholds, strict=True)
    rows = [{"block": k, "temperature": float(t), "threshold": value} for k, (t, value) in enumerate(pairs)]
    return {"rule": config.exit_rule, "speedup": config.exit_speedup, "table": table(rows, True)}


def _architecture(model: ALForSequenceClassification) -> str:
    """How many blocks, and what they are made of."""
    words = model.model.blocks[-1].encode.in_words()
    if model.config.num_blocks == 1:
        return f"one block ({words})" if words else "one block"
    return f"{model.config.num_blocks} blocks" + (f" ({words} in the last one)" if words else "")


def started_from(arguments: dict[str, Any]) -> str | None:
    """The trained model, or the pretrained encoder, whose weights a run began with."""
    return arguments["model_name_or_path"] or arguments.get("encoder")  # an earlier version's has no encoder


def _hub_id(name: str | None) -> str | None:
    """A shared argument if it names a repository, not a file or the embedded data."""
    return name if name and "/" in name else None


def _in_short(report: dict[str, Any], split: str) -> dict[str, Any]:
    """A run as one row of a comparison."""
    last = {name: value for name, value in report[split][-1].items() if name != "block"}
    return {"objective": report["objective"], **last, "training, s": f"{report['speed']['train_seconds']:.0f}"}


def _cost(model: ALForSequenceClassification, report: dict[str, Any], k: int) -> dict[str, str]:
    """What an answer at exit k needs."""
    (speed,) = [row for row in report["exit_speeds"] if row["block"] == k]
    parameters = f"{exit_parameters(model, k):,}"
    return {
        "parameters": parameters,
        "ms": f"{speed['milliseconds']:.2f}",
        "texts/s": f"{speed['texts_per_second']:,.0f}",
    }


def exit_parameters(model: ALForSequenceClassification, last: int) -> int:
    """The number of parameters needed to answer at exit `last`: encoders and decoders up to there, and its bridge."""
    blocks = list(model.model.blocks[: last + 1])
    last_one = blocks[-1]
    decoding = [block.decode_target for block in ([last_one] if last_one.reads_labels else blocks)]
    parts = [*(block.encode for block in blocks), last_one.lookahead, last_one.bridge, *decoding]
    return sum(p.numel() for part in parts if part is not None for p in part.parameters())


def _differing(report: dict[str, Any], baseline: dict[str, Any]) -> list[dict[str, Any]]:
    """What of the network and its training is not the same in both runs, the objective apart."""
    left_out = {"model.objective", *named("only", "showing", "output", "machine"), *named("section", "data")}
    runs = {"this model": report, "baseline": {**baseline, "arguments": shared_arguments(baseline["arguments"])}}
    plain = _defaults(report["arguments"])  # a run of an earlier version may lack some
    found = differences({name: {**plain, **flat_arguments(run)} for name, run in runs.items()})
    return [{"argument": name, **row} for name, row in found.items() if name not in left_out]


def shared_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a run without those specific to this machine: files by name only, no folders."""
    shown = {**arguments, "output_dir": "", "resume_from_checkpoint": None}
    for name in named("path", "file", "any"):
        value = shown.get(name)  # a run of an earlier version may lack some
        if value:
            is_file = name in named("path", "file")
            shown[name] = Path(value).name if is_file else ",".join(map(shared_name, names_in(value)))
    return shown


def shared_name(name: str) -> str:
    """A Hub id or a module as it is, and of a folder or a file of this machine its name only."""
    path = Path(name)
    is_path = path.is_absolute() or path.exists() or path.suffix == ".py" or name.startswith(".") or name.count("/") > 1
    return path.name if is_path else name


def _defaults(arguments: dict[str, Any]) -> dict[str, Any]:
    """The defaults of all arguments; some follow from others that a run was given."""
    decide = ("model_type", "encoder", "model_name_or_path", "eval_strategy", "eval_steps", "max_steps")
    filled = TrainingArguments(**{n: arguments[n] for n in decide if n in arguments}).to_dict()
    plain = {field.name: field.default for field in fields(TrainingArguments)}
    return {**filled, **{n: plain[n] for n in decide}}


def _chosen(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments that differ from the defaults, and all config values that were given."""
    defaults = _defaults(arguments)
    shown = {n: v for n, v in arguments.items() if n not in {"model", *named("only", "showing")} and v != defaults[n]}
    values = {**shown, **arguments["model"]}
    return [
        {"argument": n, "value": "none" if v is None else f"{v:g}" if isinstance(v, float) else v}
        for n, v in values.items()
    ]
