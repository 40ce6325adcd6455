"""Which attention backend is the fastest, on which streams?

    python -m benchmarks.attention [--device cpu] [--dtype float32] [--limit 2.0]

Streams of sequences of different lengths, with as many key-value heads as heads and with fewer, rotary, one
thread. Every backend that the device runs takes its turn, forward and backward; medians, and their sum
relative to ``grouped``. ``masked`` and ``flex`` let a NaN out of its sequence, so a profile does not choose
them; they are here for comparison.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import get_args

import torch

from benchmarks.helpers.machine import machine_line
from muxtune.graph.attention_backends import DEFAULT_ATTENTION, AttentionName
from muxtune.graph.operators import PHASES
from muxtune.model import PRESETS, Dtype, ModelSpec
from muxtune.support.allocator import keep_freed_memory
from muxtune.support.errors import UserError
from muxtune.support.tables import format_table, show_seconds
from profiler.devices import DEVICES
from profiler.timing import Timer, time_repeatedly
from runtime.attention import attention_site, refusals
from runtime.operators import TorchOperators

HEADS, HEAD_DIM = 8, 64
KV_HEADS = (8, 2)

STREAMS: dict[str, tuple[int, ...]] = {
    "many short": tuple(8 + 7 * i % 33 for i in range(32)),
    "equal": (64,) * 16,
    "mixed": tuple(16 + 97 * i % 241 for i in range(12)),
    "one long, many short": (512, *(16,) * 30),
    "one long": (1024,),
}
"""Lengths of the sequences."""


def _model(kv_heads: int, dtype: Dtype) -> ModelSpec:
    """A backbone with these heads; of nothing else does attention depend."""
    return PRESETS["llama-tiny"].model_copy(
        update={"hidden": HEADS * HEAD_DIM, "heads": HEADS, "kv_heads": kv_heads, "dtype": dtype}
    )


def _measure(
    lengths: Sequence[int], model: ModelSpec, device: str, timer: Timer, limit_s: float
) -> Iterator[tuple[AttentionName, float, float]]:
    """Backend with the medians of its forward and backward, in seconds."""
    running = [name for name, needs in refusals(attention_site(model, device)).items() if needs is None]
    suites = {name: TorchOperators(name) for name in running}
    built = {name: suite.build_attention(lengths, model, device) for name, suite in suites.items()}
    calls = [built[name][phase] for name in running for phase in PHASES]
    samples = iter(time_repeatedly([calls], timer, limit_s=limit_s))
    for name in running:
        forward, backward = next(samples), next(samples)
        yield name, forward.median_s, backward.median_s


def _rows(device: str, dtype: Dtype, limit_s: float) -> Iterator[list[str]]:
    bound = DEVICES[device](0)
    for kv_heads in KV_HEADS:
        model = _model(kv_heads, dtype)
        for stream, lengths in STREAMS.items():
            found = list(_measure(lengths, model, bound.name, bound.timer, limit_s))
            default_s = next(
                forward + backward for name, forward, backward in found if name == DEFAULT_ATTENTION
            )
            for name, forward, backward in found:
                yield [
                    stream,
                    f"{HEADS}/{kv_heads}",
                    name,
                    show_seconds(forward),
                    show_seconds(backward),
                    f"{(forward + backward) / default_s:.2f}x",
                ]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="Attention backends on streams of sequences.")
    parser.add_argument("--device", choices=sorted(DEVICES), default="cpu")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32")
    parser.add_argument("--limit", type=float, default=2.0, help="seconds per stream")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    device: str = arguments.device
    try:
        DEVICES[device].count()
    except UserError as error:
        parser.error(str(error))
    name = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    print(f"{machine_line()}{name}; {arguments.dtype}, heads of width {HEAD_DIM}")
    site = attention_site(_model(KV_HEADS[0], arguments.dtype), device)
    for backend, needs in refusals(site).items():
        if needs is not None:
            print(f"{backend} needs {needs}")
    header = ["stream", "heads", "backend", "forward", "backward", "to grouped"]
    print(format_table(header, list(_rows(device, arguments.dtype, arguments.limit))))


if __name__ == "__main__":
    main()
