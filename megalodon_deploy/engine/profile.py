"""The optimisation profile: which shapes an engine accepts.

One profile for prefill and decode: a second one would hold the weights twice. Letters as in `megalodon_deploy.state`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import EngineError
from megalodon_deploy.state import POSITION, TOKENS, Dim, concrete_shape, state_specs


@dataclass(frozen=True)
class ShapeRange:
    """Smallest, most frequent and largest shape of one input."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]

    @classmethod
    def from_lists(cls, values: dict[str, Sequence[int]]) -> ShapeRange:
        return cls(**{name: tuple(int(dim) for dim in values[name]) for name in ("min", "opt", "max")})


def optimization_profile(config: MegalodonConfig, *, max_batch: int) -> dict[str, ShapeRange]:
    """Range of every input by name: B = 1..max_batch, T = 1..C, S = 0..C.

    Tuned for decoding, where nearly all calls are: T = 1, all rows in use, and S = C because memory on a GPU is
    allocated for a full chunk once. Raises `EngineError` when `max_batch` is not positive.
    """
    if max_batch < 1:
        raise EngineError(f"max batch {max_batch} is not a positive number of streams")
    chunk = config.chunk_size
    shapes: dict[str, tuple[Dim, ...]] = {TOKENS: ("B", "T"), POSITION: ("B",)}
    shapes |= {spec.past: spec.past_shape for spec in state_specs(config)}
    return {
        name: ShapeRange(
            min=concrete_shape(shape, batch=1, tokens=1, capacity=0),
            opt=concrete_shape(shape, batch=max_batch, tokens=1, capacity=chunk),
            max=concrete_shape(shape, batch=max_batch, tokens=chunk, capacity=chunk),
        )
        for name, shape in shapes.items()
    }
