"""The engine's flags, made from the contract's fields, and the reading of a command line into a RunConfig.

Pure: no file is looked at, no environment read. The language is Megatron-SWIFT's: ``--name value``, ``--name=value``, lists
(``--dataset a b``, also repeated, also as JSON), bare booleans, ``--no_name`` for what is on by default, dashes for underscores.
Abbreviations are not understood, so that a new option never changes what an old script means.
"""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import Field, ValidationError
from pydantic.alias_generators import to_camel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from finetune_trainer.contract import (
    CheckpointsConfig,
    ConfigurationError,
    Contract,
    DataConfig,
    Flag,
    ModelConfig,
    Name,
    OutputConfig,
    ParallelismConfig,
    RunConfig,
    TrainingConfig,
    TuningConfig,
    nearest,
)
from finetune_trainer.swift_flags import CONVERTED, FIXED, NO_EFFECT, REFUSED

Model = TypeVar("Model", bound=Contract)
_FLAG = re.compile(r"--(?P<name>[A-Za-z][\w-]*)(?:=(?P<value>.*))?", re.DOTALL)
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]i?)?B?", re.IGNORECASE)


class CommandOptions(Contract):
    """Where results go; options of the command line only."""

    output_dir: Annotated[Name | None, Flag(old=("save",))] = Field(None, description="Folder of the results. Absent: megatron_output/<name of the model>.")
    add_version: bool = Field(True, description="Make a folder vN-<date>-<time> for this run below output_dir.")
    save_safetensors: bool | None = Field(
        None, description="false: --formats megatron. true: peft with lora (see merge_lora), huggingface with full. Absent: true."
    )
    merge_lora: bool | None = Field(None, description="With lora: true is --formats huggingface (merged weights), false is --formats peft. Absent: false.")


SECTIONS: dict[str, type[Contract]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "tuning": TuningConfig,
    "parallelism": ParallelismConfig,
    "training": TrainingConfig,
    "checkpoints": CheckpointsConfig,
    "output": OutputConfig,
    "command": CommandOptions,
}
# What a command line leaves out, where that differs from a FineTuneJob: as in Megatron-SWIFT a run is full-parameter, and starts anew.
COMMAND_DEFAULTS: dict[str, str] = {"tuner_type": "full", "resume": "never"}


@dataclass(frozen=True)
class Option:
    """One flag: the contract's field behind it."""

    section: str
    field: str
    info: FieldInfo
    flag: Flag

    @property
    def name(self) -> str:
        return self.flag.name or self.field

    @property
    def api(self) -> str | None:
        """Its name in a FineTuneJob's spec; None for an option of the command line only."""
        return None if self.section == "command" else f"{self.section}.{to_camel(self.field)}"

    @property
    def default(self) -> Any:
        if self.name in COMMAND_DEFAULTS:
            return COMMAND_DEFAULTS[self.name]
        return None if self.info.is_required() else self.info.default

    @property
    def kind(self) -> Any:
        """The field's type without `| None` and bounds: int, list, bool, ..."""
        return _kind(self.info.annotation)


def _kind(annotation: Any) -> Any:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _kind(next(part for part in get_args(annotation) if part is not type(None)))
    return _kind(get_args(annotation)[0]) if origin is Annotated else origin or annotation


@cache
def options() -> tuple[Option, ...]:
    """Every option of the command line, section by section."""
    found = []
    for section, model in SECTIONS.items():
        for name, info in model.model_fields.items():
            flag = next((item for item in info.metadata if isinstance(item, Flag)), Flag())
            found.append(Option(section, name, info, flag))
    return tuple(found)


@dataclass(frozen=True)
class Spelling:
    """What a name on the command line means."""

    option: Option
    old: bool = False
    negated: bool = False


@cache
def spellings() -> dict[str, Spelling]:
    """Every name that sets an option: today's, older ones, and `no_...` of what is on by default."""
    known: dict[str, Spelling] = {}
    for option in options():
        known[option.name] = Spelling(option)
        known |= {old: Spelling(option, old=True) for old in option.flag.old}
        known |= {old: Spelling(option, old=True, negated=True) for old in option.flag.inverted}
        if option.default is True:
            known[f"no_{option.name}"] = Spelling(option, negated=True)
    return known


