"""Jobs in flight: each follows a script of what happens to its gangs, one line a gang, whatever happens to the operator meanwhile."""

from __future__ import annotations

import http.client
import itertools
import json
import random
import socket
import ssl
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from finetune_operator import names
from finetune_trainer.contract import Reason
from kube_api import ApiError
from operator_jobs import Team, progress, told_failure

Json = dict[str, Any]
TURN_SECONDS = 0.05
HELD_SHARE = 0.3
"""Of the pods, those that take their time to end."""
EVICTED = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "", "lastTransitionTime": None}


@dataclass(frozen=True)
class Script:
    """What happens to each gang of a job in turn, and what must have become of the job in the end."""

    gangs: tuple[str, ...]
    end: str
    """Reason of the condition Succeeded or Failed."""
    restarts: int = 0
    counted: int = 0
    sections: Json = field(default_factory=dict)


SCRIPTS = {
    "good": Script(("succeed",), "Succeeded"),
    "once": Script(("fail", "succeed"), "Succeeded", 1, 1),
    "often": Script(("fail", "delete", "evict", "succeed"), "Succeeded", 3, 2),
    "lost": Script(("delete", "fail"), "BackoffLimitExceeded", 1, 1, {"runPolicy": {"backoffLimit": 1}}),
    "wrong": Script(("fail", "refuse"), "Configuration", 1, 1),
    "paused": Script(("suspend", "fail", "suspend", "succeed"), "Succeeded", 1, 1),
    "asleep": Script(("succeed",), "Succeeded", sections={"suspend": True}),
}


class PodHistory:
    """Every pod of a namespace that was made and that went, in the order of the API server's own history."""

    def __init__(self, team: Team) -> None:
        self.count = 0
        """Of all changes that were told."""
        self.made: Counter[tuple[str, int, int]] = Counter()
        """By job, attempt and node rank."""
        self.mixed: list[str] = []
        """Pods that were made while a pod of another gang of their job was there."""
        self._alive: dict[str, set[tuple[int, int]]] = {}
        self._connection = self._connect(team)
        self._thread = threading.Thread(target=self._follow, args=(self._connection.getresponse(),), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the watch, by its connection: the API server would keep it for an hour."""
        self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._connection.close()

    def _connect(self, team: Team) -> http.client.HTTPSConnection:
        authority = team.api.authority
        context = ssl.create_default_context(cafile=authority.certificate)
        context.load_cert_chain(authority.folder / "admin.crt", authority.key("admin"))
        version = team.api.get(team.path("pods"))["metadata"]["resourceVersion"]
        connection = http.client.HTTPSConnection(team.api.server.removeprefix("https://"), context=context)
        connection.request("GET", f"{team.path('pods')}?watch=1&timeoutSeconds=3600&resourceVersion={version}")
        return connection

    def _follow(self, stream: http.client.HTTPResponse) -> None:
        for line in stream:
            event = json.loads(line)
            self._note(event["type"], event["object"]["metadata"])
            self.count += 1

    def _note(self, kind: str, metadata: Json) -> None:
        labels = metadata["labels"]
        job, place = labels[names.JOB_LABEL], (int(labels[names.ATTEMPT_LABEL]), int(labels[names.NODE_LABEL]))
        alive = self._alive.setdefault(job, set())
        if kind == "ADDED":
            self.made[job, *place] += 1
            self.mixed += [f"{metadata['name']} while gang {attempt} was there" for attempt, _ in alive if attempt != place[0]]
            alive.add(place)
        elif kind == "DELETED":
            alive.discard(place)


class Traffic:
    """Kubelets, trainers and users of one namespace, in one thread of their own."""

    def __init__(self, team: Team, jobs_in_flight: int, seed: int) -> None:
        self.team, self.jobs_in_flight = team, jobs_in_flight
        self.random = random.Random(seed)
        self.scripts: dict[str, Script] = {}
        self.no_more = threading.Event()
        """Set: no new jobs; the thread ends when those that are there have ended."""
        self.stopped = threading.Event()
        """Set: the thread ends at once."""
        self._kinds = itertools.cycle(SCRIPTS)
        self._acted: set[tuple[str, int]] = set()
        self._running: set[str] = set()

    def follow_scripts(self) -> None:
        """Until there are no more jobs. Raises ApiError."""
        while not self.stopped.wait(TURN_SECONDS):
            jobs = {job["metadata"]["name"]: job for job in self.team.all(names.PLURAL)}
            open_jobs = [name for name in self.scripts if not ended(jobs[name])]
            if self.no_more.is_set() and not open_jobs:
                return
            pods = self.team.all("pods")
            for name in open_jobs:
                self._look(jobs[name], [pod for pod in pods if pod["metadata"]["labels"][names.JOB_LABEL] == name])
            if not self.no_more.is_set() and len(open_jobs) < self.jobs_in_flight:
                self._add()

    def _add(self) -> None:
        kind = next(self._kinds)
        name = f"{kind}-{len(self.scripts)}"
        self.scripts[name] = SCRIPTS[kind]
        self.team.create(name, **SCRIPTS[kind].sections)

    def _look(self, job: Json, pods: list[Json]) -> None:
        """Each pod's kubelet, then what the script says about the gang, then the user."""
        for pod in pods:
            if "deletionTimestamp" in pod["metadata"]:
                self.team.release(pod)
            elif pod["metadata"]["uid"] not in self._running:
                self._run(pod)
        status = job.get("status", {})
        attempt = status.get("attempt", 0)
        name = job["metadata"]["name"]
        gang = [pod for pod in pods if pod["metadata"]["labels"][names.ATTEMPT_LABEL] == str(attempt)]
        whole = len(gang) == 2 and all(pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"] for pod in gang)
        if whole and (name, attempt) not in self._acted:
            self._acted.add((name, attempt))
            self._act(name, self.scripts[name].gangs[attempt - 1], sorted(gang, key=lambda pod: str(pod["metadata"]["name"])))
        elif job["spec"]["suspend"] and not pods and condition(job, "Suspended").get("status") == "True":
            self.team.set_spec(name, suspend=False)

    def _run(self, pod: Json) -> None:
        try:
            if self.random.random() < HELD_SHARE:
                self.team.hold(pod)
            self.team.run([pod], progress())
            self._running.add(pod["metadata"]["uid"])
        except ApiError as error:
            if error.status not in (404, 409, 422):  # it has gone meanwhile, or is being deleted and takes no finalizer any more
                raise

    def _act(self, name: str, action: str, gang: list[Json]) -> None:
        pod = self.random.choice(gang)
        if action == "succeed":
            self.team.succeed(gang)
        elif action == "fail":
            self.team.end(pod, 1)
        elif action == "refuse":
            self.team.end(pod, 10, told_failure(Reason.CONFIGURATION, "training.lr is 0"))
        elif action == "evict":
            self.team.end(pod, 143, conditions=[EVICTED])
        elif action == "delete":
            self.team.delete_pod(pod)
        else:
            self.team.set_spec(name, suspend=True)


def condition(job: Json, kind: str) -> Json:
    found: list[Json] = job.get("status", {}).get("conditions", [])
    return next((each for each in found if each["type"] == kind), {})


def ended(job: Json) -> bool:
    return any(condition(job, kind).get("status") == "True" for kind in ("Succeeded", "Failed"))
