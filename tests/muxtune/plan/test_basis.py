"""A prediction says what it belongs to: a plan that was edited afterwards is refused, with the field."""

import json

import pytest

from muxtune.plan import Orchestration, Plan, check_plan, finish_plan, load_plan
from muxtune.plan.basis import check_prediction_basis, prediction_basis
from muxtune.policies import plan_problem
from muxtune.support.errors import SpecError
from sim import simulate_plan
from tests.muxtune.planning.problems import FakeCosts, make_problem
from tests.plans import changed, make_plan
from tests.sim.plans import launched_plan

SHARED = Orchestration(mode="interleaved", contention=0.25)


def content_of(plan):
    return json.loads(plan.model_dump_json())


def set_at(content, path, value):
    *parents, last = path
    for part in parents:
        content = content[part]
    content[last] = value


def leaves(content, path=()):
    if isinstance(content, dict | list) and content:
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from leaves(value, (*path, key))
    else:
        yield path, content


def another(value):
    """Something else of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return 2 * value + 1
    return {"x": "y"} if isinstance(value, dict) else "something else" if value is None else f"{value}x"


EDITS = [
    (
        ("decisions", "parallelism", "layers_per_stage"),
        [3, 5],
        "decisions.parallelism.layers_per_stage = [3, 5]",
    ),
    (("decisions", "cluster", "device", "name"), "h100", "decisions.cluster.device.name = 'h100'"),
    (("decisions", "cluster", "ranks"), 4, "decisions.cluster.ranks = 4"),
    (
        ("decisions", "cluster", "within_node"),
        {"name": "slow", "latency_s": 1e-3, "bandwidth_bytes_per_s": 1e8},
        "decisions.cluster.within_node",
    ),
    (("decisions", "model", "hidden"), 512, "decisions.model.hidden = 512"),
    (("decisions", "model", "dtype"), "bfloat16", "decisions.model.dtype = 'bfloat16'"),
    (("decisions", "model", "tied_embeddings"), True, "decisions.model.tied_embeddings = True"),
    (("decisions", "costs", "digest"), "1" * 64, "decisions.costs.digest = '1111"),
    (("decisions", "costs", "device"), "cuda", "decisions.costs.device = 'cuda'"),
    (("decisions", "tasks", 0, "peft", "r"), 64, "decisions.tasks.a.peft.r = 64"),
    (("decisions", "tasks", 1, "peft", "targets"), ["q_proj"], "decisions.tasks.b.peft.targets = ['q_proj']"),
    (("decisions", "tasks", 1, "peft", "dropout"), 0.1, "decisions.tasks.b.peft.dropout = 0.1"),
    (("decisions", "tasks", 2, "max_length"), 64, "decisions.tasks.c.max_length = 64"),
    (("decisions", "tasks", 0, "steps"), 400, "decisions.tasks.a.steps = 400"),
    (("decisions", "tasks", 0, "dataset", "lengths"), "rte", "decisions.tasks.a.dataset.lengths = 'rte'"),
    (("decisions", "tasks", 0, "seed"), 3, "decisions.tasks.a.seed = 3"),  # of drawn lengths
    (("derived", "htasks", 0, "tokens_per_microbatch"), 256, "derived.htasks = [{"),
    (("decisions", "htasks", 1, "instance"), 1, "decisions.htasks[1].instance = 1"),
    (("decisions", "orchestration", "mode"), "intra", "decisions.orchestration.mode = 'intra'"),
    (("derived", "contention"), 0.5, "derived.contention = 0.5"),
    (("decisions", "orchestration", "adapters"), "separate", "decisions.orchestration.adapters = 'separate'"),
    (("decisions", "execution", "attention"), "loop", "decisions.execution.attention = 'loop'"),
    (
        (
            "decisions",
            "template",
        ),
        "gpipe",
        "decisions.template = 'gpipe'",
    ),
    (("predicted", "iteration_s"), 1.0, "predicted.iteration_s = 1.0"),
    (("predicted", "fwd_s", 0, 0), 1.0, "predicted.fwd_s = [[1.0"),
]


@pytest.mark.parametrize(("path", "value", "named"), EDITS, ids=lambda v: str(v)[:60])
def test_an_edited_plan_is_refused_with_the_field(path, value, named, tmp_path):
    content = content_of(make_plan())
    set_at(content, path, value)
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(SpecError) as caught:
        load_plan(tmp_path / "plan.json")
    message = str(caught.value)
    assert message.removeprefix(f"{tmp_path}/plan.json: ").startswith(named)
    assert "expected what the plan's times and memory were predicted for" in message
    assert message.endswith(f"; muxtune plan --reprice {tmp_path}/plan.json predicts them anew")
    assert "\n" not in message


FREE = {
    "decisions.policy_options",
    "decisions.objective",
    "decisions.policy",
    "decisions.model.name",
    "decisions.model.init_seed",
    "decisions.model.norm_eps",
    "decisions.model.rope_theta",
    "decisions.cluster.name",
    "decisions.cluster.device.memory_bytes",
    "decisions.cluster.device.reserved_bytes",
    "decisions.tasks.peft.alpha",
    "decisions.tasks.learning_rate",
    "decisions.tasks.lr_schedule",
    "decisions.tasks.warmup_steps",
    "decisions.tasks.weight_decay",
    "decisions.tasks.abort_grad_norm",
    "decisions.tasks.max_grad_norm",
}
"""Labels, places, and what decides results but neither a duration nor a byte."""


@pytest.mark.parametrize(
    "plan", [make_plan(orchestration=SHARED), launched_plan("interleaved")], ids=["", "tp"]
)
def test_every_field_counts_unless_it_is_known_to_be_free(plan):
    """Each leaf of the file is replaced; what a new field does is decided by nobody's forgetting."""
    content, basis = content_of(plan), prediction_basis(plan)
    for path, value in list(leaves(content)):
        name = ".".join(str(part) for part in path if not isinstance(part, int))
        if name.startswith("predicted.made_for") or name in {
            "schema_version",
            "decisions.tasks.id",
            "decisions.htasks.task_ids",
        }:
            continue
        changed = content_of(plan)
        set_at(changed, path, another(value))
        rebuilt = Plan.model_construct(**dict(plan))
        object.__setattr__(rebuilt, "model_dump", lambda mode, kept=changed: json.loads(json.dumps(kept)))
        differs = prediction_basis(rebuilt) != basis
        assert differs == (name not in FREE), name


