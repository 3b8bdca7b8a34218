"""System packages that a test cluster needs: installed as root, else named with the command that does it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kube_processes import KubeError, run

# What is needed: how its presence shows (a command, or a file), and the Debian package that has it.
NEEDS = {
    "ip": ("ip", "iproute2"),
    "iptables": ("iptables", "iptables"),
    "nft": ("nft", "nftables"),
    "conntrack": ("conntrack", "conntrack"),
    "openssl": ("openssl", "openssl"),
    "nsenter": ("nsenter", "util-linux"),
    "setpriv": ("setpriv", "util-linux"),
    "mount": ("mount", "mount"),
    "sysctl": ("sysctl", "procps"),
    "debootstrap": ("debootstrap", "debootstrap"),
    "gcc": ("gcc", "gcc"),
    "libc": ("/usr/include/stdio.h", "libc6-dev"),
    "pkg-config": ("pkg-config", "pkg-config"),
    "seccomp": ("/usr/include/seccomp.h", "libseccomp-dev"),
}
SYSTEM_FOLDERS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def install(*needs: str) -> None:
    """Make sure that what is named in NEEDS is there. Raises KubeError with one line to type where this process may not install packages."""
    missing = sorted({NEEDS[need][1] for need in needs if not _present(NEEDS[need][0])})
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise KubeError(
            f"this machine lacks system packages; install them and try again:\n    sudo apt-get update && sudo apt-get install -y {' '.join(missing)}"
        )
    run("apt-get", "update", "-qq")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing, env=environment)


def _present(sign: str) -> bool:
    return Path(sign).exists() if sign.startswith("/") else shutil.which(sign, path=f"{os.environ.get('PATH', '')}:{SYSTEM_FOLDERS}") is not None
