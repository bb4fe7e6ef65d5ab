"""Find what can be taken out of a kernel's source: barriers, lane masks, bound checks and selections.

A mutant is the source with one of them removed. Patterns are found in the text, comments and what the compiler computes
aside, so that a new kernel is covered without being listed anywhere. All mutants of a source are compiled at once;
which one is tried is chosen when the library runs (mutant_builder.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BARRIER = re.compile(r"\b__syncthreads\(\)|\b__syncwarp\(")
COLLECTIVE = re.compile(r"\b__(?:shfl\w*|ballot|any|all|reduce\w*|match\w*)_sync\(")
CONDITION = re.compile(r"\bif \(")
LOOP = re.compile(r"\bfor \(")
FLAG = re.compile(r"\bbool \w+ =\s*([^;{}]+);")
EXIT = re.compile(r"\s*\{?\s*(?:return|break|continue)\b")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|#[^\n]*", re.DOTALL)
CONSTANT = re.compile(r"(?<!if )\bconstexpr\b[^;{]*(?P<end>[;{])|\bstatic_assert\b[^;]*;")
RUN_TIME_NAME = re.compile(r"\b(?!k[A-Z]|(?:sizeof|static_cast|int|true|false)\b)(?<!::)[a-z_]\w*")
OPENING, CLOSING = "([{", ")]}"

# What stands around the removed text; {} is the number of the mutant.
WRAPS = {
    "true": ("mgd_or({}, ", ")"),
    "false": ("mgd_and_not({}, ", ")"),
    "nothing": ("(mgd_tried({}) ? (void)0 : ", ")"),
    ">> 1": ("((", ") >> (mgd_tried({}) ? 1 : 0))"),
    "+ 1": ("((", ") + (mgd_tried({}) ? 1 : 0))"),
}


@dataclass(frozen=True)
class Mutant:
    """One removal. `key` names it without line numbers, which every edit would move."""

    path: str  # of the source, below plugins/
    line: int
    kind: str
    start: int
    end: int
    becomes: str  # a key of WRAPS
    key: str

    @property
    def name(self) -> str:
        """For people: where it is today as well."""
        return f"{self.key} (line {self.line})"

    @property
    def operator(self) -> str:
        """Folder of the operator, "common" for what all of them use."""
        parts = Path(self.path).parts
        return parts[1] if parts[0] == "operators" else "common"


Change = tuple[str, int, int, str]  # kind, start, end, what it becomes


def find_mutants(path: str, text: str) -> list[Mutant]:
    """All mutants of one source, in the order of the text."""
    code = _without_constants(COMMENT.sub(lambda match: _blank(match.group()), text))
    changes = {*_barriers(code), *_conditions(code), *_loops(code)}
    seen: Counter[str] = Counter()
    mutants = []
    for kind, start, end, becomes in sorted(changes, key=lambda change: change[1:]):
        name = f"{path}: {kind}: {_line_around(code, start)}: {' '.join(code[start:end].split())} -> {becomes}"
        seen[name] += 1
        key = name if seen[name] == 1 else f"{name} #{seen[name]}"
        mutants.append(Mutant(path, code.count("\n", 0, start) + 1, kind, start, end, becomes, key))
    return mutants


def instrument(text: str, mutants: Sequence[Mutant], numbers: Mapping[str, int]) -> str:
    """`text` with every mutant in it, lines where they were; `numbers` by key."""
    before: dict[int, str] = {}
    after: dict[int, str] = {}
    # Of two that begin together the longer one stands outside; stretches never overlap in part.
    for mutant in sorted(mutants, key=lambda mutant: (mutant.start, -mutant.end)):
        prefix, suffix = (part.replace("{}", str(numbers[mutant.key])) for part in WRAPS[mutant.becomes])
        before[mutant.start] = before.get(mutant.start, "") + prefix
        after[mutant.end] = suffix + after.get(mutant.end, "")
    pieces = []
    for position in range(len(text) + 1):
        pieces += [after.get(position, ""), before.get(position, ""), text[position : position + 1]]
    return "".join(pieces)


def _blank(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


def _without_constants(code: str) -> str:
    """`code` with spaces in the place of constexpr variables and functions, which the compiler computes."""
    position = 0
    while match := CONSTANT.search(code, position):
        end = _closing(code, match.end()) + 1 if match.group("end") == "{" else match.end()
        code = code[: match.start()] + _blank(code[match.start() : end]) + code[end:]
        position = end
    return code


def _line_around(code: str, position: int) -> str:
    """The line of source around `position`, without indentation."""
    start = code.rfind("\n", 0, position) + 1
    end = code.find("\n", position)
    return " ".join(code[start : end if end >= 0 else len(code)].split())


def _barriers(code: str) -> Iterator[Change]:
    for match in BARRIER.finditer(code):
        end = match.end() if match.group().endswith(")") else _closing(code, match.end()) + 1
        yield "barrier", match.start(), end, "nothing"
    for match in COLLECTIVE.finditer(code):
        start, end = next(_split(code, match.end(), _closing(code, match.end()), ","))
        yield "lane mask", start, end, ">> 1"


def _conditions(code: str) -> Iterator[Change]:
    for match in CONDITION.finditer(code):
        end = _closing(code, match.end())
        leaves = EXIT.match(code, end + 1) is not None
        yield from _removals("bound", code, match.end(), end, ("false",) if leaves else ("true",))
    for match in FLAG.finditer(code):
        if "?" not in match.group(1):
            yield from _removals("bound", code, match.start(1), match.end(1), ("true", "false"))
    for match in re.finditer(r"\s\? ", code):
        start = _start_of_operand(code, match.start())
        yield from _removals("select", code, start, match.start(), ("true", "false"))


def _removals(kind: str, code: str, start: int, end: int, values: tuple[str, ...]) -> Iterator[Change]:
    """The condition as a whole becomes a constant, and each of several parts that && or || join drops out."""
    if ";" in code[start:end]:  # a condition with a declaration
        start = _trim(code, code.rindex(";", start, end) + 1, end)[0]
    if _is_constant(code[start:end]):
        return
    for value in values:
        yield kind, start, end, value
    for joint, neutral in (("&&", "true"), ("||", "false")):
        parts = list(_split(code, start, end, joint))
        if len(parts) > 1:
            for part_start, part_end in parts:
                if not _is_constant(code[part_start:part_end]):
                    yield kind, part_start, part_end, neutral


def _loops(code: str) -> Iterator[Change]:
    """A loop that goes one too far."""
    for match in LOOP.finditer(code):
        clauses = list(_split(code, match.end(), _closing(code, match.end()), ";"))
        if len(clauses) != 3:
            continue
        for start, end in _split(code, *clauses[1], "&&"):
            comparison = re.search(r" < ", code[start:end])
            if comparison and not _is_constant(code[start + comparison.end() : end]):
                yield "loop bound", start + comparison.end(), end, "+ 1"


def _is_constant(expression: str) -> bool:
    """Nothing but numbers and names like kTile or Layout::kModes, which are constants of the program."""
    return RUN_TIME_NAME.search(expression) is None


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
            if character == ":" and ":" in (code[position - 1], code[position + 1]):
                continue  # a qualified name
            return _trim(code, position + 1, end)[0]
        if depth == 0 and code.startswith("return ", position):
            return position + len("return ")
    return 0
