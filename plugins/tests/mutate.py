"""Take each barrier, mask and bound check out of the kernels in turn and see that an emulation check notices.

    python plugins/tests/mutate.py [--sample N] [--only TEXT] [--plain] [--jobs N] [--report FILE] [--list]

A mutant is killed when a check of its operator (`tests/plugins/test_emulated_*.py`) fails, when the process dies or
when it runs far longer than it should; it is untouched when its removal makes no difference in any check. The kernels
are compiled as in CI: plainly, and what survives for the sanitizers. The mutants that may survive stand in
mutants_allowed.toml with the reason. Exit code 1 when another one survives, or when an allowed one is killed or gone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mutant_builder import PLUGINS, Builder, sources_of_kernels
from mutant_trials import KILLED, SURVIVED, UNTOUCHED, Request
from mutants import Mutant, find_mutants
from sanitizers import FLAGS, sanitizer_environment

TRIALS = Path(__file__).with_name("mutant_trials.py")
CHECKS = PLUGINS.parent / "tests" / "plugins"
ALLOWED = Path(__file__).with_name("mutants_allowed.toml")
BUILD = PLUGINS.parent / "build" / "mutants"
BROKEN = "does not compile"
ALIVE = (SURVIVED, UNTOUCHED)


@dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    status: str


def all_mutants() -> list[Mutant]:
    """Of every header that kernels consist of."""
    found = []
    for path in sources_of_kernels():
        found += find_mutants(str(path.relative_to(PLUGINS)), path.read_text())
    return found


def sample_of(mutants: Sequence[Mutant], count: int) -> list[Mutant]:
    """`count` mutants, the same ones each time, kinds in turn."""
    ordered = sorted(mutants, key=lambda mutant: hashlib.sha256(mutant.key.encode()).digest())
    rank: Counter[str] = Counter()
    keyed = []
    for mutant in ordered:
        keyed.append((rank[mutant.kind], mutant.kind, mutant))
        rank[mutant.kind] += 1
    return [mutant for _, _, mutant in sorted(keyed, key=lambda entry: entry[:2])[:count]]


def allowed_survivors() -> dict[str, str]:
    """Reason by key."""
    entries = tomllib.loads(ALLOWED.read_text(encoding="utf-8")).get("mutant", [])
    return {entry["key"]: entry["reason"] for entry in entries}


def operators_of(mutant: Mutant) -> set[str]:
    """Folders of the operators that the mutant is in, or whose sources include its header."""
    if mutant.operator != "common":
        return {mutant.operator}
    sources = [path for pattern in ("operators/*/*.cuh", "operators/*/*.cu") for path in PLUGINS.glob(pattern)]
    return {path.parent.name for path in sources if f'"{mutant.path}"' in path.read_text()}


def checks_of(mutants: Sequence[Mutant]) -> list[str]:
    """The check files that name an operator of the mutants."""
    operators = {operator for mutant in mutants for operator in operators_of(mutant)}
    files = sorted(CHECKS.glob("test_emulated_*.py"))
    return [str(file) for file in files if any(operator in file.read_text() for operator in operators)]


@dataclass(frozen=True)
class Stage:
    """One way in which the kernels are compiled and checked."""

    builder: Builder
    environment: Callable[[Path], dict[str, str]]  # of a process that loads this library
    rehearsal: Path | None  # of another stage or of this one, where there is none yet

    def outcomes(self, mutants: Sequence[Mutant], jobs: int) -> list[Outcome]:
        """Raises RuntimeError when a check fails on the kernels as they are: no mutant could be told from that."""
        self.builder.build()
        broken = [mutant for mutant in mutants if mutant.key in self.builder.broken]
        by_number = {self.builder.numbers[mutant.key]: mutant for mutant in mutants if mutant not in broken}
        answers = self.builder.folder / "answers.jsonl"
        answers.unlink(missing_ok=True)
        request = Request(
            library=str(self.builder.library),
            num_mutants=max(self.builder.numbers.values()),
            numbers=list(by_number),
            checks=checks_of(mutants),
            jobs=jobs,
            rehearsal=str(self.rehearsal) if self.rehearsal else None,
            answers=str(answers),
        )
        path = self.builder.folder / "request.json"
        path.write_text(json.dumps(asdict(request)), encoding="utf-8")
        outcomes = [Outcome(mutant, BROKEN) for mutant in broken]
        for number, status in self._answers(path, answers):
            outcomes.append(outcome := Outcome(by_number[number], status))
            done = f"{len(outcomes)}/{len(mutants)}"
            print(f"[{self.builder.folder.name} {done}] {status}: {outcome.mutant.name}", flush=True)
        if len(outcomes) < len(mutants):
            raise RuntimeError(f"the checks fail on the kernels as they are: {self.builder.folder}")
        return outcomes

    def _answers(self, request: Path, answers: Path) -> Iterator[tuple[int, str]]:
        """As they come."""
        environment = self.environment(self.builder.library) | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(TRIALS), str(request)]
        num_read = 0
        with subprocess.Popen(command, env=environment, cwd=PLUGINS.parent, stdout=subprocess.DEVNULL) as process:
            is_over = False
            while not is_over:
                is_over = process.poll() is not None
                lines = answers.read_text(encoding="utf-8").splitlines() if answers.is_file() else []
                for line in lines[num_read:]:
                    number, status = json.loads(line)
                    yield number, status
                num_read = len(lines)
                time.sleep(0.0 if is_over else 0.5)


def plain_environment(library: Path) -> dict[str, str]:
    return os.environ | {"MEGALODON_EMULATED_LIBRARY": str(library)}


def stages(mutants: Sequence[Mutant], *, compile_soon: bool) -> list[Stage]:
    """Plain checks kill most mutants soon, the sanitizers take the rest. `compile_soon` is for few mutants."""
    flags = ["-O0"] if compile_soon else []
    plain = Builder(BUILD / ("soon" if compile_soon else "plain"), flags, mutants)
    sanitized = Builder(BUILD / "sanitized", FLAGS, mutants)
    rehearsal = None if compile_soon else BUILD / "rehearsal.json"
    if rehearsal:
        rehearsal.unlink(missing_ok=True)
    return [
        Stage(plain, plain_environment, rehearsal),
        Stage(sanitized, sanitizer_environment, rehearsal),
    ]


def run(all_stages: Sequence[Stage], mutants: Sequence[Mutant], jobs: int, allowed: Mapping[str, str]) -> list[Outcome]:
    """One outcome for each mutant: of the last stage that it reached. Those without an explanation come first."""
    left, outcomes = sorted(mutants, key=lambda mutant: mutant.key in allowed), dict[str, Outcome]()
    for stage in all_stages:
        if not left:
            break
        for outcome in stage.outcomes(left, jobs):
            earlier = outcomes.get(outcome.mutant.key)
            if outcome.status == UNTOUCHED and earlier:
                continue  # what was touched in one stage is not forgotten in the next
            outcomes[outcome.mutant.key] = outcome
        left = [mutant for mutant in left if outcomes[mutant.key].status in (SURVIVED, UNTOUCHED)]
    return [outcomes[mutant.key] for mutant in mutants]


def table(outcomes: Sequence[Outcome], allowed: dict[str, str]) -> str:
    """Counts by operator, in Markdown: those of docs/kernels.md."""
    lines = ["| operator | removals | noticed | explained |", "| --- | --- | --- | --- |"]
    operators = sorted({outcome.mutant.operator for outcome in outcomes})
    for operator in [*operators, "all"]:
        chosen = [outcome for outcome in outcomes if operator in ("all", outcome.mutant.operator)]
        noticed = sum(outcome.status == KILLED for outcome in chosen)
        explained = sum(outcome.status in ALIVE and outcome.mutant.key in allowed for outcome in chosen)
        lines.append(f"| {operator} | {len(chosen)} | {noticed} | {explained} |")
    return "\n".join(lines)


def complaints(outcomes: Sequence[Outcome], mutants: Sequence[Mutant], allowed: dict[str, str]) -> list[str]:
    """What is wrong: unexplained survivors, what the compiler refuses, and explanations of what is killed or gone."""
    wrong = [
        f"{outcome.status}: {outcome.mutant.name}"
        for outcome in outcomes
        if outcome.status == BROKEN or (outcome.status in ALIVE and outcome.mutant.key not in allowed)
    ]
    wrong += [
        f"allowed to survive, but killed: {outcome.mutant.key}"
        for outcome in outcomes
        if outcome.status == KILLED and outcome.mutant.key in allowed
    ]
    present = {mutant.key for mutant in mutants}
    return wrong + [f"allowed to survive, but not in the sources: {key}" for key in allowed if key not in present]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="only so many, the same ones each time")
    parser.add_argument("--only", default="", help="only those whose key contains this text")
    parser.add_argument("--plain", action="store_true", help="without the sanitizers: sooner, and more survive")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--report", type=Path, help="write the table there as well")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    options = parser.parse_args()
    everything = all_mutants()
    chosen = [mutant for mutant in everything if options.only in mutant.key]
    if options.sample is not None:
        chosen = sample_of(chosen, options.sample)
    if options.list:
        print(*(mutant.name for mutant in chosen), sep="\n")
        return 0
    if shutil.which("c++") is None:
        print("a C++ compiler is needed: apt-get install g++", file=sys.stderr)
        return 2
    allowed = allowed_survivors()
    all_stages = stages(everything, compile_soon=options.sample is not None)[: 1 if options.plain else None]
    outcomes = run(all_stages, chosen, options.jobs, allowed)
    text = table(outcomes, allowed)
    if options.report:
        options.report.write_text(text + "\n", encoding="utf-8")
    print(text)
    wrong = complaints(outcomes, everything, allowed)
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
