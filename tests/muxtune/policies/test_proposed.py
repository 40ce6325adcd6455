"""A policy of another package that does not work costs itself alone, and is named."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from experiments.comparison import run_comparison
from muxtune.planning.decisions.options import FREE
from muxtune.planning.decisions.structure import Mesh
from muxtune.planning.problem.problem import PlanningProblem
from muxtune.policies import POLICIES, fixed_partition, plan_problem
from muxtune.support.errors import NotEnoughMemoryError, SpecError, UserError
from muxtune.support.registry import PluginError
from muxtune.tasks import Workload
from tests.installed import run_muxtune
from tests.muxtune.cli.conftest import task
from tests.muxtune.policies.gpus import gpu_problem


class Policy:
    """Proposes what a function makes of one structure per mesh with all tasks fused."""

    summary = "a policy of another package"

    def __init__(self, make):
        self.make = make

    def propose(self, problem, options):
        return self.make(fixed_partition(problem, options, [tuple(problem.data)]))


@pytest.fixture
def foreign(monkeypatch):
    """Registers a policy as another package would."""

    def add(make, name="theirs"):
        monkeypatch.setitem(POLICIES._entries, name, Policy(make))
        monkeypatch.setitem(POLICIES._origins, name, f"them 0.1 (entry point them:{name})")
        return name

    return add


def one(**changes):
    return lambda found: [replace(found[0], **changes)]


def with_shape(**changes):
    def make(found):
        htask = found[0].htasks[0]
        return [replace(found[0], htasks=(replace(htask, shape=replace(htask.shape, **changes)),))]

    return make


def key_error(found):
    return {}["missing"]


def late_error(found):
    yield found[0]
    raise RuntimeError("two\nlines \x1b[31m")


IMPOSSIBLE = {
    "raises": (key_error, r"propose raised KeyError: 'missing' \(test_proposed\.py:\d+\)"),
    "raises-late": (late_error, r"propose raised RuntimeError: two lines \\x1b\[31m \(test_proposed"),
    "none": (lambda found: None, "propose returned None: expected a list of PlanStructure"),
    "empty": (lambda found: [], "propose returned no structure"),
    "number": (lambda found: 3, "propose returned 3: expected a list"),
    "endless": (lambda found: itertools.repeat(found[0]), "more than 100,000 structures"),
    "partitions": (lambda found: [[("a",)]], r"\[0\] = \[\('a',\)\]: expected a PlanStructure"),
    "layers": (
        one(mesh=Mesh((3, 3))),
        r"\[0\]\.mesh\.layers_per_stage = \(3, 3\): expected integers above 0",
    ),
    "no-layers": (one(mesh=Mesh(())), r"mesh\.layers_per_stage = \(\): expected"),
    "ranks": (one(mesh=Mesh((16, 16), 1, 64)), r"mesh = 'tp 1, pp 2, dp 64': expected at most 4 ranks"),
    "zero-tp": (one(mesh=Mesh((32,), 0, 1)), r"mesh\.tp = 0: expected at least 1"),
    "heads": (one(mesh=Mesh((32,), 3, 1)), "expected a divisor of 32, the heads"),
    "no-mesh": (one(mesh=None), r"\[0\]\.mesh = None: expected a Mesh"),
    "template": (one(template="zero-bubble"), "template = 'zero-bubble': expected one of flush, continuous"),
    "buckets": (one(buckets=((0,), (0,))), r"buckets = \(\(0,\), \(0,\)\): expected every hTask from 0"),
    "no-htasks": (one(htasks=(), buckets=()), r"htasks\.task_ids = \[\]: expected every task"),
    "twice": (
        lambda found: [replace(found[0], htasks=found[0].htasks * 2, buckets=((0,), (1,)))],
        "expected every task in exactly one hTask",
    ),
    "stranger": (
        lambda found: [replace(found[0], htasks=(replace(found[0].htasks[0], task_ids=("who",)),))],
        r"htasks\[0\]\.task_ids = \('who',\): expected some of",
    ),
    "replicas": (with_shape(replicas=7), r"shape\.replicas = 7: expected"),
    "microbatches": (with_shape(microbatches=0), r"shape\.microbatches = 0: expected at least"),
    "tokens": (with_shape(tokens=1), r"shape\.tokens = 1: expected at least \d+, for the examples"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_cannot_be_is_refused_with_the_package_and_what_it_did(foreign, case):
    make, reason = IMPOSSIBLE[case]
    name = foreign(make)
    named = r"the policy 'theirs' of them 0\.1 \(entry point them:theirs\): "
    with pytest.raises(PluginError, match=f"{named}.*{reason}") as caught:
        plan_problem(gpu_problem(), policy=name)
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)


def test_what_works_is_planned_as_our_own(foreign):
    for make in (lambda found: found, iter, tuple):
        plans = plan_problem(gpu_problem(), policy=foreign(make))
        ours = plan_problem(gpu_problem(), policy="spatial-only")
        assert plans[0].predicted == ours[0].predicted
        assert plans[0].policy == "theirs"


def test_a_users_mistake_stays_the_users(foreign):
    def refuse(found):
        raise SpecError("--partition", "a", "nothing")

    with pytest.raises(SpecError, match="--partition = 'a': expected nothing"):
        plan_problem(gpu_problem(), policy=foreign(refuse))


def with_memory(problem, memory_bytes):
    device = problem.cluster.device.model_copy(update={"memory_bytes": memory_bytes})
    cluster = problem.cluster.model_copy(update={"device": device})
    return PlanningProblem(Workload(tasks=tuple(problem.tasks)), problem.model, cluster, problem.costs)


def test_a_structure_beyond_the_memory_is_left_out(foreign):
    problem = gpu_problem()
    everything = [tuple(problem.data)]
    on_one, on_four = (
        fixed_partition(problem, replace(FREE, tp=1, pp=pp, dp=1, template="flush"), everything)
        for pp in (1, 4)
    )
    needed = max(plan_problem(problem, policy=foreign(lambda _: on_one))[0].predicted.peak_memory_bytes)
    spread = max(plan_problem(problem, policy=foreign(lambda _: on_four))[0].predicted.peak_memory_bytes)
    assert spread < needed - 1  # else the case shows nothing

    def propose(structures):
        policy = Policy(None)
        policy.propose = lambda problem, options: structures
        return policy

    enough, little = with_memory(problem, needed), with_memory(problem, needed - 1)
    name = foreign(None)
    POLICIES._entries[name] = propose(on_one)
    assert plan_problem(enough, policy=name)[0].predicted.peak_memory_bytes == (needed,)
    with pytest.raises(NotEnoughMemoryError, match="memory_bytes of testbed-a = ") as refused:
        plan_problem(little, policy=name)
    assert refused.value.needed_bytes == needed
    POLICIES._entries[name] = propose([*on_one, *on_four])
    assert {plan.parallelism.pp for plan in plan_problem(little, policy=name)} == {4}


def test_a_comparison_has_a_row_for_what_does_not_work(foreign):
    problem = gpu_problem(count=2)
    found = run_comparison(problem, ["nemo", foreign(key_error)])
    planned, refused = found.policies
    assert planned.predicted is not None
    assert refused.predicted is None
    assert "propose raised KeyError: 'missing'" in str(refused.refused)


PACKAGE = """
import module_of_nobody
"""
MODULE = """
from dataclasses import replace
from muxtune.policies import fixed_partition
class Raises:
    summary = "raises"
    def propose(self, problem, options): return {}["missing"]
