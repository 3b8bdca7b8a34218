"""The command line `finetune` (also `kubectl finetune`). What a verb needs is imported when it runs, so that --help is quick."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from finetune_operator import names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; what is refused is said on standard error, without a traceback."""
    options = _parser().parse_args(arguments)
    from finetune_trainer.contract import EngineError, exit_for

    try:
        return int(options.verb(options))
    except EngineError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return exit_for(error.reason).code
    except KeyboardInterrupt:
        print("finetune: interrupted", file=sys.stderr)
        return 130


class _Parser(argparse.ArgumentParser):
    """argparse with whole names only, the nearest of them for one that is unknown, and the exit code of bad input."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses unknown flags before anything else: one that is misspelt is the reason why another is missing."""
        flags = [word.split("=")[0] for word in (sys.argv[1:] if args is None else args) if word.startswith("--")]
        unknown = next((flag for flag in flags if flag not in self._option_string_actions), None)
        if unknown is not None and self._subparsers is None:
            self.error(f"unknown flag {unknown}{self._nearest(unknown, list(self._option_string_actions))}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        from finetune_trainer.contract import Reason, exit_for

        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)$", message)
        if choice:
            known = [name.strip("' ") for name in choice[2].split(",")]  # in quotes in older Pythons only
            message = f"{message[: choice.start(2)]}{', '.join(known)}){self._nearest(choice[1], known)}"
        print(f"{self.prog}: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(exit_for(Reason.CONFIGURATION).code)

    @staticmethod
    def _nearest(name: str, known: list[str]) -> str:
        from finetune_trainer.contract import nearest

        return nearest(name, known)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="finetune", description="Fine-tuning jobs on Megatron-core: one FineTuneJob file in, a verified adapter or model out.")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    run = verbs.add_parser(
        "run", help="run a FineTuneJob on this machine, without a cluster", description="Run a FineTuneJob on this machine: local processes in place of pods."
    )
    _add_file(run)
    run.add_argument(
        "--resume",
        choices=("auto", "never"),
        help="auto: continue the newest unfinished run of this name with the same model, data, tuning and training; never: start anew (default: checkpoints.resume of the file)",
    )
    run.set_defaults(verb=_run)
    plan = verbs.add_parser("plan", help="print what would run", description="Print what a FineTuneJob would run, and what is chosen where it is silent.")
    _add_file(plan)
    plan.add_argument("--gpu-memory", type=_positive, metavar="GiB", help="memory of a GPU, to plan for a machine that is elsewhere")
    plan.set_defaults(verb=_plan)
    return parser


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--filename", type=Path, required=True, metavar="FILE", help="YAML or JSON file with one FineTuneJob; - is standard input")
    parser.add_argument("--work", type=Path, default=names.DEFAULT_WORK, metavar="DIR", help="folder of all results (default: ./runs)")


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"it must be a number above 0 (found {text})") from error
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"it must be above 0 (found {text})")
    return value


def _run(options: argparse.Namespace) -> int:
    from finetune_operator import job_file, local

    return local.run_job(job_file.load(options.filename), options.work, options.resume)


def _plan(options: argparse.Namespace) -> int:
    from finetune_operator import job_file, local

    print(local.describe_job(job_file.load(options.filename), options.work, options.gpu_memory), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
