"""Comparison of one call's outputs: what is missing, misshapen, not finite or too far off.

Stock comparison passes an element when its absolute or its relative error is small, and only warns about an output
that one side lacks. Here a call passes when every tensor of the contract is there with its shape and dtype, nothing
else is, every number is finite, and neither the worst element's error nor the whole tensor's exceeds the tolerance:
`not (error <= tolerance)` is a miss.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from megalodon_deploy.bundle import LogitsMode
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.state import LOGITS, StateSpec, concrete_shape, state_specs
from megalodon_deploy.verify.finding import Finding
from megalodon_deploy.verify.measure import measure
from megalodon_deploy.verify.schedule import Call, Schedule
from megalodon_deploy.verify.tolerance import norm_tolerance


class CallResult(Protocol):
    """What Polygraphy hands to a compare function: outputs by name, and who computed them."""

    runner_name: str

    def items(self) -> Iterator[tuple[str, np.ndarray]]: ...


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What a candidate promises: which outputs, in which types, how close."""

    logits: LogitsMode
    activation: np.dtype
    tolerances: Mapping[str, float]  # by kind
    hidden: frozenset[str] = frozenset()  # kinds of the state table that it does not show


@dataclass(frozen=True)
class ExpectedTensor:
    """An output that the contract demands of a call."""

    name: str
    kind: str  # of the state table, or "logits"
    shape: tuple[int, ...]
    dtype: np.dtype


def expected_outputs(config: MegalodonConfig, call: Call, contract: Contract) -> dict[str, ExpectedTensor]:
    """The outputs of `call` by name, from the state table, in the order in which the model computes them: the first
    that is off lies next to the cause."""
    batch, num_tokens = len(call.positions), call.num_tokens
    outputs = []
    for spec in sorted(state_specs(config), key=_dataflow):
        if spec.kind in contract.hidden:
            continue
        shape = concrete_shape(spec.present_shape, batch=batch, tokens=num_tokens)
        outputs.append(ExpectedTensor(spec.present, spec.kind, shape, spec.numpy_dtype(contract.activation)))
    num_logits = num_tokens if contract.logits == "all" else 1
    outputs.append(ExpectedTensor(LOGITS, "logits", (batch, num_logits, config.vocab_size), np.dtype(np.float32)))
    return {tensor.name: tensor for tensor in outputs}


_ORDER = ("norm", "cema", "value", "value_scale", "key", "key_scale")  # a row's codes tell more than its scale


def _dataflow(spec: StateSpec) -> tuple[float, int]:
    """Layer by layer; within a layer as its block computes them."""
    layer = spec.present.rsplit(".", 1)[1]
    return (float("inf") if layer == "final" else int(layer), _ORDER.index(spec.kind))


class ContractCompare:
    """A Polygraphy compare function over the calls of one schedule; keeps every finding in `findings`.

    It is called once per call and pair of runners, in the schedule's order. The reference returns all state tensors
    and the logits of all positions; `contracts` says for each candidate's runner name what to expect of it.
    """

    def __init__(self, config: MegalodonConfig, schedule: Schedule, contracts: Mapping[str, Contract]) -> None:
        self.findings: list[Finding] = []
        self._config = config
        self._schedule = schedule
        self._contracts = contracts
        self._fed_tokens = list(schedule.fed_tokens())
        self._num_calls: Counter[tuple[str, str]] = Counter()

    @property
    def num_compared(self) -> int:
        """Calls compared so far, over all pairs."""
        return self._num_calls.total()

    def __call__(self, reference: CallResult, candidate: CallResult) -> OrderedDict[str, Finding]:
        pair = (reference.runner_name, candidate.runner_name)
        index = self._num_calls[pair]
        self._num_calls[pair] += 1
        wanted = expected_outputs(self._config, self._schedule.calls[index], self._contracts[pair[1]])
        references, found = dict(reference.items()), dict(candidate.items())
        findings = OrderedDict()
        for name in [*wanted, *(name for name in found if name not in wanted)]:
            blank = Finding(
                schedule=self._schedule.name,
                call=index,
                reference=pair[0],
                candidate=pair[1],
                tensor=name,
                kind=wanted[name].kind if name in wanted else "",
            )
            for finding in self.compare_tensor(blank, wanted.get(name), references.get(name), found.get(name)):
                findings[f"{name} {finding.kind}"] = finding
        self.findings += findings.values()
        return findings

    def compare_tensor(
        self, blank: Finding, wanted: ExpectedTensor | None, expected: np.ndarray | None, found: np.ndarray | None
    ) -> Iterator[Finding]:
        """Findings of one tensor: `blank` filled in; two of a norm, whose mean and variance are compared apart."""
        problem = _problem(wanted, found)
        if problem is not None or wanted is None or expected is None or found is None:
            yield replace(blank, problem=problem, missed_rows=_broken_rows(found, len(self._schedule.start_positions)))
            return
        expected = np.asarray(expected)
        if wanted.kind == "logits":
            expected = expected[:, -found.shape[1] :]
        assert expected.shape == found.shape, f"Bug: reference {wanted.name} has shape {expected.shape}"
        if not np.isfinite(expected).all():
            yield replace(blank, problem="the reference itself is not finite: check the weights")
            return
        call = self._schedule.calls[blank.call]
        for measured in measure(wanted.kind, expected, found, self._config.norm_eps):
            tolerance_B = self._tolerance(measured.kind, blank)
            yield measured.finding(blank, tolerance_B, call)

    def _tolerance(self, kind: str, blank: Finding) -> np.ndarray:
        """[B], because a norm's tolerance depends on how long a row's stream is."""
        call, fed = self._schedule.calls[blank.call], self._fed_tokens[blank.call]
        tolerance = self._contracts[blank.candidate].tolerances[kind]
        if not kind.startswith("norm"):
            return np.full(len(call.positions), tolerance)
        counts = [position + call.num_tokens for position in call.positions]
        return np.array([norm_tolerance(tolerance, fed_tokens=k, count=n) for k, n in zip(fed, counts, strict=True)])


def _problem(wanted: ExpectedTensor | None, found: np.ndarray | None) -> str | None:
    if wanted is None:
        return "this output is not in the contract"
    if found is None:
        return "this output is missing"
    if tuple(found.shape) != wanted.shape:
        return f"shape {list(found.shape)}, expected {list(wanted.shape)}"
    if found.dtype != wanted.dtype:
        return f"dtype {found.dtype}, expected {wanted.dtype}"
    num_bad = int(np.count_nonzero(~np.isfinite(found)))
    if num_bad:
        first = [int(axis[0]) for axis in np.nonzero(~np.isfinite(found))]
        return f"{num_bad} of {found.size} elements are NaN or infinite, the first at index {first}"
    return None


def _broken_rows(found: np.ndarray | None, batch: int) -> tuple[int, ...]:
    """The rows that are not finite; all where it is something else that is wrong."""
    if found is None or found.ndim == 0 or len(found) != batch or np.isfinite(found).all():
        return tuple(range(batch))
    return tuple(np.flatnonzero(~np.isfinite(found).reshape(batch, -1).all(1)).tolist())
