"""The command line `finetune` (also `kubectl finetune`). What a verb needs is imported when it runs, so that --help is quick."""

from __future__ import annotations

import argparse
import os
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
    except BrokenPipeError:  # who read the output has seen enough: `finetune logs NAME | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


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
    render = verbs.add_parser(
        "render",
        help="print the Kubernetes objects that the operator would make",
        description="Print the Service, the claim and the pods of the first gang of every FineTuneJob in a file, without a cluster. They differ from the operator's in the job's uid "
        f"({names.PLACEHOLDER_UID} here; its first 8 characters are in the path of the results) and in what its settings say.",
    )
    render.add_argument("-f", "--filename", type=Path, required=True, metavar="FILE", help="YAML or JSON file with FineTuneJobs; - is standard input")
    render.add_argument("--trainer-image", metavar="IMAGE", help="the operator's setting trainerImage, for jobs that name no image")
    render.add_argument("--work-claim", metavar="CLAIM", help="the operator's setting workClaim, for jobs that name no work volume")
    render.set_defaults(verb=_render)
    _add_status(verbs)
    _add_logs(verbs)
    return parser


def _add_status(verbs: Any) -> None:
    status = verbs.add_parser(
        "status",
        help="show jobs of a cluster",
        description="Show the FineTuneJobs of a namespace, or all about one of them: progress, pods, restarts, results, and what to do when it has failed.",
    )
    status.add_argument("name", nargs="?", metavar="NAME", help="a FineTuneJob; absent: a table of all")
    _add_cluster(status)
    status.add_argument("-A", "--all-namespaces", action="store_true", help="the table of every namespace's jobs")
    status.add_argument("-w", "--watch", action="store_true", help="show it anew whenever it changes; one job until it has ended")
    status.set_defaults(verb=_status)


def _add_logs(verbs: Any) -> None:
    logs = verbs.add_parser(
        "logs", help="print what a job's trainers say", description="Print the output of a gang's launchers and ranks, one pod for each node."
    )
    logs.add_argument("name", metavar="NAME", help="a FineTuneJob")
    _add_cluster(logs)
    nodes = logs.add_mutually_exclusive_group()
    nodes.add_argument("--node-rank", type=_natural, default=0, metavar="N", help="node of the gang, from 0 (default: 0, which logs the steps)")
    nodes.add_argument("--all", action="store_true", help="all nodes, each line after its node rank")
    logs.add_argument("-f", "--follow", action="store_true", help="wait for the pods, and go on until they end")
    logs.add_argument("--attempt", type=_natural, metavar="N", help="number of the gang (default: the newest)")
    logs.set_defaults(verb=_logs)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--namespace", metavar="NAMESPACE", help="namespace (default: the kubeconfig's)")
    parser.add_argument("--kubeconfig", type=Path, metavar="FILE", help="kubeconfig (default: KUBECONFIG, else ~/.kube/config, else the pod's own account)")
    parser.add_argument("--context", metavar="NAME", help="context of the kubeconfig (default: its current one)")


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


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"it must be a whole number from 0 (found {text})")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    from finetune_operator import job_file, local

    return local.run_job(job_file.load(options.filename), options.work, options.resume)


def _plan(options: argparse.Namespace) -> int:
    from finetune_operator import job_file, local

    print(local.describe_job(job_file.load(options.filename), options.work, options.gpu_memory), end="")
    return 0


def _render(options: argparse.Namespace) -> int:
    from finetune_operator import job_file, render
    from finetune_operator.settings import Settings

    settings = Settings(trainer_image=options.trainer_image, work_claim=options.work_claim)
    print(render.render(job_file.load_all(options.filename), settings), end="")
    return 0


def _status(options: argparse.Namespace) -> int:
    from finetune_operator import reading, watching
    from finetune_trainer.contract import ConfigurationError

    if options.all_namespaces and (options.name or options.namespace):
        raise ConfigurationError("--all-namespaces (-A) is for the table of every namespace; leave NAME and --namespace out")
    reader = reading.Reader(options.kubeconfig, options.context)
    namespace = options.namespace or reader.namespace
    if options.name:
        watching.show_job(reader, namespace, options.name, watch=options.watch)
    else:
        watching.show_jobs(reader, None if options.all_namespaces else namespace, watch=options.watch)
    return 0


def _logs(options: argparse.Namespace) -> int:
    from finetune_operator import logs, reading

    reader = reading.Reader(options.kubeconfig, options.context)
    job, _ = reader.job(options.namespace or reader.namespace, options.name)
    logs.print_logs(reader, job, attempt=options.attempt, node_rank=None if options.all else options.node_rank, follow=options.follow)
    return 0


if __name__ == "__main__":
    sys.exit(main())
