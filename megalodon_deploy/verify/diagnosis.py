"""What a pattern of misses looks like: which cases miss, which pass, and the fault that does just that.

A case is a row of one call. Only the tensor nearest to the cause is looked at, the first in the model's order of all
that missed: layer 0 knows nothing of layer 1, so what is off behind it follows from it. And of every row only the
calls up to its first miss: what it carries from there on is spoilt. Then the rules are few:

| misses | passes | name |
| --- | --- | --- |
| rows that start over, with NaN or of another stream | rows that go on | stale slot |
| streams that were saved, forked or moved | carried ones | what was done to them |
| rows of a batch behind the first | first rows that go on | mixed rows |
| only beyond 2^31 tokens | the same before | float32 norm state, or a position too narrow |
| keys, from the second chunk on | the first chunk | RoPE offset at a chunk edge |
| rows that go on | rows that start, over several tokens | state not carried |
| CEMA, rows of several tokens and rows that go on | a single first token | recurrence of the moving average |
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megalodon_deploy.verify.finding import Finding, in_words
from megalodon_deploy.verify.schedule import Call, Schedule

_FAR = 2**31
_CLEARLY = 10.0  # times its tolerance is what float32 statistics are off by, far in a stream, and more
CONTRACT = "contract"  # a name: outputs that are missing, misshapen or never came


@dataclass(frozen=True)
class Diagnosis:
    """What one candidate's misses look like."""

    candidate: str
    name: str
    explanation: str
    first: Finding  # the first miss of the tensor nearest to the cause

    def describe(self) -> str:
        return f"{self.candidate}: {self.name}: {self.explanation}"


@dataclass(frozen=True)
class _Case:
    """One row of one call."""

    schedule: Schedule
    call: Call
    row: int

    @property
    def position(self) -> int:
        return self.call.positions[self.row]

    @property
    def starts(self) -> bool:
        return self.position == 0

    @property
    def is_late(self) -> bool:
        """Not in the first chunk of its stream."""
        return self.position >= self.schedule.chunk_size


@dataclass(frozen=True)
class _Pattern:
    """The cases of one tensor."""

    finding: Finding
    missed: list[_Case]
    passed: list[_Case]
    not_finite: bool

    @property
    def kind(self) -> str:
        return self.finding.kind.split(" ")[0].removesuffix("_scale")  # scales go with the codes that they are for

    @property
    def what(self) -> str:
        return in_words(self.finding.tensor)

    @property
    def are(self) -> str:
        return "is" if self.kind == "cema" else "are"


def diagnose(findings: Sequence[Finding], schedules: Iterable[Schedule]) -> list[Diagnosis]:
    """One for each candidate that missed something, in the order of their findings."""
    by_name = {schedule.name: schedule for schedule in schedules}
    diagnoses = []
    for candidate in dict.fromkeys(finding.candidate for finding in findings):
        mine = [finding for finding in findings if finding.candidate == candidate]
        if any(not finding.passed for finding in mine):
            pattern = _pattern(mine, by_name)
            diagnoses.append(Diagnosis(candidate, *_name(pattern), pattern.finding))
    return diagnoses


def _pattern(findings: Sequence[Finding], schedules: Mapping[str, Schedule]) -> _Pattern:
    order = list(dict.fromkeys(finding.tensor for finding in findings))  # each call's are in the model's order
    tensor = min((finding.tensor for finding in findings if not finding.passed), key=order.index)
    mine = [finding for finding in findings if finding.tensor == tensor]
    first = next(finding for finding in mine if not finding.passed)
    missed, passed = _cases(mine, schedules)
    return _Pattern(first, missed, passed, not_finite=first.problem is not None and "NaN" in first.problem)


