"""When a step of one token is run, captured as a CUDA graph, or launched as one.

There are two graphs, one for each half of the pair that is the past. TensorRT wants a call to have run once with its
shapes and addresses before it is captured: the first step of each half runs plainly, the second is captured and
launched, all others are launched.
"""

from __future__ import annotations

from typing import Literal

Action = Literal["run", "capture", "launch"]


class StepGraphs:
    def __init__(self) -> None:
        self._has_run = [False, False]
        self._graphs: list[int | None] = [None, None]
        self._is_refused = False

    def next_action(self, half: int) -> Action:
        if self._graphs[half] is not None:
            return "launch"
        return "capture" if self._has_run[half] and not self._is_refused else "run"

    def ran(self, half: int) -> None:
        self._has_run[half] = True

    def captured(self, half: int, graph: int | None) -> None:
        """`graph` None: the step cannot be captured, and nobody tries again."""
        self._graphs[half], self._is_refused = graph, graph is None

    def graph(self, half: int) -> int:
        graph = self._graphs[half]
        assert graph is not None, f"Bug: half {half} has no graph"
        return graph
