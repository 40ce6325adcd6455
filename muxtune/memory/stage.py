"""Peak of one rank of a stage, by what the bytes are for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

from muxtune.memory.htask_bytes import HTaskLoad
from muxtune.memory.peak import POSTED_AHEAD, Variable, fullest_moment
from muxtune.memory.weights import MOMENTS
from muxtune.schedule import Action, clocks_of

CUDA_ALLOCATOR_FRACTION = 0.05
"""Assumed share that a caching allocator adds to what is allocated: blocks are rounded up to 512 bytes, large
ones to 2 MiB, and split blocks stay as gaps. Not measured: no GPU has run this yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes of one rank of a stage at its fullest moment, by what they are for."""

    backbone_bytes: int
    """Frozen weights, all instances."""
    table_bytes: int = 0
    """Tables of rotary positions, all instances."""
    adapter_bytes: int
    optimizer_bytes: int
    gradient_bytes: int
    """Gradients of the adapters, from an hTask's first backward to its step."""
    activation_bytes: int
    """Kept by the micro-batches in flight."""
    logit_bytes: int
    """Logits of the head that the micro-batches in flight keep."""
    chunk_kv_bytes: int
    """Keys and values with their gradients that go from chunk to chunk."""
    message_bytes: int
    """Receives posted ahead, the gradient being worked on, and the last ones sent."""
    workspace_bytes: int
    """Temporaries of the action."""
    allocator_bytes: int = 0
    """Rounding and gaps of a GPU's caching allocator."""

    @property
    def total_bytes(self) -> int:
        """Sum of the parts."""
        return sum(getattr(self, part.name) for part in fields(self))

    def with_allocator(self, fraction: float) -> StageMemory:
        """This breakdown under an allocator that adds ``fraction`` to everything."""
        added = round(fraction * (self.total_bytes - self.allocator_bytes))
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return StageMemory(**parts | {"allocator_bytes": added})


@dataclass(frozen=True, kw_only=True)
class StageLoad:
    """What a rank of a stage holds, and what its actions add."""

    first: bool
    last: bool
    in_flight: int
    """Clocks whose backward may be open: ``pp - stage`` in 1F1B, all of an iteration under ``gpipe``."""
    backbone_bytes: int
    table_bytes: int
    htasks: tuple[HTaskLoad, ...]
    buckets: tuple[tuple[int, ...], ...] = ()
    """hTasks of each bucket that shares clocks; hTasks of no bucket have clocks of their own."""
    in_flight_before: int | None = None
    """Clocks that the stage before may have open; by default one more than this one."""

    def peak(
        self,
        actions: Sequence[Action],
        microbatches: Sequence[int] | None = None,
        *,
        give_up_bytes: float = math.inf,
    ) -> StageMemory:
        """Breakdown at the fullest moment of the stage's actions.

        A micro-batch is open from its F to the end of its B; the adapters' gradients live from an hTask's
        first B to its STEP. The micro-batches of a clock run together, so their temporaries add up. The
        actions are repeated in a run: optimizer states, and the messages of the repetitions before and after,
        count from the start.

        Args:
            actions: Actions of the stage, in order.
            microbatches: Micro-batches per hTask and step; needed where hTasks share clocks.
            give_up_bytes: A moment that needs more than these is answered with, though a fuller one may come.
        """
        clocks = clocks_of(actions, microbatches or (), self.buckets or None)
        fullest = fullest_moment(
            self.htasks,
            clocks,
            first=self.first,
            last=self.last,
            sent_kept=self.sent_kept,
            give_up_bytes=give_up_bytes - self._memory(Variable()).total_bytes,
        )
        return self._memory(fullest)

    def bound(self, microbatches: Sequence[int]) -> StageMemory:
        """No less than :meth:`peak` of any schedule within the limit in flight, without having one.

        Args:
            microbatches: Per hTask and step; more of one hTask can only be open with other hTasks.
        """
        open_: list[Variable] = []
        left_gradients: list[int] = []
        for clock in self._clocks:
            run = max(self.htasks[h].carry for h in clock)
            runs = -(-max(microbatches[h] for h in clock) // run)
            # The oldest may have gone back and the newest may have come in by all micro-batches but one.
            at_once = min(runs, self.in_flight, 2 + max(self.in_flight - 2, 0) // run)
            for position in range(run):
                own = [self.htasks[h].microbatch(position) for h in clock]
                together = Variable(
                    activations=sum(each.kept.activation_bytes for each in own),
                    logits=sum(each.kept.logit_bytes for each in own),
                    chunk_kv=sum(each.left_bytes for each in own),
                )
                open_ += [together] * at_once
            groups = [self.htasks[h].left_gradient_bytes * (run // self.htasks[h].carry) for h in clock]
            left_gradients += [sum(groups)] * at_once
        open_ = sorted(open_, key=sum, reverse=True)[: self.in_flight]
        left_gradients.sort(reverse=True)
        largest = max(h.message_bytes for h in self.htasks)
        received = max(sum(self.htasks[h].message_bytes for h in clock) for clock in self._clocks)
        posted = POSTED_AHEAD * largest
        sent = self.sent_kept * largest
        return self._memory(
            Variable(
                gradients=self.adapter_bytes,
                activations=sum(clock.activations for clock in open_),
                logits=sum(clock.logits for clock in open_),
                chunk_kv=sum(clock.chunk_kv for clock in open_) + sum(left_gradients[: self.in_flight]),
                messages=(posted + sent) * (not self.first) + (posted + received) * (not self.last),
                workspace=max(self._workspace_bytes(clock) for clock in self._clocks),
            )
        )

    @property
    def sent_kept(self) -> int:
        """Sent gradients that are kept, as many as the stage before may have micro-batches open."""
        before = self.in_flight + 1 if self.in_flight_before is None else self.in_flight_before
        return before * max(len(clock) for clock in self._clocks)

    @cached_property
    def _clocks(self) -> list[tuple[int, ...]]:
        """The largest clocks that there are, by their hTasks."""
        shared = {h for bucket in self.buckets for h in bucket}
        return [*self.buckets, *((h,) for h in range(len(self.htasks)) if h not in shared)]

    @cached_property
    def adapter_bytes(self) -> int:
        """Adapters of all tasks."""
        return sum(h.adapter_bytes for h in self.htasks)

    def _workspace_bytes(self, clock: Sequence[int]) -> int:
        """No less than the temporaries of a clock."""
        own = [self.htasks[h].microbatches for h in clock]
        return max(
            sum(max(each.forward_workspace_bytes for each in group) for group in own),
            sum(max(each.backward_workspace_bytes for each in group) for group in own),
        )

    def _memory(self, variable: Variable) -> StageMemory:
        return StageMemory(
            backbone_bytes=self.backbone_bytes,
            table_bytes=self.table_bytes,
            adapter_bytes=self.adapter_bytes,
            optimizer_bytes=MOMENTS * self.adapter_bytes,
            gradient_bytes=variable.gradients,
            activation_bytes=variable.activations,
            logit_bytes=variable.logits,
            chunk_kv_bytes=variable.chunk_kv,
            message_bytes=variable.messages,
            workspace_bytes=variable.workspace,
        )
