"""Rows that are read beside the imports, by real ranks under a real launcher: one reads for a node, what goes wrong is every rank's error, and nothing is left behind.

The data set is mostly a pipe with a name: it can be read once only, reading it lasts until the test has written it, and opening it for writing waits until it is being read. Most ranks are a
small program that does with its rows what ``__main__`` does, and imports no torch.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from factories import make_rows, make_tiny_model
from finetune_trainer import reading
from finetune_trainer.contract import DataError, ModelError, Reason, RunConfig, exit_for

DEADLINE_SECONDS = 120
LAUNCH = "import os, sys; from pathlib import Path; from finetune_trainer import launch; sys.exit(launch.launch(Path(sys.argv[1]), os.environ, sys.argv[2:] or launch.RANK_PROGRAM))"
RANK = """
import json, os, sys, threading
from pathlib import Path
from finetune_trainer import __main__ as program, launch, reading
from finetune_trainer.data import template
template.SAY_SECONDS = -1
{breaks}
rank, said = launch.current_rank(), []
try:
    config = program.read_config(sys.argv[1:])
    threads = len(os.listdir("/proc/self/task"))
    beside = reading.start(config, launch.place_on_node(), launch.failure_folder())
    own = [int(each) for task in os.listdir("/proc/self/task") for each in open(f"/proc/self/task/{{task}}/children").read().split()]
    os.write(1, (json.dumps(["started", rank, os.getpid(), own, threads]) + "\\n").encode())
    while not Path(os.environ["TEST_FOLDER"], "go").exists():  # as a rank waits for the others in its first collectives
        threading.Event().wait(0.02)
    rows = beside.rows(said.append)
    inodes = [line.split()[4] for line in open("/proc/self/maps") if "memfd:rows" in line]
    os.write(1, (json.dumps(["rows", rank, rows.digest, rows.counts, max(rows.lengths), said, inodes, "torch" in sys.modules]) + "\\n").encode())
except Exception as error:
    program.leave(program.describe(error, rank), None, "")
    program.end(program.describe(error, rank).report.exit_code)
"""


class Started:
    """A launcher, and what its ranks say."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._errors: list[str] = []
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")  # no more will come

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self._errors += list(self.process.stderr)

    def hear(self, word: str) -> list[object]:
        """What a rank says next, by its first word."""
        line = self.lines.get(timeout=DEADLINE_SECONDS)
        assert line, f"the launcher ended: {self.end()}"
        said, *rest = json.loads(line)
        assert said == word
        return list(rest)

    def end(self) -> tuple[int, str]:
        """Exit code and standard error."""
        code = self.process.wait(timeout=DEADLINE_SECONDS)
        for thread in self._threads:
            thread.join(DEADLINE_SECONDS)
        return code, "".join(self._errors)


Start = Callable[..., Started]
Write = Callable[..., list[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe.jsonl")
    return tmp_path / "pipe.jsonl"


@pytest.fixture
def write(tmp_path: Path, model: Path) -> Write:
    """Writes the small program and the run that it reads; returns their command."""

    def write(dataset: Path, breaks: str = "pass") -> list[str]:
        (tmp_path / "rank.py").write_text(RANK.format(breaks=breaks))
        (tmp_path / "run.json").write_text(make_config(tmp_path, model, dataset).dump())
        return [sys.executable, str(tmp_path / "rank.py"), str(tmp_path / "run.json")]

    return write


@pytest.fixture
def start(tmp_path: Path, write: Write) -> Iterator[Start]:
    """Starts a launcher with the small program, or with a rank's own; what a failed test leaves is ended."""
    started: list[Started] = []

    def start(dataset: Path, processes: int, *, small: bool = True, breaks: str = "pass", folder: Path | None = None) -> Started:
        *program, run = write(dataset, breaks)
        environment = {**alone(tmp_path), "NPROC_PER_NODE": str(processes), **({"TMPDIR": str(folder)} if folder else {})}
        started.append(Started([sys.executable, "-c", LAUNCH, run, *(program if small else [])], environment, tmp_path))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


def alone(folder: Path) -> dict[str, str]:
    """The environment of a process that no launcher has started."""
    known = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "FINETUNE_FAILURE_FOLDER")}
    return {**known, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "TEST_FOLDER": str(folder)}


