"""Write docs/flags.md out of the contract and the tables of Megatron-SWIFT's flags; `--check` says whether it is fresh."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from finetune_trainer import flags
from finetune_trainer.contract import EXITS
from finetune_trainer.swift_flags import CONVERTED, FIXED, NO_EFFECT, REFUSED

DOCS = Path(__file__).parents[2] / "docs"
INTRODUCTION = """<!-- Made by `make generate` out of the contract; do not edit. -->
# Flags of `megatron sft`

The names, defaults and older spellings are Megatron-SWIFT's. `--name value` and `--name=value` mean the same, and so do `--some_name`
and `--some-name`; a list is written `--dataset a b` or by repeating the flag; a bare boolean flag is `true`, and `--no_name` is `false`
for what is on by default. Abbreviations are not understood. Flags may come first from a file: `megatron sft run.yaml --lr 1e-4`.

Absent means that the engine chooses, by the model and the machine; what it chose is in `report.json` under `resolved`. What differs from
Megatron-SWIFT when absent: `micro_batch_size` and `recompute_granularity` (chosen by memory), `ddp_timeout` (600 seconds), the formats of
the result (LoRA: the PEFT adapter alone, not merged), parallel sizes (chosen by memory). In a FineTuneJob, `tunerType` is `lora` and
`resume` is `auto` where absent; on this command line they are `full` and `never`, as in Megatron-SWIFT.

An existing path is a path; anything else is an id. Results are below `output_dir` in `vN-<date>-<time>/`.
"""


def render() -> str:
    """The text of docs/flags.md."""
    parts = [INTRODUCTION]
    for section, model in flags.SECTIONS.items():
        parts.append(f"\n## {section}\n\n{str(model.__doc__).strip()}\n\n")
        parts.append(_table(("Flag", "In a FineTuneJob", "Value", "Default", "Bounds", "Meaning"), [_row(o) for o in flags.options() if o.section == section]))
    parts.append("\n## Older flags with another value\n\n")
    parts.append(_table(("Flag", "Value", "Example"), [(f"`--{name}`", rule.meaning, _example(name)) for name, rule in CONVERTED.items()]))
    parts.append("\n## Flags of Megatron-SWIFT without effect here\n\nAccepted, and named in one line when a command has them.\n\n")
    parts.append(_table(("Flags", "Why"), _by_reason(NO_EFFECT)))
    parts.append("\n## Flags of Megatron-SWIFT with one value\n\nAccepted with this value; any other is refused.\n\n")
    fixed = {name: f"{' or '.join(f'`{text}`' for text in rule.accepted)} | {rule.refusal}" for name, rule in FIXED.items()}
    parts.append(_table(("Flags", "Value", "Any other"), _by_reason(fixed)))
    parts.append("\n## Flags of Megatron-SWIFT that are refused\n\n")
    parts.append(_table(("Flags", "Why"), _by_reason(REFUSED)))
    parts.append("\n## Exit codes\n\nThe launcher's is that of the process that failed first. 0 is success.\n\n")
    parts.append(_table(("Code", "Reason", "In a cluster"), [(str(row.code), row.reason.value, row.consequence.value) for row in EXITS]))
    return "".join(parts)


def _row(option: flags.Option) -> tuple[str, ...]:
    names = f"`--{option.name}`"
    if option.flag.old:
        names += f"<br>formerly {', '.join(f'`--{old}`' for old in option.flag.old)}"
    meaning = flags.as_flags(str(option.info.description))
    if option.flag.inert:
        meaning += f" No effect: {option.flag.inert}."
    value = flags.type_text(option).replace("|", " \\| ")
    default = flags.default_text(option).removeprefix("default ")
    return names, f"`{option.api}`" if option.api else "", value, default, flags.bounds_text(option), meaning


def _example(name: str) -> str:
    text = "10" if "minutes" in name else "true"
    target = CONVERTED[name].convert(text)
    assert target is not None, "every row of CONVERTED changes something with its example"
    return f"`--{name} {text}` is `--{target[0]} {target[1]}`"


def _by_reason(reasons: dict[str, str]) -> list[tuple[str, ...]]:
    """One row per reason, with the flags that share it; further cells stand in the reason after `|`."""
    grouped: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        grouped.setdefault(reason, []).append(name)
    return [(", ".join(f"`--{name}`" for name in names), *reason.split(" | ")) for reason, names in grouped.items()]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: Sequence[str] | None = None, folder: Path = DOCS) -> int:
    """Write the file, or with `--check` compare it and print the difference; 1 when it is stale."""
    arguments = sys.argv[1:] if argv is None else argv
    file = folder / "flags.md"
    text = render()
    if "--check" not in arguments:
        folder.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return 0
    old = file.read_text(encoding="utf-8") if file.exists() else ""
    difference = "".join(difflib.unified_diff(old.splitlines(True), text.splitlines(True), str(file), "generated"))
    if difference:
        sys.stderr.write(f"{difference}\n{file} is stale: make generate\n")
    return int(bool(difference))


if __name__ == "__main__":
    sys.exit(main())
