"""The API server that the integration tests run against is a real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kube_api import ApiError, ApiServer
from kube_processes import KubeError, Processes, until

CONFIG_MAPS = "/api/v1/namespaces/{}/configmaps"


def test_objects_are_made_changed_and_deleted(api: ApiServer) -> None:
    path = CONFIG_MAPS.format(api.create_namespace("objects"))
    api.post(path, {"metadata": {"name": "one"}, "data": {"a": "1"}})
    api.patch(f"{path}/one", {"data": {"b": "2"}})
    assert api.get(f"{path}/one")["data"] == {"a": "1", "b": "2"}
    assert api.kubectl("-n", "objects", "get", "configmap", "one", "-o", "jsonpath={.data.b}").stdout == "2"
    api.delete(f"{path}/one")
    assert api.find(f"{path}/one") is None


def test_a_rule_of_a_custom_resource_refuses_what_breaks_it(api: ApiServer) -> None:
    rule = {"rule": "self.low <= self.high", "message": "low must not be above high"}
    bounds = {"type": "object", "properties": {"low": {"type": "integer"}, "high": {"type": "integer"}}, "x-kubernetes-validations": [rule]}
    schema = {"openAPIV3Schema": {"type": "object", "properties": {"spec": bounds}}}
    names = {"kind": "Range", "plural": "ranges", "singular": "range"}
    version = {"name": "v1", "served": True, "storage": True, "schema": schema}
    spec = {"group": "test.example", "scope": "Namespaced", "names": names, "versions": [version]}
    definition = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "ranges.test.example"}, "spec": spec}
    api.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)
    path = f"/apis/test.example/v1/namespaces/{api.create_namespace('rules')}/ranges"
    until(lambda: api.find(path), 30, "the custom resource is served")
    body = {"apiVersion": "test.example/v1", "kind": "Range", "metadata": {"name": "r"}, "spec": {"low": 2, "high": 1}}
    with pytest.raises(ApiError, match="low must not be above high"):
        api.post(path, body)
    api.post(path, {**body, "spec": {"low": 1, "high": 2}})


def test_what_an_owner_owns_is_collected_after_it(api: ApiServer) -> None:
    path = CONFIG_MAPS.format(api.create_namespace("owners"))
    owner = api.post(path, {"metadata": {"name": "owner"}})
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner["metadata"]["uid"]}
    api.post(path, {"metadata": {"name": "child", "ownerReferences": [reference]}})
    api.delete(f"{path}/owner")
    until(lambda: api.find(f"{path}/child") is None, 60, "collection of the child")


def test_a_user_may_do_what_roles_say_and_no_more(api: ApiServer) -> None:
    namespace = api.create_namespace("users")
    user = api.user_kubeconfig(f"system:serviceaccount:{namespace}:reader", [f"system:serviceaccounts:{namespace}"])
    api.kubectl("-n", namespace, "create", "rolebinding", "reader", "--clusterrole=view", f"--serviceaccount={namespace}:reader")
    look = ("-n", namespace, "get", "configmaps")
    until(
        lambda: "kube-root-ca.crt" in api.kubectl(*look, kubeconfig=user, check=False).stdout,
        60,
        "the controllers have made what the user may read, and the API server knows the user's rights",
    )
    with pytest.raises(KubeError, match="cannot create resource"):
        api.kubectl("-n", namespace, "create", "configmap", "x", kubeconfig=user)


def test_restricted_pod_security_is_enforced(api: ApiServer) -> None:
    namespace = api.create_namespace("restricted", {"pod-security.kubernetes.io/enforce": "restricted"})
    pod = {"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "x"}]}}
    with pytest.raises(ApiError, match=r'violates PodSecurity "restricted:latest": allowPrivilegeEscalation'):
        api.post(f"/api/v1/namespaces/{namespace}/pods", pod)


def test_the_api_server_comes_back_with_its_data_at_the_same_address(api: ApiServer) -> None:
    path = CONFIG_MAPS.format(api.create_namespace("restart"))
    api.post(path, {"metadata": {"name": "kept"}})
    before = api.processes.pid("kube-apiserver")
    api.stop_apiserver(grace_seconds=0)
    assert not api.is_ready()
    api.start_apiserver()
    assert api.processes.pid("kube-apiserver") != before
    assert api.get(f"{path}/kept")["metadata"]["name"] == "kept"


def test_a_daemon_that_ends_at_once_is_reported_with_its_log(api: ApiServer) -> None:
    processes = Processes(api.state / "failing")
    processes.start("etcd", [api.binaries["etcd"], "--no-such-flag"])
    with pytest.raises(KubeError, match=r"(?s)etcd has ended.*failing/log/etcd\.log ends with:.*no-such-flag"):
        processes.until("etcd", lambda: False, 30, "etcd")
    processes.stop()
    assert processes.names() == []


def test_daemons_end_with_the_process_that_started_them(api: ApiServer) -> None:
    processes = Processes(api.state / "orphans")
    pid = os.fork()
    if pid == 0:
        try:
            processes.start("sleep", ["sleep", "1000"])
            until(
                lambda: Path(f"/proc/{processes.pid('sleep')}/cmdline").read_bytes().startswith(b"sleep"),
                30,
                "the guard has asked to be killed, and become the daemon",
            )
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert processes.names() == ["sleep"]
    until(lambda: processes.pid("sleep") is None, 10, "end of the orphan")