def _cases(findings: Sequence[Finding], schedules: Mapping[str, Schedule]) -> tuple[list[_Case], list[_Case]]:
    """What missed and what passed; no calls of a row between a miss and its next start."""
    bad = {(finding.schedule, finding.call, row) for finding in findings for row in finding.missed_rows}
    compared = dict.fromkeys((finding.schedule, finding.call) for finding in findings)
    missed: list[_Case] = []
    passed: list[_Case] = []
    spoilt: set[tuple[str, int]] = set()
    for name, index in sorted(compared):
        call = schedules[name].calls[index]
        for row, position in enumerate(call.positions):
            if (name, row) in spoilt and position:
                continue
            is_bad = (name, index, row) in bad
            (missed if is_bad else passed).append(_Case(schedules[name], call, row))
            (spoilt.add if is_bad else spoilt.discard)((name, row))
    return missed, passed


def _name(pattern: _Pattern) -> tuple[str, str]:
    """Name and explanation; the rules of the module's table, the surest first."""
    first, missed, passed, what, are = pattern.finding, pattern.missed, pattern.passed, pattern.what, pattern.are
    if first.problem is not None and not pattern.not_finite:
        return CONTRACT, f"{what}: {first.problem}"
    if first.hint.startswith("heads"):
        return "swapped heads", f"{what}: {first.hint}"
    handovers = {case.call.handover for case in missed}
    if "carried" not in handovers:
        return (
            f"{' or '.join(sorted(handovers))} streams",
            f"{what} {are} off in streams that were handed over, only there",
        )
    if all(case.starts for case in missed) and any(not case.starts for case in passed):
        return "stale slot", f"{what} {are} off where a stream starts in used memory: what lies there has an effect"
    if all(case.row for case in missed) and any(not case.row and not case.starts for case in passed):
        return "mixed rows", f"{what} {are} right in the first row of a batch, off in others: rows are mixed up"
    if all(case.position >= _FAR for case in missed) and passed and first.share > _CLEARLY:
        return _far_name(pattern)
    if all(not case.starts for case in missed):
        return _later_name(pattern)
    if pattern.kind == "cema" and any(case.starts and case.call.num_tokens == 1 for case in passed):
        explanation = f"{what} {are} right after one token and off after several, in fresh streams too"
        return "recurrence of the moving average", f"{explanation}: a coefficient, a sign or the order of tokens"
    return _plain_name(pattern)


def _far_name(pattern: _Pattern) -> tuple[str, str]:
    if pattern.kind == "norm":
        hint = f" ({pattern.finding.hint})" if pattern.finding.hint else ""
        return "float32 norm state", f"{pattern.what} {pattern.are} right early in a stream and drift late in it{hint}"
    return "position too narrow", f"{pattern.what} {pattern.are} right up to 2^31 tokens, off beyond"


def _later_name(pattern: _Pattern) -> tuple[str, str]:
    """Rows that start are right."""
    what, are = pattern.what, pattern.are
    early = any(not case.is_late and not case.starts for case in pattern.passed)
    if pattern.kind == "key" and all(case.is_late for case in pattern.missed) and early:
        return "RoPE offset at a chunk edge", f"{what} {are} right in a stream's first chunk, off from the next on"
    if pattern.kind == "norm" and not pattern.finding.tensor.endswith(".0"):
        explanation = f"{what} {are} right where a stream starts, off where it goes on: the norm's state, or attention"
        return "state or past rows", f"{explanation} over past rows in the layer before"
    if pattern.kind in ("cema", "norm"):
        explanation = f"{what} {are} right where a stream starts, off where it goes on from the call before"
        return "state not carried", explanation
    return "past rows of the open chunk", f"{what}: right where a stream starts, off where it goes on"


def _plain_name(pattern: _Pattern) -> tuple[str, str]:
    """Off from the first token on."""
    what = pattern.what
    if pattern.not_finite:
        return "not finite", f"{what}: {pattern.finding.problem}"
    names = {
        "cema": "moving average",
        "norm": "input of a norm",
        "key": "queries and keys",
        "value": "values",
        "logits": "logits",
    }
    near = ": the state tensors are right" if pattern.kind == "logits" else ""
    return names.get(pattern.kind, pattern.kind), f"{what} {pattern.are} off from a stream's first tokens on{near}"
