"""The launcher with real processes; the ranks are small programs, since what a rank does is the launcher's input."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune_trainer import launch
from finetune_trainer.contract import ConfigurationError, FailureReport, Reason, RunConfig, RunReport
from finetune_trainer.launch import Course, Node
from finetune_trainer.watch import News, Watch

PRELUDE = """
import json, os, signal, sys, threading, time
from pathlib import Path
rank = int(os.environ["RANK"])
folder = Path(os.environ["FINETUNE_FAILURE_FOLDER"])
def fail(reason, message, code, trace=""):
    body = {"report": {"reason": reason, "message": message, "rank": rank, "node": "n", "exitCode": code}, "time": time.time(), "trace": trace}
    (folder / f".{rank}").write_text(json.dumps(body))
    (folder / f".{rank}").rename(folder / f"failure-{rank}.json")
    os._exit(code)
def say(word):
    os.write(1, f"{word} {os.getpid()}\\n".encode())  # one write, so that two ranks' lines do not mix
def wait():
    threading.Event().wait()
def other_has_failed(other):
    while not (folder / f"failure-{other}.json").exists():
        threading.Event().wait(0.01)
"""


def make_config(folder: Path, checkpoints: dict[str, bool] | None = None, **run: object) -> RunConfig:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").touch()
    (folder / "rows.jsonl").touch()
    return RunConfig.model_validate(
        {
            "model": {"source": str(folder / "model")},
            "data": {"dataset": [str(folder / "rows.jsonl")]},
            "checkpoints": checkpoints or {},
            "run": {"outputDir": str(folder / "out"), **run},
        }
    )


def make_program(folder: Path, body: str) -> list[str]:
    path = folder / "rank.py"
    path.write_text(PRELUDE + textwrap.dedent(body))
    return [sys.executable, "-S", str(path)]


def launch_here(folder: Path, body: str, processes: int = 2, **run: object) -> int:
    return launch.launch(make_config(folder, **run), {**os.environ, "NPROC_PER_NODE": str(processes)}, make_program(folder, body))


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start_launcher(tmp_path: Path) -> Iterator[Start]:
    """Starts a launcher in a process of its own; what a failed test leaves is ended."""
    started: list[subprocess.Popen[str]] = []

    def start(body: str, processes: int = 2, **run: object) -> subprocess.Popen[str]:
        config = tmp_path / "run.json"
        config.write_text(make_config(tmp_path, **run).dump())
        program = make_program(tmp_path, body)
        code = f"import os, sys; from pathlib import Path; from finetune_trainer import launch; sys.exit(launch.launch(Path({str(config)!r}), os.environ, {program!r}))"
        environment = {**os.environ, "NPROC_PER_NODE": str(processes), "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        started.append(subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher waits for failures of ranks that a busy machine has yet to start; all end by themselves."""
    monkeypatch.setattr(launch, "LINGER_SECONDS", 60.0)


def wait_for_ranks(process: subprocess.Popen[str], count: int = 2) -> list[int]:
    """Process ids of the ranks, once each has said that it runs."""
    assert process.stdout is not None
    return [int(process.stdout.readline().split()[1]) for _ in range(count)]


def read_report(folder: Path) -> RunReport:
    return RunReport.model_validate_json((folder / "out" / "report.json").read_bytes())


def read_failure(folder: Path) -> FailureReport:
    failure = read_report(folder).failure
    assert failure is not None
    return failure


def test_every_rank_gets_its_place_in_the_environment(tmp_path: Path) -> None:
    body = f"""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    Path({str(tmp_path)!r}, f"rank-{{rank}}.json").write_text(json.dumps({{name: os.environ[name] for name in names}}))
    assert Path(sys.argv[1]).is_file()
    """
    environment = {
        **os.environ,
        "PET_NPROC_PER_NODE": "2",
        "PET_NNODES": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "1234",
        "OMP_NUM_THREADS": "3",
    }
    assert launch.launch(make_config(tmp_path), environment, make_program(tmp_path, body)) == 0
    places = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (2, 3)]
    assert [(place["RANK"], place["LOCAL_RANK"]) for place in places] == [("2", "0"), ("3", "1")]
    assert places[0]["WORLD_SIZE"] == "4"
    assert (places[0]["MASTER_ADDR"], places[0]["MASTER_PORT"], places[0]["OMP_NUM_THREADS"]) == ("10.0.0.1", "1234", "3")


