"""Reads FineTuneJobs, their pods and logs out of a cluster, with a user's own kubeconfig. The official client is imported when it is needed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_operator import names
from finetune_operator.lifecycle import Pod
from finetune_operator.page import JobView
from finetune_operator.pods import read_pod
from finetune_operator.status import Status
from finetune_trainer.contract import EngineError, describe_errors

_NAMESPACE_OF_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_JOBS = (names.GROUP, names.VERSION)
PIECE = 65536
"""Bytes of a log that are read at once, at most; what has come is passed on."""


class ClusterError(EngineError):
    """What was asked of a cluster cannot be had; the message says why."""


class Reader:
    """One cluster, as one user sees it."""

    def __init__(self, kubeconfig: Path | None = None, context: str | None = None) -> None:
        """Raises ClusterError where neither a kubeconfig nor a service account is at hand."""
        from kubernetes import client

        configuration = client.Configuration()
        self.namespace = _configure(configuration, kubeconfig, context)
        configuration.retries = False
        self._host = configuration.host
        api = client.ApiClient(configuration)
        self._custom = client.CustomObjectsApi(api)
        self._core = client.CoreV1Api(api)

    def jobs(self, namespace: str | None) -> tuple[list[JobView], str]:
        """All jobs of a namespace, or (None) of all, without their pods; and the resource version that they were read at."""
        with self._said():
            answer = self._list_jobs(namespace)()
        return [_view(raw) for raw in answer["items"]], str(answer["metadata"]["resourceVersion"])

    def job(self, namespace: str, name: str) -> tuple[JobView, str]:
        """One job with its pods, and the resource version that it was read at."""
        with self._said(name, f"there is no FineTuneJob {name} in namespace {namespace}"):
            raw = self._custom.get_namespaced_custom_object(*_JOBS, namespace, names.PLURAL, name)
        return _view(raw, self._pods(namespace, name, raw["metadata"]["uid"])), str(raw["metadata"]["resourceVersion"])

    def wait_for_change(self, namespace: str | None, name: str | None, version: str, seconds: int) -> None:
        """Return when a job has changed since ``version``, or after ``seconds``."""
        from kubernetes.client import ApiException
        from kubernetes.watch import Watch

        selector = {"field_selector": f"metadata.name={name}"} if name else {}
        with self._said():
            try:
                for _ in Watch().stream(self._list_jobs(namespace), resource_version=version, timeout_seconds=seconds, **selector):
                    return
            except ApiException as error:
                if error.status != 410:  # too long ago: what there is now is news
                    raise

    def wait_for_start(self, namespace: str, pod: Pod) -> None:
        """Return when a pod's trainer has started, or ended; raises ClusterError where the pod is deleted before."""
        from kubernetes.watch import Watch

        with self._said():
            while True:
                for event in Watch().stream(self._core.list_namespaced_pod, namespace, field_selector=f"metadata.name={pod.name}", timeout_seconds=300):
                    record = read_pod(event["raw_object"])
                    if event["type"] == "DELETED" or record is None or record.pod.uid != pod.uid:
                        raise ClusterError(f"pod {pod.name} was deleted before its trainer started")
                    if has_started(record.pod):
                        return

    def log(self, namespace: str, pod: Pod, *, follow: bool) -> Iterator[bytes]:
        """The trainer's output, in pieces as they come."""
        with self._said(pod.name, f"pod {pod.name} is gone"):
            answer = self._core.read_namespaced_pod_log(pod.name, namespace, container=names.TRAINER_CONTAINER, follow=follow, _preload_content=False)
            try:
                yield from answer.stream(PIECE, decode_content=True)
            finally:
                answer.release_conn()

    def _list_jobs(self, namespace: str | None) -> Any:
        from functools import partial

        if namespace is None:
            return partial(self._custom.list_cluster_custom_object, *_JOBS, names.PLURAL)
        return partial(self._custom.list_namespaced_custom_object, *_JOBS, namespace, names.PLURAL)

    def _pods(self, namespace: str, name: str, uid: str) -> tuple[Pod, ...]:
        with self._said():
            answer = self._core.list_namespaced_pod(namespace, label_selector=f"{names.JOB_LABEL}={name}", _preload_content=False)
        records = (read_pod(raw) for raw in json.loads(answer.data)["items"])
        return tuple(record.pod for record in records if record is not None and record.owner == uid)

    @contextmanager
    def _said(self, name: str = "", missing: str = "") -> Iterator[None]:
        """The client's errors as sentences; ``missing`` is the one for an object of this name that is not there."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            raise ClusterError(_answer_text(error, name, missing)) from error
        except HTTPError as error:
            raise ClusterError(f"cannot talk to the cluster at {self._host}: {error}") from error


def has_started(pod: Pod) -> bool:
    """Whether there is output of a pod's trainer."""
    return pod.started or pod.exit_code is not None or pod.phase in ("Succeeded", "Failed")


def _configure(configuration: Any, kubeconfig: Path | None, context: str | None) -> str:
    """Fill the client's configuration from the kubeconfig, in a pod from its service account; the namespace that goes with it."""
    from kubernetes import config

    chosen = {"config_file": str(kubeconfig) if kubeconfig else None}
    try:
        config.load_kube_config(**chosen, context=context, client_configuration=configuration)
        contexts, current = config.list_kube_config_contexts(**chosen)
        active = next((each for each in contexts if each["name"] == context), current)
        return str(active["context"].get("namespace") or "default")
    except config.ConfigException as error:
        if kubeconfig or context or not _NAMESPACE_OF_POD.exists():
            raise ClusterError(f"no cluster is known: {error}; --kubeconfig and --context say which") from error
    config.load_incluster_config(client_configuration=configuration)
    return _NAMESPACE_OF_POD.read_text().strip()


def _answer_text(error: Any, name: str, missing: str) -> str:
    """The API server's own words, unless there are better ones."""
    try:
        body = json.loads(error.body)
    except (TypeError, ValueError):
        body = {}
    if error.status == 404 and not body:
        return "the cluster does not know FineTuneJobs: the operator's chart is not installed"
    if error.status == 404 and name and body.get("details", {}).get("name") == name:
        return missing
    return f"the cluster answers: {body.get('message') or error.reason}"


def _view(raw: dict[str, Any], pods: Sequence[Pod] = ()) -> JobView:
    metadata = raw["metadata"]
    try:
        status = Status.model_validate(raw.get("status") or {})
    except ValidationError as error:
        raise ClusterError(
            f"the status of {metadata['namespace']}/{metadata['name']} is of another version than this command: " + "; ".join(describe_errors(error, "status"))
        ) from error
    return JobView(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        created=datetime.fromisoformat(metadata["creationTimestamp"]),
        spec=raw["spec"],
        status=status,
        pods=tuple(pods),
        being_deleted="deletionTimestamp" in metadata,
    )
