"""A profile in a few seconds: a handful of operators of each kind, which show rates and not shapes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from muxtune.costs.operator_work import operator_work
from muxtune.costs.profile import Profile, save_profile
from muxtune.graph import frozen_products
from muxtune.graph.attention_backends import DEFAULT_ATTENTION
from muxtune.graph.operators import Operator
from muxtune.model import ModelSpec
from muxtune.peft import PLAIN_KIND
from profiler.devices import DEVICES
from profiler.jobs import SUITE, Job
from profiler.processes import measured_lines
from profiler.session import assemble_profile
from profiler.worker_protocol import read_line

_LIMIT_S = 0.02
"""Seconds per operator and phase."""

_FLOPS = 4e8
"""Floating-point operations of the largest operator: about 10 ms of a core."""

_STAGE_PARAMETERS = 8e6
"""A layer of more is not built: filling it with numbers would take seconds."""

_MESSAGES = (1 << 14, 1 << 20)


def calibrate(model: ModelSpec, *, ranks: int, out: Path) -> Profile:
    """Measure a few operators of a backbone on this machine's CPU, and keep that.

    Args:
        model: The backbone.
        ranks: Processes that measure at the same time.
        out: Where the profile goes.

    Raises:
        RunError: A measuring process failed.
    """
    listed = tuple((op.kind, op.dims) for op in calibration_grid(model))
    job = Job(
        model=model,
        device="cpu",
        suite=SUITE,
        ranks=ranks,
        operators=listed,
        link_ranks=2,
        links=tuple(("p2p", (bytes_,)) for bytes_ in _MESSAGES),
        attention=DEFAULT_ATTENTION,
        limit_s=_LIMIT_S,
    )
    with closing(measured_lines(job)) as texts:
        lines = [read_line(text) for text in texts]
    profile = assemble_profile(job, lines, DEVICES["cpu"].count())
    save_profile(profile, out)
    return profile


def calibration_grid(model: ModelSpec) -> Iterator[Operator]:
    """Few and many tokens of what a backbone runs, as far as that takes milliseconds."""
    products = sorted(set(frozen_products(model)), key=lambda each: each[0] * each[1])
    for i, o in dict.fromkeys((products[0], products[-1])):
        for tokens in sorted({_affordable(16, i * o), _affordable(64, i * o), _affordable(512, i * o)}):
            yield Operator("linear", (i, o, tokens))
    linear = max(model.linears, key=lambda each: each.in_features * each.out_features)
    i, o = linear.in_features, linear.out_features
    for tokens in sorted({_affordable(64, i * o), _affordable(512, i * o), 64}):
        yield Operator(PLAIN_KIND, (i, o, min(8, i, o), tokens))
        yield Operator("norm", (tokens,))
        yield Operator("activation", (tokens,))
        yield Operator("embedding", (tokens,))
    longest = min(256, model.max_positions // 16 * 16)
    while longest > 64 and operator_work(Operator("attention", (1, longest)), "bwd", model).flops > _FLOPS:
        longest //= 2
    short = min(64, longest)
    for sequences, length in dict.fromkeys(((1, short), (8, short), (1, longest))):
        yield Operator("attention", (sequences, length))
    for targets in dict.fromkeys((16, _affordable(256, model.hidden * model.vocab))):
        yield Operator("head", (targets,))
    for tensors in (4, 28):
        yield Operator("optimizer", (tensors, tensors * 8 * model.hidden))
    for sequences in (2, 16):
        yield Operator("feed", (sequences,))
    if model.layer_parameters <= _STAGE_PARAMETERS:
        length = min(64, model.max_positions)
        for dims in ((1, 1, 8, 1, length // 2), (1, 4, 8, 2, length), (1, 1, 0, 4, length)):
            yield Operator("stage", dims)


def _affordable(tokens: int, weights: int) -> int:
    """At most so many tokens, and as few as a product with so many weights takes milliseconds with."""
    while tokens > 16 and 2.0 * tokens * weights > _FLOPS:
        tokens //= 2
    return tokens
