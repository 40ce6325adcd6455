"""Operator costs of a sweep's points, found as by every command."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from muxtune.api.costs import find_costs
from muxtune.cluster import ClusterSpec
from muxtune.costs.base import CostModel
from muxtune.model import ModelSpec
from muxtune.support.user_files import read_user_bytes
from muxtune.tasks import Workload


@dataclass(frozen=True, slots=True)
class FoundCosts:
    """Costs as every command finds them; travels to worker processes."""

    profile: Path | None

    def __call__(self, workload: Workload, model: ModelSpec, cluster: ClusterSpec) -> CostModel:
        """Costs of the profile, or of the cluster's device."""
        return find_costs(self.profile, workload, model, cluster)

    def prepare(self, workload: Workload, model: ModelSpec, cluster: ClusterSpec) -> None:
        """Measure or calibrate this machine's CPU now if need be; workers would do it all at once."""
        if self.profile is None and cluster.device.kind == "cpu":
            self(workload, model, cluster)


def profile_digest(profile: Path | None) -> str:
    """SHA-256 of a profile's file; empty where there is none.

    Raises:
        UserError: It cannot be read.
    """
    if profile is None:
        return ""
    return hashlib.sha256(read_user_bytes(profile, "the profile")).hexdigest()
