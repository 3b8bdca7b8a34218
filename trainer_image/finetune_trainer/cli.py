"""The `megatron` command: Megatron-SWIFT's command language in front of this engine.

Reads a command line, writes the RunConfig to ``run.json`` in the run's folder and hands over to the launcher of this node. What a
flag means is in ``flags.py``; which processes there are, and where, the launcher reads from the environment.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import version
from os.path import exists, isdir  # False, where Path's raise: a name that is too long for a file
from pathlib import Path
from typing import Any

from finetune_trainer import flags
from finetune_trainer.contract import ConfigurationError, EngineError, ModelConfig, RunConfig, exit_for, nearest
from finetune_trainer.streams import write_line
from finetune_trainer.swift_flags import CONVERTED, FIXED, NO_EFFECT

USAGE = """usage: megatron sft FLAGS          train: full-parameter or LoRA, from a Hugging Face model
       megatron sft CONFIG FLAGS   the same, flags from a YAML or JSON file first
       megatron sft --help         every flag
       megatron launch RUN.json    start this node's processes of a run
       megatron --version

Processes: NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and CUDA_VISIBLE_DEVICES in the environment.
Of several nodes, node 0 is reached on MASTER_PORT by the ranks and on the port after it by the launchers, which end together.
"""
LATER = ("pt", "export", "infer", "rlhf")
_VERSION_FOLDER = re.compile(r"v(\d+)-\d{8}-\d{6}")
_SNAPSHOT = re.compile(r"/models(?:--|/)(?:.+?--)?(?P<name>.+?)/snapshots/")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is that of the reason of a failure, which is told in a sentence on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except EngineError as error:
        _say(str(error))
        return exit_for(error.reason).code


def _run(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    commands: dict[str, Callable[[list[str]], int]] = {"sft": sft, "launch": launch, "--help": usage, "-h": usage, "--version": show_version}
    if command in LATER:
        raise ConfigurationError(f"`megatron {command}` is not built yet; this version has sft and launch")
    if command not in commands:
        raise ConfigurationError(f"unknown command {command!r}{nearest(command, [*commands, *LATER])}; see megatron --help")
    return commands[command](rest)


def _say(text: str) -> None:
    write_line(f"megatron: {text}", sys.stderr)


def usage(_: list[str]) -> int:
    """`megatron --help`."""
    print(USAGE, end="")
    return 0


def show_version(_: list[str]) -> int:
    """`megatron --version`."""
    print(f"mcore-finetune {version('mcore-finetune')}")
    return 0


def launch(arguments: list[str]) -> int:
    """`megatron launch RUN.json`."""
    if len(arguments) != 1:
        raise ConfigurationError(f"megatron launch needs one file, RUN.json (found {len(arguments)})")
    from finetune_trainer import launch as launcher  # here, so that --help and refusals need not wait for it

    return launcher.launch(RunConfig.load(Path(arguments[0])))


# sft


def sft(arguments: list[str]) -> int:
    """`megatron sft FLAGS`."""
    if "--help" in arguments or "-h" in arguments:
        print(sft_help(), end="")
        return 0
    line = flags.read(expand_config_file(arguments))
    for note in line.notes():
        _say(note)
    config = make_run(line, datetime.now())
    from finetune_trainer import launch as launcher

    launcher.check_inputs(config)
    if launcher.is_first_node():  # every node computes a folder, the gang uses the first node's
        config = claim_folder(config) if line.command().add_version else config
        write_run(config)
        _say(f"results: {config.run.output_dir}")
    return launcher.launch(config)


def make_run(line: flags.CommandLine, now: datetime) -> RunConfig:
    """The whole run of a command line: paths absolute, the folder of its results chosen. Reads folders, writes nothing."""
    command = line.command()
    config = with_paths(line.config(output_dir=command.output_dir or "."))
    base = Path(command.output_dir or f"megatron_output/{model_name(config.model.source)}").expanduser().absolute()
    folder = base
    if command.add_version:
        earlier = _earlier_run(base, config) if config.checkpoints.resume == "auto" else None
        folder = earlier or base / f"v{_next_version(base)}-{now:%Y%m%d-%H%M%S}"
    return config.model_copy(update={"run": config.run.model_copy(update={"output_dir": str(folder)})})


def claim_folder(config: RunConfig) -> RunConfig:
    """The run with its version folder made, under the next version where another command has just taken this one. A run that goes on keeps its folder."""
    folder = Path(config.run.output_dir)
    while not isdir(folder / "checkpoints"):
        with _writing_to(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with _writing_to(folder), suppress(FileExistsError):
            folder.mkdir()
            break
        folder = folder.with_name(f"v{_next_version(folder.parent)}-{folder.name.partition('-')[2]}")
    return config.model_copy(update={"run": config.run.model_copy(update={"output_dir": str(folder)})})


def write_run(config: RunConfig) -> None:
    """Write `run.json` into the run's folder, whole or not at all; `megatron launch` runs it again."""
    folder = Path(config.run.output_dir)
    with _writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".run.json.{socket.gethostname()}-{os.getpid()}"  # another command may write to the same folder
        partial.write_text(config.dump() + "\n", encoding="utf-8")
        partial.replace(folder / "run.json")


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(f"--output_dir: cannot write to {folder}: {error.strerror}") from error


