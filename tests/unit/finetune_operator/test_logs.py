"""Which pods `finetune logs` means, and how pieces of output become lines."""

from __future__ import annotations

import io
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_operator.lifecycle import Pod
from finetune_operator.logs import check_started, choose, lines, print_logs
from finetune_operator.page import JobView
from finetune_operator.reading import ClusterError
from finetune_operator.status import Status


def pod(attempt: int, node_rank: int, **fields: Any) -> Pod:
    return Pod(f"robin-{attempt}-{node_rank}", f"{attempt}{node_rank}", attempt, node_rank, **{"phase": "Running", "started": True, **fields})


def job(*pods: Pod) -> JobView:
    return JobView("team-a", "robin", "7c0e", datetime.now(UTC), {}, Status.model_validate({"phase": "Running"}), pods)


GANGS = job(pod(2, 1), pod(1, 0), pod(2, 0), pod(1, 1))


@pytest.mark.parametrize(
    ("attempt", "node_rank", "names"),
    [
        (None, 0, ["robin-2-0"]),
        (None, 1, ["robin-2-1"]),
        (1, 1, ["robin-1-1"]),
        (None, None, ["robin-2-0", "robin-2-1"]),
        (1, None, ["robin-1-0", "robin-1-1"]),
    ],
)
def test_the_newest_gang_is_meant_unless_another_is_named(attempt: int | None, node_rank: int | None, names: list[str]) -> None:
    assert [each.name for each in choose(GANGS, attempt, node_rank)] == names


@pytest.mark.parametrize(
    ("view", "attempt", "node_rank", "message"),
    [
        (GANGS, 3, 0, "team-a/robin has no pods of attempt 3; there are those of 1, 2"),
        (GANGS, None, 2, "team-a/robin has no pod of node rank 2; there are 0, 1"),
        (job(), None, 0, r"team-a/robin has no pods \(phase Running\)"),
    ],
)
def test_what_is_not_there_is_said_with_what_there_is(view: JobView, attempt: int | None, node_rank: int | None, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        choose(view, attempt, node_rank)


def test_pod_that_has_said_nothing_yet_is_refused_with_the_reason() -> None:
    check_started([pod(1, 0), pod(1, 1, started=False, phase="Failed"), pod(1, 2, started=False, exit_code=1)])
    with pytest.raises(ClusterError, match="pod robin-1-0 has not started: ImagePullBackOff: nowhere; -f waits for it"):
        check_started([pod(1, 0, started=False, phase="Pending", message="ImagePullBackOff: nowhere")])


def test_lines_are_whole_wherever_pieces_end() -> None:
    output = "step 1\n小鹰\nthe end".encode()
    for size in range(1, len(output) + 1):
        pieces = [output[start : start + size] for start in range(0, len(output), size)]
        assert list(lines(pieces)) == ["step 1\n", "小鹰\n", "the end\n"]
    assert list(lines([])) == []
    assert list(lines([b"\xff\n"])) == ["�\n"]


class Said:
    """A cluster whose pods have said this."""

    def __init__(self, **output: str | ClusterError) -> None:
        self.output = output

    def log(self, namespace: str, pod: Pod, *, follow: bool) -> Iterator[bytes]:
        said = self.output[f"node{pod.node_rank}"]
        if isinstance(said, ClusterError):
            raise said
        yield said.encode()


def printed(cluster: Said, **options: Any) -> str:
    target = io.StringIO()
    print_logs(cluster, GANGS, **{"attempt": None, "node_rank": None, "follow": False, **options}, target=target)  # type: ignore[arg-type]
    return target.getvalue()


def test_lines_of_all_nodes_carry_their_node_rank() -> None:
    assert printed(Said(node0="a\nb\n", node1="c\n")) == "[0] a\n[0] b\n[1] c\n"
    assert printed(Said(node0="a\nb\n", node1="c\n"), node_rank=1) == "c\n"


def test_nodes_that_are_followed_together_all_come_to_their_end() -> None:
    shown = printed(Said(node0="a\nb\n", node1="c\n"), follow=True).splitlines()
    assert sorted(shown) == ["[0] a", "[0] b", "[1] c"]
    assert shown.index("[0] a") < shown.index("[0] b")


def test_error_of_a_followed_node_is_raised() -> None:
    with pytest.raises(ClusterError, match=r"pod robin-2-1 is gone"):
        printed(Said(node0="a\n", node1=ClusterError("pod robin-2-1 is gone")), follow=True)
