"""What a cluster takes from the machine, and gives back: a network namespace, a control group, mounts and containers."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kube_processes import KubeError, Processes, end, run, until

CGROUPS = Path("/sys/fs/cgroup")
NAME = "mcore-finetune"
FIXED_FOLDERS = tuple(
    Path(path)
    for path in (
        "/run/containerd/s",
        "/run/containerd",
        "/var/log/containers",
        "/var/lib/cni/results",
        "/var/lib/cni",
        "/var/lib/kubelet/device-plugins",
        "/var/lib/kubelet",
    )
)


@dataclass(frozen=True)
class Place:
    """The names and addresses of one cluster; several clusters differ in the number.

    The namespace has one way out: a pair of virtual cards, over which the host reaches the node. The host forwards nothing, so pods cannot leave.
    """

    number: int

    @property
    def namespace(self) -> str:
        return f"{NAME}-{self.number}"

    @property
    def node_address(self) -> str:
        return f"10.77.{self.number}.1"

    @property
    def host_address(self) -> str:
        return f"10.77.{self.number}.254"

    @property
    def enter(self) -> tuple[str, str]:
        """The start of a command that runs in the namespace. (`ip netns exec` would mount /sys anew and hide the control groups.)"""
        return "nsenter", f"--net=/run/netns/{self.namespace}"

    @property
    def cgroup(self) -> str:
        """Two kubelets must not see each other's pods, so each has a control group of its own."""
        return f"/{self.namespace}"


def reserve(state: Path) -> Place:
    """Take the first free number, make its namespace and control group, and note the number in the state."""
    for number in range(1, 250):
        place = Place(number)
        network = place.node_address.removesuffix("1")
        if network in run("ip", "-4", "route", "show", "table", "all") or not _add_namespace(place):
            continue
        (state / "place").write_text(str(number))
        _connect(place)
        _make_cgroups(place)
        return place
    raise KubeError("no free network 10.77.x.0/24 on this machine: do clusters of earlier runs still stand? make cluster-down ends them")


def _add_namespace(place: Place) -> bool:
    """False where it exists: another cluster's."""
    if Path(f"/run/netns/{place.namespace}").exists():
        return False
    run("ip", "netns", "add", place.namespace)
    return True


def _connect(place: Place) -> None:
    namespace, host, node = place.namespace, f"ftk{place.number}-host", f"ftk{place.number}-node"
    run("ip", "link", "add", host, "type", "veth", "peer", "name", node, "netns", namespace)
    run("ip", "address", "add", f"{place.host_address}/24", "dev", host)
    run("ip", "link", "set", host, "up")
    run("ip", "-n", namespace, "link", "set", "lo", "up")
    run("ip", "-n", namespace, "address", "add", f"{place.node_address}/24", "dev", node)
    run("ip", "-n", namespace, "link", "set", node, "up")
    run("ip", "-n", namespace, "route", "add", "default", "via", place.host_address)
    run(*place.enter, "sysctl", "-qw", "net.ipv4.ip_forward=1")
    if Path("/proc/sys/net/bridge").exists():
        run(*place.enter, "sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=1")


def _hierarchies() -> list[Path]:
    """The roots of the control groups: one with cgroup v2, one for each controller with v1."""
    if (CGROUPS / "cgroup.controllers").exists():
        return [CGROUPS]
    return sorted(folder for folder in CGROUPS.iterdir() if (folder / "cgroup.procs").exists() and not folder.is_symlink())


def _make_cgroups(place: Place) -> None:
    for root in _hierarchies():
        (root / place.namespace).mkdir(exist_ok=True)
        if root == CGROUPS:
            controllers = " ".join(f"+{name}" for name in (root / "cgroup.controllers").read_text().split())
            (root / "cgroup.subtree_control").write_text(controllers)


def demolish(state: Path) -> None:
    """End a cluster whose state is here, whoever started it, and remove every process, mount, namespace, control group and file of it."""
    processes = Processes(state)
    processes.stop(*(name for name in processes.names() if name != "containerd"))
    _end_containers(state)
    processes.stop("containerd")
    end(_shims(state), grace_seconds=0)
    _unmount(state)
    if (state / "place").exists():
        place = Place(int((state / "place").read_text()))
        if Path(f"/run/netns/{place.namespace}").exists():
            run("ip", "netns", "del", place.namespace)
        until(lambda: _remove_cgroups(place), 10, f"removal of control group {place.cgroup}")
    _remove_strays(state)
    _leave_netns()
    run("rm", "-rf", "--one-file-system", state)


def _end_containers(state: Path) -> None:
    """Kill the first process of each container, which ends the rest, and remove the sockets of the helpers."""
    tasks = sorted((state / "run/containerd/io.containerd.runtime.v2.task/k8s.io").glob("*"))
    end([int((task / "init.pid").read_text()) for task in tasks if (task / "init.pid").exists()], grace_seconds=0)
    for task in tasks:
        if (task / "bootstrap.json").exists():
            address = json.loads((task / "bootstrap.json").read_text())["address"]
            Path(address.removeprefix("unix://")).unlink(missing_ok=True)


def _shims(state: Path) -> list[int]:
    """containerd's helpers, one for each pod, outlive it."""
    mark = f"{state}/run/containerd.sock".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if b"containerd-shim" in words[0] and mark in words:
                found.append(int(folder.name))
    return found


def _mounts() -> list[str]:
    return [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]


def _unmount(state: Path) -> None:
    for mount in sorted((mount for mount in _mounts() if mount.startswith(f"{state}/")), reverse=True):
        run("umount", "--lazy", mount)


def _remove_cgroups(place: Place) -> bool:
    """Remove the control groups bottom up; False while processes in them are still ending."""
    for root in _hierarchies():
        top = root / place.namespace
        folders = [Path(folder) for folder, _, _ in os.walk(top, topdown=False)]
        try:
            for folder in folders:
                folder.rmdir()
        except OSError:
            return False
    return True


def _leave_netns() -> None:
    """The first `ip netns add` mounts the folder of namespaces upon itself; undone when none is left."""
    folder = Path("/run/netns")
    if folder.exists() and not any(folder.iterdir()):
        if str(folder) in _mounts():  # Path.is_mount does not see a folder that is mounted upon itself
            run("umount", folder)
        folder.rmdir()


def _remove_strays(state: Path) -> None:
    """kubelet, containerd and the CNI library use a few fixed places, whatever their settings say."""
    for link in Path("/var/log/containers").glob("*.log"):
        if link.is_symlink() and str(link.readlink()).startswith(f"{state}/"):
            link.unlink()
    for result in Path("/var/lib/cni/results").glob("*"):
        if str(state) in result.read_text():
            result.unlink()
    if list(Path("/run/netns").glob(f"{NAME}-*")):
        return  # another cluster uses these
    Path("/var/lib/kubelet/device-plugins/kubelet.sock").unlink(missing_ok=True)
    for folder in FIXED_FOLDERS:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
