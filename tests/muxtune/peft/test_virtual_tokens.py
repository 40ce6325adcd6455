"""Prefix and prompt tuning in the domain: what stands in front of a sequence is counted wherever it costs."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest

from muxtune.batches import attention_calls, effective_tokens, layout_step, measure_shape
from muxtune.graph.layer import layer_graph
from muxtune.model import PRESETS
from muxtune.peft import EMBEDDING, Extra, attachments, extra, first_trained, stage_layers
from muxtune.peft.prefix_tuning import PrefixTuningSpec
from muxtune.peft.prompt_tuning import PromptTuningSpec
from muxtune.planning.decisions.structure import HTaskChoice
from muxtune.planning.exact.works import sample_works
from muxtune.support.errors import SpecError
from muxtune.tasks import TaskData
from tests.muxtune.batches.carried import carried_attention_calls
from tests.muxtune.planning.problems import make_problem, make_workload

LLAMA = PRESETS["llama-tiny"]
P = 6
PREFIX = {"method": "prefix_tuning", "num_virtual_tokens": P}
PROMPT = {"method": "prompt_tuning", "num_virtual_tokens": P}
TASKS = ({"peft": PREFIX}, {}, {"peft": PROMPT, "micro_batch_size": 2})


def spec_of(peft):
    return make_workload([{"peft": peft}]).tasks[0].peft


def data_of(tasks=TASKS):
    return dict(make_problem(tasks, model=LLAMA).data)


def test_they_say_what_stands_in_front():
    assert isinstance(spec_of(PREFIX), PrefixTuningSpec)
    assert isinstance(spec_of(PROMPT), PromptTuningSpec)
    assert (extra(spec_of(PREFIX)), extra(spec_of(PROMPT))) == (Extra(keys=P), Extra(rows=P))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft": PREFIX | {"prefix_projection": True}}, r"peft\.prefix_projection = True: expected false"),
        (
            {"peft": PREFIX, "max_length": 8192},
            r"max_length = 8192: expected at most 1018, .* behind 6 virtual",
        ),
        (
            {"peft": PROMPT, "max_length": 1020},
            r"max_length = 1020: expected at most 1018, .* behind 6 virtual",
        ),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(changes, message):
    workload = make_workload([changes])
    with pytest.raises(SpecError, match=message):
        workload.check(PRESETS["gpt2-tiny"])


@pytest.mark.parametrize(
    ("peft", "message"),
    [
        (PROMPT | {"prompt_tuning_init": "TEXT"}, r"prompt_tuning_init = 'TEXT': expected 'RANDOM'"),
        (PREFIX | {"num_virtual_tokens": 0}, r"num_virtual_tokens = 0"),
        (PREFIX | {"layers": [0]}, r"peft\.layers = .*expected no such field"),
    ],
)
def test_bad_parameters_are_named(peft, message):
    with pytest.raises(SpecError, match=message):
        spec_of(peft)


def test_virtual_tokens_are_rows_but_neither_effective_nor_billed():
    tasks = make_workload([{"peft": PROMPT}, {}]).tasks
    prompt, plain = (TaskData(task, data_of()[task.id].examples) for task in tasks)
    plain = TaskData(tasks[1], prompt.examples)
    assert np.array_equal(prompt.lengths, plain.lengths + P)
    assert (prompt.longest, prompt.mean_length) == (plain.longest + P, plain.mean_length + P)
    assert effective_tokens([prompt]) == effective_tokens([plain])
    assert prompt.effective_tokens(1) == plain.effective_tokens(1)
    assert prompt.task.row_tokens == prompt.task.max_length + P
    # Every token attends to the virtual ones as well.
    assert prompt.step_keys == pytest.approx(plain.step_keys + P * plain.step_tokens)


def test_a_plan_bills_examples_alone():
    plain, virtual = (make_problem(({"peft": peft},), model=LLAMA) for peft in (spec_of_lora(), PROMPT))
    tokens = [sum(t.global_batch_size * t.max_length for t in each.tasks) for each in (plain, virtual)]
    assert tokens[0] == tokens[1]
    pads = [measure_shape(list(each.data.values()), "pack").tokens for each in (plain, virtual)]
    assert pads[1] > pads[0]


def spec_of_lora():
    return {"method": "lora", "r": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("alignment", "chunk", "carry"), [("pad", None, 1), ("pack", None, 1), ("chunk", 64, 1), ("chunk", 16, 2)]
)
def test_sampled_work_is_that_of_the_layouts(alignment, chunk, carry):
    data = data_of([task | {"steps": 3} for task in TASKS])  # all of which are looked at
    members = list(data.values())
    shape = measure_shape(members, alignment, chunk_tokens=chunk, microbatches=4, carry=carry)
    works = sample_works(HTaskChoice(task_ids=tuple(data), shape=shape), data)
    fronts = [extra(each.task.peft).keys for each in members]
    steps = [layout_step(shape, [each.batch_lengths(step) for each in members]) for step in range(3)]
    layouts = list(chain.from_iterable(steps))
    begun = Counter(call for layout in layouts for call in attention_calls(layout, fronts))
    behind = Counter(call for layout in layouts for call in carried_attention_calls(layout, fronts))
    found = {tuple(call): n * len(layouts) for n, *call in works.mean.attention}
    assert found == pytest.approx(dict(begun))
    found = {tuple(call): n * len(layouts) for n, *call in works.mean.carried_attention}
    assert found == pytest.approx(dict(behind))
    assert behind


def test_attention_waits_for_the_prefix_and_training_begins_there():
    data = data_of(({"peft": PREFIX},))
    shape = measure_shape(list(data.values()), "pack")
    work = sample_works(HTaskChoice(task_ids=tuple(data), shape=shape), data).mean
    nodes = layer_graph(LLAMA, work, "fwd")
    (place,) = [i for i, node in enumerate(nodes) if node.op.kind == "prefix"]
    attention = [node for node in nodes if node.op.kind == "carried_attention"]
    assert attention
    assert all(place in node.deps for node in attention)
    # Queries, keys and values of the first layer are computed by frozen things alone.
    specs = tuple(each.task.peft for each in data.values())
    begin = first_trained(LLAMA, specs, stage_layers(LLAMA, specs, 0, LLAMA.layers))
    back = layer_graph(LLAMA, work, "bwd", trained=begin.depth)
    products = [node.op.dims for node in back if node.op.kind == "linear"]
    assert len(products) == 3
    assert "prefix" in {node.op.kind for node in back}


def test_ranks_have_their_heads_of_a_prefix_and_all_of_a_prompt():
    prefix, prompt = spec_of(PREFIX), spec_of(PROMPT)
    for tp in (1, 2):
        shard = LLAMA.shard(tp)
        (own,) = attachments(prefix, shard, 0)
        assert own.tensors[0].shape == (P, 2 * LLAMA.kv_heads * LLAMA.head_dim // tp)
        (rows,) = attachments(prompt, shard, EMBEDDING)
        assert rows.tensors[0].shape == (P, LLAMA.hidden)
    assert attachments(prefix, LLAMA, EMBEDDING) == () == attachments(prompt, LLAMA, 0)