class Works:
    summary = "works"
    def propose(self, problem, options): return fixed_partition(problem, options, [tuple(problem.data)])
class Mute:
    propose = Works.propose
"""
POINTS = """[muxtune.policies]
broken = theirs_broken:P
mute = theirs:Mute
nemo = theirs:Works
raises = theirs:Raises
works = theirs:Works
[muxtune.operators]
broken = theirs_broken:P
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder of packages as pip leaves it, with one that registers good and bad policies."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "theirs.py").write_text(MODULE)
    (folder / "theirs_broken.py").write_text(PACKAGE)
    info = folder / "theirs-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(POINTS)
    content = {"backbone": "llama2-7b", "tasks": [task("a", steps=2)]}
    (folder / "w.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.mark.integration
def test_the_policies_of_others_are_listed_with_what_is_wrong_with_them(site, tmp_path):
    listed = run_muxtune(site, "policies", "--json", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    content = json.loads(listed.stdout)
    names = {policy["name"] for policy in content["policies"]}
    assert {"muxtune", "nemo", "works", "raises"} <= names
    assert [fault["name"] for fault in content["faults"]] == ["broken", "mute", "nemo"]
    assert all("theirs 0.1 (entry point theirs" in fault["reason"] for fault in content["faults"])
    assert listed.stderr.count("is left out") == 3


@pytest.mark.integration
@pytest.mark.parametrize(
    ("policy", "code", "said"),
    [
        ("muxtune", 0, ""),
        ("nemo", 0, ""),
        ("works", 0, ""),
        (
            "raises",
            2,
            "the policy 'raises' of theirs 0.1 (entry point theirs:Raises): propose raised KeyError",
        ),
        ("broken", 2, "of theirs 0.1 (entry point theirs_broken:P): loading it raised ModuleNotFoundError"),
        ("mute", 2, "(entry point theirs:Mute): summary = None"),
        ("wroks", 2, "no policy named 'wroks'; did you mean 'works'?"),
    ],
)
def test_one_bad_policy_stops_no_other_plan(site, tmp_path, policy, code, said):
    arguments = ("--workload", site / "w.yaml", "--cluster", "testbed-a", "--policy", policy)
    done = run_muxtune(site, "plan", *arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("muxtune: error: ")]
    assert len(errors) == (code != 0)
    assert said in "".join(errors)
    if not code:
        assert "left out" not in done.stderr  # what nobody asked for was not even loaded


@pytest.mark.integration
def test_a_comparison_and_a_sweep_go_on_without_the_bad_ones(site, tmp_path):
    arguments = ("--workload", site / "w.yaml", "--cluster", "testbed-a")
    compared = run_muxtune(site, "compare", *arguments, "--json", cwd=tmp_path)
    assert compared.returncode == 0, compared.stderr
    rows = {row["policy"]: row for row in json.loads(compared.stdout)["policies"]}
    refused = {name for name, row in rows.items() if row["refused"]}
    assert refused == {"broken", "mute", "raises"}
    assert rows["nemo"]["predicted"] is not None
    asked = run_muxtune(site, "compare", *arguments, "--policies", "nemo,broken", cwd=tmp_path)
    assert asked.returncode == 2
    assert "theirs_broken:P" in asked.stderr

    names = ["nemo", "raises", "broken", "works"]
    content = {"workload": str(site / "w.yaml"), "cluster": "testbed-a", "grid": {"policy": names}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    swept = run_muxtune(
        site, "sweep", "sweep.yaml", "--out", "r.parquet", "--jobs", 1, "--json", cwd=tmp_path
    )
    assert swept.returncode == 0, swept.stderr
    summary = json.loads(swept.stdout)
    assert (summary["planned"], summary["refused"], summary["failed"]) == (2, 1, 1)
    reasons = " ".join(failure["reason"] for failure in summary["failures"])
    assert "theirs:Raises" in reasons
    assert "theirs_broken:P" in reasons