LEGITIMATE = [
    (("decisions", "tasks", 0, "learning_rate"), 1e-5),
    (("decisions", "tasks", 0, "weight_decay"), 0.1),
    (("decisions", "tasks", 2, "warmup_steps"), 2),
    (("decisions", "tasks", 2, "lr_schedule"), "cosine"),
    (("decisions", "tasks", 0, "max_grad_norm"), 1.0),
    (("decisions", "tasks", 0, "abort_grad_norm"), 9.0),
    (("decisions", "tasks", 0, "peft", "alpha"), 16.0),
    (
        (
            "decisions",
            "policy",
        ),
        "mine",
    ),
    (("decisions", "model", "name"), "my-llama"),
    (("decisions", "cluster", "name"), "the-box-under-the-desk"),
    (("decisions", "cluster", "device", "memory_bytes"), 10**12),
]


@pytest.mark.parametrize(("path", "value"), LEGITIMATE, ids=str)
def test_what_changes_neither_times_nor_memory_may_be_edited(path, value):
    content = content_of(make_plan())
    set_at(content, path, value)
    check_plan(Plan.model_validate(content))


def test_a_task_may_be_renamed_everywhere():
    text = make_plan().model_dump_json().replace('"a"', '"tenant.7"')
    plan = Plan.model_validate_json(text)
    check_plan(plan)
    content = content_of(plan)
    content["decisions"]["tasks"][0]["peft"]["r"] = 2
    with pytest.raises(SpecError, match=r"^plan: decisions\.tasks\.tenant\.7\.peft\.r = 2: "):
        check_plan(Plan.model_validate(content))


def test_the_seed_of_a_file_that_is_read_in_order_moves_no_data(tmp_path):
    content = content_of(make_plan())
    content["decisions"]["tasks"][0]["dataset"] = {"path": "/data/a.jsonl", "sha256": "0" * 64}
    content = content_of(finish_plan(Plan.model_validate(content)))
    content["decisions"]["tasks"][0] |= {"seed": 9, "dataset": {"path": "/data/a.jsonl", "sha256": "0" * 64}}
    check_plan(Plan.model_validate(content))
    content["decisions"]["tasks"][0]["shuffle"] = True
    with pytest.raises(SpecError, match=r"tasks\.a\.seed = 9: .* \(nor are decisions\.tasks\.a\.shuffle as"):
        check_plan(Plan.model_validate(content))


def test_another_order_of_the_pipeline_is_refused():
    """Its memory may be several times larger, and nobody has played it."""
    flush, gpipe = make_plan(template="flush"), make_plan(template="gpipe")
    edited = changed(flush, schedule=gpipe.schedule, template="gpipe")
    with pytest.raises(SpecError, match=r"^plan: decisions\.template = 'gpipe': .*--reprice PLAN"):
        check_plan(edited)
    check_plan(finish_plan(edited))


def test_several_edits_are_counted():
    content = content_of(make_plan())
    for task in content["decisions"]["tasks"]:
        task["steps"], task["peft"]["r"] = 9, 2
    content["decisions"]["costs"]["profile_id"] = "another"
    with pytest.raises(SpecError) as caught:
        check_plan(Plan.model_validate(content))
    message = str(caught.value)
    assert message.startswith("plan: decisions.costs.profile_id = 'another': expected")
    assert "(nor are decisions.tasks.a, decisions.tasks.b, decisions.tasks.c as they were)" in message


