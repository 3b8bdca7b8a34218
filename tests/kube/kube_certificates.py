"""Certificates and kubeconfig files of a test cluster, made with openssl."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from pathlib import Path

from kube_processes import run

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")  # quick to make, and Kubernetes takes it everywhere


class Authority:
    """A certificate authority that lives in a folder, with the key that signs service-account tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certificate = folder / "ca.crt"
        self.token_key, self.token_public_key = folder / "tokens.key", folder / "tokens.pub"
        if not self.certificate.exists():
            self._create()

    def _create(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        run("openssl", "req", "-x509", *_KEY, "-keyout", self.key("ca"), "-out", self.certificate, "-days", "3650", "-subj", "/CN=test-authority")
        run("openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", self.token_key)
        run("openssl", "ec", "-in", self.token_key, "-pubout", "-out", self.token_public_key)

    def key(self, name: str) -> Path:
        return self.folder / f"{name}.key"

    def issue(self, name: str, user: str, groups: Sequence[str] = (), hosts: Sequence[str] = ()) -> Path:
        """Make `<name>.crt` and `<name>.key` for a user (or a server that answers to `hosts`) and return the certificate."""
        certificate, request, extensions = (self.folder / f"{name}.{ending}" for ending in ("crt", "csr", "ext"))
        subject = "".join(f"/O={group}" for group in groups) + f"/CN={user}"
        names = ",".join(f"{'IP' if host[0].isdigit() else 'DNS'}:{host}" for host in hosts)
        lines = ["keyUsage=digitalSignature", "extendedKeyUsage=serverAuth,clientAuth", *([f"subjectAltName={names}"] if names else [])]
        extensions.write_text("\n".join(lines))
        run("openssl", "req", *_KEY, "-keyout", self.key(name), "-out", request, "-subj", subject)
        authority = ("-CA", self.certificate, "-CAkey", self.key("ca"), "-set_serial", f"0x{secrets.token_hex(16)}")
        run("openssl", "x509", "-req", "-in", request, *authority, "-days", "3650", "-out", certificate, "-extfile", extensions)
        return certificate

    def kubeconfig(self, file: Path, server: str, name: str, user: str, groups: Sequence[str] = ()) -> Path:
        """Write a kubeconfig (JSON is YAML) whose user is known by a client certificate."""
        certificate = self.issue(name, user, groups)
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": server, "certificate-authority": str(self.certificate)}}],
            "users": [{"name": name, "user": {"client-certificate": str(certificate), "client-key": str(self.key(name))}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
            "current-context": "test",
        }
        file.write_text(json.dumps(content, indent=2) + "\n")
        return file