def make_config(folder: Path, model: Path, *dataset: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"source": str(model)},
            "data": {"dataset": [str(each) for each in dataset]},
            "training": {"globalBatchSize": 4, "trainIters": 1},
            "output": {"verification": "Files"},
            "run": {"outputDir": str(folder / "out"), "graceSeconds": 1},
        }
    )


def hear_all(launcher: Started, word: str, processes: int) -> list[list[object]]:
    return sorted((launcher.hear(word) for _ in range(processes)), key=str)


def hear_started(launcher: Started, processes: int) -> tuple[list[int], psutil.Process]:
    """The ranks' process ids, and the process that reads for them; then lets them go on."""
    said = hear_all(launcher, "started", processes)
    readers = [psutil.Process(pid) for _, _, own, _ in said if isinstance(own, list) for pid in own]
    (launcher.folder / "go").touch()  # now: one that ends is reaped
    assert [bool(own) for _, _, own, _ in said] == [True] + [False] * (processes - 1), "the first rank of a node alone has a process that reads"
    assert [threads for *_, threads in said] == [1] * processes, "nothing has started a thread before the fork"
    return [pid for _, pid, _, _ in said if isinstance(pid, int)], readers[0]


def await_reading(pipe: Path) -> int:
    """Return, with the writing end, when the pipe is being read."""
    return os.open(pipe, os.O_WRONLY)


def assert_gone(process: psutil.Process) -> None:
    assert psutil.wait_procs([process], timeout=DEADLINE_SECONDS)[1] == []


def test_all_ranks_of_a_node_map_what_one_process_has_read(start: Start, model: Path, pipe: Path, tmp_path: Path) -> None:
    launcher = start(pipe, 3)
    _, reader = hear_started(launcher, 3)
    rows = make_rows(tmp_path, 1500)
    with open(await_reading(pipe), "wb") as stream:
        stream.write(rows.read_bytes())
    said = hear_all(launcher, "rows", 3)
    assert launcher.end() == (0, "")
    expected = reading.read_rows(make_config(tmp_path, model, rows), lambda line: None)
    assert {json.dumps(each[1:4]) for each in said} == {json.dumps([expected.digest, expected.counts, max(expected.lengths)])}
    assert [each[4] for each in said] == [["tokenized 512 of 1,500 rows", "tokenized 1,024 of 1,500 rows", "tokenized 1,500 of 1,500 rows"], [], []]
    assert len({json.dumps(each[5]) for each in said}) == 1, "the same file in memory"
    assert [each[6] for each in said] == [False] * 3
    assert_gone(reader)


