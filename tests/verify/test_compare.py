"""The compare function alone: every way to be wrong is a miss, under the right name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from helpers import small_config
from polygraphy.comparator import IterationResult

from megalodon_deploy.state import LOGITS, concrete_shape, pack_norm, state_specs
from megalodon_deploy.verify.compare import Contract, ContractCompare
from megalodon_deploy.verify.finding import Finding
from megalodon_deploy.verify.schedule import Call, Schedule
from megalodon_deploy.verify.tolerance import norm_tolerance, tolerances

CONFIG = small_config()
CALL = Call((3, 0), 2, 4)
SCHEDULE = Schedule("x", "", CONFIG.chunk_size, (CALL,))
FLOAT32 = np.dtype(np.float32)


def right_outputs() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    outputs = {LOGITS: random.standard_normal((2, 2, CONFIG.vocab_size), np.float32)}
    for spec in state_specs(CONFIG):
        shape = concrete_shape(spec.present_shape, batch=2, tokens=2)
        outputs[spec.present] = random.standard_normal(shape, np.float32)
        if spec.kind == "norm":
            outputs[spec.present] = pack_norm(random.standard_normal(shape[:-1]), random.uniform(0.5, 2, shape[:-1]))
    return outputs


def compare(found: dict[str, np.ndarray], **contract: Any) -> list[Finding]:
    values = {"logits": "all", "activation": FLOAT32, "tolerances": tolerances(CONFIG, "fp32")} | contract
    function = ContractCompare(CONFIG, SCHEDULE, {"it": Contract(**values)})
    verdicts = function(IterationResult(right_outputs(), runner_name="ref"), IterationResult(found, runner_name="it"))
    assert list(verdicts.values()) == function.findings
    assert function.num_compared == 1
    return function.findings


def misses(found: dict[str, np.ndarray], **contract: Any) -> list[Finding]:
    return [finding for finding in compare(found, **contract) if not finding]


def test_equal_outputs_pass_and_every_tensor_is_looked_at() -> None:
    findings = compare(right_outputs())
    assert all(findings)
    assert {finding.tensor for finding in findings} == set(right_outputs())
    assert all(finding.error == 0 < finding.tolerance for finding in findings)


@pytest.mark.parametrize("name", [LOGITS, "new_key.1", "new_value.0", "present_cema.1", "present_norm.final"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_element_that_is_not_finite_is_a_miss(name: str, value: float) -> None:
    found = right_outputs()
    found[name].flat[1] = value
    (miss,) = misses(found)
    assert miss.tensor == name
    assert "1 of" in str(miss.problem)
    assert miss.missed_rows == (0,)


@pytest.mark.parametrize("name", [LOGITS, "new_key.1", "present_norm.0"])
def test_a_missing_output_is_a_miss(name: str) -> None:
    found = right_outputs()
    del found[name]
    (miss,) = misses(found)
    assert (miss.tensor, miss.problem, miss.missed_rows) == (name, "this output is missing", (0, 1))


def test_an_extra_output_is_a_miss() -> None:
    (miss,) = misses(right_outputs() | {"new_key.2": np.zeros(1, np.float32)})
    assert (miss.tensor, miss.problem) == ("new_key.2", "this output is not in the contract")


@pytest.mark.parametrize("name", [LOGITS, "new_value.1", "present_cema.0"])
def test_wrong_shape_and_wrong_dtype_are_misses(name: str) -> None:
    right = right_outputs()
    (miss,) = misses(right | {name: right[name][:1]})
    assert "shape" in str(miss.problem)
    (miss,) = misses(right | {name: right[name].astype(np.float64)})
    assert "dtype" in str(miss.problem)


def test_half_precision_rows_are_expected_where_the_contract_says_so() -> None:
    found = right_outputs()
    for name in found:
        if name.startswith("new_"):
            found[name] = found[name].astype(np.float16)
    assert misses(found)
    assert not misses(found, activation=np.dtype(np.float16), tolerances=tolerances(CONFIG, "fp16"))


def test_last_logits_are_compared_with_the_last_of_the_reference() -> None:
    found = right_outputs()
    found[LOGITS] = found[LOGITS][:, -1:]
    assert not misses(found, logits="last")
    found[LOGITS] = right_outputs()[LOGITS][:, :1]
    assert [miss.tensor for miss in misses(found, logits="last")] == [LOGITS]


def test_the_worst_element_is_named_with_its_token() -> None:
    found = right_outputs()
    found["new_key.1"][1, 0, 0, 3] += 0.25
    (miss,) = misses(found)
    assert (miss.tensor, miss.kind, miss.index, miss.position) == ("new_key.1", "key", (1, 0, 0, 3), 0)
    assert miss.missed_rows == (1,)
    assert miss.absolute_error == pytest.approx(0.25, rel=1e-6)
    scale = np.abs(right_outputs()["new_key.1"][1]).max()
    assert miss.error == pytest.approx(0.25 / scale, rel=1e-6)
    assert "new_key.1" in miss.describe()


@pytest.mark.parametrize(("row", "token", "position"), [(0, 0, 3), (0, 1, 4), (1, 0, 0), (1, 1, 1)])
def test_logits_are_named_with_their_token(row: int, token: int, position: int) -> None:
    found = right_outputs()
    found[LOGITS][row, token, 5] += 1
    (miss,) = misses(found)
    assert (miss.index, miss.position) == ((row, token, 5), position)
    found[LOGITS] = found[LOGITS][:, -1:]
    last = misses(found, logits="last")
    assert [(miss.index, miss.position) for miss in last] == ([((row, 0, 5), position)] if token == 1 else [])


@pytest.mark.parametrize(("share", "hint"), [(1.0, "head 0 holds what head 1 should"), (0.4, "")])
def test_swapped_heads_are_told_from_others(share: float, hint: str) -> None:
    """Each head's own part aside, which `share` leaves of the other head's rows."""
    found = right_outputs()
    right, unrelated = found["new_value.0"], np.random.default_rng(1).standard_normal(found["new_value.0"].shape)
    found["new_value.0"] = (share * right[:, ::-1] + (1 - share) * unrelated).astype(np.float32)
    (miss,) = misses(found)
    assert miss.hint.endswith(hint)
    assert bool(miss.hint) == bool(hint)


def test_small_errors_everywhere_are_a_miss() -> None:
    found = right_outputs()
    found[LOGITS][1] += 1.5e-5 * np.abs(found[LOGITS][1]).max()
    (miss,) = misses(found)
    assert miss.error < miss.tolerance < miss.relative_error
    assert miss.share == pytest.approx(miss.relative_error / miss.tolerance)
    assert (miss.tensor, miss.missed_rows) == (LOGITS, (1,))


@pytest.mark.parametrize("which", ["error", "relative_error"])
def test_an_error_that_is_nan_is_the_worst_of_all(which: str) -> None:
    """Python's `max` and comparisons pass it over."""
    right = compare(right_outputs())[0]
    finding = dataclasses.replace(right, **{which: math.nan})
    assert not finding.passed
    assert finding.share == math.inf
    assert "nan" in finding.describe()