def test_threads_are_the_cores_shared_out_and_libraries_keep_still(tmp_path: Path) -> None:
    environments = launch.rank_environments(Node(2, 1, 0, "127.0.0.1", 1), {"TQDM_DISABLE": "0"}, tmp_path)
    assert environments[0]["OMP_NUM_THREADS"] == str(max(1, launch.available_cores() // 2))
    assert environments[0]["TRANSFORMERS_VERBOSITY"] == "error"
    assert environments[0]["TQDM_DISABLE"] == "0"


def test_compiled_kernels_are_kept_beside_the_models_that_jobs_share(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (environment,) = launch.rank_environments(Node(1, 1, 0, "127.0.0.1", 1), {"HF_HOME": f"{tmp_path}/cache/huggingface", "HOME": "/nowhere"}, tmp_path)
    assert environment["TRITON_CACHE_DIR"] == f"{tmp_path}/cache/mcore-finetune/triton"
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == f"{tmp_path}/cache/mcore-finetune/torchinductor"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_for_kernels_that_the_user_names_is_taken(tmp_path: Path) -> None:
    given = {"TRITON_CACHE_DIR": "/fast/triton", "NVTE_TORCH_COMPILE": "1", "HOME": str(tmp_path)}
    (environment,) = launch.rank_environments(Node(1, 1, 0, "127.0.0.1", 1), given, tmp_path)
    assert (environment["TRITON_CACHE_DIR"], environment["NVTE_TORCH_COMPILE"]) == ("/fast/triton", "1")
    assert environment["TORCHINDUCTOR_CACHE_DIR"] == f"{tmp_path}/.cache/mcore-finetune/torchinductor"


@pytest.mark.parametrize("given", [{}, {"HOME": "~"}, {"HF_HOME": "models"}, {"HF_HOME": "/dev/null/huggingface"}, {"XDG_CACHE_HOME": "/dev/null"}])
def test_kernels_are_left_to_the_libraries_where_no_folder_can_be_written(given: dict[str, str]) -> None:
    assert launch.kernel_caches(given) == {}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE is 'two'; it must be a whole number, at least 1"),
        ({"NNODES": "2", "NODE_RANK": "2"}, r"NODE_RANK is 2; it must be below NNODES \(2\)"),
        ({"NNODES": "2"}, "MASTER_ADDR is not set; with NNODES 2 it must name the host of node 0"),
    ],
)
def test_a_wrong_environment_is_refused_by_the_variable(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        launch.read_node(environment)


def test_as_many_processes_as_visible_devices_when_asked_for_auto() -> None:
    assert launch.read_node({"PET_NPROC_PER_NODE": "auto", "CUDA_VISIBLE_DEVICES": "4,5,6"}).num_processes == 3
    assert launch.read_node({}).num_processes == 1


def test_a_wrong_configuration_is_one_sentence_and_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"model": {"source": "x"}, "data": {"dataset": ["y"]}, "run": {"outputDir": "/z"}, "trainin": {}}))
    assert launch.launch(path, {}) == 10
    assert capsys.readouterr().err == f"megatron: {path}: unknown field 'trainin'; did you mean 'training'?\n"


def test_the_error_of_the_rank_that_failed_is_the_gangs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    if rank == 1:
        fail("Data", "rows.jsonl:7: role order", 11)
    wait()
    """
    assert launch_here(tmp_path, body) == 11
    assert capfd.readouterr().err == "megatron: rows.jsonl:7: role order\n"
    report = read_report(tmp_path)
    assert report.failure is not None
    assert (report.succeeded, report.failure.reason, report.failure.rank, report.failure.exit_code) == (False, Reason.DATA, 1, 11)


@pytest.mark.usefixtures("patient")
def test_a_broken_connection_loses_against_the_error_that_broke_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    if rank == 0:
        fail("Distributed", "the connection between the ranks broke", 20)
    other_has_failed(0)
    fail("Numeric", "step 3: the loss is nan", 14)
    """
    assert launch_here(tmp_path, body) == 14
    assert capfd.readouterr().err == "megatron: step 3: the loss is nan\n"


def test_the_first_of_several_own_errors_wins(tmp_path: Path) -> None:
    body = """
    if rank == 1:
        fail("Model", "first", 12)
    other_has_failed(1)
    fail("Data", "second", 11)
    """
    assert launch_here(tmp_path, body) == 12