@dataclass
class CommandLine:
    """What a command line says: texts by option, and what is to be told about it."""

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    renamed: list[str] = field(default_factory=list)
    without_effect: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """At most two lines: older spellings, and flags without effect."""
        lines = []
        if self.renamed:
            lines.append(f"older spellings: {', '.join(self.renamed)}")
        if self.without_effect:
            lines.append(f"no effect here: {', '.join(self.without_effect)}")
        return lines

    def command(self) -> CommandOptions:
        """The options of the command line only."""
        return _validate(CommandOptions, self.values.get("command", {}), "command")

    def config(self, output_dir: str) -> RunConfig:
        """The run that this command line asks for; raises ConfigurationError naming the flag."""
        sections = {name: dict(self.values.get(name, {})) for name in SECTIONS if name != "command"}
        for option in options():
            if option.name in COMMAND_DEFAULTS:
                sections[option.section].setdefault(option.field, COMMAND_DEFAULTS[option.name])
            if option.info.is_required() and option.field not in sections[option.section]:
                raise ConfigurationError(f"--{option.name} is missing: {option.info.description}")
        formats = _formats(self.command(), sections["tuning"]["tuner_type"])
        if formats is not None and "formats" in sections["output"]:
            raise ConfigurationError("--formats says the same as --save_safetensors and --merge_lora; write either")
        if formats is not None:
            sections["output"]["formats"] = formats
        return _validate(RunConfig, {**sections, "run": {"output_dir": output_dir, "artifact_layout": "checkpoints"}})


def _formats(command: CommandOptions, tuner_type: str) -> list[str] | None:
    if command.save_safetensors is False:
        return ["megatron"]
    if tuner_type == "lora" and command.merge_lora is not None:
        return ["huggingface"] if command.merge_lora else ["peft"]
    if command.save_safetensors:
        return ["peft"] if tuner_type == "lora" else ["huggingface"]
    return None


def _validate(model: type[Model], values: dict[str, Any], section: str | None = None) -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError("\n".join(_describe(problem, section) for problem in error.errors())) from error


