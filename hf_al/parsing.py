"""From YAML and flags to TrainingArguments. Nothing here imports torch or transformers: `--help` answers at once."""

import dataclasses
import re
import sys
import typing
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, HelpFormatter, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .arguments import PRETRAINED, TrainingArguments, named
from .config_fields import built_in, config_fields, config_values, known_fields
from .messages import nearest
from .modeling import limits
from .values import YAML_FLOAT, convert, type_name, union_members

OTHER_NAMES = {"num_hidden_layers": "num_blocks", "--num_hidden_layers": "--num_blocks"}  # those of transformers
BALANCED = "balanced"  # cuts of an encoder, by measured time
# Arguments that are one number, or a list of one for each block
PER_BLOCK = [n for n, kind in typing.get_type_hints(TrainingArguments).items() if list[float] in union_members(kind)]
METAVARS = {int: "N", float: "X", bool: "BOOL", str: "NAME"}


# --- flags


class FlagParser(ArgumentParser):
    """argparse whose errors are one sentence instead of a page of flags."""

    def __init__(self, prog: str | None = None, **options: Any):
        options = {"formatter_class": lambda prog: HelpFormatter(prog, max_help_position=32), **options}
        super().__init__(prog, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message[:1].upper() + message[1:] + ".")

    def take(self, unknown: list[str], flags: Namespace) -> list[str]:
        """Adds `unknown` to the last list of arguments without a flag: argparse fills that once, before the first
        flag, and `predict DIR --all_scores TEXT` would not be understood. Returns what is left."""
        lists = [action.dest for action in self._actions if action.nargs in ("*", "+") and not action.option_strings]
        if not lists or any(text.startswith("-") for text in unknown):
            return unknown
        setattr(flags, lists[-1], [*getattr(flags, lists[-1]), *unknown])
        return []

    def refuse(self, unknown: list[str]) -> None:
        """ValueError for the first argument that `parse_known_args` did not know, with the nearest flag."""
        if not unknown:
            return
        if not unknown[0].startswith("-"):
            raise ValueError(f"Unexpected argument {unknown[0]!r}.")
        flag = unknown[0].split("=")[0]
        known = [name for name in self._option_string_actions if name.startswith("--")]
        raise ValueError(f"Unknown flag {unknown[0]}.{nearest(OTHER_NAMES.get(flag, flag), known)}")


def reader(kind: Any) -> Callable[[str], Any]:
    """For argparse's `type`: converts a flag's text to the annotated type."""

    def read(text: str) -> Any:
        try:
            return convert(text, kind)
        except (TypeError, ValueError):
            raise ArgumentTypeError(f"expected {type_name(kind)}, got {text!r}") from None

    return read


def add_training_flags(parser: ArgumentParser) -> None:
    """Flags for every field of TrainingArguments and every config value of all architectures."""
    import shtab

    complete = {"file": shtab.FILE, "folder": shtab.DIRECTORY}  # in a shell, with names of these
    config = parser.add_argument("--config", metavar="FILE", help="YAML file with values of these arguments.")
    config.complete = complete["file"]  # type: ignore[attr-defined]
    parser.add_argument("--print_config", action="store_true", help="Print the resolved arguments as YAML and stop.")

    def add(group: Any, name: str, kind: Any, default: Any, help: str, path: str = "") -> None:
        shown = "" if default in (None, "") else f" (default: {default})"
        members = union_members(kind)
        switch: dict[str, Any] = {"nargs": "?", "const": True} if bool in members else {}
        metavar = {"file": "FILE", "folder": "DIR"}.get(path, METAVARS.get(members[0], "LIST"))
        short = ["--import"] if name == "import_module" else []
        action = group.add_argument(
            f"--{name}",
            *short,
            type=reader(kind | str if name == "cuts" else kind),  # or `balanced`
            default=SUPPRESS,
            help=(help + shown).replace("%", "%%"),
            metavar=metavar,
            **switch,
        )
        if path in complete:
            action.complete = complete[path]

    hints = typing.get_type_hints(TrainingArguments)
    run = parser.add_argument_group("run")
    for f in dataclasses.fields(TrainingArguments):
        if f.name != "model":
            default = None if f.default is dataclasses.MISSING else f.default
            add(run, f.name, hints[f.name], default, f.metadata["help"], f.metadata["path"])
    fields = known_fields()
    group = parser.add_argument_group("model config (see ALLstmConfig, ALTransformerConfig and ALEncoderConfig)")
    for name in {name: None for known in fields.values() for name in known}:
        owners = {model_type: known[name] for model_type, known in fields.items() if name in known}
        field = next(iter(owners.values()))
        shared = [t for t in field.texts if all(name in known and t in known[name].texts for known in fields.values())]
        own = [f"{model_type}: {t}" for model_type, f in owners.items() for t in f.texts if t not in shared]
        add(group, name, field.kind, field.default, " ".join([*shared, *own]))