@pytest.mark.usefixtures("patient")
def test_a_rank_that_is_killed_is_named_with_its_signal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait(0.2)
    fail("Distributed", "the connection between the ranks broke", 20)
    """
    assert launch_here(tmp_path, body) == 128 + signal.SIGKILL
    assert capfd.readouterr().err == "megatron: rank 0 was killed by signal SIGKILL; the kernel does so when memory runs out\n"
    assert read_failure(tmp_path).reason is Reason.INTERNAL


def test_a_rank_that_leaves_no_reason_is_named_with_its_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch_here(tmp_path, "sys.exit(15 if rank == 1 else 0)") == 15
    assert capfd.readouterr().err == "megatron: rank 1 ended with exit code 15 and left no reason\n"
    assert read_failure(tmp_path).reason is Reason.OUT_OF_MEMORY


def test_an_internal_error_prints_its_traceback_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    body = """
    fail("Internal", "KeyError: 'x'", 1, "Traceback (most recent call last):\\n  ...\\nKeyError: 'x'\\n")
    """
    assert launch_here(tmp_path, body) == 1
    assert capfd.readouterr().err == "Traceback (most recent call last):\n  ...\nKeyError: 'x'\n"


def test_the_others_are_dead_soon_after_one_has_failed(tmp_path: Path) -> None:
    body = f"""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path({str(tmp_path)!r}, f"pid-{{rank}}").write_text(str(os.getpid()))
    if rank == 1:
        other = Path({str(tmp_path)!r}, "pid-0")
        while not (other.exists() and other.read_text()):
            threading.Event().wait(0.01)
        fail("Model", "no such model", 12)
    wait()
    """
    assert launch_here(tmp_path, body) == 12
    assert launch.LINGER_SECONDS < 2
    for rank in (0, 1):
        assert not is_alive(int((tmp_path / f"pid-{rank}").read_text()))


def test_what_a_rank_has_started_ends_with_it(tmp_path: Path) -> None:
    body = f"""
    import subprocess
    child = subprocess.Popen(["sleep", "1000"])
    Path({str(tmp_path)!r}, "child").write_text(str(child.pid))
    os._exit(0)
    """
    assert launch_here(tmp_path, body, processes=1) == 0
    assert wait_until_gone(int((tmp_path / "child").read_text()))


CHECKPOINTING = """
# Not a handler that sets an event: one that comes while wait() holds the event's lock would wait for that lock for ever.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
say("ready")
signal.sigwait({signal.SIGTERM})
(Path(os.environ["OUT"]) / f"checkpoint-{rank}").write_text("")
fail("Preempted", "saved step 3", 143)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_ranks_save_and_ends_as_preempted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start_launcher: Start, number: signal.Signals
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    process = start_launcher(CHECKPOINTING)
    wait_for_ranks(process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, "megatron: saved step 3\n")
    assert (tmp_path / "checkpoint-0").exists()
    assert (tmp_path / "checkpoint-1").exists()
    assert read_failure(tmp_path).reason is Reason.PREEMPTED


SAVING = """
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
out = Path(os.environ["OUT"])
(out / "ready").touch()
signal.sigwait({signal.SIGTERM})
while not (out / "go").exists():
    threading.Event().wait(0.01)
os._exit(143)
"""


@pytest.mark.parametrize(
    ("events", "has_saved"),
    [
        ([News.STOP, 10.0], True),
        ([10.0, News.STOP], True),
        ([News.STOP, News.STOP, 10.0, News.STOP], True),
        ([10.0, 10.0 + launch.REPEAT_SECONDS], True),
        ([News.STOP, 10.0, 10.1, 10.2], True),
        ([10.0, 10.1 + launch.REPEAT_SECONDS], False),
        ([News.STOP, 10.0, 20.0], False),
        ([News.STOP, News.END], False),
        ([10.0, News.END], False),
    ],
)
def test_only_a_second_signal_of_its_own_or_a_failed_gang_keeps_a_node_from_saving(events: list[News | float], has_saved: bool, tmp_path: Path) -> None:
    """A cluster asks the pods of a gang one after the other, so that another node's word often comes before a node's own signal."""
    course = Course(grace_seconds=600)
    environment = {**os.environ, "RANK": "0", "OUT": str(tmp_path), launch.FAILURE_FOLDER: str(tmp_path)}
    course.ranks.append(launch._start(make_program(tmp_path, SAVING), environment))
    while not (tmp_path / "ready").exists():
        assert course.ranks[0].process.poll() is None
        threading.Event().wait(0.01)
    for event in events:
        course.events.put(event)
    if has_saved:
        (tmp_path / "go").touch()
    launch._follow(course, Watch())
    launch._end(course.ranks)
    assert course.ranks[0].process.returncode == (143 if has_saved else -signal.SIGKILL)


