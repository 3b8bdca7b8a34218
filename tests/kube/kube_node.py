"""The one node of a test cluster: containerd, kubelet, kube-proxy and CoreDNS as processes, and their configuration."""

from __future__ import annotations

import json
from pathlib import Path

import requests

from kube_host import Place
from kube_images import pause_image
from kube_processes import KubeError, Processes, run

NODE_BINARIES = ("kubelet", "kube-proxy", "coredns", "containerd", "containerd-shim-runc-v2", "ctr", "bridge", "loopback", "host-local", "portmap", "runc")
NODE_NAME = "node1"
PODS = "10.87.0.0/24"
DOMAIN = "cluster.local"
SANDBOX_IMAGE = "localhost/pause:1"
START_SECONDS = 120.0


class Node:
    """Starts the daemons of a node in the place's network namespace, with all their files below `state`."""

    def __init__(self, state: Path, binaries: dict[str, Path], place: Place, processes: Processes) -> None:
        self._state, self._binaries, self._place, self._processes = state, binaries, place, processes
        self._socket = state / "run" / "containerd.sock"
        self._snapshotter = "overlayfs"

    def start_containerd(self) -> None:
        """containerd with the pause image, ready for `load_image`."""
        for folder in ("cni", "run"):
            (self._state / folder).mkdir(exist_ok=True)
        self._snapshotter = "overlayfs" if self._can_overlay() else "native"
        (self._state / "cni/10-pods.conflist").write_text(json.dumps(self._network(), indent=2))
        (self._state / "containerd.toml").write_text(self._containerd_settings())
        path = ":".join(sorted({str(file.parent) for file in self._binaries.values()}))
        command: list[str | Path] = [self._binaries["containerd"], "--config", self._state / "containerd.toml"]
        self._processes.start("containerd", command, {"PATH": f"{path}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"})
        self._processes.until("containerd", self._socket.exists, START_SECONDS, str(self._socket))
        self.load_image(pause_image(self._state / "pause.tar", SANDBOX_IMAGE))

    def start_kubelet(self, kubeconfig: Path) -> None:
        (self._state / "resolv.conf").write_text(f"nameserver {self._place.node_address}\n")
        (self._state / "kubelet.json").write_text(json.dumps(self._kubelet_settings(), indent=2))
        flags = [f"--hostname-override={NODE_NAME}", f"--node-ip={self._place.node_address}", f"--root-dir={self._state}/kubelet"]
        command: list[str | Path] = [self._binaries["kubelet"], f"--config={self._state}/kubelet.json", f"--kubeconfig={kubeconfig}", *flags]
        self._processes.start("kubelet", [*command, f"--cert-dir={self._state}/kubelet/pki"])

    def start_proxy(self, kubeconfig: Path) -> None:
        """kube-proxy leaves the machine's connection tracking settings as they are."""
        tracking = [f"--conntrack-{limit}=0" for limit in ("max-per-core", "tcp-timeout-established", "tcp-timeout-close-wait")]
        flags = [f"--hostname-override={NODE_NAME}", f"--cluster-cidr={PODS}", "--proxy-mode=nftables", *tracking]
        self._processes.start("kube-proxy", [self._binaries["kube-proxy"], f"--kubeconfig={kubeconfig}", *flags])

    def start_dns(self, kubeconfig: Path) -> None:
        address = self._place.node_address
        (self._state / "Corefile").write_text(
            f".:53 {{\n  bind {address}\n  errors\n  ready {address}:8181\n  kubernetes {DOMAIN} {{\n    kubeconfig {kubeconfig}\n    ttl 1\n  }}\n}}\n"
        )
        self._processes.start("coredns", [self._binaries["coredns"], "-conf", self._state / "Corefile"])

    def wait_for_services(self) -> None:
        """Wait until cluster DNS and the proxy answer."""
        self._processes.until("coredns", lambda: self._answers(":8181/ready"), START_SECONDS, "CoreDNS")
        self._processes.until("kube-proxy", lambda: self._answers(":10256/healthz"), START_SECONDS, "kube-proxy")

    def load_image(self, archive: Path) -> None:
        """Import a docker archive into the node."""
        run(self._binaries["ctr"], "-a", self._socket, "-n", "k8s.io", "images", "import", "--local", "--snapshotter", self._snapshotter, archive)

    def _answers(self, place: str) -> bool:
        try:
            return requests.get(f"http://{self._place.node_address}{place}", timeout=5, proxies={"http": ""}).ok
        except (requests.ConnectionError, requests.Timeout):
            return False

    def _can_overlay(self) -> bool:
        """An overlay cannot lie upon an overlay, as in most containers; copying ("native") is slower and works everywhere."""
        folders = {name: self._state / "overlay" / name for name in ("lower", "upper", "work", "merged")}
        for folder in folders.values():
            folder.mkdir(parents=True)
        options = ",".join(f"{name}dir={folders[name]}" for name in ("lower", "upper", "work"))
        try:
            run("mount", "-t", "overlay", "overlay", "-o", options, folders["merged"])
        except KubeError:
            return False
        run("umount", folders["merged"])
        return True

    def _network(self) -> dict[str, object]:
        addresses = {"type": "host-local", "dataDir": f"{self._state}/run/addresses", "ranges": [[{"subnet": PODS}]], "routes": [{"dst": "0.0.0.0/0"}]}
        bridge = {"type": "bridge", "bridge": "pods0", "isGateway": True, "ipMasq": True, "hairpinMode": True, "ipam": addresses}
        return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}]}

    def _containerd_settings(self) -> str:
        folders = sorted({str(self._binaries[name].parent) for name in ("bridge", "loopback", "host-local", "portmap")})
        return f"""version = 3
root = "{self._state}/containerd"
state = "{self._state}/run/containerd"
[grpc]
  address = "{self._socket}"
[plugins."io.containerd.nri.v1.nri"]
  disable = true                       # it would listen on a socket outside of this state
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "{self._snapshotter}"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{SANDBOX_IMAGE}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true        # CAP_SYS_RESOURCE may be missing
  netns_mounts_under_state_dir = true  # so that they are found and unmounted
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = {json.dumps(folders)}
    conf_dir = "{self._state}/cni"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      BinaryName = "{self._binaries["runc"]}"
      Root = "{self._state}/run/runc"
      SystemdCgroup = false
"""

    def _kubelet_settings(self) -> dict[str, object]:
        certificates = self._state / "certificates"
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True}, "x509": {"clientCAFile": f"{certificates}/ca.crt"}},
            "authorization": {"mode": "AlwaysAllow"},
            "tlsCertFile": f"{certificates}/kubelet.crt",
            "tlsPrivateKeyFile": f"{certificates}/kubelet.key",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": self._place.cgroup,
            "failCgroupV1": False,  # some machines still mount cgroup v1
            "failSwapOn": False,
            "oomScoreAdj": 0,  # CAP_SYS_RESOURCE may be missing
            "maxOpenFiles": 10000,  # below the hard limit of small machines
            "evictionHard": {"nodefs.available": "1%", "imagefs.available": "1%", "memory.available": "100Mi"},
            "imageGCHighThresholdPercent": 100,
            "clusterDNS": [self._place.node_address],
            "clusterDomain": DOMAIN,
            "resolvConf": f"{self._state}/resolv.conf",
            "containerRuntimeEndpoint": f"unix://{self._socket}",
            "podLogsDir": f"{self._state}/run/pod-logs",
            "volumePluginDir": f"{self._state}/run/volume-plugins",
            "nodeStatusUpdateFrequency": "5s",
        }
