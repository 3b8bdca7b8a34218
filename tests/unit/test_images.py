"""What a linter of Dockerfiles does not know."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("Dockerfile", "trainer_image/Dockerfile")
Instruction = tuple[str, str]


def instructions(file: str) -> list[Instruction]:
    """Word and arguments of every instruction, on one line each, without comments."""
    written = [line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(written).replace("\\\n", " ")
    return [(word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def arguments(file: str) -> dict[str, str]:
    """ARG name -> default."""
    return dict(rest.split("=", 1) for word, rest in instructions(file) if word == "ARG" and "=" in rest)


def final_stage(file: str) -> list[Instruction]:
    every = instructions(file)
    return every[max(index for index, (word, _) in enumerate(every) if word == "FROM") :]


def project_version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def pin(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)", (ROOT / "requirements/dev.txt").read_text(), re.MULTILINE)
    assert found, f"requirements/dev.txt does not pin {package}"
    return found[1]


@pytest.mark.parametrize("file", FILES)
def test_image_runs_as_a_user_without_rights(file: str) -> None:
    users = [rest for word, rest in final_stage(file) if word == "USER"]
    assert users == ["65532:65532"]  # a number: Kubernetes' runAsNonRoot cannot tell what a name is


@pytest.mark.parametrize("file", FILES)
def test_image_begins_with_exact_versions(file: str) -> None:
    every = instructions(file)
    stages = {rest.split(" AS ")[1] for word, rest in every if word == "FROM" and " AS " in rest}
    values = arguments(file)
    for base in (rest.split(" AS ")[0] for word, rest in every if word == "FROM"):
        image = re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], base)
        image = re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], image)
        assert image in stages or re.search(r":\d+\.\d+\.\d+-|@sha256:[0-9a-f]{64}$", image), f"{image} names no exact version"
    assert values["UV_VERSION"] == pin("uv")
    for word, rest in every:
        for name in re.findall(r'"([a-z]+)==', rest) if word == "RUN" else ():
            assert re.search(rf'"{name}==\$\{{\w+_VERSION\}}"', rest), f"{name} is not pinned by an ARG"


@pytest.mark.parametrize("file", FILES)
def test_everything_that_is_copied_exists_and_is_not_ignored(file: str) -> None:
    allowed = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = [source for word, rest in instructions(file) if word == "COPY" and "--from" not in rest for source in shlex.split(rest)[:-1]]
    assert "pyproject.toml" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source.split("/")[0] in allowed, f".dockerignore leaves {source} out"
    assert not [rest for word, rest in instructions(file) if word == "ADD"]


@pytest.mark.parametrize("file", FILES)
def test_image_that_runs_installs_no_python_packages(file: str) -> None:
    assert not [rest for word, rest in final_stage(file) if word == "RUN" and re.search(r"\b(uv|pip) (pip )?install\b", rest)]


@pytest.mark.parametrize("file", FILES)
def test_image_says_the_version_of_the_project(file: str) -> None:
    labels = [rest for word, rest in final_stage(file) if word == "LABEL"]
    assert f'org.opencontainers.image.version="{project_version()}"' in labels[0]


def test_cuda_is_the_one_that_torch_is_built_for() -> None:
    toolkit = re.search(r"^cuda-toolkit==(\d+\.\d+)", (ROOT / "requirements/gpu.txt").read_text(), re.MULTILINE)
    assert toolkit
    assert arguments("trainer_image/Dockerfile")["CUDA_VERSION"].startswith(f"{toolkit[1]}.")
    assert f"transformer-engine-cu{toolkit[1].split('.')[0]}==" in (ROOT / "requirements/gpu.txt").read_text()