DEAF = 'signal.signal(signal.SIGTERM, lambda *_: say("asked"))\nsay("ready")\nwhile True: threading.Event().wait()\n'


def test_ranks_that_do_not_end_in_time_are_killed_and_the_run_counts_as_preempted(start_launcher: Start) -> None:
    process = start_launcher(DEAF, graceSeconds=1)
    pids = wait_for_ranks(process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "killed before it had ended by itself (graceSeconds is 1); with resume auto it goes on from its newest checkpoint, if it has one" in errors
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.parametrize(
    ("checkpoints", "onward"),
    [
        ({}, "with resume auto it goes on from its newest checkpoint, if it has one"),
        ({"noSaveOptim": True}, "noSaveOptim leaves the optimizer's state out of checkpoints, so it begins anew"),
    ],
    ids=["resumable", "no-save-optim"],
)
def test_ranks_that_are_not_in_training_end_at_once_and_the_run_counts_as_preempted(
    tmp_path: Path, start_launcher: Start, checkpoints: dict[str, bool], onward: str
) -> None:
    process = start_launcher('say("ready")\nwait()\n', graceSeconds=600, checkpoints=checkpoints)
    wait_for_ranks(process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (143, f"megatron: the run was asked to stop when no training was under way; {onward}\n")
    assert read_failure(tmp_path).reason is Reason.PREEMPTED


def test_a_connection_that_a_stopped_rank_broke_is_no_failure_of_the_run(start_launcher: Start) -> None:
    body = """
    if rank == 1:
        def broken(*_):
            fail("Distributed", "the connection between the ranks broke", 20)
        signal.signal(signal.SIGTERM, broken)
    say("ready")
    wait()
    """
    process = start_launcher(body, graceSeconds=600)
    wait_for_ranks(process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "when no training was under way" in errors


def test_a_sigterm_that_nobody_asked_for_is_a_failure(tmp_path: Path) -> None:
    launch_here(tmp_path, "os.kill(os.getpid(), signal.SIGTERM)", processes=1)
    assert read_failure(tmp_path).reason is Reason.INTERNAL


@pytest.mark.parametrize(
    ("section", "code", "message"),
    [
        ({"model": {"source": "/no/model"}}, 12, "model.source: there is no folder /no/model"),
        ({"model": {"source": "{folder}"}}, 12, "model.source: {folder} is not a Hugging Face model folder: it has no config.json"),
        ({"model": {"source": "{folder}/rows.jsonl"}}, 12, "model.source: {folder}/rows.jsonl is a file; it must be a Hugging Face model folder or a hub id"),
        ({"data": {"dataset": ["{folder}/rows.jsonl", "/no/rows.jsonl#5"]}}, 11, "data.dataset: /no/rows.jsonl: no such file or folder"),
    ],
    ids=["no-folder", "no-config", "a-file", "no-data"],
)
def test_missing_inputs_are_refused_before_a_rank_is_started(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], section: dict[str, object], code: int, message: str
) -> None:
    written = json.loads(make_config(tmp_path).dump())
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**written, **section}).replace("{folder}", str(tmp_path)))
    assert launch.launch(path, os.environ, make_program(tmp_path, f"Path({str(tmp_path)!r}, 'started').touch()")) == code
    assert capfd.readouterr().err == f"megatron: {message.replace('{folder}', str(tmp_path))}\n"
    assert not (tmp_path / "started").exists()


def test_a_second_signal_kills_the_ranks_at_once(start_launcher: Start) -> None:
    process = start_launcher(DEAF, graceSeconds=600)
    wait_for_ranks(process)
    assert process.stdout is not None
    process.send_signal(signal.SIGINT)
    assert {process.stdout.readline().split()[0] for _ in range(2)} == {"asked"}
    time.sleep(launch.REPEAT_SECONDS + 0.2)  # so soon it would be the same request
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 143


def test_why_a_run_failed_is_told_to_kubernetes_where_the_folder_of_results_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = make_config(tmp_path, outputDir=str(tmp_path / "file" / "out"), terminationMessagePath=str(tmp_path / "termination"))
    body = 'fail("Configuration", "run.outputDir cannot be written", 10)'
    assert launch.launch(config, {**os.environ, "NPROC_PER_NODE": "1"}, make_program(tmp_path, body)) == 10
    failure = json.loads((tmp_path / "termination").read_text())["failure"]
    assert (failure["reason"], failure["message"]) == ("Configuration", "run.outputDir cannot be written")