def test_one_edit_of_all_tasks_names_each():
    content = content_of(make_plan())
    for task in content["decisions"]["tasks"]:
        task["steps"] = 9
    with pytest.raises(
        SpecError, match=r"^plan: decisions\.tasks\.a\.steps = 9: .*are decisions\.tasks\.b\.steps, "
    ):
        check_plan(Plan.model_validate(content))


def test_another_number_of_tasks_is_an_edit_of_each_field():
    plan = make_plan()
    without = changed(plan, htasks=plan.htasks[:1])
    with pytest.raises(SpecError, match=r"^plan: decisions\.htasks\[1\]\.task_ids = None: "):
        check_prediction_basis(without)


def test_a_plan_from_before_there_were_digests_is_refused(tmp_path):
    content = content_of(make_plan())
    del content["predicted"]["made_for"]
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(SpecError, match=r"plan\.json: predicted\.made_for = \{\}: expected digests of what"):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "name", ["k" * 300, "tasks[x]", "tasks[9999999999]", "", "a\x1b[31mb", "decisions.htasks[-1]"]
)
def test_digests_of_what_is_no_field_are_refused_in_a_short_line(name, tmp_path):
    content = content_of(make_plan())
    content["predicted"]["made_for"][name] = "0" * 10
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    with pytest.raises(
        SpecError, match=r"predicted\.made_for = .*: expected names of the plan's fields"
    ) as error:
        load_plan(path)
    assert len(str(error.value)) < 300 + len(str(path))


def test_a_simulation_belongs_to_its_plan():
    plan = make_plan()
    played = changed(plan, predicted=simulate_plan(plan).predicted)
    check_plan(played)


def test_memory_beyond_the_device_is_refused_wherever_a_plan_is_read():
    content = content_of(make_plan())
    content["decisions"]["cluster"]["device"]["memory_bytes"] = 1000
    with pytest.raises(SpecError, match=r"peak_memory_bytes = 95\.4 MiB: expected at most 1000 bytes, the"):
        check_plan(Plan.model_validate(content))


IMPOSSIBLE = [
    (("fwd_s", 0, 0), -0.5, "predicted.fwd_s.0.0 = -0.5: expected greater than 0"),
    (("bwd_s", 0, 0), -5.0, "predicted.bwd_s.0.0 = -5.0: expected greater than 0"),
    (("bwd_s", 1, 1), 0.0, "predicted.bwd_s.1.1 = 0.0: expected greater than 0"),
    (("fwd_s", 0, 0), 1e308, "predicted.fwd_s.0.0 = 1e+308: expected less than or equal to 1000000000"),
    (("fwd_s", 0, 0), float("nan"), "predicted.fwd_s.0.0 = nan: expected "),
    (("p2p_s", 0), -1.0, "predicted.p2p_s.0 = -1.0: expected greater than or equal to 0"),
    (("iteration_s",), -3, "predicted.iteration_s = -3: expected greater than 0"),
    (("iteration_s",), 0, "predicted.iteration_s = 0: expected greater than 0"),
    (("tokens_per_s",), -1, "predicted.tokens_per_s = -1: expected greater than 0"),
    (("bubble_fraction",), 1.5, "predicted.bubble_fraction = 1.5: expected less than 1"),
    (("peak_memory_bytes", 0), -1, "predicted.peak_memory_bytes.0 = -1: expected greater than 0"),
    (("makespan_s",), float("inf"), "predicted.makespan_s = inf: expected "),
    (("clock_s", 0, "seconds", 0), 0.0, "predicted.clock_s.0.seconds.0 = 0.0: expected greater than 0"),
]


@pytest.mark.parametrize(("path", "value", "message"), IMPOSSIBLE, ids=lambda v: str(v)[:40])
def test_times_that_nothing_takes_are_refused(tmp_path, path, value, message):
    content = content_of(make_plan(orchestration=SHARED))
    set_at(content["predicted"], path, value)
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(SpecError) as caught:
        load_plan(tmp_path / "plan.json")
    assert str(caught.value).startswith(f"{tmp_path}/plan.json: {message}")


@pytest.mark.parametrize("seconds", [-1.0, 0.0, 1e10, float("nan")])
@pytest.mark.parametrize("policy", ["nemo", "muxtune"])
def test_own_costs_that_cannot_be_are_refused_instead_of_searched_with_for_ever(policy, seconds):

    class Wrong(FakeCosts):
        def action_s(self, operators_s, phase):
            return seconds

    with pytest.raises(
        SpecError, match=r"^costs fake: forwards of t0.* = \[.*\]: expected seconds above 0, and"
    ):
        plan_problem(make_problem(costs=Wrong()), policy=policy)


def test_edited_digests_are_refused_like_edited_fields():
    plan = make_plan()
    for name in plan.predicted.made_for:
        made_for = {**plan.predicted.made_for, name: "0123456789"}
        edited = changed(plan, predicted=plan.predicted.model_copy(update={"made_for": made_for}))
        with pytest.raises(SpecError, match=r"^plan: \S+ = .*muxtune plan"):
            check_prediction_basis(edited)