def parse_arguments(argv: list[str], prog: str = "hf-al train") -> TrainingArguments:
    """The flags of `hf-al train` -> TrainingArguments; see `resolve`."""
    parser = FlagParser(prog)
    add_training_flags(parser)
    parsed, unknown = parser.parse_known_args(argv)
    parser.refuse(unknown)
    return resolve(vars(parsed))


def resolve(flags: dict[str, Any]) -> TrainingArguments:
    """The arguments of a run: the flags given override `--config`, which overrides the defaults. A flag that names data
    replaces the whole data section of the YAML file.

    Raises:
        ValueError: a key, a config value or a combination that does not exist or cannot work.
    """
    fields = {f.name: f for f in dataclasses.fields(TrainingArguments)}
    flags = dict(flags)
    config, print_only = flags.pop("config", None), flags.pop("print_config", False)
    values = read_yaml(config) if config else {}
    data = named("section", "data")
    if {"train_file", "dataset_name"} & flags.keys():
        values = {name: value for name, value in values.items() if name not in data}
    model = dict(values.pop("model", None) or {})
    model |= {name: flags.pop(name) for name in list(flags) if name not in fields}
    args = TrainingArguments(**{**values, **flags}, model=model)
    if not args.model_name_or_path:  # its architecture is not known yet
        check_model_keys(args)
        check_new_model(args)
    if not args.output_dir and not print_only:
        raise ValueError("Expected --output_dir, got none. Pass --output_dir out/my_run, for example.")
    return args


