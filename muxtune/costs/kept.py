"""Where profiles of this machine are kept, so that a backbone is measured once."""

from __future__ import annotations

from pathlib import Path

from muxtune.costs.conditions import conditions_digest, machine_digest
from muxtune.model import ModelSpec
from muxtune.support.cache import cache_folder
from muxtune.support.files import file_name


def kept_profiles() -> Path:
    """Folder of the kept profiles of this machine."""
    return cache_folder() / "profiles" / machine_digest()


def kept_profile_path(model: ModelSpec, ranks: int) -> Path:
    """Where the profile of this machine for a backbone and a number of ranks is kept.

    The name has a digest of all that changes what an operator takes: shapes and dtype, the machine and the
    cores that processes have on it, versions, and the settings of kernels.
    """
    name = f"{file_name(model.name)}-{model.dtype}-{ranks}-{conditions_digest(model, ranks)}"
    return kept_profiles() / f"{name}.parquet"
