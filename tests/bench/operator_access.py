"""The API server as the benchmark sees it: bare requests, its write counters, and when it has come to rest."""

from __future__ import annotations

import re
import ssl
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import aiohttp

if TYPE_CHECKING:
    from kube_api import ApiServer  # the watcher's process does without

METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
POLL_SECONDS = 0.5
REST_SECONDS, LONGEST_WAIT_SECONDS = 4.0, 180.0
"""The API server rests when nothing but Leases was written for so long. The controller manager writes Endpoints at 20 a second: 50 s after 1,000 jobs."""

Write = tuple[str, str, str]
"""Verb, resource or resource/subresource, code of the answer."""

_REQUESTS = re.compile(r"^apiserver_request_total\{(.*)\} (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')
_WRITING = frozenset(("POST", "PUT", "PATCH", "APPLY", "DELETE", "DELETECOLLECTION"))
_QUESTIONS = frozenset(("tokenreviews", "subjectaccessreviews"))


@dataclass(frozen=True)
class Access:
    """Where the API server is and who an administrator is to it: what a process of the benchmark needs."""

    server: str
    authority: str
    certificate: str
    key: str

    @classmethod
    def of(cls, api: ApiServer) -> Access:
        """Of a running API server."""
        folder = api.authority.folder
        return cls(api.server, str(api.authority.certificate), str(folder / "admin.crt"), str(api.authority.key("admin")))

    def session(self, connections: int) -> aiohttp.ClientSession:
        """A session with so many requests in flight at most."""
        context = ssl.create_default_context(cafile=self.authority)
        context.load_cert_chain(self.certificate, self.key)
        connector = aiohttp.TCPConnector(limit=connections, ssl=context, keepalive_timeout=300)
        return aiohttp.ClientSession(self.server, connector=connector, timeout=aiohttp.ClientTimeout(total=None), read_bufsize=2**20)


async def post(session: aiohttp.ClientSession, path: str, body: bytes) -> None:
    """Create one object; raises aiohttp.ClientResponseError with the API server's message."""
    async with session.post(path, data=body, headers={"Content-Type": "application/json", "Accept": METADATA_ONLY}) as response:
        content = await response.read()
        if response.status != 201:
            raise aiohttp.ClientResponseError(response.request_info, (), status=response.status, message=content.decode(errors="replace")[:1000])


def writes(api: ApiServer) -> Counter[Write]:
    """Writing requests that the API server has counted so far, of everybody. Reading /metrics costs it tenths of a second: not to be polled."""
    found: Counter[Write] = Counter()
    for match in _REQUESTS.finditer(api.get("/metrics")):
        labels = dict(_LABEL.findall(match[1]))
        if labels["verb"] in _WRITING and labels["resource"] not in _QUESTIONS:
            found[labels["verb"], "/".join(filter(None, (labels["resource"], labels["subresource"]))), labels["code"]] += int(float(match[2]))
    return found


def of_resource(counted: Mapping[Write, int], *resources: str) -> int:
    """How many of the writes went to these resources (a subresource counts as its resource's)."""
    return sum(count for (_, resource, _), count in counted.items() if resource.split("/")[0] in resources)


def come_to_rest(api: ApiServer) -> float:
    """Wait until etcd's revision moves by single writes (Leases) only; when the last other change was, monotonic."""
    revision, begun = _revision(api), time.monotonic()
    changed = begun
    while time.monotonic() - changed < REST_SECONDS and time.monotonic() - begun < LONGEST_WAIT_SECONDS:
        time.sleep(POLL_SECONDS)
        newer = _revision(api)
        if newer > revision + 1:
            changed = time.monotonic()
        revision = newer
    return changed


def _revision(api: ApiServer) -> int:
    return int(api.get("/api/v1/namespaces", limit=1)["metadata"]["resourceVersion"])
