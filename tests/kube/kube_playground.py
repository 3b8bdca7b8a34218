"""`make cluster` and `make cluster-down`: a Kubernetes with one node to play with."""

from __future__ import annotations

import os
import sys
import time

from kube_build import say
from kube_cluster import remove_playground, start_playground
from kube_processes import KubeError


def up() -> None:
    started = time.monotonic()
    cluster = start_playground()
    folders = dict.fromkeys(str(cluster.binaries[name].parent) for name in ("kubectl", "helm", "ctr"))
    say(f"the node is ready after {time.monotonic() - started:.0f} s; `make cluster-down` ends the cluster")
    print(f"export KUBECONFIG={cluster.kubeconfig}")
    print(f"export PATH={':'.join(folders)}:$PATH")
    print("kubectl get nodes")
    print(f"ctr --address {cluster.state}/run/containerd.sock --namespace k8s.io images import IMAGE.tar   # there is no registry")


def down() -> None:
    if not remove_playground():
        say("no cluster stands")


def main() -> int:
    commands = {"up": up, "down": down}
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        print(f"usage: {sys.argv[0]} up|down", file=sys.stderr)
        return os.EX_USAGE
    try:
        commands[sys.argv[1]]()
    except KubeError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
