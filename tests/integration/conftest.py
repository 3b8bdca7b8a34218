"""Fixtures of the integration tests."""

from __future__ import annotations

from kube_fixtures import api
from operator_fixtures import operator, operator_kubeconfig, team, trainers

__all__ = ["api", "operator", "operator_kubeconfig", "team", "trainers"]
