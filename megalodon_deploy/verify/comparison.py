"""One schedule, one candidate: run through Polygraphy's comparator call by call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from polygraphy.comparator import Comparator, RunResults
from polygraphy.logger import G_LOGGER

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.runtime.session import Session
from megalodon_deploy.verify.compare import Contract, ContractCompare
from megalodon_deploy.verify.finding import Finding
from megalodon_deploy.verify.reference import ReferenceRunner, Start
from megalodon_deploy.verify.runners import CandidateFailedError, Feed, StreamRunner
from megalodon_deploy.verify.schedule import Schedule

Tick = Callable[[str, int], None]  # told before every call who computes, and the effort in tokens

_CALL_EFFORT = 10  # of a row's call, whatever its tokens: weights and memory are read


RunnerFactory = Callable[[Schedule, Start], StreamRunner]


@dataclass(frozen=True)
class Candidate:
    """Something that claims to compute what PyTorch computes."""

    name: str
    what: str  # for the report
    contract: Contract
    open: Callable[[], RunnerFactory]  # runners of one factory share a loaded model
    max_batch: int | None = None
    session: Callable[[], Session] | None = None  # opened anew; where it is the public runtime

    @property
    def keeps_streams(self) -> bool:
        """By itself, so that it can save, fork and move them, and read text."""
        return self.session is not None


def reference_efforts(schedule: Schedule) -> list[int]:
    """Of each call: one reference computes its tokens, the other every row anew from its start."""
    calls = zip(candidate_efforts(schedule), schedule.fed_tokens(), strict=True)
    return [2 * effort + sum(fed) for effort, fed in calls]


def candidate_efforts(schedule: Schedule) -> list[int]:
    """Of each call, in tokens."""
    return [schedule.batch * (call.num_tokens + _CALL_EFFORT) for call in schedule.calls]


def run_references(
    schedule: Schedule, references: Sequence[ReferenceRunner], feeds: Iterable[Feed], tick: Tick
) -> list[RunResults]:
    """Results of all references, an item per call."""
    told = _told(feeds, reference_efforts(schedule), "PyTorch", tick)
    with G_LOGGER.verbosity():
        return list(Comparator.run([*references], told, streaming=True))


def compare_candidate(
    config: MegalodonConfig,
    schedule: Schedule,
    candidate: Candidate,
    runner: StreamRunner,
    feeds: Iterable[Feed],
    references: Sequence[RunResults],
    tick: Tick,
) -> list[Finding]:
    """Findings of every tensor of every call against each reference; a candidate that cannot go on is one, too."""
    assert runner.name == candidate.name, f"Bug: {runner.name} runs for {candidate.name}"
    compare = ContractCompare(config, schedule, {runner.name: candidate.contract})
    names = list(references[0].keys())
    told = _told(feeds, candidate_efforts(schedule), candidate.name, tick)
    try:
        with G_LOGGER.verbosity():
            Comparator.compare_accuracy(
                [iter(references), Comparator.run([runner], told, streaming=True)],
                comparisons=[(index, len(names)) for index in range(len(names))],
                compare_func=compare,
            )
    except CandidateFailedError as failure:
        stopped = Finding(
            schedule=schedule.name,
            call=compare.num_compared // len(names),
            reference=names[0],
            candidate=candidate.name,
            tensor="all outputs",
            kind="",
            problem=str(failure),
        )
        return [*compare.findings, stopped]
    num_due = len(schedule.calls) * len(names)
    assert compare.num_compared == num_due, f"Bug: {compare.num_compared} of {num_due} calls were compared"
    return compare.findings


def _told(feeds: Iterable[Feed], efforts: Iterable[int], who: str, tick: Tick) -> Iterator[Feed]:
    for feed, effort in zip(feeds, efforts, strict=True):
        tick(who, effort)
        yield feed
