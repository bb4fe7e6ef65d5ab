"""Plan the calls, compute the reference, run each candidate over them, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from polygraphy.comparator import RunResults

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.errors import BundleError, UserError
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.runtime.executors.onnxruntime import missing_on_cpu
from megalodon_deploy.verify.bisection import bisect
from megalodon_deploy.verify.candidates import ACTIVATIONS, WIDENED, cpu_candidates
from megalodon_deploy.verify.comparison import (
    Candidate,
    Tick,
    candidate_efforts,
    compare_candidate,
    reference_efforts,
    run_references,
)
from megalodon_deploy.verify.diagnosis import CONTRACT
from megalodon_deploy.verify.engines import engine_candidates
from megalodon_deploy.verify.finding import Finding
from megalodon_deploy.verify.long_stream import run_long_stream
from megalodon_deploy.verify.machine import describe_machine, describe_versions
from megalodon_deploy.verify.not_run import NotRun
from megalodon_deploy.verify.reference import CallByCallRunner, Start, WholeSequenceRunner, make_start
from megalodon_deploy.verify.report import VerifyReport
from megalodon_deploy.verify.runners import Feed, make_feeds
from megalodon_deploy.verify.schedule import Schedule, plan_schedules
from megalodon_deploy.verify.text import TextAgreement, TextReading, compare_text, default_text, read_text
from megalodon_deploy.verify.weights import WeightSource, load_reference

Progress = Callable[[str, float], None]
_COMPARED = 0.2  # share of the bar for the calls, where a long stream follows


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """See `megalodon_deploy.verify.verify_bundle`."""

    ckpt: str | Path | None = None
    bisect: bool = False
    text: str | Path | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class _Prepared:
    """A schedule with everything that a candidate is run on and compared with."""

    schedule: Schedule
    feeds: Sequence[Feed]
    start: Start
    references: list[RunResults]


@dataclass(frozen=True)
class _Reference:
    """All that the reference model computed, so that it is gone before another one is loaded."""

    prepared: list[_Prepared]
    source: WeightSource
    reading: TextReading | NotRun


def run_verification(bundle: Bundle, options: VerifyOptions, progress: Progress | None) -> VerifyReport:
    """See `megalodon_deploy.verify.verify_bundle`."""
    begin = time.perf_counter()
    schedules = plan_schedules(bundle.config)
    on_cpu, not_here = cpu_candidates(bundle)
    on_gpu, not_anywhere = engine_candidates(bundle)
    candidates, not_run = on_cpu + on_gpu, not_here + not_anywhere
    compared = _part(progress, 0.0, 1.0 if options.tokens is None else _COMPARED)
    tick = _meter(compared, schedules, candidates)
    reference = _compute_references(bundle, options, schedules, tick)
    findings: list[Finding] = []
    for candidate in candidates:
        found, left_out = _run(candidate, reference.prepared, bundle, tick)
        findings += found
        not_run += left_out
    agreements, left_out = _compare_text(candidates, reference.reading, findings, compared)
    report = VerifyReport(
        bundle=_describe(bundle),
        config=bundle.config.to_dict(),
        reference=asdict(reference.source),
        candidates={candidate.name: candidate.what for candidate in candidates},
        schedules=schedules,
        findings=tuple(findings),
        not_run=(*not_run, *left_out),
        text=tuple(agreements),
        machine=describe_machine(),
        versions=describe_versions(),
        seconds=0.0,
        quality=bundle.manifest.quality,
    )
    if options.bisect:
        report = _bisected(bundle, options, report)
    if options.tokens is not None:
        long_stream = run_long_stream(bundle, options.tokens, _part(progress, _COMPARED, 1.0))
        report = replace(report, long_stream=long_stream, not_run=(*report.not_run, *long_stream.not_run))
    return replace(report, seconds=time.perf_counter() - begin)


def _compute_references(
    bundle: Bundle, options: VerifyOptions, schedules: tuple[Schedule, ...], tick: Tick
) -> _Reference:
    model, source = load_reference(bundle, options.ckpt)
    reading = _read_text(bundle, model, options.text)  # first: a text that cannot be read is said at once
    activation = ACTIVATIONS[bundle.manifest.precision]
    prepared = []
    for seed, schedule in enumerate(schedules):
        start = make_start(model, schedule, activation, seed)
        feeds = list(make_feeds(schedule, bundle.config.vocab_size, seed))
        runners = [
            WholeSequenceRunner(model, schedule, start, name="PyTorch, whole sequence"),
            CallByCallRunner(model, schedule, start, name="PyTorch, call by call"),
        ]
        prepared.append(_Prepared(schedule, feeds, start, run_references(schedule, runners, feeds, tick)))
    return _Reference(prepared, source, reading)


def _read_text(bundle: Bundle, model: Megalodon, chosen: str | Path | None) -> TextReading | NotRun:
    """A text that the user chose has to be readable; the default one may not fit the model. A damaged tokenizer is an
    error in any case."""
    if chosen is not None:
        return read_text(bundle, model, Path(chosen))
    try:
        return read_text(bundle, model, default_text())
    except BundleError:
        raise
    except UserError as error:
        return NotRun("text", str(error))


def _compare_text(
    candidates: Sequence[Candidate],
    reading: TextReading | NotRun,
    findings: Sequence[Finding],
    progress: Progress | None,
) -> tuple[list[TextAgreement], list[NotRun]]:
    """The text read through the public runtime. A backend that fails at it has missed before, or has a bug."""
    if isinstance(reading, NotRun):
        return [], [reading]
    if progress is not None:
        progress("text", 1.0)
    agreements, not_run = [], []
    for candidate in candidates:
        if candidate.session is None:
            continue
        try:
            agreements.append(compare_text(candidate.session(), reading, candidate.name))
        except Exception as error:
            if all(finding.passed for finding in findings if finding.candidate == candidate.name):
                raise
            not_run.append(NotRun(f"text with {candidate.name}", " ".join(str(error).split())))
    return agreements, not_run


def _bisected(bundle: Bundle, options: VerifyOptions, report: VerifyReport) -> VerifyReport:
    """With what the graph shows inside, in the schedule of the miss that is nearest to the cause.

    Left as it is where nothing missed; a graph that breaks the contract has no tensors to compare.
    """
    if not report.diagnoses:
        return report
    diagnosis = report.diagnoses[0]
    if diagnosis.name == CONTRACT:
        not_run = NotRun("bisection", f"{diagnosis.candidate} breaks the contract")
        return replace(report, not_run=(*report.not_run, not_run))
    seed, schedule = next(
        (seed, schedule) for seed, schedule in enumerate(report.schedules) if schedule.name == diagnosis.first.schedule
    )
    model, _ = load_reference(bundle, options.ckpt)
    is_widened = diagnosis.candidate == WIDENED or missing_on_cpu(bundle.manifest) is not None
    return replace(report, bisection=bisect(bundle, model, schedule, seed, widened=is_widened))


def _run(
    candidate: Candidate, prepared: Sequence[_Prepared], bundle: Bundle, tick: Tick
) -> tuple[list[Finding], list[NotRun]]:
    findings: list[Finding] = []
    not_run = []
    make_runner = candidate.open()
    for part in prepared:
        schedule = part.schedule
        if not is_for(schedule, candidate):
            continue
        if candidate.max_batch is not None and schedule.batch > candidate.max_batch:
            why = f"it takes {candidate.max_batch} rows at most, the schedule has {schedule.batch}"
            not_run.append(NotRun(f"{candidate.name}, schedule {schedule.name}", why))
            continue
        runner = make_runner(schedule, part.start)
        findings += compare_candidate(bundle.config, schedule, candidate, runner, part.feeds, part.references, tick)
    return findings, not_run


def is_for(schedule: Schedule, candidate: Candidate) -> bool:
    """Whether the candidate can do what the schedule asks for."""
    return candidate.keeps_streams or not schedule.is_for_streams


def _part(progress: Progress | None, begin: float, end: float) -> Progress | None:
    """Progress of a part of the whole, from `begin` to `end`."""
    if progress is None:
        return None
    return lambda stage, done: progress(stage, begin + (end - begin) * done)


def _meter(progress: Progress | None, schedules: tuple[Schedule, ...], candidates: Sequence[Candidate]) -> Tick:
    total = 0
    for schedule in schedules:
        num_runs = sum(is_for(schedule, candidate) for candidate in candidates)
        total += sum(reference_efforts(schedule)) + num_runs * sum(candidate_efforts(schedule))
    done = 0

    def tick(who: str, effort: int) -> None:
        nonlocal done
        if progress is not None:
            progress(who, done / total)
        done += effort

    return tick


def _describe(bundle: Bundle) -> dict[str, str]:
    manifest = bundle.manifest
    return {
        "path": str(bundle.path),
        "name": manifest.name,
        "fingerprint": manifest.fingerprint,
        "precision": manifest.precision,
        "logits": manifest.logits,
    }
