"""Progress out of TensorRT's nested phases."""

from __future__ import annotations

import pytest

from megalodon_deploy.engine.phases import PhaseTree


def test_an_inner_phase_is_part_of_the_outer_step() -> None:
    tree = PhaseTree()
    assert tree.fraction() == 0.0
    tree.start("build", None, 4)
    tree.step("build", 0)
    assert tree.fraction() == pytest.approx(0.25)
    tree.start("optimise", "build", 2)
    tree.step("optimise", 0)
    assert tree.fraction() == pytest.approx(0.375)
    tree.start("time", "optimise", 10)
    tree.step("time", 4)
    assert tree.fraction() == pytest.approx(0.25 + 0.25 * (0.5 + 0.5 * 0.5))
    tree.finish("time")
    tree.finish("optimise")
    tree.step("build", 3)
    assert tree.fraction() == pytest.approx(1.0)


def test_never_above_one_and_strays_are_ignored() -> None:
    tree = PhaseTree()
    tree.step("unknown", 3)
    tree.finish("unknown")
    tree.start("build", "unknown", 0)
    tree.step("build", 7)
    assert tree.fraction() == 1.0
