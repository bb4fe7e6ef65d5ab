"""What a verification found, for a person (rows of a table), for a machine (JSON) and for an exit code."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megalodon_deploy.verify.diagnosis import Diagnosis, diagnose
from megalodon_deploy.verify.finding import Finding
from megalodon_deploy.verify.schedule import Schedule
from megalodon_deploy.verify.tolerance import KINDS

_MEASURED = ("error", "relative_error", "tolerance", "absolute_error", "expected", "found", "index", "position")


@dataclass(frozen=True)
class NotRun:
    """A comparison that this machine or this bundle did not allow, and why."""

    what: str
    why: str


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The outcome of `verify_bundle`. It passed when something was compared and nothing missed its tolerance."""

    bundle: dict[str, str]  # path, name, fingerprint, precision, logits
    reference: dict[str, Any]  # where the weights came from, and what that checks
    candidates: dict[str, str]  # by name: what was run
    schedules: tuple[Schedule, ...]
    findings: tuple[Finding, ...]
    not_run: tuple[NotRun, ...]
    versions: dict[str, str]
    seconds: float

    @property
    def misses(self) -> list[Finding]:
        """Everything that did not pass, in the order in which it was found."""
        return [finding for finding in self.findings if not finding.passed]

    @property
    def passed(self) -> bool:
        return bool(self.findings) and not self.misses

    @functools.cached_property
    def diagnoses(self) -> list[Diagnosis]:
        """What each candidate's misses look like."""
        return diagnose(self.findings, self.schedules)

    def verdict(self) -> str:
        """One line: what the first candidate's misses look like and the miss nearest to the cause, or what was
        compared."""
        if not self.findings:
            return "failed: nothing was compared"
        if not self.misses:
            return f"passed: {len(self.findings)} comparisons within tolerance"
        first = self.diagnoses[0]
        return f"failed: {first.name}: {first.explanation}; first {first.first.describe()}"

    @staticmethod
    def table_header() -> tuple[str, ...]:
        return ("candidate", "tensor", "error", "tolerance", "worst", "verdict")

    def table_rows(self) -> list[tuple[str, ...]]:
        """The worst finding of each kind of tensor for each candidate, whichever the reference."""
        return [_row(finding) for finding in _worst(self.findings)]

    def notes(self) -> list[str]:
        """Lines to print below the table: the reference's weights, what was not run, how many comparisons."""
        reference = f"reference: PyTorch in float32, weights of {self.reference['weights']}"
        note = [f"note: {self.reference['note']}"] if self.reference["note"] else []
        looks_like = [f"looks like {diagnosis.describe()}" for diagnosis in self.diagnoses]
        not_run = [f"not run: {item.what}: {item.why}" for item in self.not_run]
        count = self.verdict() if self.passed else f"{len(self.misses)} of {len(self.findings)} comparisons missed"
        return [reference, *note, *not_run, *looks_like, f"{count}, {self.seconds:.1f} s"]

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
            "candidates": self.candidates,
            "num_compared": len(self.findings),
            "worst": [_finding_json(finding) for finding in _worst(self.findings)],
            "diagnoses": [
                {"candidate": it.candidate, "name": it.name, "explanation": it.explanation} for it in self.diagnoses
            ],
            "misses": [_finding_json(finding) for finding in self.misses],
            "comparisons": [_finding_json(finding) for group in by_call.values() for finding in _worst(group)],
            "schedules": [dataclasses.asdict(schedule) for schedule in self.schedules],
            "not_run": [dataclasses.asdict(item) for item in self.not_run],
            "versions": self.versions,
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
    numbers = (f"{finding.error:.1e}", f"{finding.tolerance:.1e}")
    return (finding.candidate, finding.kind, *numbers, place, verdict)


def _finding_json(finding: Finding) -> dict[str, Any]:
    """A finding without the numbers that mean nothing: JSON has no infinity."""
    values = {"passed": finding.passed} | dataclasses.asdict(finding)
    if finding.problem is not None:
        for name in _MEASURED:
            del values[name]
    return values
