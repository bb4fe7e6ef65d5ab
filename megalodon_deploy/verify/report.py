"""What a verification found, for a person (rows of a table), for a machine (JSON) and for an exit code."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from megalodon_deploy.quality import Quality
from megalodon_deploy.verify.bisection import Bisection
from megalodon_deploy.verify.diagnosis import Diagnosis, diagnose
from megalodon_deploy.verify.finding import Finding, in_words
from megalodon_deploy.verify.long_stream import LongStream
from megalodon_deploy.verify.not_run import NotRun
from megalodon_deploy.verify.schedule import Schedule
from megalodon_deploy.verify.text import TextAgreement
from megalodon_deploy.verify.tolerance import KINDS

_MEASURED = ("error", "relative_error", "tolerance", "absolute_error", "expected", "found", "index", "position")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The outcome of `verify_bundle`. It passed when something was compared, nothing missed its tolerance, and the
    bundle did not fail its quality gate when it was exported."""

    bundle: dict[str, str]  # path, name, fingerprint, precision, logits
    config: dict[str, Any]
    reference: dict[str, Any]  # where the weights came from, and what that checks
    candidates: dict[str, str]  # by name: what was run
    schedules: tuple[Schedule, ...]
    findings: tuple[Finding, ...]
    not_run: tuple[NotRun, ...]
    text: tuple[TextAgreement, ...]
    machine: dict[str, str]
    versions: dict[str, str]
    seconds: float
    quality: Quality | None = None  # what the bundle's quality gate measured
    date: str = field(default_factory=_now)
    bisection: Bisection | None = None
    long_stream: LongStream | None = None

    @property
    def misses(self) -> list[Finding]:
        """Everything that did not pass, in the order in which it was found."""
        return [finding for finding in self.findings if not finding.passed]

    @property
    def passed(self) -> bool:
        return bool(self.findings) and not self.misses and not self._other_failures()

    def _other_failures(self) -> list[str]:
        """What went wrong outside the calls of the schedules."""
        broken = [it.candidate for it in self.text if not it.is_finite]
        failures = [f"logits that are not finite over text, {candidate}" for candidate in broken]
        if self.quality is not None and not self.quality.passed:
            failures.append(self.quality.describe())
        if self.long_stream is not None:
            failures += [check.describe() for check in self.long_stream.checks if not check.passed]
        return failures

    @functools.cached_property
    def diagnoses(self) -> list[Diagnosis]:
        """What each candidate's misses look like."""
        return diagnose(self.findings, self.schedules)

    def verdict(self) -> str:
        """One line: what the first candidate's misses look like and the miss nearest to the cause, or what was
        compared."""
        if not self.findings:
            return "failed: nothing was compared"
        if self.passed:
            return f"passed: {len(self.findings):,} comparisons within tolerance"
        if not self.misses:
            return f"failed: {self._other_failures()[0]}"
        first = self.diagnoses[0]
        return f"failed: {first.name}: {first.explanation}; first {first.first.describe()}"

    @staticmethod
    def table_header() -> tuple[str, ...]:
        return ("candidate", "tensor", "error", "tolerance", "worst", "verdict")

    @functools.cached_property
    def worst(self) -> list[Finding]:
        """The worst finding of each kind of tensor for each candidate, whichever the reference."""
        return _worst(self.findings)

    def table_rows(self) -> list[tuple[str, ...]]:
        """Of the worst findings."""
        return [_row(finding) for finding in self.worst]

    def bisection_rows(self) -> list[tuple[str, ...]]:
        """(tensor, error, tolerance, verdict) of the tensors of the call that was looked into."""
        findings = () if self.bisection is None else self.bisection.findings
        return [(in_words(finding.tensor), *_row(finding)[2:4], _row(finding)[-1]) for finding in findings]

    def notes(self) -> list[str]:
        """Lines to print below the table: the reference's weights, what was not run, how many comparisons."""
        reference = f"reference: PyTorch in float32, weights of {self.reference['weights']}"
        note = [f"note: {self.reference['note']}"] if self.reference["note"] else []
        looks_like = [f"looks like {diagnosis.describe()}" for diagnosis in self.diagnoses]
        not_run = [f"not run: {item.what}: {item.why}" for item in self.not_run]
        count = self.verdict() if self.passed else f"{len(self.misses)} of {len(self.findings)} comparisons missed"
        quality = [f"quality: {self.quality.describe()}"] if self.quality else []
        text = [f"text: {agreement.describe()}" for agreement in self.text]
        long_stream = [check.describe() for check in self.long_stream.checks] if self.long_stream else []
        bisected = [f"bisection: {self.bisection.describe()}"] if self.bisection is not None else []
        return [
            reference,
            *note,
            *quality,
            *text,
            *long_stream,
            *not_run,
            *looks_like,
            *bisected,
            f"{count}, {self.seconds:.1f} s",
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything above as JSON values; `comparisons` holds the worst tensor of each kind for every call."""
        by_call: dict[tuple[Any, ...], list[Finding]] = {}
        for finding in self.findings:
            key = (finding.reference, finding.candidate, finding.schedule, finding.call)
            by_call.setdefault(key, []).append(finding)
        return {
            "passed": self.passed,
            "verdict": self.verdict(),
            "bundle": self.bundle,
            "reference": self.reference,
            "quality": self.quality.to_dict() if self.quality else None,
            "candidates": self.candidates,
            "num_compared": len(self.findings),
            "worst": [_finding_json(finding) for finding in self.worst],
            "diagnoses": [
                {"candidate": it.candidate, "name": it.name, "explanation": it.explanation} for it in self.diagnoses
            ],
            "misses": [_finding_json(finding) for finding in self.misses],
            "comparisons": [_finding_json(finding) for group in by_call.values() for finding in _worst(group)],
            "text": _without_nan([dataclasses.asdict(agreement) for agreement in self.text]),
            "bisection": None if self.bisection is None else _bisection_json(self.bisection),
            "long_stream": None if self.long_stream is None else _without_nan(self.long_stream.to_dict()),
            "config": self.config,
            "machine": self.machine,
            "schedules": [dataclasses.asdict(schedule) for schedule in self.schedules],
            "not_run": [dataclasses.asdict(item) for item in self.not_run],
            "versions": self.versions,
            "date": self.date,
            "seconds": round(self.seconds, 3),
        }


def _worst(findings: Iterable[Finding]) -> list[Finding]:
    """For each candidate and kind the finding with the largest share of its tolerance; kinds in the table's order."""
    worst: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        key = (finding.candidate, finding.kind)
        if key not in worst or finding.share > worst[key].share:
            worst[key] = finding
    order: list[str] = [*KINDS]
    return sorted(
        worst.values(),
        key=lambda item: (item.candidate, order.index(item.kind) if item.kind in order else len(order)),
    )


def _row(finding: Finding) -> tuple[str, ...]:
    verdict = "passed" if finding.passed else "MISSED"
    place = f"{finding.tensor}, {finding.schedule} call {finding.call}, {finding.reference}"
    if finding.problem is not None:
        return (finding.candidate, finding.kind, "-", "-", place, f"{verdict}: {finding.problem}")
    numbers = (f"{finding.worst_error:.1e}", f"{finding.tolerance:.1e}")
    return (finding.candidate, finding.kind, *numbers, place, verdict)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: null in their place."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _bisection_json(bisection: Bisection) -> dict[str, Any]:
    return {
        "schedule": bisection.schedule,
        "call": bisection.call,
        "precision": bisection.precision,
        "verdict": bisection.describe(),
        "tensors": [_finding_json(finding) for finding in bisection.findings],
    }


def _finding_json(finding: Finding) -> dict[str, Any]:
    """A finding without the numbers that mean nothing."""
    values: dict[str, Any] = {"passed": finding.passed} | dataclasses.asdict(finding)
    if finding.problem is not None:
        for name in _MEASURED:
            del values[name]
    return {name: _without_nan(value) for name, value in values.items()}
