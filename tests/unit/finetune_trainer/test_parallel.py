"""What a rank reads from its environment, and how long it waits for the master."""

from __future__ import annotations

import socket
import threading
import time

import pytest
import torch

from finetune_trainer.contract import ConfigurationError, DistributedError
from finetune_trainer.parallel import Place, Ranks, current_device, read_place, wait_for_master
from finetune_trainer.ports import find_free_port
from finetune_trainer.shards import Share


def test_without_a_launcher_a_process_is_alone() -> None:
    assert read_place({}) == Place(rank=0, world_size=1, local_rank=0, local_world_size=1, master=None)


def test_the_environment_of_torchrun_is_read() -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "job-0", "MASTER_PORT": "23456"}
    assert read_place(environment) == Place(5, 8, 1, 4, ("job-0", 23456))


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "x"}, r"RANK is 'x'; it must be a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, r"RANK is 2; it must be below WORLD_SIZE \(2\)"),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, r"LOCAL_RANK is 1; it must be below LOCAL_WORLD_SIZE \(1\)"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, r"MASTER_ADDR is not set; with WORLD_SIZE 2 it must name the host of rank 0"),
    ],
)
def test_a_wrong_environment_is_refused_by_the_variable_name(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read_place(environment)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigurationError, match=r"NPROC_PER_NODE is 4; this node shows 2 GPUs \(CUDA_VISIBLE_DEVICES\), so it may be at most 2"):
        current_device(Place(0, 4, 0, 4, ("localhost", 1)))
    assert current_device(Place(1, 2, 1, 2, ("localhost", 1))) == torch.device("cuda", 1)


def test_a_master_that_does_not_answer_is_named_at_the_deadline() -> None:
    port = find_free_port()
    with pytest.raises(DistributedError, match=rf"rank 3 waited \d+ s for the master at MASTER_ADDR 127.0.0.1, MASTER_PORT {port}: .*refused"):
        wait_for_master(Place(3, 4, 3, 4, ("127.0.0.1", port)), time.monotonic() + 0.2)


def test_a_master_whose_name_does_not_resolve_is_named_at_the_deadline() -> None:
    with pytest.raises(DistributedError, match="rank 1 waited .* for the master at MASTER_ADDR no-such-host.invalid, MASTER_PORT 1: "):
        wait_for_master(Place(1, 2, 1, 2, ("no-such-host.invalid", 1)), time.monotonic() + 0.1)


def test_a_master_that_comes_late_is_waited_for() -> None:
    port = find_free_port()
    waiting = threading.Thread(target=wait_for_master, args=(Place(1, 2, 1, 2, ("127.0.0.1", port)), time.monotonic() + 30), daemon=True)
    waiting.start()
    assert waiting.is_alive()
    with socket.create_server(("127.0.0.1", port)):
        waiting.join(30)
    assert not waiting.is_alive()


def test_one_rank_of_each_pipeline_stage_writes() -> None:
    def ranks(tp: int, pp: int, dp: int) -> Ranks:
        return Ranks(0, 8, 0, torch.device("cpu"), Share(tp, 2), Share(pp, 2), Share(dp, 2))

    assert [ranks(*place).is_writer for place in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1))] == [True, True, False, False]
    assert (ranks(0, 0, 0).is_first_stage, ranks(0, 0, 0).is_last_stage) == (True, False)
    assert (ranks(0, 1, 0).is_first_stage, ranks(0, 1, 0).is_last_stage) == (False, True)
