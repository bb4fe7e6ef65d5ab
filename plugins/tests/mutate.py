"""Take each barrier, mask and bound check out of the kernels in turn and see that an emulation check notices.

    python plugins/tests/mutate.py [--sample N] [--only TEXT] [--jobs N] [--report FILE] [--list]

A mutant is killed when a check of its operator (`tests/plugins/test_emulated_*.py`) fails, when the process dies or
when it runs far longer than it should. The kernels are compiled as in CI: plainly, and for the sanitizers. The
mutants that may survive stand in mutants_allowed.toml with the reason. Exit code 1 when another one survives, or when
an allowed one is killed or gone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from mutant_builder import PLUGINS, Builder, sources_of_kernels
from mutants import Mutant, find_mutants
from sanitizers import FLAGS, sanitizer_environment

CHECKS = PLUGINS.parent / "tests" / "plugins"
ALLOWED = Path(__file__).with_name("mutants_allowed.toml")
BUILD = PLUGINS.parent / "build" / "mutants"
LONGEST_SECONDS = 300  # of processor time: a loop without end is a killed mutant, a busy machine is not
SANITIZED = ("test_emulated_*.py",)
PLAIN = (*SANITIZED, "test_runtime_kernels.py")  # the latter needs PyTorch, which the sanitizers do not go with
NO_TESTS = 5  # exit code of pytest when nothing was selected
KILLED, SURVIVED, BROKEN = "killed", "survived", "does not compile"


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


@dataclass(frozen=True)
class Stage:
    """One way in which the kernels are compiled and checked."""

    builder: Builder
    environment: Callable[[Path], dict[str, str]]  # of a process that loads this library
    patterns: tuple[str, ...]  # of the check files

    def checks_of(self, mutant: Mutant) -> list[Path]:
        """The check files that name an operator of the mutant."""
        files = sorted(file for pattern in self.patterns for file in CHECKS.glob(pattern))
        return [file for file in files if any(operator in file.read_text() for operator in operators_of(mutant))]

    def passes(self, checks: Sequence[Path], mutant: Mutant | None) -> bool:
        """Whether all `checks` pass with this mutant, or with the kernels as they are."""
        if not checks:
            return True
        environment = self.environment(self.builder.library) | self.builder.environment(mutant)
        command = ["prlimit", f"--cpu={LONGEST_SECONDS}", sys.executable, "-m", "pytest", "-q", "-x"]
        command += ["-p", "no:cacheprovider", *map(str, checks)]
        for selection in (["-k", "order"], ["-k", "not order"]):  # what catches a missing barrier comes first
            done = subprocess.run(
                [*command, *selection],
                env=environment | {"OMP_NUM_THREADS": "1"},
                cwd=PLUGINS.parent,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
            )
            if done.returncode not in (0, NO_TESTS):
                return False
        return True


def plain_environment(library: Path) -> dict[str, str]:
    return os.environ | {"MEGALODON_EMULATED_LIBRARY": str(library)}


def stages(mutants: Sequence[Mutant], *, compile_soon: bool) -> list[Stage]:
    """Plain first: it is faster, and few mutants are left for the sanitizers. `compile_soon` is for few mutants."""
    flags = ["-O0"] if compile_soon else []
    return [
        Stage(Builder(BUILD / ("soon" if compile_soon else "plain"), flags, mutants), plain_environment, PLAIN),
        Stage(Builder(BUILD / "sanitized", FLAGS, mutants), sanitizer_environment, SANITIZED),
    ]


def try_mutant(all_stages: Sequence[Stage], mutant: Mutant) -> Outcome:
    for stage in all_stages:
        passed = stage.passes(stage.checks_of(mutant), mutant)
        if mutant.key in stage.builder.broken:
            return Outcome(mutant, BROKEN)
        if not passed:
            return Outcome(mutant, KILLED)
    return Outcome(mutant, SURVIVED)


def check_originals(all_stages: Sequence[Stage], mutants: Sequence[Mutant]) -> None:
    """Raises RuntimeError when checks fail on the kernels as they are: no mutant could be told from that."""
    for stage in all_stages:
        if not stage.passes(sorted({file for mutant in mutants for file in stage.checks_of(mutant)}), None):
            raise RuntimeError(f"the checks fail on the kernels as they are: {stage.builder.folder}")


def run(all_stages: Sequence[Stage], mutants: Sequence[Mutant], jobs: int) -> list[Outcome]:
    """Outcomes in the order in which they come."""
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed(pool.submit(try_mutant, all_stages, mutant) for mutant in mutants):
            outcomes.append(outcome := future.result())
            mutant = outcome.mutant
            print(f"[{len(outcomes)}/{len(mutants)}] {outcome.status}: {mutant.key} (line {mutant.line})", flush=True)
    return outcomes


def table(outcomes: Sequence[Outcome], allowed: dict[str, str]) -> str:
    """Counts by operator and kind, in Markdown."""
    lines = [
        "| operator | removed | mutants | killed | explained | survived |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    groups = sorted({(outcome.mutant.operator, outcome.mutant.kind) for outcome in outcomes})
    for operator, kind in [*groups, ("all", "")]:
        chosen = [
            outcome
            for outcome in outcomes
            if outcome.status != BROKEN
            and (operator == "all" or (outcome.mutant.operator, outcome.mutant.kind) == (operator, kind))
        ]
        killed = sum(outcome.status == KILLED for outcome in chosen)
        explained = sum(outcome.status == SURVIVED and outcome.mutant.key in allowed for outcome in chosen)
        counts = (len(chosen), killed, explained, len(chosen) - killed - explained)
        lines.append(f"| {operator} | {kind} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


def complaints(outcomes: Sequence[Outcome], mutants: Sequence[Mutant], allowed: dict[str, str]) -> list[str]:
    """What is wrong: unexplained survivors, and explanations of what is killed or gone."""
    wrong = [
        f"survived: {outcome.mutant.key} (line {outcome.mutant.line})"
        for outcome in outcomes
        if outcome.status == SURVIVED and outcome.mutant.key not in allowed
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
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--report", type=Path, help="write the table there as well")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    options = parser.parse_args()
    everything = all_mutants()
    chosen = [mutant for mutant in everything if options.only in mutant.key]
    if options.sample is not None:
        chosen = sample_of(chosen, options.sample)
    if options.list:
        print(*(f"{mutant.key} (line {mutant.line})" for mutant in chosen), sep="\n")
        return 0
    if shutil.which("c++") is None:
        print("a C++ compiler is needed: apt-get install g++", file=sys.stderr)
        return 2
    allowed = allowed_survivors()
    all_stages = stages(everything, compile_soon=options.sample is not None)
    if options.sample is None:  # a sample runs beside these very checks
        check_originals(all_stages, chosen)
    outcomes = run(all_stages, chosen, options.jobs)
    text = table(outcomes, allowed)
    if options.report:
        options.report.write_text(text + "\n", encoding="utf-8")
    print(text)
    wrong = complaints(outcomes, everything, allowed)
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