# --- YAML


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice, and reads numbers as YAML 1.2 does: 010 and 1:30 are no numbers, but text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"the key {twice[0]!r} comes {keys.count(twice[0])} times")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    start: [(tag, rule) for tag, rule in rules if tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
    for start, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", YAML_FLOAT, list("-+0123456789."))


def load_yaml(path: str, named_by: str) -> dict[str, Any]:
    """The mapping of a YAML file; `named_by`: what to check if there is none.

    Raises:
        ValueError: no such file, or one that holds something else.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"Expected a YAML file at {path}, found none. Check {named_by}.")
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected YAML in {path}, got something else: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"Expected a mapping of arguments in {path}, got {type(values).__name__}.")
    return values


def read_yaml(path: str) -> dict[str, Any]:
    """The values of a YAML file, with keys checked against TrainingArguments."""
    values = load_yaml(path, "--config")
    known = [f.name for f in dataclasses.fields(TrainingArguments)]
    for key in values:
        if key not in known and any(key in fields for fields in built_in().values()):
            raise ValueError(f"Unknown key {key!r} at the top of {path}: it is a config value. Put it under model:")
        if key not in known:
            raise ValueError(f"Unknown key {key!r} in {path}.{nearest(str(key), known)}")
    if not isinstance(values.get("model") or {}, dict):
        raise ValueError(f"Expected a mapping of config values as model: in {path}, got {values['model']!r}.")
    return values


def check_model_keys(args: TrainingArguments) -> None:
    """Refuses config values that the chosen architecture does not have; reads `1e-4` strings as numbers."""
    known = {name: field.kind for name, field in config_fields(args.model_type).items()}
    for key, value in args.model.items():
        if key not in known:
            name = OTHER_NAMES.get(str(key), str(key))
            raise ValueError(f"Unknown config value {key!r} for {args.model_type}.{nearest(name, list(known))}")
        if (key, value) == ("cuts", BALANCED):  # measured when the run starts
            if not args.encoder:
                raise ValueError("Expected --encoder with cuts=balanced, got none: a trained model has its cuts.")
            continue
        try:
            args.model[key] = convert(value, known[key])
        except (TypeError, ValueError):
            raise ValueError(f"Expected {key} as {type_name(known[key])}, got {value!r}.") from None


def check_new_model(args: TrainingArguments) -> None:
    """Refuses what a new model cannot be, as far as that is known before its data and its classes: config values out of
    range, more stages than blocks, lists that do not have one number for each block."""
    values = config_values(args.model_type, args.model)
    cuts, blocks = values.get("cuts"), planned_blocks(args)
    if isinstance(cuts, list) and args.model.get("num_blocks", blocks) != blocks:
        raise ValueError(
            f"Expected {blocks} blocks with the cuts {cuts}, got num_blocks={values['num_blocks']}. Leave one of them "
            "out."
        )
    if cuts == BALANCED:
        values["cuts"] = None
    of_lora = [name for name in ("lora_alpha", "lora_dropout", "lora_target_modules") if name in args.model]
    if of_lora and not values.get("lora_r"):
        raise ValueError(
            f"Expected lora_r above 0 with {of_lora[0]}, got 0. Pass --lora_r 8, for example, or leave it out."
        )
    if args.model_type in limits.OF_ARCHITECTURES:
        loaded = sys.modules.get(f"{__package__}.modeling.objectives")  # with your own ones, if there are any
        objectives = getattr(loaded, "OBJECTIVES", limits.OBJECTIVE_NAMES)
        limits.check_shared(Namespace(**values), tuple(objectives))
        limits.OF_ARCHITECTURES[args.model_type](Namespace(**values))
    _check_numbers(args)
    check_stages(args.stages, blocks)
    check_lists(args, blocks)


def _check_numbers(args: TrainingArguments) -> None:
    """Refuses columns of numbers that no block reads, and a block that would read none."""
    names, block = args.numeric_column_names, args.model.get("numeric_block")
    if names and args.model_type == PRETRAINED:
        raise ValueError(
            f"Expected no numeric_column_names with model_type={PRETRAINED}, got {','.join(names)}: a pretrained "
            "encoder reads text alone. Leave them out, or train al_lstm or al_transformer."
        )
    if block and not names:
        raise ValueError(
            f"Expected numeric_column_names with numeric_block={block}, got none. Name the columns of numbers "
            "that this block is to read."
        )


def planned_blocks(args: TrainingArguments) -> int:
    """How many blocks a new model gets."""
    cuts = args.model.get("cuts")
    blocks: int = args.model.get("num_blocks", config_fields(args.model_type)["num_blocks"].default)
    return len(cuts) + 1 if isinstance(cuts, list) else blocks


def check_lists(args: TrainingArguments, blocks: int) -> None:
    """Refuses a list that does not have one number for each block, and more frozen blocks than there are or than leave
    something to learn."""
    for name in PER_BLOCK:
        value = getattr(args, name)
        if isinstance(value, list) and len(value) != blocks:
            raise ValueError(f"Expected {name} as one number, or {blocks} of them (num_blocks), got {len(value)}.")
    if args.frozen_blocks > blocks:
        raise ValueError(f"Expected frozen_blocks of at most {blocks} (num_blocks), got {args.frozen_blocks}.")
    if args.freeze == "blocks" and args.frozen_blocks == blocks:
        raise ValueError(
            f"Expected frozen_blocks below {blocks} (num_blocks) with freeze=blocks, got {blocks}: nothing would "
            "learn. Pass fewer, or more --num_blocks."
        )


def check_stages(stages: int, units: int) -> None:
    """Refuses stages that would own nothing. `units`: what cannot be split; at most the number of blocks."""
    if not 1 <= stages <= units:
        raise ValueError(
            f"Expected 1 to {units} stages, one or more blocks each, got {stages}. Pass fewer --stages, or more "
            "--num_blocks."
        )
