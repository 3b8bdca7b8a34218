"""`finetune status` and `finetune logs` (and `kubectl finetune`) against a real API server; nobody runs pods there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from finetune_operator import names
from jobs import job_value
from kube_api import ApiServer, start_api_server
from kube_processes import until

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent
NAMESPACE = "readers"
JOBS = f"/apis/{names.API_VERSION}/namespaces/{NAMESPACE}/{names.PLURAL}"
PROGRESS = {"stage": "training", "step": 42, "totalSteps": 93, "steps": "42/93", "percent": 45, "loss": 1.234, "remaining": "31s"}


@pytest.fixture(scope="module", name="cluster")
def served(api: ApiServer) -> ApiServer:
    """The API server with the definition and a namespace for these tests."""
    api.kubectl("apply", "--server-side", "--force-conflicts", "-f", ROOT / "crds/finetune.mcore.dev_finetunejobs.yaml")
    api.kubectl("wait", "--for=condition=Established", "--timeout=60s", f"crd/{names.PLURAL}.{names.GROUP}")
    api.create_namespace(NAMESPACE)
    until(lambda: api.find(JOBS), 30, "FineTuneJobs are served")
    return api


def make(api: ApiServer, name: str, **status: Any) -> dict[str, Any]:
    """A job with a status, as the operator would have written it."""
    value = job_value(volumes={"work": {"claimName": "results"}})
    value["metadata"] = {"name": name, "namespace": NAMESPACE}
    made: dict[str, Any] = api.post(JOBS, value)
    write(api, name, **status)
    return made


def write(api: ApiServer, name: str, **status: Any) -> None:
    api.kubectl("-n", NAMESPACE, "patch", "ftj", name, "--subresource=status", "--type=merge", "-p", json.dumps({"status": status}))


def make_pod(api: ApiServer, job: dict[str, Any], attempt: int, node: int, **status: Any) -> None:
    """A pod of a job as the operator makes it, and what a kubelet says of it."""
    name = names.pod(job["metadata"]["name"], attempt, node)
    owner = {"apiVersion": names.API_VERSION, "kind": names.KIND, "name": job["metadata"]["name"], "uid": job["metadata"]["uid"], "controller": True}
    labels = {**names.child_labels(job["metadata"]["name"]), names.ATTEMPT_LABEL: str(attempt), names.NODE_LABEL: str(node)}
    spec = {"nodeName": f"node-{node}", "containers": [{"name": names.TRAINER_CONTAINER, "image": "trainer"}]}
    path = f"/api/v1/namespaces/{NAMESPACE}/pods"
    api.post(path, {"metadata": {"name": name, "labels": labels, "ownerReferences": [owner]}, "spec": spec})
    api.patch(f"{path}/{name}/status", {"status": status})


def command(api: ApiServer, *words: str | Path, kubeconfig: Path | None = None) -> list[str]:
    return [str(SCRIPTS / "finetune"), *map(str, words), "--kubeconfig", str(kubeconfig or api.kubeconfig)]


def run(words: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def finetune(api: ApiServer, *words: str, kubeconfig: Path | None = None) -> str:
    result = run(command(api, *words, kubeconfig=kubeconfig))
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def refusal(api: ApiServer, *words: str, kubeconfig: Path | None = None) -> str:
    """The one sentence on standard error of a command that ends with exit code 1."""
    result = run(command(api, *words, kubeconfig=kubeconfig))
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    return line.removeprefix("finetune: ")


def test_table_says_what_kubectl_says(cluster: ApiServer) -> None:
    make(cluster, "table", observedGeneration=1, phase="Running", attempt=2, progress=PROGRESS)
    line = next(line for line in finetune(cluster, "status", "-n", NAMESPACE).splitlines() if line.startswith("table"))
    theirs = cluster.kubectl("-n", NAMESPACE, "get", "ftj", "table", "--no-headers").stdout
    assert line.split()[:-1] == theirs.split()[:-1] == ["table", "Running", "42/93", "1.234", "31s", "2"]  # the last is the age
    everywhere = finetune(cluster, "status", "-A").splitlines()
    assert everywhere[0].split()[0] == "NAMESPACE"
    assert [NAMESPACE, "table"] in [line.split()[:2] for line in everywhere]


def test_page_shows_the_pods_of_this_job_only(cluster: ApiServer) -> None:
    job = make(cluster, "page", observedGeneration=1, phase="Running", attempt=1, progress=PROGRESS, resolved={"training.lr": 1e-4})
    waiting = {"name": names.TRAINER_CONTAINER, "image": "x", "imageID": "", "ready": False, "restartCount": 0}
    make_pod(cluster, job, 1, 0, phase="Running", containerStatuses=[{**waiting, "state": {"running": {"startedAt": "2026-05-04T12:00:00Z"}}}])
    make_pod(cluster, job, 1, 1, phase="Pending", containerStatuses=[{**waiting, "state": {"waiting": {"reason": "ImagePullBackOff"}}}])
    stranger = {"metadata": {**job["metadata"], "uid": "another"}}
    make_pod(cluster, stranger, 7, 0)
    page = finetune(cluster, "status", "page", "-n", NAMESPACE)
    rows = [line.split() for line in page.splitlines()]
    assert ["page-1-0", "0", "Running", "node-0"] in rows
    assert ["page-1-1", "1", "Pending", "node-1", "ImagePullBackOff:", "trainer"] in rows
    assert "page-7-0" not in page
    assert ["training.lr", "0.0001"] in rows
    assert refusal(cluster, "logs", "page", "-n", NAMESPACE, "--node-rank", "1") == "pod page-1-1 has not started: ImagePullBackOff: trainer; -f waits for it"
    assert refusal(cluster, "logs", "page", "-n", NAMESPACE) == 'the cluster answers: pods "node-0" not found'  # in Kubernetes' words: the node is not there
    assert refusal(cluster, "logs", "page", "-n", NAMESPACE, "--attempt", "3").startswith(f"{NAMESPACE}/page has no pods of attempt 3; there are those of 1")


def test_what_is_not_there_is_said_in_a_sentence(cluster: ApiServer) -> None:
    assert refusal(cluster, "status", "nobody", "-n", NAMESPACE) == f"there is no FineTuneJob nobody in namespace {NAMESPACE}"
    assert refusal(cluster, "logs", "nobody", "-n", NAMESPACE) == f"there is no FineTuneJob nobody in namespace {NAMESPACE}"
    assert finetune(cluster, "status", "-n", "empty") == "no FineTuneJobs in namespace empty\n"
    make(cluster, "podless", phase="Suspended")
    assert refusal(cluster, "logs", "podless", "-n", NAMESPACE) == f"{NAMESPACE}/podless has no pods (phase Suspended)"


def test_cluster_without_the_definition_says_what_is_missing(tmp_path: Path) -> None:
    with start_api_server(tmp_path) as bare:
        assert refusal(bare, "status") == "the cluster does not know FineTuneJobs: the operator's chart is not installed"
        assert refusal(bare, "status", "any") == "the cluster does not know FineTuneJobs: the operator's chart is not installed"


def test_user_without_rights_is_told_so_in_the_api_servers_words(cluster: ApiServer) -> None:
    said = refusal(cluster, "status", "-n", NAMESPACE, kubeconfig=cluster.user_kubeconfig("mallory"))
    assert said.startswith('the cluster answers: finetunejobs.finetune.mcore.dev is forbidden: User "mallory" cannot list resource "finetunejobs"')


def test_cluster_that_does_not_answer_is_said_in_a_sentence(cluster: ApiServer, tmp_path: Path) -> None:
    nowhere = tmp_path / "kubeconfig"
    nowhere.write_text(cluster.kubeconfig.read_text().replace(cluster.server, "https://127.0.0.1:9"))
    assert refusal(cluster, "status", kubeconfig=nowhere).startswith("cannot talk to the cluster at https://127.0.0.1:9: ")
    assert refusal(cluster, "status", kubeconfig=tmp_path / "missing").startswith("no cluster is known: ")
    assert "no cluster is known: " in refusal(cluster, "status", "--context", "elsewhere")


def test_namespace_is_the_kubeconfigs_unless_another_is_named(cluster: ApiServer, tmp_path: Path) -> None:
    make(cluster, "mine", phase="Running")
    own = tmp_path / "kubeconfig"
    own.write_bytes(cluster.kubeconfig.read_bytes())
    cluster.kubectl("config", "set-context", "--current", f"--namespace={NAMESPACE}", kubeconfig=own)
    assert f"{NAMESPACE}/mine" in finetune(cluster, "status", "mine", kubeconfig=own)
    assert refusal(cluster, "status", "mine", "-n", "default", kubeconfig=own) == "there is no FineTuneJob mine in namespace default"


def test_watched_job_is_shown_until_it_has_ended(cluster: ApiServer) -> None:
    make(cluster, "watched", observedGeneration=1, phase="Running", progress=PROGRESS)
    watching = subprocess.Popen(command(cluster, "status", "watched", "-n", NAMESPACE, "--watch"), stdout=subprocess.PIPE, text=True)
    assert watching.stdout
    try:
        assert any("42/93" in line for line in watching.stdout)  # lines as they come, to the end of a command that fails
        write(cluster, "watched", progress={**PROGRESS, "steps": "43/93"})
        assert any("43/93" in line for line in watching.stdout)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        condition = {"type": "Succeeded", "status": "True", "reason": "Succeeded", "message": "", "lastTransitionTime": now}
        write(cluster, "watched", phase="Succeeded", conditions=[condition])
        rest = watching.communicate(timeout=60)[0]
    finally:
        watching.kill()
    assert "watched   Succeeded" in rest
    assert watching.returncode == 0


def test_kubectl_finds_the_command_as_its_own(cluster: ApiServer) -> None:
    make(cluster, "plugin", phase="Running")
    words = [str(cluster.binaries["kubectl"]), "finetune", "status", "plugin", "-n", NAMESPACE]
    result = run(words, PATH=f"{SCRIPTS}:{os.environ['PATH']}", KUBECONFIG=str(cluster.kubeconfig))
    assert f"FineTuneJob {NAMESPACE}/plugin" in result.stdout, result.stderr


def test_flags_that_exclude_each_other_are_refused(cluster: ApiServer) -> None:
    both = run(command(cluster, "status", "page", "-A"))
    assert (both.returncode, both.stderr) == (10, "finetune: --all-namespaces (-A) is for the table of every namespace; leave NAME and --namespace out\n")
    assert "not allowed with argument --node-rank" in run(command(cluster, "logs", "page", "--node-rank", "1", "--all")).stderr
