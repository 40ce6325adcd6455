"""The front door in Python: one import line for the whole loop; the command line is made of it, too.

    from muxtune.api import plan
    planned = plan("workload.yaml", cluster="testbed-a")

Torch and simpy are loaded by the calls that need them.
"""

from muxtune.api.calls import (
    compare,
    load_cluster,
    load_model,
    load_plan,
    load_workload,
    plan,
    profile,
    run,
    simulate,
    sweep,
    validate,
)
from muxtune.api.results import Compared, Executed, Planned, Profiled, Simulated, Swept, Validated

__all__ = [
    "Compared",
    "Executed",
    "Planned",
    "Profiled",
    "Simulated",
    "Swept",
    "Validated",
    "compare",
    "load_cluster",
    "load_model",
    "load_plan",
    "load_workload",
    "plan",
    "profile",
    "run",
    "simulate",
    "sweep",
    "validate",
]
