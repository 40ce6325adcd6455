"""Profiles that follow a law known to the test."""

from collections.abc import Callable, Iterable

from muxtune.costs import ActionOverhead, Measurement, Profile, Provenance, StageSum
from muxtune.costs.compose import frozen_products
from muxtune.costs.roofline import RooflineCoefficients, RooflineCosts
from muxtune.graph.operators import FWD_ONLY, PHASES, Operator, Phase
from muxtune.model import PRESETS, ModelSpec
from muxtune.support.machine import package_version, processor_name

MODEL = PRESETS["llama-tiny"]

COEFFICIENTS = RooflineCoefficients(
    device="cpu",
    launch_s=2e-6,
    flops_per_s=8e10,
    bytes_per_s=2e10,
    overlap=2.0,
    link_latency_s=5e-5,
    link_bytes_per_s=3e9,
    error=0.0,
)

TOKENS = (16, 64, 256, 1024, 4096)


def operators(model: ModelSpec = MODEL) -> list[Operator]:
    """A grid of every kind but ``stage``."""
    grid = [Operator("linear", (*shape, n)) for shape in frozen_products(model) for n in TOKENS]
    shapes = sorted({(linear.in_features, linear.out_features) for linear in model.linears})
    grid += [Operator("lora", (i, o, r, n)) for i, o in shapes for r in (1, 8, 64) for n in TOKENS]
    grid += [Operator("dropout", (i, n)) for i in sorted({i for i, _ in shapes}) for n in TOKENS]
    lengths = {8: (1, 4, 16, 64), 64: (1, 4, 16, 64), 256: (1, 4, 16), 1024: (1, 4)}
    grid += [Operator("attention", (s, length)) for length, counts in lengths.items() for s in counts]
    grid += [Operator(kind, (n,)) for kind in ("norm", "activation", "embedding") for n in TOKENS]
    grid += [Operator("head", (n,)) for n in (1, 16, 256, 1024)]
    grid += [Operator("optimizer", (t, t * n)) for t in (2, 16, 112) for n in (256, 16384)]
    grid += [Operator("feed", (n,)) for n in (1, 8, 64)]
    transfers = (4096, 65536, 1 << 20, 8 << 20)
    return grid + [Operator(kind, (n,)) for kind in ("message", "p2p") for n in transfers]


def make_profile(
    law: Callable[[Operator, Phase], float], ops: Iterable[Operator], model: ModelSpec = MODEL
) -> Profile:
    """Every operator in its phases, with the median that ``law`` gives."""
    rows = []
    for op in ops:
        for phase in PHASES[:1] if op.kind in FWD_ONLY else PHASES:
            s = law(op, phase)
            rows.append(Measurement(op, phase, s, 0.9 * s, 1.1 * s, 10))
    provenance = Provenance(
        created_utc="2025-01-01T00:00:00+00:00",
        model=model,
        device="cpu",
        ranks=2,
        threads=1,
        processor=processor_name(),
        os="an os",
        versions={package: package_version(package) or "" for package in ("torch", "numpy", "muxtune")},
    )
    return Profile(tuple(rows), provenance)


def analytic_law(model: ModelSpec = MODEL) -> Callable[[Operator, Phase], float]:
    """The law of :data:`COEFFICIENTS`."""
    return RooflineCosts(COEFFICIENTS, model).latency_s


def stage_s(overhead: ActionOverhead, stage: StageSum) -> float:
    """Seconds of a stage with an overhead, which a fit brings near to the measured ones."""
    scaled_s = sum(overhead.factors[name] * seconds for name, seconds in stage.classes_s.items())
    return overhead.fixed_s + scaled_s + stage.operators * overhead.per_operator_s
