"""The shapes that an engine accepts."""

from __future__ import annotations

import pytest
from helpers import small_config

from megalodon_deploy.engine.profile import ShapeRange, optimization_profile
from megalodon_deploy.errors import EngineError
from megalodon_deploy.state import state_specs


def test_ranges() -> None:
    config = small_config()
    profile = optimization_profile(config, max_batch=4)
    assert profile["tokens"] == ShapeRange((1, 1), (4, 1), (4, 12))
    assert profile["position"] == ShapeRange((1,), (4,), (4,))
    assert profile["past_key.1"] == ShapeRange((1, 2, 0, 8), (4, 2, 12, 8), (4, 2, 12, 8))
    assert profile["past_value.0"] == ShapeRange((1, 2, 0, 10), (4, 2, 12, 10), (4, 2, 12, 10))
    assert profile["past_cema.0"] == ShapeRange((1, 24, 4, 2), (4, 24, 4, 2), (4, 24, 4, 2))
    assert profile["past_norm.final"] == ShapeRange((1, 3, 4), (4, 3, 4), (4, 3, 4))


def test_every_input_has_a_range() -> None:
    config = small_config()
    names = {"tokens", "position"} | {spec.past for spec in state_specs(config)}
    assert set(optimization_profile(config, max_batch=1)) == names


@pytest.mark.parametrize("max_batch", [0, -1])
def test_batch_must_be_positive(max_batch: int) -> None:
    with pytest.raises(EngineError, match=f"batch {max_batch}"):
        optimization_profile(small_config(), max_batch=max_batch)
