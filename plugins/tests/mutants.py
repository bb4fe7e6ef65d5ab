"""Find what can be taken out of a kernel's source: barriers, lane masks, bound checks and selections.

A mutant is the source with one of them removed. Patterns are found in the text, comments aside, so that a new kernel is
covered without being listed anywhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BARRIER = re.compile(r"\b__syncthreads\(\)|\b__syncwarp\(")
COLLECTIVE = re.compile(r"\b__(?:shfl\w*|ballot|any|all|reduce\w*|match\w*)_sync\(")
CONDITION = re.compile(r"\bif \(")
LOOP = re.compile(r"\bfor \(")
FLAG = re.compile(r"\bbool \w+ =\s*([^;{}]+);")
EXIT = re.compile(r"\s*\{?\s*(?:return|break|continue)\b")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"", re.DOTALL)
OPENING, CLOSING = "([{", ")]}"


@dataclass(frozen=True)
class Mutant:
    """One removal. `key` names it without line numbers, which every edit would move."""

    path: str  # of the source, below plugins/
    line: int
    kind: str
    start: int
    end: int
    replacement: str
    key: str

    @property
    def operator(self) -> str:
        """Folder of the operator, "common" for what all of them use."""
        parts = Path(self.path).parts
        return parts[1] if parts[0] == "operators" else "common"

    def apply(self, text: str) -> str:
        return text[: self.start] + self.replacement + text[self.end :]


Change = tuple[str, int, int, str]  # kind, start, end, replacement


def find_mutants(path: str, text: str) -> list[Mutant]:
    """All mutants of one source, in the order of the text."""
    code = COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
    changes = sorted({*_barriers(code), *_conditions(code), *_loops(code)}, key=lambda change: change[1:])
    seen: Counter[str] = Counter()
    mutants = []
    for kind, start, end, replacement in changes:
        before = " ".join(code[start:end].split())
        name = f"{path}: {kind}: {_statement(code, start)}: {before} -> {replacement}"
        seen[name] += 1
        key = name if seen[name] == 1 else f"{name} #{seen[name]}"
        mutants.append(Mutant(path, code.count("\n", 0, start) + 1, kind, start, end, replacement, key))
    return mutants


def _statement(code: str, position: int) -> str:
    """The line of source around `position`, without indentation."""
    start = code.rfind("\n", 0, position) + 1
    end = code.find("\n", position)
    return " ".join(code[start : end if end >= 0 else len(code)].split())


def _barriers(code: str) -> Iterator[Change]:
    for match in BARRIER.finditer(code):
        end = match.end() if match.group().endswith(")") else _closing(code, match.end()) + 1
        yield "barrier", match.start(), end, "(void)0"
    for match in COLLECTIVE.finditer(code):
        end = next(_split(code, match.end(), _closing(code, match.end()), ","))[1]
        if "=" not in code[match.end() : end]:  # not a declaration with types
            yield "lane mask", match.end(), end, f"(({code[match.end() : end]}) >> 1)"


def _conditions(code: str) -> Iterator[Change]:
    for match in CONDITION.finditer(code):
        end = _closing(code, match.end())
        leaves = EXIT.match(code, end + 1) is not None
        yield from _removals("bound", code, match.end(), end, (False,) if leaves else (True,))
    for match in FLAG.finditer(code):
        if "?" not in match.group(1):
            yield from _removals("bound", code, match.start(1), match.end(1), (True, False))
    for match in re.finditer(r" \? ", code):
        start = _start_of_operand(code, match.start())
        yield from _removals("select", code, start, match.start(), (True, False))


def _removals(kind: str, code: str, start: int, end: int, values: tuple[bool, ...]) -> Iterator[Change]:
    """The condition as a whole becomes a constant, and each of several parts that && or || join drops out."""
    for value in values:
        yield kind, start, end, str(value).lower()
    for joint, neutral in (("&&", "true"), ("||", "false")):
        parts = list(_split(code, start, end, joint))
        if len(parts) > 1:
            for part_start, part_end in parts:
                yield kind, part_start, part_end, neutral


def _loops(code: str) -> Iterator[Change]:
    """A loop that goes one too far: `<` becomes `<=`."""
    for match in LOOP.finditer(code):
        clauses = list(_split(code, match.end(), _closing(code, match.end()), ";"))
        if len(clauses) == 3:
            found = re.search(r" (<) ", code[slice(*clauses[1])])
            if found:
                start = clauses[1][0] + found.start(1)
                yield "loop bound", start, start + 1, "<="


def _closing(code: str, position: int) -> int:
    """Index of the bracket that closes the one before `position`."""
    depth = 1
    while depth > 0:
        depth += (code[position] in OPENING) - (code[position] in CLOSING)
        position += 1
    return position - 1


def _split(code: str, start: int, end: int, separator: str) -> Iterator[tuple[int, int]]:
    """Stretches between separators that stand in no bracket, spaces aside."""
    depth, first = 0, start
    for position in range(start, end):
        depth += (code[position] in OPENING) - (code[position] in CLOSING)
        if depth == 0 and code.startswith(separator, position):
            yield _trim(code, first, position)
            first = position + len(separator)
    yield _trim(code, first, end)


def _trim(code: str, start: int, end: int) -> tuple[int, int]:
    stretch = code[start:end]
    return start + len(stretch) - len(stretch.lstrip()), end - len(stretch) + len(stretch.rstrip())


def _start_of_operand(code: str, end: int) -> int:
    """Where the condition of a `?:` begins: after an assignment, `return`, comma or opening bracket."""
    depth = 0
    for position in range(end - 1, -1, -1):
        character = code[position]
        depth += (character in CLOSING) - (character in OPENING)
        is_assignment = character == "=" and code[position - 1] not in "=!<>" and code[position + 1] != "="
        if depth < 0 or (depth == 0 and (character in ",;?:" or is_assignment)):
            return _trim(code, position + 1, end)[0]
        if depth == 0 and code.startswith("return ", position):
            return position + len("return ")
    return 0
