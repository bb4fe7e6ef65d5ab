"""`verify_bundle`: plan the calls, compute the reference, run each candidate over them, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from polygraphy.comparator import RunResults

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.errors import UserError
from megalodon_deploy.runtime.session import open_session
from megalodon_deploy.verify.candidates import onnx_candidate, session_candidate
from megalodon_deploy.verify.compare import Finding
from megalodon_deploy.verify.comparison import REFERENCE, Candidate, Tick, compare_candidate, run_references
from megalodon_deploy.verify.reference import CallByCallRunner, Start, WholeSequenceRunner, make_start
from megalodon_deploy.verify.report import NotRun, VerifyReport
from megalodon_deploy.verify.runners import Feed, make_feeds
from megalodon_deploy.verify.schedule import Schedule, plan_schedules
from megalodon_deploy.verify.weights import Reference, load_reference

Progress = Callable[[str, float], None]

_PACKAGES = ("megalodon-deploy", "numpy", "onnx", "onnxruntime", "polygraphy", "torch")
_REFERENCE_EFFORT = 4  # of a token, where a candidate's is 1: two runs, one of which recomputes
_SEED = 0


@dataclass(frozen=True)
class _Prepared:
    """A schedule with everything that a candidate is run on and compared with."""

    schedule: Schedule
    feeds: Sequence[Feed]
    start: Start
    references: list[RunResults]


def run_verification(bundle: Bundle, ckpt: str | Path | None, progress: Progress | None) -> VerifyReport:
    """See `verify_bundle`."""
    begin = time.perf_counter()
    config = bundle.config
    schedules = plan_schedules(config)
    openers = {"onnxruntime": onnx_candidate, "onnxruntime session": _open_session}
    tick = _meter(progress, schedules, len(openers))
    reference = load_reference(bundle, ckpt)
    prepared = list(_prepare(reference, schedules, tick))
    findings: list[Finding] = []
    candidates: dict[str, str] = {}
    not_run: list[NotRun] = []
    for name, open_candidate in openers.items():
        try:
            candidate = open_candidate(bundle)
        except UserError as error:
            not_run.append(NotRun(name, str(error)))
            continue
        candidates[name] = candidate.what
        for part in prepared:
            findings += compare_candidate(
                config, part.schedule, candidate, part.start, part.feeds, part.references, tick
            )
    return VerifyReport(
        bundle=_describe(bundle),
        reference={"weights": reference.weights, "checks_mapping": reference.checks_mapping, "note": reference.note},
        candidates=candidates,
        schedules=schedules,
        findings=tuple(findings),
        not_run=tuple(not_run),
        versions={package: version(package) for package in _PACKAGES},
        seconds=time.perf_counter() - begin,
    )


def _prepare(reference: Reference, schedules: tuple[Schedule, ...], tick: Tick) -> Iterator[_Prepared]:
    model = reference.model
    for seed, schedule in enumerate(schedules, _SEED):
        start = make_start(model, schedule, np.dtype(np.float32), seed)
        feeds = list(make_feeds(schedule, model.config.vocab_size, seed))
        runners = [
            WholeSequenceRunner(model, schedule, start, name="PyTorch, whole sequence"),
            CallByCallRunner(model, schedule, start, name="PyTorch, call by call"),
        ]
        yield _Prepared(schedule, feeds, start, run_references(runners, feeds, tick))


def _open_session(bundle: Bundle) -> Candidate:
    return session_candidate(open_session(bundle))


def _meter(progress: Progress | None, schedules: tuple[Schedule, ...], num_candidates: int) -> Tick:
    """Progress in tokens, a reference's counted as what they cost."""
    per_token = _REFERENCE_EFFORT + num_candidates
    total = per_token * sum(schedule.num_tokens for schedule in schedules)
    done = 0

    def tick(who: str, num_tokens: int) -> None:
        nonlocal done
        if progress is not None:
            progress(who, done / total)
        done += num_tokens * (_REFERENCE_EFFORT if who == REFERENCE else 1)

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