def _describe(problem: ErrorDetails, section: str | None) -> str:
    where = [section, *problem["loc"]] if section else list(problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    option = next((option for option in options() if [option.section, option.field] == where[:2]), None)
    if option is None:
        return as_flags(message)
    return f"--{option.name}: {message} (found {problem['input']!r})"


# Description


def as_flags(text: str) -> str:
    """A sentence of the contract with the API's names of options as flags."""
    flag_names = {to_camel(option.field): option.name for option in options() if "_" in option.field}
    return re.sub(r"[a-z]\w*", lambda match: f"--{flag_names[match[0]]}" if match[0] in flag_names else match[0], text)


def schema(option: Option) -> dict[str, Any]:
    """The JSON schema of an option's value, without null."""
    whole = _properties(option.section)[to_camel(option.field)]
    branches = [branch for branch in whole.get("anyOf", [whole]) if branch.get("type") != "null"]
    return {**branches[0], **{key: whole[key] for key in ("minimum", "maximum") if key in whole}}


@cache
def _properties(section: str) -> dict[str, Any]:
    properties: dict[str, Any] = SECTIONS[section].model_json_schema()["properties"]
    return properties


def type_text(option: Option) -> str:
    """How to write an option's value: N or its unit, X, TEXT, true|false, or its choices; lists with dots."""
    described = schema(option)
    item = described.get("items", described)
    names = {"integer": (option.flag.unit or "N").upper(), "number": "X", "boolean": "true|false", "string": "TEXT"}
    text = "|".join(item["enum"]) if "enum" in item else names[item["type"]]
    return f"{text}..." if option.kind is list else text


def bounds_text(option: Option) -> str:
    """An option's bounds: `>= 1, <= 4096`; of a list, those of its items and its length."""
    described = schema(option)
    item = described.get("items", described)
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    largest = 2**31 - 1  # stands for "as large as an integer can be"
    texts = [f"{sign} {item[key]:g}" for key, sign in signs.items() if key in item and item[key] != largest]
    if "maxItems" in described:
        texts.append(f"{described.get('minItems', 0)} to {described['maxItems']} items")
    return ", ".join(texts)


def default_text(option: Option) -> str:
    """`default X`, `required`, or nothing where the description says what absence means."""
    if option.info.is_required() and option.name not in COMMAND_DEFAULTS:
        return "required"
    value = option.default
    if value is None:
        return ""
    return f"default {str(value).lower() if isinstance(value, bool) else value}"


# Reading


def read(argv: Sequence[str]) -> CommandLine:
    """Read flags; raises ConfigurationError for one that is unknown, refused or lacks its value."""
    line = CommandLine()
    for name, values in _groups(argv):
        _take(line, name.replace("-", "_"), values)
    return line


def _groups(argv: Sequence[str]) -> Iterable[tuple[str, list[str]]]:
    """Each flag with the texts that follow it."""
    name: str | None = None
    values: list[str] = []
    for text in argv:
        match = None if " " in text.partition("=")[0] else _FLAG.fullmatch(text)
        if match is None and name is None:
            raise ConfigurationError(f"unexpected argument {text!r}; flags begin with --")
        if match is None:
            values.append(text)
            continue
        if name is not None:
            yield name, values
        name, values = match["name"], [] if match["value"] is None else [match["value"]]
    if name is not None:
        yield name, values


def _take(line: CommandLine, name: str, values: list[str]) -> None:
    spelling = spellings().get(name)
    if spelling is not None:
        _set(line, name, spelling, values)
    elif name in CONVERTED:
        _convert(line, name, values)
    elif name in NO_EFFECT:
        line.without_effect.append(f"--{name} ({NO_EFFECT[name]})")
    elif name in FIXED:
        _fixed(line, name, values)
    elif name in REFUSED:
        raise ConfigurationError(f"--{name}: {REFUSED[name]}")
    else:
        raise ConfigurationError(f"unknown flag --{name}{nearest('--' + name, ['--' + known for known in spellings()])}")


def _set(line: CommandLine, name: str, spelling: Spelling, values: list[str]) -> None:
    option = spelling.option
    if spelling.old:
        line.renamed.append(f"--{name} is now --{option.name}{' with the opposite sense' if spelling.negated else ''}")
    value = _value(name, option, values)
    if spelling.negated:
        value = not is_true(name, value)
    if option.flag.inert is not None:
        line.without_effect.append(f"--{option.name} ({option.flag.inert})")
        return
    section = line.values.setdefault(option.section, {})
    section[option.field] = section.get(option.field, []) + value if option.kind is list else value


def _value(name: str, option: Option, values: list[str]) -> Any:
    """The texts of one flag as pydantic takes them."""
    if option.kind is list:
        if not values:
            raise ConfigurationError(f"--{name} needs at least one value: {option.info.description}")
        return [item for text in values for item in _items(text)]
    if option.kind is bool and not values:
        return "true"
    if len(values) != 1:
        found = "none" if not values else " ".join(map(repr, values))
        raise ConfigurationError(f"--{name} needs one value (found {found}): {option.info.description}")
    return _bytes(values[0]) if option.flag.unit == "bytes" else values[0]


def _items(text: str) -> list[Any]:
    if text.lstrip().startswith("["):
        try:
            return list(json.loads(text))
        except json.JSONDecodeError:
            return [text]
    return [text]


def _bytes(text: str) -> Any:
    """`5GB`, `500MiB` or plain bytes as a number; anything else as it is, for pydantic to refuse."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        return text
    unit = (match[2] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(float(match[1]) * base ** ("kmgt".index(unit[0]) + 1 if unit else 0))


def is_true(name: str, text: str) -> bool:
    """A boolean's text; raises ConfigurationError when it is none."""
    if text.lower() in ("true", "t", "yes", "y", "on", "1"):
        return True
    if text.lower() in ("false", "f", "no", "n", "off", "0"):
        return False
    raise ConfigurationError(f"--{name} needs true or false (found {text!r})")


def _convert(line: CommandLine, name: str, values: list[str]) -> None:
    """An older flag whose value reads differently today."""
    text = " ".join(values) or "true"
    try:
        target = CONVERTED[name].convert(text)
    except ValueError as error:
        raise ConfigurationError(f"--{name}: {CONVERTED[name].meaning} (found {text!r})") from error
    if target is None:
        line.without_effect.append(f"--{name} {text}")
        return
    line.renamed.append(f"--{name} {text} is now --{target[0]} {target[1]}")
    _set(line, target[0], spellings()[target[0]], [target[1]])


def _fixed(line: CommandLine, name: str, values: list[str]) -> None:
    """A flag of Megatron-SWIFT that this version has with one value only."""
    rule = FIXED[name]
    text = " ".join(values) if values else "true"
    if not any(_same(name, text, accepted) for accepted in rule.accepted):
        raise ConfigurationError(f"--{name} {text}: {rule.refusal}")
    line.without_effect.append(f"--{name} {text} ({rule.note})")


def _same(name: str, text: str, accepted: str) -> bool:
    if accepted in ("true", "false"):
        return is_true(name, text) == (accepted == "true")
    if accepted.isdigit():
        return re.fullmatch(rf"{accepted}(\.0*)?", text) is not None
    return text.lower() == accepted
