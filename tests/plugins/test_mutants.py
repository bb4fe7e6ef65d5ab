"""What the mutation script finds in a source, and that a few removals are noticed by the kernels' checks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mutant_builder import CHOICE_HEADER, CHOICE_SOURCE, numbers_of
from mutants import Mutant, find_mutants, instrument
from mutate import BROKEN, KILLED, SURVIVED, Outcome, all_mutants, allowed_survivors, complaints, sample_of, table

SAMPLE = ["--only", ": barrier: ", "--sample", "2"]

SOURCE = """\
__global__ void kernel(Call call) {
    // if (comment) __syncthreads();
    const bool is_inside = index < call.B && index >= 0;
    if (index >= call.B) return;
    if (is_inside && lane == 0) { y[index] = 1; }
    constexpr int kHalf = kLanes > 1 ? kLanes / 2 : 1;
    if constexpr (kLanes > 1) sum = __shfl_xor_sync(kWholeWarp, sum, 1);
    for (int i = 0; i < kLanes; ++i) x += i;
    for (int64_t t = lane; t < call.T; t += kWarpSize) { x += t; }
    const float past = fresh ? 0.0f : call.past[row];
    return a.count == 0 ? f(b, c) : c;
    __syncthreads();
    __syncwarp(mask);
    __syncthreads();
}
"""


def changes(mutants: list[Mutant]) -> list[tuple[int, str, str, str]]:
    return [(mutant.line, mutant.kind, SOURCE[mutant.start : mutant.end], mutant.becomes) for mutant in mutants]


def test_every_removal_is_found() -> None:
    assert changes(find_mutants("operators/one/kernel.cuh", SOURCE)) == [
        (3, "bound", "index < call.B", "true"),
        (3, "bound", "index < call.B && index >= 0", "false"),
        (3, "bound", "index < call.B && index >= 0", "true"),
        (3, "bound", "index >= 0", "true"),
        (4, "bound", "index >= call.B", "false"),
        (5, "bound", "is_inside", "true"),
        (5, "bound", "is_inside && lane == 0", "true"),
        (5, "bound", "lane == 0", "true"),
        (7, "lane mask", "kWholeWarp", ">> 1"),
        (9, "loop bound", "call.T", "+ 1"),
        (10, "select", "fresh", "false"),
        (10, "select", "fresh", "true"),
        (11, "select", "a.count == 0", "false"),
        (11, "select", "a.count == 0", "true"),
        (12, "barrier", "__syncthreads()", "nothing"),
        (13, "barrier", "__syncwarp(mask)", "nothing"),
        (14, "barrier", "__syncthreads()", "nothing"),
    ]


def test_names_do_not_depend_on_lines() -> None:
    mutants = find_mutants("operators/one/kernel.cuh", SOURCE)
    assert len({mutant.key for mutant in mutants}) == len(mutants)
    assert {mutant.operator for mutant in mutants} == {"one"}
    moved = find_mutants("operators/one/kernel.cuh", "\n" + SOURCE)
    assert [mutant.key for mutant in moved] == [mutant.key for mutant in mutants]


PROGRAM = """
#include <cstdio>
HEADER
SOURCE
void __syncthreads() { std::printf("barrier "); }
unsigned __ballot_sync(unsigned mask, bool) { return mask; }
TEXT
int main() {
    for (int number = 0; number <= NUM_MUTANTS; ++number) {
        mgd_choose_mutant(number);
        kernel(3);
        std::printf("|");
        if (number > 0) continue;
        for (int other = 0; other <= NUM_MUTANTS; ++other) std::printf("%d", mgd_touched[other]);
        std::printf("|");
    }
    return 0;
}
"""
FUNCTION = """
void kernel(int n) {
    const bool small = n < 2 && n >= 0;
    if (small) std::printf("small ");
    for (int i = 0; i < n; ++i) std::printf("%d ", i);
    std::printf("%s ", n > 5 ? "big" : "not");
    __syncthreads();
    std::printf("%u", __ballot_sync(8u, true));
}
"""


def test_each_number_chooses_one_mutant(tmp_path: Path) -> None:
    mutants = find_mutants("operators/one/kernel.cuh", FUNCTION)
    numbers = numbers_of(mutants)
    parts = {"HEADER": CHOICE_HEADER.replace("#pragma once", ""), "SOURCE": CHOICE_SOURCE}
    parts |= {"TEXT": instrument(FUNCTION, mutants, numbers), "NUM_MUTANTS": str(len(mutants))}
    text = PROGRAM
    for name, part in parts.items():
        text = text.replace(name, part)
    (tmp_path / "program.cpp").write_text(text)
    subprocess.run(["c++", "-o", tmp_path / "program", tmp_path / "program.cpp"], check=True)
    printed = subprocess.run([tmp_path / "program"], capture_output=True, text=True, check=True).stdout.split("|")
    assert printed[0] == "0 1 2 not barrier 8"
    touched = printed.pop(1)
    found = {(mutant.becomes, FUNCTION[mutant.start : mutant.end]): printed[numbers[mutant.key]] for mutant in mutants}
    assert found == {
        ("true", "n < 2"): "small 0 1 2 not barrier 8",
        ("true", "n >= 0"): printed[0],
        ("true", "n < 2 && n >= 0"): "small 0 1 2 not barrier 8",
        ("false", "n < 2 && n >= 0"): printed[0],
        ("true", "small"): "small 0 1 2 not barrier 8",
        ("+ 1", "n"): "0 1 2 3 not barrier 8",
        ("true", "n > 5"): "0 1 2 big barrier 8",
        ("false", "n > 5"): printed[0],
        ("nothing", "__syncthreads()"): "0 1 2 not 8",
        (">> 1", "8u"): "0 1 2 not barrier 4",
    }

    changed = {number for number, text in enumerate(printed) if text not in (printed[0], "")}
    assert {number for number, bit in enumerate(touched) if bit == "1"} == changed


def test_the_report_counts_and_complains() -> None:
    first, second, third, *_ = find_mutants("common/warp.cuh", SOURCE)
    outcomes = [Outcome(first, KILLED), Outcome(second, SURVIVED), Outcome(third, SURVIVED)]
    allowed = {second.key: "it does not matter"}
    assert table(outcomes, allowed).splitlines()[2:] == ["| common | 3 | 1 | 1 |", "| all | 3 | 1 | 1 |"]
    assert complaints(outcomes, [first, second, third], allowed) == [f"survived: {third.key} (line {third.line})"]
    outcomes = [Outcome(first, BROKEN), Outcome(second, KILLED)]
    assert len(complaints(outcomes, [first, second], {second.key: ""})) == 2
    assert len(complaints(outcomes, [first], {second.key: ""})) == 3


def test_explanations_are_of_mutants_that_exist() -> None:
    present = {mutant.key for mutant in all_mutants()}
    allowed = allowed_survivors()
    assert set(allowed) <= present
    assert all(len(reason) > 20 for reason in allowed.values())


def test_the_documented_counts_are_of_these_sources(repository: Path) -> None:
    """After a change of the kernels: run `python plugins/tests/mutate.py --only operators/NAME`, then correct the
    page."""
    allowed = allowed_survivors()
    outcomes = [Outcome(mutant, SURVIVED if mutant.key in allowed else KILLED) for mutant in all_mutants()]
    assert table(outcomes, allowed) in (repository / "docs" / "kernels.md").read_text()


def test_a_sample_has_every_kind() -> None:
    mutants = all_mutants()
    kinds = {mutant.kind for mutant in mutants}
    assert {mutant.kind for mutant in sample_of(mutants, len(kinds))} == kinds
    assert sample_of(mutants[::-1], 7) == sample_of(mutants, 7)


def test_a_sample_is_killed(repository: Path) -> None:
    script = repository / "plugins" / "tests" / "mutate.py"
    command = [sys.executable, script, *SAMPLE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"] {KILLED}: ") == 2


@pytest.mark.parametrize("arguments", [["--list"], ["--list", "--sample", "3"]], ids=len)
def test_mutants_can_be_listed(repository: Path, arguments: list[str]) -> None:
    script = repository / "plugins" / "tests" / "mutate.py"
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == (3 if "--sample" in arguments else len(all_mutants()))