def test_a_launcher_whose_words_nobody_reads_ends_as_any_other(start_launcher: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    process = start_launcher(CHECKPOINTING)
    wait_for_ranks(process)
    assert process.stderr is not None
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 143
    assert read_failure(tmp_path).reason is Reason.PREEMPTED


def test_ranks_do_not_outlive_a_launcher_that_is_killed(start_launcher: Start) -> None:
    process = start_launcher(DEAF)
    pids = wait_for_ranks(process)
    process.kill()
    process.wait()
    assert all(wait_until_gone(pid) for pid in pids)


@pytest.mark.usefixtures("patient")
def test_a_consequence_written_by_rank_0_gives_way_to_the_cause_in_the_report(tmp_path: Path) -> None:
    body = """
    import datetime
    out = Path(json.loads(Path(sys.argv[1]).read_text())["run"]["outputDir"])
    if rank == 0:
        out.mkdir(parents=True)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat()
        failure = {"reason": "Distributed", "message": "broke", "rank": 0, "node": "n", "exitCode": 20}
        point = {"step": 1, "loss": 2.0, "learningRate": 0.1, "gradientNorm": 1.0, "tokens": 5, "seconds": 1.0}
        (out / "report.json").write_text(json.dumps({"name": "run", "namespace": "default", "uid": "", "attempt": 1, "identity": "0", "succeeded": False,
            "failure": failure, "startTime": now, "completionTime": now, "curve": [point]}))
        fail("Distributed", "broke", 20)
    other_has_failed(0)
    fail("OutOfMemory", "out of memory", 15)
    """
    assert launch_here(tmp_path, body) == 15
    report = read_report(tmp_path)
    assert report.failure is not None
    assert (report.failure.reason, report.failure.rank) == (Reason.OUT_OF_MEMORY, 1)
    assert len(report.curve) == 1


def test_the_termination_message_is_written_on_every_node(tmp_path: Path) -> None:
    message = tmp_path / "termination"
    environment = {**os.environ, "NPROC_PER_NODE": "1", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    config = make_config(tmp_path, terminationMessagePath=str(message))
    assert launch.launch(config, environment, make_program(tmp_path, 'fail("Model", "no such model", 12)')) == 12
    assert json.loads(message.read_text())["failure"]["reason"] == "Model"
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.fixture
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(launch, "DEVICE_FOLDER", tmp_path)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("visible", "processes", "shown"),
    [
        (None, 5, "4 GPUs, so it may be at most 4"),
        ("0,1", 3, "2 GPUs (CUDA_VISIBLE_DEVICES is '0,1'), so it may be at most 2"),
        ("3", 2, "1 GPU (CUDA_VISIBLE_DEVICES is '3'), so it may be at most 1"),
        ("GPU-aa, MIG-bb", 3, "2 GPUs (CUDA_VISIBLE_DEVICES is 'GPU-aa, MIG-bb'), so it may be at most 2"),
        ("0,7,1", 2, "1 GPU (CUDA_VISIBLE_DEVICES is '0,7,1'), so it may be at most 1"),
    ],
)
def test_more_processes_than_visible_gpus_are_refused_before_a_rank_is_started(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], visible: str | None, processes: int, shown: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | {"NPROC_PER_NODE": str(processes)}
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    assert launch.launch(make_config(tmp_path), environment, make_program(tmp_path, f"Path({str(tmp_path)!r}, 'started').touch()")) == 10
    sentence = f"NPROC_PER_NODE is {processes}; this node shows {shown}; an empty CUDA_VISIBLE_DEVICES runs the processes on the CPU"
    assert capfd.readouterr().err == f"megatron: {sentence}\n"
    assert not (tmp_path / "started").exists()
    failure = read_failure(tmp_path)
    assert (failure.reason, failure.message, failure.rank) == (Reason.CONFIGURATION, sentence, None)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(("visible", "processes"), [(None, 4), ("", 8), ("-1", 8), ("3,2", 2)])
def test_processes_that_have_a_gpu_each_or_run_on_the_cpu_are_started(visible: str | None, processes: int) -> None:
    launch.check_devices(Node(processes, 1, 0, "127.0.0.1", 1), {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})


def test_a_machine_without_gpus_runs_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "DEVICE_FOLDER", tmp_path)
    launch.check_devices(Node(8, 1, 0, "127.0.0.1", 1), {"CUDA_VISIBLE_DEVICES": "0"})


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int, seconds: float = 20.0) -> bool:
    """Whether a process that is not our child ends in time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    deadline = time.monotonic() + seconds
    try:
        ready, _, _ = select.select([descriptor], [], [], deadline - time.monotonic())
        return bool(ready)
    finally:
        os.close(descriptor)
