"""How far a build is, from TensorRT's nested phases."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class _Phase:
    parent: str | None
    num_steps: int
    done: int = 0


class PhaseTree:
    """Fraction of the outermost phase, given the starts, steps and ends that TensorRT reports.

    A phase within another counts as part of the step that the outer one is at. TensorRT's steps are not equally long.
    """

    def __init__(self) -> None:
        self._phases: dict[str, _Phase] = {}

    def start(self, name: str, parent: str | None, num_steps: int) -> None:
        self._phases[name] = _Phase(parent, max(1, num_steps))

    def step(self, name: str, step: int) -> None:
        if name in self._phases:
            self._phases[name].done = step + 1

    def finish(self, name: str) -> None:
        self._phases.pop(name, None)

    def fraction(self) -> float:
        """0 before the first phase; never above 1."""
        roots = [name for name, phase in self._phases.items() if phase.parent not in self._phases]
        return max((self._fraction(name) for name in roots), default=0.0)

    def _fraction(self, name: str) -> float:
        phase = self._phases[name]
        children = [child for child, value in self._phases.items() if value.parent == name]
        inside = max((self._fraction(child) for child in children), default=0.0)
        return min(1.0, (phase.done + inside) / phase.num_steps)
