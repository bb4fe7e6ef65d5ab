"""Plan the calls, compute the reference, run each candidate over them, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from polygraphy.comparator import RunResults

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.verify.candidates import ACTIVATIONS, cpu_candidates
from megalodon_deploy.verify.comparison import (
    Candidate,
    Tick,
    candidate_efforts,
    compare_candidate,
    reference_efforts,
    run_references,
)
from megalodon_deploy.verify.engines import engine_candidates
from megalodon_deploy.verify.finding import Finding
from megalodon_deploy.verify.reference import CallByCallRunner, Start, WholeSequenceRunner, make_start
from megalodon_deploy.verify.report import NotRun, VerifyReport
from megalodon_deploy.verify.runners import Feed, make_feeds
from megalodon_deploy.verify.schedule import Schedule, plan_schedules
from megalodon_deploy.verify.weights import WeightSource, load_reference

Progress = Callable[[str, float], None]

_PACKAGES = ("megalodon-deploy", "numpy", "onnx", "onnxruntime", "polygraphy", "torch")


@dataclass(frozen=True)
class _Prepared:
    """A schedule with everything that a candidate is run on and compared with."""

    schedule: Schedule
    feeds: Sequence[Feed]
    start: Start
    references: list[RunResults]


def run_verification(bundle: Bundle, ckpt: str | Path | None, progress: Progress | None) -> VerifyReport:
    """See `megalodon_deploy.verify.verify_bundle`."""
    begin = time.perf_counter()
    schedules = plan_schedules(bundle.config)
    on_cpu, not_here = cpu_candidates(bundle)
    on_gpu, not_anywhere = engine_candidates(bundle)
    candidates, not_run = on_cpu + on_gpu, not_here + not_anywhere
    tick = _meter(progress, schedules, candidates)
    prepared, source = _compute_references(bundle, ckpt, schedules, tick)
    findings: list[Finding] = []
    for candidate in candidates:
        found, left_out = _run(candidate, prepared, bundle, tick)
        findings += found
        not_run += left_out
    return VerifyReport(
        bundle=_describe(bundle),
        reference=asdict(source),
        candidates={candidate.name: candidate.what for candidate in candidates},
        schedules=schedules,
        findings=tuple(findings),
        not_run=tuple(not_run),
        versions={package: version(package) for package in _PACKAGES},
        seconds=time.perf_counter() - begin,
    )


def _compute_references(
    bundle: Bundle, ckpt: str | Path | None, schedules: tuple[Schedule, ...], tick: Tick
) -> tuple[list[_Prepared], WeightSource]:
    """All of them first, so that the model is gone before another one is loaded."""
    model, source = load_reference(bundle, ckpt)
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
    return prepared, source


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
