"""Fixtures of the end-to-end tests: one cluster with the operator installed by its chart."""

from __future__ import annotations

from kube_fixtures import cluster
from platform_fixtures import platform

__all__ = ["cluster", "platform"]