def test_numbers_whose_difference_overflows_are_a_miss() -> None:
    found = right_outputs()
    found[LOGITS][0, 0, 0] = -np.finfo(np.float32).max
    with np.errstate(over="ignore"):
        (miss,) = misses(found)
    assert miss.share > 1e30


def test_a_small_number_in_a_large_tensor_is_held_against_the_tensor() -> None:
    found = right_outputs()
    found[LOGITS][0, 0, 0] += 1e-5 * np.abs(found[LOGITS][0]).max()
    assert not misses(found)
    found[LOGITS][0, 0, 0] += 3e-5 * np.abs(found[LOGITS][0]).max()
    assert [(miss.tensor, miss.missed_rows) for miss in misses(found)] == [(LOGITS, (0,))]


@pytest.mark.parametrize(("part", "kind"), [(0, "norm mean"), (2, "norm var")])
def test_norms_are_compared_as_float64(part: int, kind: str) -> None:
    found = right_outputs()
    hi = found["present_norm.1"][..., part].copy()
    found["present_norm.1"][..., part] = 0
    found["present_norm.1"][..., part + 1] += hi  # the number is the same up to float32, split otherwise
    assert not misses(found)
    found["present_norm.1"][0, 0, part] += 2e-6
    assert not misses(found)
    found["present_norm.1"][0, 0, part] += 5e-5
    assert [(miss.tensor, miss.kind) for miss in misses(found)] == [("present_norm.1", kind)]


def test_a_lost_low_part_is_a_miss_deep_in_a_stream() -> None:
    deep = Schedule("x", "", CONFIG.chunk_size, (Call((2**33, 2**20), 2, 12),))
    contract = Contract(logits="all", activation=FLOAT32, tolerances=tolerances(CONFIG, "fp32"))
    compare = ContractCompare(CONFIG, deep, {"it": contract})
    found = right_outputs()
    found["present_norm.0"][..., 1] = 0
    compare(IterationResult(right_outputs(), runner_name="ref"), IterationResult(found, runner_name="it"))
    assert {miss.tensor for miss in compare.findings if not miss} == {"present_norm.0"}


def test_a_reference_that_is_not_finite_proves_nothing() -> None:
    reference = right_outputs()
    reference["present_cema.0"].flat[0] = np.nan
    contract = Contract(logits="all", activation=FLOAT32, tolerances=tolerances(CONFIG, "fp32"))
    compare = ContractCompare(CONFIG, SCHEDULE, {"it": contract})
    compare(IterationResult(reference, runner_name="ref"), IterationResult(right_outputs(), runner_name="it"))
    (miss,) = (finding for finding in compare.findings if not finding)
    assert miss.tensor == "present_cema.0"
    assert "the reference itself" in str(miss.problem)


def test_hidden_kinds_are_not_expected() -> None:
    found = {name: array for name, array in right_outputs().items() if not name.startswith("new_")}
    assert not misses(found, hidden=frozenset({"key", "value"}))
    assert misses(found, hidden=frozenset({"key"}))


def test_tolerances_follow_precision_and_depth() -> None:
    by_precision = [tolerances(CONFIG, precision)["logits"] for precision in ("fp32", "fp16", "bf16")]
    assert by_precision == sorted(by_precision)
    assert by_precision[2] == pytest.approx(8 * by_precision[1])
    deeper = tolerances(small_config(num_layers=8), "fp16")["logits"]
    assert by_precision[1] < deeper < 2.01 * by_precision[1]
    assert norm_tolerance(2e-5, fed_tokens=5, count=5) == pytest.approx(2e-5)
    assert norm_tolerance(2e-5, fed_tokens=5, count=10**9) < 1e-12
