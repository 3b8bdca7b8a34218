"""The Helm chart by the real helm: what it renders, what values it refuses, and what a real API server makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator import names
from finetune_operator.settings import Settings
from jobs import job_value
from kube_api import ApiServer, free_ports, start_api_server
from kube_build import binaries
from kube_processes import KubeError, until

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm/finetune-operator"
RELEASE, NAMESPACE = "tuning", "operators"
NAME = "tuning-finetune-operator"
Object = dict[str, Any]


@pytest.fixture(scope="module")
def helm() -> Path:
    return binaries("helm")["helm"]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server of the chart's own: it installs the definition itself."""
    with start_api_server(tmp_path_factory.mktemp("chart")) as server:
        server.create_namespace(NAMESPACE, {"pod-security.kubernetes.io/enforce": "restricted"})
        server.create_namespace("team-a")
        server.create_namespace("team-b")
        yield server


def run(helm: Path, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    result = subprocess.run([str(word) for word in (helm, *arguments)], capture_output=True, text=True, check=False)
    assert result.returncode == 0 or not check, result.stderr
    return result


def values(given: Object | None) -> list[str]:
    return [word for key, value in (given or {}).items() for word in ("--set-json", f"{key}={json.dumps(value)}")]


def template(helm: Path, given: Object | None = None, *more: str) -> list[Object]:
    """Rendered objects, each of them once."""
    command = ("template", RELEASE, CHART, "--namespace", NAMESPACE, "--kube-version", "1.35.0", *more)
    objects = [value for value in yaml.safe_load_all(run(helm, *command, *values(given)).stdout) if value]
    assert len({identity(value) for value in objects}) == len(objects)
    return objects


def identity(value: Object) -> tuple[str, str, str]:
    return value["kind"], value["metadata"].get("namespace", ""), value["metadata"]["name"]


def one(objects: Sequence[Object], kind: str, name: str | None = None) -> Object:
    found = [value for value in objects if value["kind"] == kind and name in (None, value["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} objects {kind} {name or ''}"
    return found[0]


def kinds(objects: Sequence[Object]) -> list[str]:
    return sorted(value["kind"] for value in objects)


def rules(role: Object) -> dict[str, set[str]]:
    return {resource: set(rule["verbs"]) for rule in role["rules"] for resource in rule["resources"]}


def pod_of(objects: Sequence[Object]) -> Object:
    pod: Object = one(objects, "Deployment")["spec"]["template"]
    return pod


def container_of(objects: Sequence[Object]) -> Object:
    (container,) = pod_of(objects)["spec"]["containers"]
    return dict(container)


JOB_RULES = {
    "finetunejobs": {"get", "list", "watch"},
    "finetunejobs/status": {"patch"},
    "pods": {"get", "list", "watch", "create", "delete"},
    "services": {"get", "create"},
    "persistentvolumeclaims": {"get", "create"},
    "events": {"create"},
}


def test_lint_has_no_complaint(helm: Path) -> None:
    result = run(helm, "lint", "--strict", CHART)
    assert "[WARNING]" not in result.stdout
    assert "[ERROR]" not in result.stdout


def test_default_values_give_two_operators_for_the_whole_cluster(helm: Path) -> None:
    objects = template(helm)
    assert kinds(objects) == [
        *("ClusterRole", "ClusterRole", "ClusterRole", "ClusterRoleBinding", "ConfigMap", "CustomResourceDefinition", "Deployment"),
        *("PodDisruptionBudget", "Role", "RoleBinding", "ServiceAccount"),
    ]
    deployment = one(objects, "Deployment")["spec"]
    assert deployment["replicas"] == 2
    assert rules(one(objects, "ClusterRole", f"{NAMESPACE}-{NAME}")) == {"nodes": {"get"}, **JOB_RULES}
    assert one(objects, "PodDisruptionBudget")["spec"]["selector"] == deployment["selector"]
    assert deployment["selector"]["matchLabels"].items() <= deployment["template"]["metadata"]["labels"].items()


def test_operator_finds_its_settings_and_itself(helm: Path) -> None:
    objects = template(helm, {"settings.httpPort": 9000, "settings.requestsInFlight": 16})
    container = container_of(objects)
    assert container["command"] == ["python", "-m", "finetune_operator"]
    environment = {variable["name"]: variable.get("value") or variable["valueFrom"]["fieldRef"]["fieldPath"] for variable in container["env"]}
    assert environment == {"FINETUNE_SETTINGS": "/etc/finetune/settings.json", "POD_NAME": "metadata.name", "POD_NAMESPACE": "metadata.namespace"}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volume = next(volume for volume in pod_of(objects)["spec"]["volumes"] if volume["name"] == "settings")
    settings = one(objects, "ConfigMap", volume["configMap"]["name"])["data"]["settings.json"]
    assert mounts["settings"] == "/etc/finetune"
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    expected = Settings(http_port=9000, requests_in_flight=16, trainer_image=f"mcore-finetune/trainer:{version}")
    assert Settings.model_validate_json(settings) == expected
    assert container["ports"] == [{"name": "http", "containerPort": 9000}]
    assert {container[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")} == {"http"}


def test_changed_settings_replace_the_pods_and_nothing_else_does(helm: Path) -> None:
    checksums = [pod_of(template(helm, given))["metadata"]["annotations"]["checksum/settings"] for given in ({}, {"settings.httpPort": 9000}, {"replicas": 3})]
    assert checksums[0] != checksums[1]
    assert checksums[0] == checksums[2]


def test_namespaces_that_are_served_are_all_that_the_operator_reaches(helm: Path) -> None:
    objects = template(helm, {"settings.watchNamespaces": ["team-a", "team-b"]})
    assert rules(one(objects, "ClusterRole", f"{NAMESPACE}-{NAME}")) == {"nodes": {"get"}}
    roles = {value["metadata"]["namespace"]: value for value in objects if value["kind"] == "Role" and value["metadata"]["name"] == NAME}
    bindings = {value["metadata"]["namespace"]: value for value in objects if value["kind"] == "RoleBinding" and value["metadata"]["name"] == NAME}
    assert set(roles) == set(bindings) == {"team-a", "team-b"}
    for namespace, role in roles.items():
        assert rules(role) == JOB_RULES
        assert bindings[namespace]["subjects"] == [{"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}]


def test_lease_is_reached_where_and_as_the_settings_say(helm: Path) -> None:
    role = one(template(helm, {"settings.leaseName": "boss", "settings.leaseNamespace": "kube-leases"}), "Role")
    assert role["metadata"]["namespace"] == "kube-leases"
    assert [(rule["verbs"], rule.get("resourceNames")) for rule in role["rules"]] == [(["get", "update"], ["boss"]), (["create"], None)]


def test_definition_is_kept_and_can_be_left_out(helm: Path) -> None:
    definition = one(template(helm), "CustomResourceDefinition")
    assert definition["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert definition == yaml.safe_load((ROOT / "crds/finetune.mcore.dev_finetunejobs.yaml").read_text(encoding="utf-8"))
    assert "CustomResourceDefinition" not in kinds(template(helm, {"crds.enabled": False}))


def test_what_an_administrator_may_leave_out(helm: Path) -> None:
    objects = template(
        helm,
        {"replicas": 1, "rbac.create": False, "rbac.aggregate": False, "serviceAccount.create": False, "serviceAccount.name": "mine", "crds.enabled": False},
    )
    assert kinds(objects) == ["ConfigMap", "Deployment"]
    assert pod_of(objects)["spec"]["serviceAccountName"] == "mine"


def test_pods_take_what_an_administrator_adds(helm: Path) -> None:
    given = {
        "image.repository": "registry.example/operator",
        "image.digest": "sha256:" + "0" * 64,
        "imagePullSecrets": [{"name": "pull"}],
        "extraEnv": [{"name": "PATH", "value": "/env/bin"}],
        "extraVolumes": [{"name": "env", "hostPath": {"path": "/env"}}],
        "extraVolumeMounts": [{"name": "env", "mountPath": "/env"}],
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "high",
        "podAnnotations": {"a": "b"},
        "podLabels": {"c": "d"},
        "metricsService.enabled": True,
        "fullnameOverride": "ftj",
    }
    objects = template(helm, given)
    pod, container = pod_of(objects), container_of(objects)
    assert container["image"] == "registry.example/operator:0.1.0@sha256:" + "0" * 64
    assert {"name": "PATH", "value": "/env/bin"} in container["env"]
    assert container["volumeMounts"][-1] == {"name": "env", "mountPath": "/env"}
    assert pod["spec"]["volumes"][-1] == {"name": "env", "hostPath": {"path": "/env"}}
    assert pod["spec"]["nodeSelector"] == {"disk": "ssd"}
    assert pod["spec"]["tolerations"] == [{"operator": "Exists"}]
    assert pod["spec"]["affinity"] == {"nodeAffinity": {}}
    assert pod["spec"]["priorityClassName"] == "high"
    assert pod["spec"]["imagePullSecrets"] == [{"name": "pull"}]
    assert pod["metadata"]["annotations"]["a"] == "b"
    assert pod["metadata"]["labels"]["c"] == "d"
    assert one(objects, "Service")["spec"]["ports"] == [{"name": "http", "port": 8080, "targetPort": "http"}]
    assert one(objects, "Deployment")["metadata"]["name"] == "ftj"


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"replica": 3}, "'replica' not allowed"),
        ({"replicas": "two"}, "/replicas': got string, want integer"),
        ({"replicas": -1}, "/replicas': minimum: got -1, want 0"),
        ({"settings.httpPort": 70000}, "/settings/httpPort': maximum: got 70,000, want 65,535"),
        ({"settings.leaseNam": "x"}, "'leaseNam' not allowed"),
        ({"settings.watchNamespaces": "team-a"}, "/settings/watchNamespaces': got string, want array"),
        ({"settings.leaseDurationSeconds": 1}, "/settings/leaseDurationSeconds': minimum"),
        ({"image.digest": "latest"}, "/image/digest': 'latest' does not match pattern"),
        ({"image.pullPolicy": "Sometimes"}, "/image/pullPolicy': value must be one of"),
        ({"crds.enabled": "no"}, "/crds/enabled': got string, want boolean"),
        ({"extraEnv": {"A": "b"}}, "/extraEnv': got object, want array"),
    ],
    ids=str,
)
def test_values_that_cannot_be_meant_are_refused_by_name(helm: Path, given: Object, complaint: str) -> None:
    result = run(helm, "lint", CHART, *values(given), check=False)
    assert result.returncode != 0
    assert complaint in result.stdout + result.stderr


def test_notes_have_a_first_job_that_the_schema_takes(helm: Path, api: ApiServer) -> None:
    helm_here = (helm, "--kubeconfig", api.kubeconfig)
    install = subprocess.run([*helm_here, "upgrade", "--install", RELEASE, CHART, "--namespace", NAMESPACE], capture_output=True, text=True, check=False)
    assert install.returncode == 0, install.stderr
    api.kubectl("wait", "--for=condition=Established", "--timeout=60s", f"crd/{names.PLURAL}.{names.GROUP}")
    notes = install.stdout.split("NOTES:")[1]
    first_job = "\n".join(line[4:] for line in notes.split("<<'JOB'\n")[1].split("    JOB\n")[0].splitlines())
    made = api.kubectl("-n", "team-a", "create", "--dry-run=server", "--validate=strict", "-f", "-", "-o", "name", input=first_job)
    assert made.stdout.strip() == "finetunejob.finetune.mcore.dev/who-are-you"
    assert "2 operator(s) in namespace operators serve FineTuneJobs in every namespace" in notes


def test_definition_and_jobs_outlive_the_chart(helm: Path, api: ApiServer) -> None:
    where = ("--kubeconfig", api.kubeconfig, "--namespace", NAMESPACE)
    run(helm, "upgrade", "--install", RELEASE, CHART, *where)
    api.kubectl("wait", "--for=condition=Established", "--timeout=60s", f"crd/{names.PLURAL}.{names.GROUP}")
    value = job_value(volumes={"work": {"claimName": "results"}})
    value["metadata"] = {"name": "kept", "namespace": "team-a"}
    api.kubectl("apply", "-f", "-", input=json.dumps(value))
    run(helm, "uninstall", RELEASE, *where, "--wait", "--cascade", "foreground")
    assert api.kubectl("-n", "team-a", "get", "ftj", "kept", "-o", "name").stdout.strip() == "finetunejob.finetune.mcore.dev/kept"
    assert not api.find(f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/{NAME}")
    run(helm, "install", RELEASE, CHART, *where)  # and is taken over by the next release of that name


@pytest.mark.parametrize("given", [{}, {"settings.watchNamespaces": ["team-a"]}, {"metricsService.enabled": True, "replicas": 1}], ids=str)
def test_api_server_takes_every_object_without_a_warning(helm: Path, api: ApiServer, given: Object) -> None:
    objects = template(helm, given)
    result = api.kubectl("apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "-f", "-", input=yaml.safe_dump_all(objects))
    assert result.stdout.count("serverside-applied") == len(objects)
    assert "warning" not in result.stderr.lower()


def test_restricted_pod_security_takes_the_operators_pod(helm: Path, api: ApiServer) -> None:
    run(helm, "upgrade", "--install", RELEASE, CHART, "--kubeconfig", api.kubeconfig, "--namespace", NAMESPACE)
    pod = pod_of(template(helm))
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "probe", "labels": pod["metadata"]["labels"]}, "spec": pod["spec"]}
    api.post(f"/api/v1/namespaces/{NAMESPACE}/pods", body, dryRun="All", fieldValidation="Strict")


ALLOWED = [
    *(f"{verb} finetunejobs.finetune.mcore.dev -n team-a" for verb in ("get", "list", "watch")),
    "patch finetunejobs.finetune.mcore.dev --subresource=status -n team-a",
    *(f"{verb} pods -n team-a" for verb in ("get", "list", "watch", "create", "delete")),
    *(f"{verb} {resource} -n team-a" for verb in ("get", "create") for resource in ("services", "persistentvolumeclaims")),
    "create events -n team-a",
    "get nodes",
    f"create leases.coordination.k8s.io -n {NAMESPACE}",
    *(f"{verb} leases.coordination.k8s.io/finetune-operator -n {NAMESPACE}" for verb in ("get", "update")),
]
FORBIDDEN = [
    *("get secrets -n team-a", "list secrets -n team-a", "create pods --subresource=exec -n team-a", "get pods --subresource=log -n team-a"),
    *("patch pods -n team-a", "update pods -n team-a", "patch finetunejobs.finetune.mcore.dev -n team-a", "update finetunejobs.finetune.mcore.dev -n team-a"),
    *("delete finetunejobs.finetune.mcore.dev -n team-a", "delete persistentvolumeclaims -n team-a", "delete services -n team-a", "list nodes", "patch nodes"),
    *("get configmaps -n team-a", "create serviceaccounts --subresource=token -n team-a", "create rolebindings.rbac.authorization.k8s.io -n team-a"),
    *(f"update leases.coordination.k8s.io/another -n {NAMESPACE}", "get leases.coordination.k8s.io/finetune-operator -n team-a", f"get secrets -n {NAMESPACE}"),
]


PATIENCE_SECONDS = 60.0
"""The API server reads rights a moment after they are written."""


def can(api: ApiServer, action: str, account: str = f"system:serviceaccount:{NAMESPACE}:{NAME}") -> bool:
    answer = api.kubectl("auth", "can-i", *action.split(), f"--as={account}", check=False).stdout.strip()
    assert answer in ("yes", "no")
    return answer == "yes"


def test_operator_may_do_what_it_must_and_no_more(helm: Path, api: ApiServer) -> None:
    run(helm, "upgrade", "--install", RELEASE, CHART, "--kubeconfig", api.kubeconfig, "--namespace", NAMESPACE)
    until(lambda: all(can(api, action) for action in ALLOWED), PATIENCE_SECONDS, "the operator may do what it must")
    assert [action for action in FORBIDDEN if can(api, action)] == []


def test_operator_of_some_namespaces_may_do_nothing_in_others(helm: Path, api: ApiServer) -> None:
    run(
        helm,
        "upgrade",
        "--install",
        RELEASE,
        CHART,
        "--kubeconfig",
        api.kubeconfig,
        "--namespace",
        NAMESPACE,
        *values({"settings.watchNamespaces": ["team-a"]}),
    )
    until(lambda: all(can(api, action) for action in ALLOWED), PATIENCE_SECONDS, "the operator may do what it must")
    elsewhere = [action.replace("-n team-a", "-n team-b") for action in ALLOWED if "-n team-a" in action]
    until(lambda: not any(can(api, action) for action in elsewhere), PATIENCE_SECONDS, "the operator may do nothing elsewhere, also if it could before")


@pytest.mark.parametrize("given", [{}, {"settings.watchNamespaces": ["team-a"]}], ids=["everywhere", "in a namespace"])
def test_operator_serves_a_job_with_the_rights_and_settings_of_the_chart(helm: Path, api: ApiServer, tmp_path: Path, given: Object) -> None:
    run(helm, "upgrade", "--install", RELEASE, CHART, "--kubeconfig", api.kubeconfig, "--namespace", NAMESPACE, *values(given))
    api.kubectl("wait", "--for=condition=Established", "--timeout=60s", f"crd/{names.PLURAL}.{names.GROUP}")
    settings, log = tmp_path / "settings.json", tmp_path / "log"
    written = json.loads(api.get(f"/api/v1/namespaces/{NAMESPACE}/configmaps/{NAME}")["data"]["settings.json"])
    settings.write_text(json.dumps({**written, "httpPort": free_ports(1)[0]}))
    account = api.user_kubeconfig(f"system:serviceaccount:{NAMESPACE}:{NAME}", ["system:serviceaccounts", "system:authenticated"])
    here = {"KUBECONFIG": str(account), "FINETUNE_SETTINGS": str(settings), "POD_NAME": "one", "POD_NAMESPACE": NAMESPACE}
    with log.open("w") as output:
        operator = subprocess.Popen([sys.executable, "-m", "finetune_operator"], env={**os.environ, **here}, stdout=output, stderr=output)
    try:
        serve_a_gang_that_loses_a_pod(api, f"job-{len(given)}")
    except KubeError as error:
        error.add_note(log.read_text())
        raise
    finally:
        operator.terminate()
        operator.wait(30)
    assert "forbidden" not in log.read_text().lower()


def serve_a_gang_that_loses_a_pod(api: ApiServer, name: str) -> None:
    """Service, claim, pods, status and Event are made, and a pod that is deleted brings the next gang: everything but nodes is touched."""
    claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    value = job_value(volumes={"work": {"volumeClaimTemplate": {"spec": claim}}}, nodes={"count": 2})
    value["metadata"] = {"name": name, "namespace": "team-a"}
    api.kubectl("apply", "-f", "-", input=json.dumps(value))
    job = f"/apis/{names.API_VERSION}/namespaces/team-a/{names.PLURAL}/{name}"
    core = "/api/v1/namespaces/team-a"
    until(lambda: api.get(job).get("status", {}).get("attempt") == 1, 120, "the first gang")
    assert api.find(f"{core}/services/{name}")
    assert api.find(f"{core}/persistentvolumeclaims/{names.claim(name)}")
    api.delete(f"{core}/pods/{names.pod(name, 1, 1)}", {"gracePeriodSeconds": 0})
    until(lambda: api.get(job)["status"]["attempt"] == 2, 120, "the second gang")
    until(lambda: any(event["involvedObject"]["name"] == name for event in api.get(f"{core}/events")["items"]), 30, "an Event")
    api.delete(job)


def test_who_may_view_or_edit_a_namespace_may_do_so_with_its_jobs(helm: Path, api: ApiServer) -> None:
    run(helm, "upgrade", "--install", RELEASE, CHART, "--kubeconfig", api.kubeconfig, "--namespace", NAMESPACE)
    for person, role in (("vera", "view"), ("edith", "edit")):
        api.kubectl("-n", "team-a", "create", "rolebinding", person, f"--clusterrole={role}", f"--user={person}")
    jobs = "finetunejobs.finetune.mcore.dev -n team-a"
    until(lambda: can(api, f"create {jobs}", "edith") and can(api, f"get {jobs}", "vera"), 60, "the roles are joined")
    assert [can(api, f"{verb} {jobs}", "vera") for verb in ("get", "watch", "create", "delete")] == [True, True, False, False]
    assert [can(api, f"{verb} {jobs}", "edith") for verb in ("get", "create", "patch", "delete")] == [True, True, True, True]
    assert not can(api, f"patch --subresource=status {jobs}", "edith")
