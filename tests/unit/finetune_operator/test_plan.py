"""spec + settings -> Plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune_operator.plan import Identity, Place, Plan, Variable, cluster_only_fields, cluster_place, make_plan
from finetune_operator.problems import InvalidJob
from finetune_operator.schema import FineTuneJob
from finetune_operator.settings import Settings
from jobs import make_job

SETTINGS = Settings(work_claim="results")
IDENTITY = Identity("0f8e7d6c-1111-2222-3333-444444444444", attempt=2)
LOCAL = Place(
    kind="local",
    work="/home/me/runs",
    relative_to="/home/me/jobs",
    run_file="{output_dir}/run.json",
    progress_host="127.0.0.1",
    progress_port=0,
    master_port=40001,
    master_address="127.0.0.1",
)


def in_cluster(job: FineTuneJob) -> Plan:
    return make_plan(job, SETTINGS, cluster_place(SETTINGS), IDENTITY)


def environment(plan: Plan, node: int) -> dict[str, str | None]:
    return {variable.name: variable.value for variable in plan.nodes[node].environment}


def test_environment_of_a_pod_is_that_of_pytorchjob_and_torchrun() -> None:
    plan = in_cluster(make_job(nodes={"count": 2, "processesPerNode": 4}))
    assert environment(plan, 1) == {
        "PYTHONUNBUFFERED": "1",
        "HF_HOME": "/cache/huggingface",
        "RANK": "1",
        "WORLD_SIZE": "8",
        "NNODES": "2",
        "NODE_RANK": "1",
        "NPROC_PER_NODE": "4",
        "MASTER_ADDR": "tiny-0.tiny",
        "MASTER_PORT": "29500",
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "PET_NPROC_PER_NODE": "4",
        "PET_MASTER_ADDR": "tiny-0.tiny",
        "PET_MASTER_PORT": "29500",
    }
    assert [node.host for node in plan.nodes] == ["tiny-0", "tiny-1"]


def test_local_processes_get_the_names_that_pods_get() -> None:
    job = make_job(nodes={"count": 2})
    pod, process = environment(in_cluster(job), 1), environment(make_plan(job, SETTINGS, LOCAL, IDENTITY), 1)
    assert set(pod) - set(process) == {"HF_HOME"}
    assert {name for name in process if pod[name] != process[name]} == {"MASTER_ADDR", "MASTER_PORT", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
    assert (process["MASTER_ADDR"], process["PET_MASTER_PORT"]) == ("127.0.0.1", "40001")


def test_a_users_variable_wins_over_a_default_but_not_over_the_gang() -> None:
    plan = in_cluster(make_job(nodes={"env": [{"name": "HF_HOME", "value": "/else"}, {"name": "NCCL_DEBUG", "value": "INFO"}]}))
    assert environment(plan, 0)["HF_HOME"] == "/else"
    assert environment(plan, 0)["NCCL_DEBUG"] == "INFO"
    assert environment(plan, 0)["RANK"] == "0"


def test_a_token_comes_from_its_secret_in_a_cluster_only() -> None:
    job = make_job(model={"source": "org/model", "tokenSecretRef": {"name": "hf", "key": "token"}})
    assert Variable("HF_TOKEN", value_from={"secretKeyRef": {"name": "hf", "key": "token"}}) in in_cluster(job).nodes[0].environment
    assert "HF_TOKEN" not in environment(make_plan(job, SETTINGS, LOCAL, IDENTITY), 0)


def test_run_config_knows_who_and_where_it_is() -> None:
    config = make_plan(make_job(), SETTINGS, LOCAL, IDENTITY).config
    assert config.run.output_dir == "/home/me/runs/default/tiny/0f8e7d6c"
    assert (config.run.uid, config.run.attempt, config.run.namespace, config.run.name) == (IDENTITY.uid, 2, "default", "tiny")
    assert (config.run.progress_host, config.run.progress_port, config.run.termination_message_path) == ("127.0.0.1", 0, None)
    pod = in_cluster(make_job()).config.run
    assert (pod.output_dir, pod.progress_host, pod.progress_port, pod.termination_message_path) == (
        "/work/default/tiny/0f8e7d6c",
        "0.0.0.0",
        8080,
        "/dev/termination-log",
    )


def test_command_is_the_launcher_with_the_run_file() -> None:
    assert in_cluster(make_job()).command == ("megatron", "launch", "/run/finetune/run.json")
    assert make_plan(make_job(), SETTINGS, LOCAL, IDENTITY).command == ("megatron", "launch", "/home/me/runs/default/tiny/0f8e7d6c/run.json")


def test_options_pass_unchanged_and_open_ones_stay_open() -> None:
    config = in_cluster(make_job(training={"lr": 3e-4, "trainIters": 7}, tuning={"loraRank": 4})).config
    assert (config.training.lr, config.training.train_iters, config.tuning.lora_rank) == (3e-4, 7, 4)
    assert config.training.micro_batch_size is None
    assert config.parallelism.tensor_model_parallel_size is None


def test_dot_slash_is_the_yamls_folder_here_and_the_work_volume_in_a_pod() -> None:
    job = make_job(model={"source": "./models/a"}, data={"dataset": ["./rows.jsonl#50", "/abs/b.jsonl", "swift/self-cognition#5", "hf://org/rows"]})
    config = make_plan(job, SETTINGS, LOCAL, IDENTITY).config
    assert config.model.source == "/home/me/jobs/models/a"
    assert config.data.dataset == ["/home/me/jobs/rows.jsonl#50", "/abs/b.jsonl", "swift/self-cognition#5", "org/rows"]
    assert in_cluster(job).config.model.source == "/work/models/a"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ms://org/x", "ModelScope is not supported yet"),
        ("s3://bucket/x", "object storage is not supported yet"),
        ("pvc://claim/x", "a PersistentVolumeClaim is not supported yet"),
        ("ftp://host/x", "this scheme is unknown"),
        ("../x", "a path must begin with / or ./, which is the YAML's folder"),
        ("~/x", "a path must begin with / or ./"),
    ],
)
def test_a_store_that_is_not_built_is_refused_by_name(source: str, message: str) -> None:
    with pytest.raises(InvalidJob) as error:
        make_plan(make_job(data={"dataset": ["a/b", source]}), SETTINGS, LOCAL, IDENTITY)
    assert str(error.value).startswith(f"spec.data.dataset[1]: {source}: ")
    assert message in str(error.value)


def test_work_is_required_in_a_cluster_unless_the_settings_give_one() -> None:
    with pytest.raises(InvalidJob, match=r"spec\.volumes\.work: it is required in a cluster"):
        make_plan(make_job(), Settings(), cluster_place(Settings()), IDENTITY)
    make_plan(make_job(), SETTINGS, cluster_place(SETTINGS), IDENTITY)
    make_plan(make_job(), Settings(), LOCAL, IDENTITY)


def test_accelerator_is_one_resource_per_process() -> None:
    assert in_cluster(make_job()).accelerator == "nvidia.com/gpu"
    assert in_cluster(make_job(nodes={"accelerator": {"resourceName": "amd.com/gpu"}})).accelerator == "amd.com/gpu"
    assert in_cluster(make_job(nodes={"accelerator": {"type": "CPU"}})).accelerator is None


def test_identity_of_a_run_does_not_depend_on_its_attempt_or_place_of_results() -> None:
    first = make_plan(make_job(), SETTINGS, LOCAL, IDENTITY).config.identity()
    again = make_plan(make_job(), SETTINGS, replace(LOCAL, work="/else", master_port=1), replace(IDENTITY, attempt=3)).config.identity()
    assert first == again
    assert first != make_plan(make_job(training={"lr": 1e-3}), SETTINGS, LOCAL, IDENTITY).config.identity()


def test_fields_for_a_cluster_are_named_when_they_say_something() -> None:
    job = make_job(
        suspend=False,
        model={"source": "a/b", "tokenSecretRef": {"name": "n", "key": "k"}},
        volumes={"work": {"claimName": "results"}},
        runPolicy={"backoffLimit": 3},
        nodes={
            "image": "i:1",
            "tolerations": [],
            "nodeSelector": {},
            "podTemplate": {},
            "resources": {"requests": {"cpu": 8}},
            "env": [{"name": "A", "value": "1"}, {"name": "B", "valueFrom": {"fieldRef": {}}}],
        },
    )
    assert cluster_only_fields(job) == ["volumes", "model.tokenSecretRef", "nodes.image", "nodes.resources", "nodes.env[1].valueFrom"]
    assert cluster_only_fields(make_job()) == []


def test_plan_knows_its_accelerator_and_the_port_of_the_rendezvous() -> None:
    assert (in_cluster(make_job()).accelerator, in_cluster(make_job()).master_port) == ("nvidia.com/gpu", 29500)
    assert in_cluster(make_job(nodes={"accelerator": {"resourceName": "amd.com/gpu"}})).accelerator == "amd.com/gpu"
    assert in_cluster(make_job(nodes={"accelerator": {"type": "CPU"}})).accelerator is None
