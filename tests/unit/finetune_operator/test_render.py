"""`finetune render`: the manifests of a file's jobs, or a refusal with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from finetune_operator import cli, kubeyaml
from jobs import job_value, write_job

FLAGS = ["--trainer-image", "trainer:1", "--work-claim", "results"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["render", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_service_claim_and_pods_of_the_first_gang_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claim = {"spec": {"accessModes": ["ReadWriteMany"]}}
    path = write_job(tmp_path, nodes={"count": 2}, volumes={"work": {"volumeClaimTemplate": claim}})
    code, out, _ = run(capsys, "-f", str(path), "--trainer-image", "trainer:1")
    names = [(each["kind"], each["metadata"]["name"]) for each in yaml.safe_load_all(out)]
    assert (code, names) == (0, [("Service", "tiny"), ("PersistentVolumeClaim", "tiny-work"), ("Pod", "tiny-1-0"), ("Pod", "tiny-1-1")])
    assert "uid: 00000000-0000-0000-0000-000000000000" in out


def test_every_job_of_a_file_is_rendered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_job(tmp_path, name="one").read_text(), write_job(tmp_path, name="two").read_text()
    path = tmp_path / "jobs.yaml"
    path.write_text(f"{one}---\napiVersion: v1\nkind: Secret\n---\n{two}")
    code, out, _ = run(capsys, "-f", str(path), *FLAGS)
    assert code == 0
    assert [each["metadata"]["name"] for each in yaml.safe_load_all(out)] == ["one", "one-1-0", "two", "two-1-0"]


def test_text_that_kubectl_would_take_for_a_number_stays_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = ["1e3", "017", "on", "null", "1_000", "0x1f", "", "2026-01-01", "- a", "a: b"]
    path = tmp_path / "job.yaml"
    path.write_text(kubeyaml.write([job_value(nodes={"env": [{"name": f"V{index}", "value": value} for index, value in enumerate(values)]})]))
    _, out, _ = run(capsys, "-f", str(path), *FLAGS)
    pod = kubeyaml.read(out.encode())[1].value
    found = {variable["name"]: variable["value"] for variable in pod["spec"]["containers"][0]["env"]}
    assert [found[f"V{index}"] for index in range(len(values))] == values


@pytest.mark.parametrize(
    ("sections", "flags", "message"),
    [
        ({"training": {"lr": "fast"}}, FLAGS, ':12: spec.training.lr: it must be a valid number (found "fast")'),
        ({}, FLAGS[:2], ":5: spec.volumes.work: it is required in a cluster"),
        ({}, FLAGS[2:], ":5: spec.nodes.image: it is required, because the operator's settings name no trainer image"),
        ({"nodes": {"podTemplate": {"spec": {"containers": 7}}}}, FLAGS, ":14: spec.nodes.podTemplate.spec.containers: it must be a list (found 7)"),
        ({"model": {"source": "s3://bucket/model"}}, FLAGS, ":7: spec.model.source: s3://bucket/model: object storage is not supported yet"),
    ],
    ids=["type", "work", "image", "template", "scheme"],
)
def test_what_cannot_be_made_is_refused_with_file_line_and_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sections: dict[str, object], flags: list[str], message: str
) -> None:
    path = write_job(tmp_path, **sections)
    code, out, err = run(capsys, "-f", str(path), *flags)
    assert (code, out) == (10, "")
    assert err.startswith(f"finetune: {path}{message}")


def test_file_without_a_job_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.yaml"
    path.write_text("apiVersion: v1\nkind: Secret\nmetadata: {name: a}\n")
    assert run(capsys, "-f", str(path), *FLAGS) == (10, "", f"finetune: {path}: it must hold a FineTuneJob (found Secret/a)\n")


def test_help_says_how_it_differs_from_the_operators(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["render", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "differ from the operator's in the job's uid" in text
