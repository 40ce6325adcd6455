"""Links between neighbouring stages, and the tensors that travel on them."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from simpy import Environment, Event, Resource

from muxtune.schedule import COMMUNICATION, Action, ActionSpan
from sim.noise import Noise


class Wires:
    """Two links between every two neighbours, one per direction; each carries one transfer at a time.

    Args:
        env: Clock of the run.
        stages: Number of stages.
        p2p_s: Seconds per transfer, per hTask.
        spans: Where transfers are noted, as spans of their sender.
        noise: Noise of the transfers' durations.
    """

    def __init__(
        self, env: Environment, stages: int, p2p_s: Sequence[float], spans: list[ActionSpan], noise: Noise
    ) -> None:
        self._env = env
        self._stages = stages
        self._p2p_s = p2p_s
        self._spans = spans
        self._links: dict[tuple[int, int], Resource] = {}
        for left in range(stages - 1):
            for pair in ((left, left + 1), (left + 1, left)):
                self._links[pair] = Resource(env, capacity=1)
        self._factors = {pair: noise.factors("link", *pair) for pair in self._links}
        self._arrivals: dict[tuple[int, Action], Event] = {}

    def arrival(self, stage: int, action: Action) -> Event | None:
        """Fires when the input of ``action`` has reached ``stage``; None where none comes from elsewhere."""
        needs_input = (action.kind == "F" and stage > 0) or (action.kind == "B" and stage < self._stages - 1)
        return self._event(stage, action) if needs_input else None

    def send(self, stage: int, action: Action) -> None:
        """Start to send the result of ``action``: activations downstream, gradients upstream."""
        receiver = {"F": stage + 1, "B": stage - 1}.get(action.kind, -1)
        if 0 <= receiver < self._stages:
            self._env.process(self._transfer(stage, receiver, action))

    def _transfer(self, sender: int, receiver: int, action: Action) -> Generator[Event, object, None]:
        with self._links[sender, receiver].request() as turn:
            yield turn
            start_s = self._env.now
            (seconds,) = self._factors[sender, receiver].scale((self._p2p_s[action.htask],))
            yield self._env.timeout(seconds)
        self._spans.append(ActionSpan(sender, COMMUNICATION, action, start_s, self._env.now))
        self._event(receiver, action).succeed()

    def _event(self, stage: int, action: Action) -> Event:
        key = (stage, action)
        if key not in self._arrivals:
            self._arrivals[key] = self._env.event()
        return self._arrivals[key]
