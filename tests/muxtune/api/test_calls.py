"""The front door in Python: planning needs one import line, and says what the command line says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from muxtune import api
from muxtune.costs.analytic import AnalyticCosts
from muxtune.costs.collectives import interconnect_of
from muxtune.planning.decisions.options import PlanOptions
from muxtune.policies import fixed_partition
from muxtune.support.errors import SpecError, UserError

WORKLOAD = {
    "backbone": "llama2-7b",
    "tasks": [
        {
            "id": name,
            "peft": {"method": "lora", "r": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]},
            "dataset": {"lengths": lengths},
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "max_length": length,
            "learning_rate": 1.0e-3,
            "steps": 4,
        }
        for name, lengths, length in (("reviews", "sst2", 64), ("questions", "openbookqa", 128))
    ],
}


@pytest.fixture(scope="module")
def planned():
    return api.plan(WORKLOAD, cluster="testbed-a")


def test_a_plan_shows_itself(planned, tmp_path):
    assert {name for htask in planned.htasks for name in htask.task_ids} == {"reviews", "questions"}
    assert len(planned.to_frame()) == len(planned.htasks)
    assert list(planned.to_frame()["microbatches"]) == [htask.microbatches for htask in planned.htasks]
    assert str(planned).startswith("muxtune: 2 tasks in ")
    assert planned._repr_html_().count("<table>") >= 3
    assert planned.plot().axes
    assert api.load_plan(planned.save(tmp_path / "plan.json")) == planned


def test_files_content_and_objects_give_the_same_plan(planned, tmp_path):
    import yaml

    (tmp_path / "w.yaml").write_text(yaml.safe_dump(WORKLOAD))
    for workload in (tmp_path / "w.yaml", str(tmp_path / "w.yaml"), api.load_workload(WORKLOAD)):
        model, cluster = api.load_model("llama2-7b"), api.load_cluster("testbed-a")
        assert api.plan(workload, model=model, cluster=cluster) == planned
    costs = AnalyticCosts("a40", api.load_model("llama2-7b"), interconnect_of(api.load_cluster("testbed-a")))
    assert api.plan(WORKLOAD, cluster="testbed-a", costs=costs) == planned


def test_a_plan_is_simulated_from_object_and_file(planned, tmp_path):
    simulated = api.simulate(planned)
    assert simulated.predicted == planned.predicted
    assert api.simulate(planned.save(tmp_path / "p.json")).predicted == planned.predicted
    frame = simulated.to_frame()
    assert set(frame["kind"]) >= {"F", "B", "STEP"}
    assert (frame["end_s"] >= frame["start_s"]).all()
    assert "lower bound" in simulated._repr_html_()
    assert simulated.save_trace(tmp_path / "trace.json").stat().st_size > 1000
    operators = api.simulate(planned, operators=True)
    assert operators.predicted.iteration_s == pytest.approx(planned.predicted.iteration_s, rel=0.05)
    with pytest.raises(SpecError, match="operators=True"):
        api.simulate(planned, noise=0.1)


def test_own_policies_and_options_are_objects(planned):
    class Apart:
        summary = "Every task is an hTask of its own."

        def propose(self, problem, options):
            return fixed_partition(problem, options, [(task.id,) for task in problem.tasks])

    assert [htask.task_ids for htask in api.plan(WORKLOAD, cluster="testbed-a", policy=Apart()).htasks] == [
        ("reviews",),
        ("questions",),
    ]
    fixed = api.plan(WORKLOAD, cluster="testbed-a", options=PlanOptions(tp=2, pp=2))
    assert (fixed.decisions.parallelism.tp, fixed.decisions.parallelism.pp) == (2, 2)


def test_policies_are_compared(planned):
    compared = api.compare(WORKLOAD, cluster="testbed-a", policies=["nemo", "muxtune"])
    frame = compared.to_frame()
    assert list(frame.index) == ["nemo", "muxtune"]
    assert frame.loc["muxtune", "iteration_s"] == planned.predicted.iteration_s
    assert frame.loc["nemo", "speedup"] == 1
    assert "muxtune" in compared._repr_html_()
    assert [label.get_text() for label in compared.plot().axes[0].get_yticklabels()] == ["nemo", "muxtune"]
    assert "exhaustive" not in api.calls.compared_policies()


def test_a_sweep_becomes_a_frame_and_a_line(tmp_path):
    import yaml

    content = {
        "workload": WORKLOAD,
        "cluster": "testbed-a",
        "grid": {"workload.tasks[*].global_batch_size": [4, 8], "policy": ["nemo", "muxtune"]},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content))
    swept = api.sweep(tmp_path / "s.yaml", tmp_path / "s.parquet", jobs=1)
    assert len(swept.to_frame()) == 4
    figure = swept.plot("workload.tasks[*].global_batch_size")
    assert len(figure.axes[0].lines) == 2
    assert "4 points" in str(swept) or "planned" in str(swept)


def test_what_is_missing_is_one_error(tmp_path):
    with pytest.raises(SpecError, match="a backbone in the workload"):
        api.plan({key: value for key, value in WORKLOAD.items() if key != "backbone"}, cluster="testbed-a")
    with pytest.raises(UserError, match="testbed-z"):
        api.plan(WORKLOAD, cluster="testbed-z")
    with pytest.raises(SpecError, match=r"workload: tasks\.0\.peft\.r"):
        api.load_workload(
            {"tasks": [{**WORKLOAD["tasks"][0], "peft": {**WORKLOAD["tasks"][0]["peft"], "r": 0}}]}
        )


def test_importing_the_front_door_loads_neither_torch_nor_simpy():
    script = (
        "import sys, muxtune.api; print({'torch', 'simpy', 'matplotlib', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
