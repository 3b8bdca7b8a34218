"""FineTuneJobs in a namespace of their own, and their pods, which go through their phases as the test says: there is no kubelet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_operator import names
from finetune_trainer.contract import Artifact, FailureReport, Progress, Reason, RunReport, Verification, exit_for
from kube_api import ApiError, ApiServer
from kube_processes import KubeError, until
from operator_process import Trainers

Json = dict[str, Any]
WAIT_SECONDS = 30.0
ARTIFACT = Artifact(format="peft", path="/work/team/job/0123abcd/peft", sha256="ab" * 32)
VERIFIED = Verification(level="Adapter", passed=True, max_logit_difference=1.1e-6)


def ago(seconds: float) -> str:
    """A moment in the past as Kubernetes writes it."""
    return (datetime.now(UTC) - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def progress(stage: str = "training", step: int = 0, heartbeat_age: float = 0.0, **fields: Any) -> str:
    """An answer of /progress."""
    heartbeat = datetime.now(UTC) - timedelta(seconds=heartbeat_age)
    return Progress(stage=stage, last_heartbeat_time=heartbeat, **fields).at(step, 20).model_dump_json(by_alias=True)


def told_success(**fields: Any) -> str:
    """The termination message of a trainer that succeeded."""
    return _report(succeeded=True, artifacts=[ARTIFACT], verification=VERIFIED, resolved={"training.lr": 1e-4}, **fields)


def told_failure(reason: Reason, message: str, rank: int = 3) -> str:
    """The termination message of a trainer that failed."""
    failure = FailureReport(reason=reason, message=message, rank=rank, exit_code=exit_for(reason).code)
    return _report(succeeded=False, failure=failure)


def _report(**fields: Any) -> str:
    now = datetime.now(UTC)
    return RunReport(name="job", namespace="team", uid="u", attempt=1, identity="i", start_time=now, completion_time=now, **fields).summary()


def _merged(ours: Json, theirs: Json) -> Json:
    both = {key: _merged(ours[key], value) if isinstance(value, dict) and isinstance(ours.get(key), dict) else value for key, value in theirs.items()}
    return {**ours, **both}


@dataclass(frozen=True)
class Team:
    """One namespace and what is in it."""

    api: ApiServer
    namespace: str
    trainers: Trainers

    # Jobs.

    def create(self, name: str = "job", **sections: Any) -> Json:
        """A job of two nodes on the CPU; ``sections`` are merged into its spec."""
        spec: Json = {
            "model": {"source": "org/model"},
            "data": {"dataset": ["org/rows"]},
            "nodes": {"count": 2, "accelerator": {"type": "CPU"}},
            "volumes": {"work": {"claimName": "results"}},
        }
        body = {"apiVersion": names.API_VERSION, "kind": names.KIND, "metadata": {"name": name}, "spec": _merged(spec, sections)}
        made: Json = self.api.post(self.path(names.PLURAL), body, fieldValidation="Strict")
        return made

    def job(self, name: str = "job") -> Json:
        found: Json = self.api.get(self.path(names.PLURAL, name))
        return found

    def status(self, name: str = "job") -> Json:
        found: Json = self.job(name).get("status", {})
        return found

    def set_spec(self, name: str = "job", **sections: Any) -> None:
        self.api.patch(self.path(names.PLURAL, name), {"spec": sections})

    def remove(self, name: str = "job", propagation: str = "Background") -> None:
        self.api.delete(self.path(names.PLURAL, name), {"propagationPolicy": propagation})

    def condition(self, kind: str, name: str = "job") -> Json:
        """The condition of a type; empty where there is none."""
        found: list[Json] = self.status(name).get("conditions", [])
        return next((condition for condition in found if condition["type"] == kind), {})

    def states(self, name: str = "job") -> dict[str, str]:
        """Every condition's value, by type."""
        return {condition["type"]: condition["status"] for condition in self.status(name).get("conditions", [])}

    def until_condition(self, kind: str, name: str = "job", value: str = "True", seconds: float = WAIT_SECONDS) -> Json:
        """Wait for a condition; returns it."""
        self.until(lambda: self.condition(kind, name).get("status") == value, f"{name}: {kind} is {value}", seconds)
        return self.condition(kind, name)

    def until_attempt(self, attempt: int, name: str = "job", seconds: float = WAIT_SECONDS) -> list[Json]:
        """Wait for a gang; returns its pods, by node rank."""
        self.until(lambda: self.status(name).get("attempt") == attempt, f"{name}: attempt {attempt}", seconds)
        return self.gang(attempt, name)

    def until(self, condition: Callable[[], object], what: str, seconds: float = WAIT_SECONDS) -> Any:
        """`kube_processes.until`, which says in the end what stands in the namespace."""
        try:
            return until(condition, seconds, what)
        except KubeError as error:
            jobs = [(job["metadata"]["name"], job.get("status")) for job in self.all(names.PLURAL)]
            pods = [(pod["metadata"]["name"], pod["status"].get("phase"), pod["metadata"].get("deletionTimestamp")) for pod in self.all("pods")]
            raise KubeError(f"{error}\njobs: {jobs}\npods: {pods}") from None

    def events(self, name: str = "job") -> list[Json]:
        """Events about a job, as they were told."""
        found = [event for event in self.all("events") if event["involvedObject"]["kind"] == names.KIND and event["involvedObject"]["name"] == name]
        return sorted(found, key=lambda event: int(event["metadata"]["resourceVersion"]))

    # Children.

    def gang(self, attempt: int, name: str = "job") -> list[Json]:
        """The pods of one gang, by node rank."""
        pods = [pod for pod in self.all("pods") if pod["metadata"]["labels"].get(names.JOB_LABEL) == name]
        members = [pod for pod in pods if pod["metadata"]["labels"][names.ATTEMPT_LABEL] == str(attempt)]
        return sorted(members, key=lambda pod: int(pod["metadata"]["labels"][names.NODE_LABEL]))

    def all(self, plural: str) -> list[Json]:
        """Every object of a kind in the namespace."""
        items: list[Json] = self.api.get(self.path(plural))["items"]
        return items

    def names(self, plural: str = "pods") -> list[str]:
        return sorted(item["metadata"]["name"] for item in self.all(plural))

    def find(self, plural: str, name: str) -> Json | None:
        found: Json | None = self.api.find(self.path(plural, name))
        return found

    def path(self, plural: str, name: str = "") -> str:
        group = f"/apis/{names.API_VERSION}" if plural == names.PLURAL else "/api/v1"
        return f"{group}/namespaces/{self.namespace}/{plural}{f'/{name}' if name else ''}"

    # What a scheduler, a kubelet and a trainer do.

    def run(self, pods: list[Json], answer: str | None = None) -> str:
        """Every pod's trainer runs; rank 0 answers. Returns its address."""
        addresses = [self.trainers.address() for _ in pods]
        if answer is not None:
            self.trainers.answers[addresses[0]] = answer
        for pod, address in zip(pods, addresses, strict=True):
            ready = {"type": "Ready", "status": "True", "lastTransitionTime": ago(0)}
            state = {"running": {"startedAt": ago(0)}}
            self.set_pod(pod, phase="Running", podIP=address, podIPs=[{"ip": address}], conditions=[ready], **self._trainer(state))
        return addresses[0]

    def say(self, address: str, answer: str) -> None:
        """Rank 0 answers so from now on."""
        self.trainers.answers[address] = answer

    def end(self, pod: Json, exit_code: int, message: str = "", seconds_ago: float = 0.0, **status: Any) -> None:
        """The trainer of a pod ends, and the pod with it."""
        ended = {"exitCode": exit_code, "startedAt": ago(seconds_ago + 1), "finishedAt": ago(seconds_ago), **({"message": message} if message else {})}
        state = {"terminated": {**ended, "reason": "Error" if exit_code else "Completed"}}
        self.set_pod(pod, **{"phase": "Failed" if exit_code else "Succeeded", **self._trainer(state), **status})

    def succeed(self, pods: list[Json], message: str | None = None) -> None:
        """Every trainer ends well; node 0 leaves the summary of its report."""
        for rank, pod in reversed(list(enumerate(pods))):
            self.end(pod, 0, (told_success() if message is None else message) if rank == 0 else "")

    def set_pod(self, pod: Json, **status: Any) -> None:
        self.api.patch(f"{self.path('pods', pod['metadata']['name'])}/status", {"status": status})

    def delete_pod(self, pod: Json, **body: Any) -> None:
        self.api.delete(self.path("pods", pod["metadata"]["name"]), body)

    def bind(self, pod: Json, node: str) -> None:
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        self.api.post(f"{self.path('pods', pod['metadata']['name'])}/binding", {"metadata": {"name": pod["metadata"]["name"]}, "target": target})

    def hold(self, pod: Json) -> None:
        """The pod stays, being deleted, until `release`: as one that writes a checkpoint."""
        self.api.patch(self.path("pods", pod["metadata"]["name"]), {"metadata": {"finalizers": ["example.test/hold"]}})

    def release(self, pod: Json) -> None:
        try:
            self.api.patch(self.path("pods", pod["metadata"]["name"]), {"metadata": {"finalizers": None}})
        except ApiError as error:
            if error.status != 404:
                raise

    @staticmethod
    def _trainer(state: Json) -> Json:
        status = {"name": names.TRAINER_CONTAINER, "ready": "running" in state, "restartCount": 0, "image": "trainer", "imageID": "", "state": state}
        return {"containerStatuses": [status]}
