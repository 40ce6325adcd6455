"""Conditions that measured costs hold under: what must be the same wherever they are used, or added to."""

from __future__ import annotations

import hashlib
import json
import os
import platform

from muxtune.costs.applicability import KERNELS_VARIABLE
from muxtune.costs.profile import PROFILE_FORMAT, Profile
from muxtune.model import ModelSpec
from muxtune.support.machine import package_version, processor_name, usable_cores

_SPEED_VARIABLES = (
    KERNELS_VARIABLE,
    *("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"),
    *("MALLOC_ARENA_MAX", "LD_PRELOAD"),
)
"""Environment variables that decide which kernels, instructions and allocator operators run with."""

_PACKAGES = ("torch", "numpy", "muxtune")


def conditions_digest(model: ModelSpec, ranks: int) -> str:
    """Digest of all that changes what an operator takes: shapes and dtype, machine, versions, settings."""
    shapes = model.model_dump_json(exclude={"name", "source", "init_seed"})  # costs depend on nothing else
    key = json.dumps([shapes, ranks, machine_digest()])
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def machine_digest() -> str:
    """Digest of this machine, the cores that processes have on it, versions, and settings of kernels."""
    machine = [platform.node(), platform.machine(), processor_name(), usable_cores(), platform.release()]
    versions = [platform.python_version(), *map(package_version, _PACKAGES)]
    settings = [os.environ.get(name, "") for name in _SPEED_VARIABLES]
    return hashlib.sha256(json.dumps([PROFILE_FORMAT, machine, versions, settings]).encode()).hexdigest()[:16]


_SHAPE_FIELDS = (
    "family hidden ffn heads kv_heads head_dim vocab max_positions activation attention_bias mlp_bias dtype"
).split()


def foreign_conditions(profile: Profile, model: ModelSpec, device: str, ranks: int) -> str | None:
    """What differs between the session of a profile and one here and now, in words; None if nothing does."""
    then = profile.provenance
    pairs: list[tuple[str, object, object]] = [
        ("device", then.device, device),
        ("ranks", then.ranks, ranks),
        *((name, getattr(then.model, name), getattr(model, name)) for name in _SHAPE_FIELDS),
        *(
            (package, then.versions[package], package_version(package))
            for package in _PACKAGES
            if package in then.versions
        ),
    ]
    if device == "cpu":
        pairs.append(("processor", then.processor, processor_name()))
        pairs.append(("cores", then.settings.get("cores", str(usable_cores())), str(usable_cores())))
    kernels = os.environ.get(KERNELS_VARIABLE) or then.settings.get("kernels")
    pairs.append(("kernels", then.settings.get("kernels"), kernels))
    differing = [f"{name} {was}, here {now}" for name, was, now in pairs if was != now]
    return "; ".join(differing) or None
