"""Run checks on mutants of a library: each mutant in a process of its own, forked when the checks have been collected.

    python plugins/tests/mutant_trials.py REQUEST.json

The request names the library, the numbers of the mutants, the check files and where the answers go. A first run of
all checks without a mutant notes how long each takes and in which of them a removal would change anything: a mutant is
then tried on those alone, the quickest first, until one fails or, with a budget, enough were tried.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

KILLED, SURVIVED, UNTOUCHED = "killed", "survived", "untouched"  # untouched: it made no difference in any check
LONGEST_SECONDS = 200.0  # of processor time for a check of unknown length: a loop without end is a killed mutant


@dataclass(frozen=True)
class Request:
    """What a process is asked: with `has_rehearsal`, checks run without a mutant first."""

    library: str
    num_mutants: int  # in the library
    numbers: list[int]
    checks: list[str]
    jobs: int
    has_rehearsal: bool
    budget_seconds: float  # of checks for each mutant, as the rehearsal timed them
    answers: str  # a file, a line [number, status] for each mutant in the order in which they are known


@dataclass
class Rehearsal:
    """Of one check: seconds of processor time, and the numbers of the mutants that would have changed something."""

    seconds: float = LONGEST_SECONDS / 10
    touched: list[int] = field(default_factory=list)


class Trials:
    """A plugin of pytest that runs mutants where pytest would run each check once."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.error: str | None = None  # why nothing could be tried
        self.rehearsals: list[Rehearsal] | None = None

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if self.request.has_rehearsal and not self._rehearse(session.items):
            return True
        waiting, running = list(self.request.numbers), dict[int, int]()
        with open(self.request.answers, "a", encoding="utf-8", buffering=1) as answers:
            while waiting or running:
                if waiting and len(running) < self.request.jobs:
                    number = waiting.pop(0)
                    if chosen := self._checks_for(number, session.items):
                        running[_in_child(partial(self._passes, number, chosen))] = number
                    else:
                        answers.write(json.dumps([number, UNTOUCHED]) + "\n")
                    continue
                pid, status = os.wait()
                answers.write(json.dumps([running.pop(pid), KILLED if status else SURVIVED]) + "\n")
        return True

    def _checks_for(self, number: int, items: Sequence[pytest.Item]) -> list[tuple[pytest.Item, float]]:
        """What catches a missing barrier comes first where nothing is known of the checks."""
        if self.rehearsals is None:
            ordered = sorted(items, key=lambda item: "order" not in item.name)
            return [(item, LONGEST_SECONDS / 10) for item in ordered]
        found = zip(items, self.rehearsals, strict=True)
        chosen = [(item, rehearsal.seconds) for item, rehearsal in found if number in rehearsal.touched]
        chosen.sort(key=lambda pair: pair[1])
        before = itertools.accumulate((seconds for _, seconds in chosen), initial=0.0)
        return [pair for pair, spent in zip(chosen, before, strict=False) if spent < self.request.budget_seconds]

    def _passes(self, number: int, checks: Sequence[tuple[pytest.Item, float]]) -> bool:
        ctypes.CDLL(self.request.library).mgd_choose_mutant(number)
        for index, (item, seconds) in enumerate(checks):
            used = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(used.ru_utime + used.ru_stime + 3 + 10 * seconds)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            if _failure(item, checks[index + 1][0] if index + 1 < len(checks) else None):
                return False
        return True

    def _rehearse(self, items: Sequence[pytest.Item]) -> bool:
        """In a child as well: autograd, once used, refuses to work in forks."""
        path = Path(self.request.answers + ".rehearsal")
        _, status = os.waitpid(_in_child(partial(self._write_rehearsal, items, path)), 0)
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else "the checks end the process"
        if status or isinstance(found, str):
            self.error = str(found)
            return False
        self.rehearsals = [Rehearsal(**entry) for entry in found]
        return True

    def _write_rehearsal(self, items: Sequence[pytest.Item], path: Path) -> bool:
        path.unlink(missing_ok=True)
        library = ctypes.CDLL(self.request.library)
        touched = (ctypes.c_ubyte * (self.request.num_mutants + 1)).in_dll(library, "mgd_touched")
        rehearsals = []
        for index, item in enumerate(items):
            ctypes.memset(touched, 0, len(touched))
            start = time.process_time()
            if failure := _failure(item, items[index + 1] if index + 1 < len(items) else None):
                path.write_text(json.dumps(failure), encoding="utf-8")
                return False
            seconds, bits = time.process_time() - start, bytes(touched)
            rehearsals.append(Rehearsal(seconds, [number for number in self.request.numbers if bits[number]]))
        path.write_text(json.dumps([asdict(rehearsal) for rehearsal in rehearsals]), encoding="utf-8")
        return True


def _failure(item: pytest.Item, next_item: pytest.Item | None) -> str:
    """What a check says when it fails, else nothing."""
    reports = runtestprotocol(item, log=False, nextitem=next_item)
    return next((f"{item.nodeid}: {report.longreprtext}" for report in reports if report.failed), "")


def _in_child(work: Callable[[], bool]) -> int:
    """Process number; its exit status is 0 when `work` returns true."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        os._exit(0 if work() else 1)
    except BaseException:  # whatever it is, the child must not go on as its parent
        os._exit(1)


def main() -> int:
    content: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    trials = Trials(Request(**content))
    options = ["-q", "-s", "-W", "ignore", "--no-header", "--no-summary"]
    for plugin in ("cacheprovider", "xdist", "faulthandler"):
        options += ["-p", f"no:{plugin}"]
    code = pytest.main([*options, *trials.request.checks], plugins=[trials])
    if trials.error:
        print(trials.error, file=sys.stderr)
    return 1 if trials.error else int(code != pytest.ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
