"""Run checks on mutants of a library: each mutant in a process of its own, forked when the checks have been collected.

    python plugins/tests/mutant_trials.py REQUEST.json

The request names the library, the numbers of the mutants, the check files and where the answers go. A rehearsal, all
checks without a mutant, notes how long each takes and in which of them a removal would change anything: a mutant is
then tried on those alone, the quickest first, until one fails. A check that fails must pass without the mutant.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

KILLED, SURVIVED, UNTOUCHED = "killed", "survived", "untouched"  # untouched: it made no difference in any check
LONGEST_SECONDS = 20.0  # for a check of unknown length


@dataclass(frozen=True)
class Request:
    """What a process is asked."""

    library: str
    num_mutants: int  # in the library
    numbers: list[int]
    checks: list[str]
    jobs: int
    rehearsal: str | None  # a file, written where it is missing; none: nothing is known of the checks
    answers: str  # a file, a line [number, status] for each mutant in the order in which they are known


@dataclass(frozen=True)
class Check:
    """One test."""

    item: pytest.Item
    seconds: float = LONGEST_SECONDS  # of processor time
    touched: frozenset[int] = frozenset()  # mutants that would have changed something


@dataclass(frozen=True)
class Trial:
    """A mutant whose process runs."""

    number: int
    checks: Sequence[Check]
    current: mmap.mmap  # shared with the process: the index of the check that it runs


class Trials:
    """A plugin of pytest that runs mutants where pytest would run each check once."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.error: str | None = None  # why nothing can be tried
        self.right = set[str]()  # checks that have passed without a mutant

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        checks = [Check(item) for item in session.items]
        if self.request.rehearsal is not None:
            path = Path(self.request.rehearsal)
            if not path.is_file():
                self._rehearse(session.items, path)
            if self.error is not None:
                return True
            found = json.loads(path.read_text(encoding="utf-8"))
            checks = [Check(item, found[item.nodeid][0], frozenset(found[item.nodeid][1])) for item in session.items]
        waiting, running = list(self.request.numbers), dict[int, Trial]()
        with open(self.request.answers, "a", encoding="utf-8", buffering=1) as answers:
            while (waiting or running) and self.error is None:
                if waiting and len(running) < self.request.jobs:
                    trial = Trial(waiting.pop(0), [], mmap.mmap(-1, 8))
                    trial = replace(trial, checks=self._checks_for(trial.number, checks))
                    if trial.checks:
                        running[_in_child(partial(self._passes, trial))] = trial
                    else:
                        answers.write(json.dumps([trial.number, UNTOUCHED]) + "\n")
                    continue
                pid, status = os.wait()
                trial = running.pop(pid)
                if status:
                    self._confirm(trial)
                answers.write(json.dumps([trial.number, KILLED if status else SURVIVED]) + "\n")
        return True

    def _checks_for(self, number: int, checks: Sequence[Check]) -> list[Check]:
        """What catches a missing barrier comes first where nothing is known of the checks."""
        if self.request.rehearsal is None:
            return sorted(checks, key=lambda check: "order" not in check.item.name)
        return sorted((check for check in checks if number in check.touched), key=lambda check: check.seconds)

    def _passes(self, trial: Trial) -> bool:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # what the sanitizers say of it
        ctypes.CDLL(self.request.library).mgd_choose_mutant(trial.number)
        for index, check in enumerate(trial.checks):
            trial.current[:] = index.to_bytes(8, "little")
            used = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(used.ru_utime + used.ru_stime + 3 + 10 * check.seconds)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            if _failure(check.item, trial.checks[index + 1].item if index + 1 < len(trial.checks) else None):
                return False
        return True

    def _confirm(self, trial: Trial) -> None:
        """The check that failed passes without the mutant, else no mutant can be told from what is wrong."""
        check = trial.checks[int.from_bytes(trial.current[:], "little")]
        name = check.item.nodeid
        if name in self.right:
            return
        self.right.add(name)
        pid = _in_child(partial(self._passes, Trial(0, [check], mmap.mmap(-1, 8))))
        if os.waitpid(pid, 0)[1]:
            self.error = f"{name} fails on the kernels as they are"

    def _rehearse(self, items: Sequence[pytest.Item], path: Path) -> None:
        """In a child as well: autograd, once used, refuses to work in forks."""
        pid = _in_child(partial(self._write_rehearsal, items, path))
        if os.waitpid(pid, 0)[1]:
            self.error = "the checks fail on the kernels as they are"

    def _write_rehearsal(self, items: Sequence[pytest.Item], path: Path) -> bool:
        library = ctypes.CDLL(self.request.library)
        touched = (ctypes.c_ubyte * (self.request.num_mutants + 1)).in_dll(library, "mgd_touched")
        found = dict[str, tuple[float, list[int]]]()
        for index, item in enumerate(items):
            ctypes.memset(touched, 0, len(touched))
            start = time.process_time()
            if failure := _failure(item, items[index + 1] if index + 1 < len(items) else None):
                print(failure, file=sys.stderr)
                return False
            found[item.nodeid] = time.process_time() - start, [number for number, bit in enumerate(touched) if bit]
        path.write_text(json.dumps(found), encoding="utf-8")
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