def with_paths(config: RunConfig) -> RunConfig:
    """``config`` with every model and data set that is a path made absolute; a system prompt that names a .txt file is read."""
    data = config.data
    dataset = [_dataset_path(entry) for entry in data.dataset]
    system = _read_system(data.system) if data.system is not None and data.system.endswith(".txt") else data.system
    model: ModelConfig = config.model.model_copy(update={"source": _path(config.model.source)})
    return config.model_copy(update={"model": model, "data": data.model_copy(update={"dataset": dataset, "system": system})})


def _path(text: str) -> str:
    """An existing path, or what can only be one, as an absolute path; an id as it is."""
    path = Path(text).expanduser()
    return str(path.absolute()) if exists(path) or text.startswith(("/", "./", "../", "~/")) else text


def _dataset_path(entry: str) -> str:
    name, mark, count = entry.rpartition("#")
    return f"{_path(name)}#{count}" if mark and count.isdigit() else _path(entry)


def _read_system(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--system: cannot read {name}: {error.strerror}; a prompt that ends with .txt names a file") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"--system: {name} is not UTF-8 (byte {error.start}: {error.reason}); a prompt must be text in UTF-8") from error


def model_name(source: str) -> str:
    """The last part of a path or id; of a hub cache's snapshot, the model's name."""
    snapshot = _SNAPSHOT.search(source)
    return snapshot["name"] if snapshot else source.rstrip("/").rpartition("/")[2]


def _versions(base: Path) -> list[tuple[int, Path]]:
    """The version folders of earlier runs, newest first."""
    found = [(int(match[1]), path) for path in (base.iterdir() if isdir(base) else ()) if (match := _VERSION_FOLDER.fullmatch(path.name))]
    return sorted(found, reverse=True)


def _next_version(base: Path) -> int:
    versions = _versions(base)
    return versions[0][0] + 1 if versions else 0


def _earlier_run(base: Path, config: RunConfig) -> Path | None:
    """The newest folder that holds a whole checkpoint of this same run."""
    from finetune_trainer.checkpoint_files import choose_checkpoint

    return next((folder for _, folder in _versions(base) if choose_checkpoint(folder / "checkpoints", config.identity(), sys.maxsize)[0]), None)


def expand_config_file(arguments: list[str]) -> list[str]:
    """Flags with a leading YAML or JSON file replaced by the flags that it stands for."""
    if not arguments or not arguments[0].endswith((".yaml", ".yml", ".json")):
        return arguments
    file = Path(arguments[0])
    try:
        content = _parse(file)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{file}: found a {type(content).__name__}; it must be a mapping of flags to values")
    if "ENV" in content:
        raise ConfigurationError(f"{file}: ENV is not supported; set the variables in the environment")
    return [text for name, value in content.items() if value is not None for text in _flag_texts(name, value)] + arguments[1:]


def _parse(file: Path) -> Any:
    if file.suffix == ".json":
        return json.loads(file.read_bytes())
    import yaml  # only for this

    try:
        return yaml.safe_load(file.read_bytes())
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _flag_texts(name: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{name}={item}" for item in value]
    return [f"--{name}={json.dumps(value) if isinstance(value, dict | bool) else value}"]


# Help


def sft_help() -> str:
    """Every flag of `megatron sft`, section by section."""
    parts = ["usage: megatron sft --model DIR_OR_ID --dataset FILE_OR_ID... [FLAGS]\n"]
    for section, model in flags.SECTIONS.items():
        parts.append(f"\n{section}: {str(model.__doc__).strip()}\n")
        parts += [_help_entry(option) for option in flags.options() if option.section == section]
    also = sorted({*NO_EFFECT, *FIXED, *CONVERTED})
    parts.append(f"\nalso read, for Megatron-SWIFT's scripts (docs/flags.md says what each does):\n{_fill(', '.join(also), '  ')}\n")
    return "".join(parts)


def _help_entry(option: flags.Option) -> str:
    facts = [flags.default_text(option)]
    if option.flag.old:
        facts.append(f"formerly {', '.join('--' + old for old in option.flag.old)}")
    if option.flag.inert:
        facts.append(f"no effect: {option.flag.inert}")
    description = flags.as_flags(str(option.info.description))
    text = f"{description} ({'; '.join(fact for fact in facts if fact)})" if any(facts) else description
    return f"  --{option.name} {flags.type_text(option)}\n{_fill(text, '        ')}\n"


def _fill(text: str, indent: str) -> str:
    return textwrap.fill(text, width=120, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
