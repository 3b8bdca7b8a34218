"""Container images without a builder or a registry: docker archives made of a Debian root and folders of this machine."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import kube_packages
from kube_build import cache, locked, say
from kube_processes import KubeError, run

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
PATH_IN_IMAGES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PAUSE = """#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
static void leave(int number) { (void)number; _exit(0); }
static void reap(int number) { (void)number; while (waitpid(-1, 0, WNOHANG) > 0); }
int main(void) { signal(SIGTERM, leave); signal(SIGINT, leave); signal(SIGCHLD, reap); for (;;) pause(); }
"""


def build_image(
    out: Path,
    name: str,
    folders: Mapping[str, Path],
    *,
    layers: Sequence[Path] = (),
    user: str = "0",
    entrypoint: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    workdir: str = "/",
) -> Path:
    """Write a docker archive: `layers` (tar files), then one layer with `folders` (path in the image -> folder or file here, owned by root)."""
    with tempfile.TemporaryDirectory(prefix="image.", dir=out.parent) as temporary:
        own = _tar(Path(temporary) / "folders.tar", folders)
        config = {
            "architecture": ARCHITECTURES[platform.machine()],
            "os": "linux",
            "config": {
                "User": user,
                "Entrypoint": list(entrypoint),
                "Env": [f"{key}={value}" for key, value in {"PATH": PATH_IN_IMAGES, **(env or {})}.items()],
                "WorkingDir": workdir,
            },
        }
        _archive(out, name, config, [*layers, own])
    return out


def _tar(file: Path, folders: Mapping[str, Path]) -> Path:
    """The same content gives the same bytes. Everybody may read it: temporary folders here are often their owner's alone."""

    def neutral(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.uid = member.gid = member.mtime = 0
        member.uname = member.gname = ""
        member.mode |= 0o555 if member.isdir() or member.mode & 0o100 else 0o444
        return None if Path(member.name).name == "__pycache__" else member

    with tarfile.open(file, "w") as tar:
        for place, source in sorted(folders.items()):
            tar.add(source, arcname=place.strip("/") or ".", filter=neutral)
    return file


def _archive(out: Path, name: str, config: Mapping[str, object], layers: Sequence[Path]) -> None:
    digests = [hashlib.file_digest(layer.open("rb"), "sha256").hexdigest() for layer in layers]
    image = json.dumps({**config, "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]}}).encode()
    image_name = hashlib.sha256(image).hexdigest() + ".json"
    manifest = json.dumps([{"Config": image_name, "RepoTags": [name], "Layers": [f"{digest}.tar" for digest in digests]}]).encode()
    with tarfile.open(out, "w") as tar:
        for layer, digest in zip(layers, digests, strict=True):
            tar.add(layer, arcname=f"{digest}.tar")
        for member_name, data in ((image_name, image), ("manifest.json", manifest)):
            member = tarfile.TarInfo(member_name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def pause_image(out: Path, name: str) -> Path:
    """The image that holds a pod's namespaces open: one static program that waits."""
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        program = Path(temporary) / "pause"
        run("gcc", "-Os", "-static", "-s", "-x", "c", "-", "-o", program, input=PAUSE)
        return build_image(out, name, {"/pause": program}, entrypoint=["/pause"], user="65535:65535")


def environment_paths() -> list[Path]:
    """The folders that hold this Python environment: pods mount them read-only at the same paths. A base below /usr is part of the Debian root instead."""
    prefixes = [Path(sys.prefix), Path(sys.base_prefix), Path(sys.base_prefix).resolve()]
    return sorted({path for path in prefixes if path != Path("/usr")})


def environment_variables() -> dict[str, str]:
    """What a process needs in its environment to run this Python environment's programs in a pod."""
    return {"PATH": f"{sys.prefix}/bin:{PATH_IN_IMAGES}", "LD_LIBRARY_PATH": f"{sys.base_prefix}/lib", "PYTHONDONTWRITEBYTECODE": "1"}


def debian_layer() -> Path:
    """A small Debian (this machine's release) with the libraries that this Python needs; made once for each list of packages."""
    packages = ["libgomp1", "libstdc++6", *_packages_of_python()]
    release = _release()
    digest = hashlib.sha256(" ".join([release, *packages]).encode()).hexdigest()[:16]
    layer = cache() / "images" / f"{release}-{digest}.tar"
    if not layer.exists():
        with locked("debian"):
            if not layer.exists():
                _debootstrap(layer, release, packages)
    return layer


def _debootstrap(layer: Path, release: str, packages: Sequence[str]) -> None:
    kube_packages.install("debootstrap")
    say(f"making a {release} root for images (first time: about 1 minute)")
    layer.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, **_apt_proxy(), "PATH": f"{os.environ['PATH']}:{kube_packages.SYSTEM_FOLDERS}"}
    with tempfile.TemporaryDirectory(prefix="debian.", dir=layer.parent) as temporary:
        root, tar = Path(temporary) / "root", Path(temporary) / "root.tar"
        run("debootstrap", "--variant=minbase", f"--include={','.join(packages)}", release, root, _mirror(release), env=environment)
        (root / "root").chmod(0o755)  # a Python environment below /root is mounted there, for users other than root too
        left_out = ("dev", "proc", "sys", "tmp", "var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man")
        run("tar", "--numeric-owner", "-C", root, *(f"--exclude=./{folder}/*" for folder in left_out), "-cf", tar, ".")
        tar.rename(layer)


def _release() -> str:
    codename = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    if codename is None:
        raise KubeError("/etc/os-release has no VERSION_CODENAME: images are made on Debian and its relatives only")
    return codename[1]


def _mirror(release: str) -> str:
    """Where this machine's own packages come from."""
    for line in run("apt-get", "indextargets", "--format", "$(CODENAME) $(COMPONENT) $(REPO_URI)", "Created-By: Packages").splitlines():
        codename, component, address = line.split()
        if (codename, component) == (release, "main"):
            return address
    raise KubeError(f"apt knows no source of {release} main")


def _apt_proxy() -> dict[str, str]:
    proxy = re.search(r'"(.+)"', run("apt-config", "dump", "Acquire::http::Proxy"))
    return {"http_proxy": proxy[1]} if proxy else {}


def _packages_of_python() -> list[str]:
    """The Debian packages of the libraries that the base interpreter and its modules load, and of the interpreter itself where it is Debian's."""
    program = Path(sys.executable).resolve()
    standard_library = Path(os.__file__).parent
    modules = [path for path in (standard_library / "lib-dynload").glob("*.so") if not path.name.startswith("_tkinter")]
    libraries = {match[1] for path in (program, *modules) for match in re.finditer(r"=> (/\S+)", run("ldd", path))}
    files = {path for path in libraries if not any(path.startswith(f"{folder}/") for folder in environment_paths())}
    packages = {_package_of(Path(file)) for file in files}
    return sorted(packages | (_packages_of_debians_python() if Path(sys.base_prefix) == Path("/usr") else set()))


def _packages_of_debians_python() -> set[str]:
    """The interpreter and its standard library, without what pods have no use for (Tk, IDLE, headers), and /usr/bin/python3, which .venv may point to."""
    owners = run("dpkg", "--search", f"{Path(os.__file__).parent}/*")
    return {"python3-minimal", *re.findall(r"\b(?:lib)?python3\.\d+(?:-minimal|-stdlib)?(?=[:,])", owners)}


def _package_of(file: Path) -> str:
    """dpkg may know a file by its path with or without /usr."""
    for line in run("dpkg", "--search", f"*/{file.name}").splitlines():
        package, _, path = line.rpartition(": ")
        if Path(path).name == file.name and file.resolve().parent == Path(path).resolve().parent:
            return package.split(",")[0].split(":")[0]
    raise KubeError(f"{file} belongs to no Debian package, so it cannot be put into images")
