"""Bytes of a structure's stages."""

from __future__ import annotations

from dataclasses import fields, replace

from muxtune.planning.decisions.options import PlanOptions
from muxtune.policies import POLICIES
from tests.muxtune.planning.problems import make_problem


def test_instances_repeat_the_backbone_alone():
    problem = make_problem()
    apart = POLICIES.get("nemo").propose(problem, PlanOptions(pp=2))[0]
    instances = len(apart.htasks)
    assert {htask.instance for htask in apart.htasks} == set(range(instances))
    shared = replace(apart, htasks=tuple(replace(htask, instance=0) for htask in apart.htasks))
    for one, each in zip(problem.memory(shared), problem.memory(apart), strict=True):
        assert (each.backbone_bytes, each.table_bytes) == (
            instances * one.backbone_bytes,
            instances * one.table_bytes,
        )
        for part in fields(one):
            if part.name not in {"backbone_bytes", "table_bytes"}:
                assert getattr(each, part.name) == getattr(one, part.name)
