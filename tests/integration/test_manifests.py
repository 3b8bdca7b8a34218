"""What a job becomes is what a real API server takes, in a namespace under the Pod Security Standard `restricted`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_operator import kubeyaml, manifests, names
from finetune_operator.job_file import load
from finetune_operator.manifests import Owner
from finetune_operator.plan import Identity, cluster_place, make_plan
from finetune_operator.settings import Settings
from kube_api import ApiError, ApiServer

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
SETTINGS = Settings(work_claim="results", trainer_image="registry.example/trainer:1.0")
NAMESPACE = "manifests"
PLURALS = {"Service": "services", "PersistentVolumeClaim": "persistentvolumeclaims", "Pod": "pods"}


@pytest.fixture(scope="module", name="restricted")
def namespace_under_the_standard(api: ApiServer) -> ApiServer:
    api.create_namespace(NAMESPACE, {"pod-security.kubernetes.io/enforce": "restricted"})
    api.post("/apis/scheduling.k8s.io/v1/priorityclasses", {"metadata": {"name": "research"}, "value": 7})
    return api


def path_of(value: dict[str, Any]) -> str:
    return f"/api/v1/namespaces/{NAMESPACE}/{PLURALS[value['kind']]}"


def objects_of(example: Path) -> tuple[dict[str, Any], ...]:
    job = load(example).job
    plan = make_plan(job, SETTINGS, cluster_place(SETTINGS), Identity(names.PLACEHOLDER_UID))
    return manifests.objects(plan, Owner(job.name, names.PLACEHOLDER_UID, NAMESPACE), SETTINGS)


def without_defaults(made: Any, sent: Any) -> Any:
    """What was sent, as the API server has it."""
    if isinstance(sent, dict):
        return {key: without_defaults(made.get(key), value) for key, value in sent.items()}
    if isinstance(sent, list):
        return [without_defaults(one, other) for one, other in zip(made, sent, strict=False)]
    return made


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_objects_of_an_example_are_taken_as_they_are(restricted: ApiServer, example: Path) -> None:
    for value in objects_of(example):
        made = restricted.post(path_of(value), value, dryRun="All", fieldValidation="Strict")
        assert without_defaults(made, value) == value


def test_rendered_text_is_what_is_sent(restricted: ApiServer) -> None:
    (example,) = (path for path in EXAMPLES if path.stem == "pod-template")
    sent = list(objects_of(example))
    assert [document.value for document in kubeyaml.read(kubeyaml.write(sent).encode())] == sent
    done = restricted.kubectl("apply", "--server-side", "--dry-run=server", "-f", "-", input=kubeyaml.write(sent))
    assert done.stdout.count("serverside-applied (server dry run)") == len(sent)


def test_a_wrong_field_of_a_pod_template_is_named_by_the_api_server(restricted: ApiServer) -> None:
    (example,) = (path for path in EXAMPLES if path.stem == "smallest")
    pod = objects_of(example)[-1]
    pod["spec"]["containers"][0]["image"] = ""
    with pytest.raises(ApiError, match=r"spec\.containers\[0\]\.image: Required value"):
        restricted.post(path_of(pod), pod, dryRun="All")
