"""`finetune logs`: which pods of a job are meant, and their output as it comes."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from finetune_operator.lifecycle import Pod
from finetune_operator.page import JobView
from finetune_operator.reading import ClusterError, Reader, has_started

Line = tuple[Pod, str]


def print_logs(reader: Reader, job: JobView, *, attempt: int | None, node_rank: int | None, follow: bool, target: TextIO | None = None) -> None:
    """Print what the trainers of one gang say: of one node, or (None) of all, each line then with its node's rank. Raises ClusterError."""
    target = target or sys.stdout
    pods = choose(job, attempt, node_rank)
    if not follow:
        check_started(pods)
    for pod, line in _together(reader, job.namespace, pods, follow):
        target.write(line if node_rank is not None else f"[{pod.node_rank}] {line}")
        target.flush()


def choose(job: JobView, attempt: int | None, node_rank: int | None) -> list[Pod]:
    """Pods of one gang by node rank: of the newest that there is, and of all its nodes, where neither is given. Raises ClusterError."""
    where = f"{job.namespace}/{job.name}"
    attempts = sorted({pod.attempt for pod in job.pods})
    if not attempts:
        raise ClusterError(f"{where} has no pods (phase {job.status.phase or 'Pending'})")
    if attempt is not None and attempt not in attempts:
        raise ClusterError(
            f"{where} has no pods of attempt {attempt}; there are those of {', '.join(map(str, attempts))} (a gang's pods are deleted before the next)"
        )
    gang = sorted((pod for pod in job.pods if pod.attempt == (attempt or attempts[-1])), key=lambda pod: pod.node_rank)
    chosen = [pod for pod in gang if node_rank in (None, pod.node_rank)]
    if not chosen:
        raise ClusterError(f"{where} has no pod of node rank {node_rank}; there are {', '.join(str(pod.node_rank) for pod in gang)}")
    return chosen


def check_started(pods: Sequence[Pod]) -> None:
    """Raise ClusterError, with the reason, for a pod that has said nothing yet."""
    for pod in pods:
        if not has_started(pod):
            raise ClusterError(f"pod {pod.name} has not started: {pod.message or pod.phase}; -f waits for it")


def lines(pieces: Iterable[bytes]) -> Iterator[str]:
    """Whole lines out of pieces that end anywhere, also amid a character; the last one gets its line feed where it has none."""
    rest = b""
    for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line.decode(errors="replace") + "\n" for line in whole)
    if rest:
        yield rest.decode(errors="replace") + "\n"


def _together(reader: Reader, namespace: str, pods: Sequence[Pod], follow: bool) -> Iterator[Line]:
    """The pods' lines: one pod after the other, or as they come where they are followed."""
    if not follow or len(pods) == 1:
        for pod in pods:
            yield from _read(reader, namespace, pod, follow)
        return
    arrived: queue.Queue[Line | ClusterError | None] = queue.Queue(1024)
    for pod in pods:
        threading.Thread(target=_pass_on, args=(reader, namespace, pod, arrived), daemon=True).start()
    still = len(pods)
    while still:
        item = arrived.get()
        if isinstance(item, ClusterError):
            raise item
        if item is None:
            still -= 1
        else:
            yield item


def _pass_on(reader: Reader, namespace: str, pod: Pod, arrived: queue.Queue[Line | ClusterError | None]) -> None:
    """A thread's work: lines of one pod, and at their end None, or the error that the reader of them raises."""
    end: ClusterError | None = None
    try:
        for line in _read(reader, namespace, pod, follow=True):
            arrived.put(line)
    except ClusterError as error:
        end = error
    finally:
        arrived.put(end)


def _read(reader: Reader, namespace: str, pod: Pod, follow: bool) -> Iterator[Line]:
    if follow and not has_started(pod):
        print(f"finetune: waiting for pod {pod.name}: {pod.message or pod.phase}", file=sys.stderr)
        reader.wait_for_start(namespace, pod)
    for line in lines(reader.log(namespace, pod, follow=follow)):
        yield pod, line