def test_a_rank_without_a_launcher_reads_for_itself(write: Write, tmp_path: Path) -> None:
    """Also one that is not the first of its node."""
    place = {"LOCAL_RANK": "1", "RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    rank = Started(write(make_rows(tmp_path, 5)), {**alone(tmp_path), **place}, tmp_path)
    hear_started(rank, 1)
    assert rank.hear("rows")[2] == {"read": 5, "dropped": 0, "trained": 5}
    assert rank.end() == (0, ""), "not even a word that there is no torch"


def test_a_folder_of_a_long_name_will_do(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    launcher = start(make_rows(tmp_path, 5), 2, folder=folder)
    hear_started(launcher, 2)
    assert len({str(launcher.hear("rows")[1]) for _ in range(2)}) == 1
    assert launcher.end() == (0, "")


def test_an_error_of_the_data_set_is_every_ranks(start: Start, pipe: Path) -> None:
    launcher = start(pipe, 2)
    _, reader = hear_started(launcher, 2)
    with open(await_reading(pipe), "wb") as stream:
        stream.write(b'{"messages": []}\n')
    code, words = launcher.end()
    assert code == exit_for(Reason.DATA).code
    assert words.startswith(f"megatron: {pipe}:1: ")
    assert words.count("\n") == 1, "one sentence, no traceback"
    assert_gone(reader)


@pytest.mark.parametrize(
    ("breaks", "reason", "words"),
    [
        (
            "template.encode.__globals__['_Encoder'] = None",
            Reason.INTERNAL,
            ["'NoneType' object is not callable", "in encode", "EngineError: the rows could not be read: TypeError: "],
        ),
        (
            "from finetune_trainer import data; data.open_rows = lambda *_: [0] * 2**62",
            Reason.OUT_OF_MEMORY,
            ["out of memory: the rows do not fit into the memory"],
        ),
        (
            "from finetune_trainer import data; data.open_rows = lambda *_: os._exit(7)",
            Reason.INTERNAL,
            ["the process that reads the rows ended with exit code 7"],
        ),
    ],
)
def test_anything_else_that_goes_wrong_has_its_reason_and_words(breaks: str, reason: Reason, words: list[str], start: Start, tmp_path: Path) -> None:
    launcher = start(make_rows(tmp_path, 5), 2, breaks=breaks)
    hear_started(launcher, 2)
    code, said = launcher.end()
    assert code == exit_for(reason).code
    assert [each for each in words if each not in said] == []


def test_a_reader_that_is_killed_is_an_error_and_no_hang(start: Start, pipe: Path) -> None:
    launcher = start(pipe, 2)
    _, reader = hear_started(launcher, 2)
    with open(await_reading(pipe), "wb"):
        reader.kill()
        code, words = launcher.end()
    assert code == exit_for(Reason.INTERNAL).code
    assert words.strip().endswith("EngineError: the process that reads the rows was killed by signal SIGKILL; the kernel does so when memory runs out")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_ends_takes_the_reader_along(victim: int, number: signal.Signals, start: Start, pipe: Path) -> None:
    launcher = start(pipe, 2)
    ranks, reader = hear_started(launcher, 2)
    with open(await_reading(pipe), "wb"):
        os.kill(ranks[victim], number)
        assert_gone(reader)
        code, words = launcher.end()
    assert (code, words.startswith(f"megatron: rank {victim} was killed by signal {number.name}")) == (128 + number, True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_rank_without_a_launcher_takes_the_reader_along(number: signal.Signals, write: Write, pipe: Path, tmp_path: Path) -> None:
    rank = Started(write(pipe), alone(tmp_path), tmp_path)
    _, reader = hear_started(rank, 1)
    with open(await_reading(pipe), "wb"):
        rank.process.send_signal(number)
        assert_gone(reader)
    assert rank.end()[0] == -number


def test_a_rank_that_fails_early_leaves_no_reader(model: Path, pipe: Path, tmp_path: Path) -> None:
    """One that was started without a launcher: nobody else would end what it leaves, which would hold its standard error."""
    (tmp_path / "out").write_text("a file where the folder of results should be")
    (tmp_path / "run.json").write_text(make_config(tmp_path, model, pipe).dump())
    command = [sys.executable, "-m", "finetune_trainer", str(tmp_path / "run.json")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=DEADLINE_SECONDS)
    assert (result.returncode, "cannot be written" in result.stderr) == (exit_for(Reason.CONFIGURATION).code, True)
    with pytest.raises(OSError, match="No such device"):  # nobody reads the pipe
        os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)


def test_a_whole_run_reads_once(start: Start, pipe: Path, tmp_path: Path) -> None:
    launcher = start(pipe, 2, small=False)
    with open(await_reading(pipe), "wb") as stream:
        stream.write(make_rows(tmp_path, 20).read_bytes())
    code, words = launcher.end()
    assert (code, words) == (0, "")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["succeeded"], report["rows"]) == (True, {"read": 20, "dropped": 0, "trained": 20})


def test_a_whole_run_ends_with_the_error_of_its_data_set(start: Start, pipe: Path, tmp_path: Path) -> None:
    launcher = start(pipe, 2, small=False)
    with open(await_reading(pipe), "wb") as stream:
        stream.write(b'{"messages": []}\n')
    code, words = launcher.end()
    assert (code, words.startswith(f"megatron: {pipe}:1: ")) == (exit_for(Reason.DATA).code, True)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["failure"]["reason"] == "Data"


# What is read


def test_rows_are_cut_at_what_the_model_reads_where_no_length_is_written(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path / "model", max_position_embeddings=40)
    rows = reading.read_rows(make_config(tmp_path, model, make_rows(tmp_path, 40)), lambda line: None)
    assert 0 < rows.counts["dropped"] < 40
    assert max(rows.lengths) <= 40


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path / "model", vocab_size=300)
    with pytest.raises(ModelError, match="tokenizer and model do not belong together"):
        reading.read_rows(make_config(tmp_path, model, make_rows(tmp_path, 5)), lambda line: None)


def test_a_missing_model_or_data_set_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        reading.read_rows(make_config(tmp_path, tmp_path / "nowhere", tmp_path), lambda line: None)
    with pytest.raises(DataError, match="no such file or folder"):
        reading.read_rows(make_config(tmp_path, model, tmp_path / "nowhere.jsonl"), lambda line: None)
