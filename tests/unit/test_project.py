"""The project keeps its own rules: names of modules, source roots, pins, documents that say what is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [*sorted((ROOT / "operator").rglob("*.py")), *sorted((ROOT / "trainer_image").rglob("*.py"))]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def test_no_module_is_a_drawer_for_everything() -> None:
    assert [path for path in SOURCES if re.fullmatch(r"(utils?|helpers?|common|constants|misc)", path.stem)] == []


def test_no_module_is_longer_than_600_lines() -> None:
    assert {path.name: count for path in SOURCES if (count := len(path.read_text(encoding="utf-8").splitlines())) > 600} == {}


def test_source_roots_and_tests_are_not_packages() -> None:
    """A package named ``operator`` would shadow the standard library's."""
    roots = [ROOT / "operator", ROOT / "trainer_image", *(path for path in (ROOT / "tests").rglob("*") if path.is_dir())]
    assert [folder for folder in roots if (folder / "__init__.py").exists()] == []


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return dict(re.fullmatch(r"([\w.-]+)==([^ ;]+)( ;.*)?", line).group(1, 2) for line in lines if not line.lstrip().startswith("#"))  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["operator.txt", "trainer.txt", "gpu.txt"])
def test_every_version_is_exact_and_the_same_in_all_files(name: str) -> None:
    development = pins("dev.txt")
    assert {package: version for package, version in pins(name).items() if development.get(package, version) != version} == {}


def test_operator_is_installed_without_torch() -> None:
    assert {"torch", "transformers", "megatron-core"} & set(pins("operator.txt")) == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8"))
    assert [target for target in targets if "://" not in target and not (document.parent / target).exists()] == []


def test_readme_shows_the_example_as_it_is() -> None:
    assert (ROOT / "examples" / "self-cognition-lora.yaml").read_text(encoding="utf-8") in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_names_targets_that_make_knows() -> None:
    known = subprocess.run(["make", "-C", str(ROOT), "--no-print-directory", "help"], capture_output=True, text=True, check=True).stdout
    wanted = set(re.findall(r"make ([a-z]+) +#|`make ([a-z]+)`", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {name for pair in wanted for name in pair if name} - set(re.findall(r"^make (\w+)", known, re.MULTILINE)) - {"help"} == set()
