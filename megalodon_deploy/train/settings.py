"""Settings as frozen dataclasses that explain themselves: from TOML, from `section.key=value`, and back to TOML.

Nothing here knows what is trained. A `Section` checks its own values, so a mistake is one line naming the setting,
whether it came from a file, the command line or Python.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from megalodon_deploy.errors import ConfigError

Table = dict[str, Any]
S = TypeVar("S", bound="Section")
_NONE = "none"  # how the command line spells an optional setting that is not set


def setting(
    doc: str,
    default: Any = dataclasses.MISSING,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A field with its documentation and the range of its values."""
    metadata = {"doc": doc, "least": least, "above": above, "below": below}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of all sections. Raises `ConfigError` for a value of another type or outside its range."""

    def __post_init__(self) -> None:
        for field, hint in fields(type(self)):
            value = coerce(getattr(self, field.name), hint, f"{self.title()}.{field.name}")
            _check_range(value, field, self.title())
            object.__setattr__(self, field.name, value)

    @classmethod
    def title(cls) -> str:
        """The section's name in a file."""
        return cls.__name__.removesuffix("Config").lower()

    @classmethod
    def from_table(cls: type[S], table: Mapping[str, Any]) -> S:
        """Raises `ConfigError` for an unknown key, naming the nearest, and for a missing one."""
        known = {field.name: field for field, _ in fields(cls)}
        refuse_unknown(table, known, cls.title())
        required = [name for name, field in known.items() if field.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in table]:
            raise ConfigError(f"{cls.title()}.{missing[0]} is not set: {known[missing[0]].metadata['doc']}")
        return cls(**table)


def fields(section: type[Section]) -> list[tuple[dataclasses.Field[Any], Any]]:
    """(field, its type) in the order of the class."""
    hints = typing.get_type_hints(section)
    return [(field, hints[field.name]) for field in dataclasses.fields(section)]


def refuse_unknown(found: Iterable[str], known: Iterable[str], where: str = "") -> None:
    """Raises `ConfigError` for the first name of `found` that is not known, with the nearest that is."""
    known = list(known)
    prefix = f"{where}." if where else ""
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"there are: {', '.join(known)}"
            raise ConfigError(f"unknown setting {prefix}{name}; {hint}")


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`: numbers widen, paths and tuples are made of strings and lists, nothing else changes.

    Raises `ConfigError` naming `where`.
    """
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None or value == _NONE:
            return None
        inner = next(part for part in typing.get_args(hint) if part is not types.NoneType)
        return coerce(value, inner, where)
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        inner, *rest = typing.get_args(hint)
        if rest != [Ellipsis] and len(items) != 1 + len(rest):
            raise ConfigError(f"{where} = {value!r}: expected {1 + len(rest)} values")
        return tuple(coerce(item, inner, where) for item in items)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"{where} = {value!r} is none of {', '.join(map(str, choices))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # a name of digits, from the command line
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where} = {value!r}: expected {_name_of(hint)}")
    return value


def _name_of(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path", str: "text"}
    return names.get(hint, str(hint))


def _check_range(value: Any, field: dataclasses.Field[Any], title: str) -> None:
    least, above, below = (field.metadata.get(key) for key in ("least", "above", "below"))
    for number in value if isinstance(value, tuple) else (value,):
        if not isinstance(number, int | float) or isinstance(number, bool):
            continue
        where = f"{title}.{field.name} = {number}"
        if not math.isfinite(number):
            raise ConfigError(f"{where} is not a finite number")
        if least is not None and number < least:
            raise ConfigError(f"{where} is below {least}")
        if above is not None and number <= above:
            raise ConfigError(f"{where} is not above {above}")
        if below is not None and number >= below:
            raise ConfigError(f"{where} is not below {below}")


def read_toml(path: Path) -> Table:
    """The tables of a file. Raises `ConfigError` for a file that is absent or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # TOML and UTF-8 alike
        raise ConfigError(f"{path}: not TOML ({error})") from error


def override(tables: Table, assignments: Sequence[str]) -> Table:
    """`tables` with `section.key=value` texts applied; a value is TOML, or else text: `data.glob=**/*.md`."""
    merged = {name: dict(table) if isinstance(table, dict) else table for name, table in tables.items()}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        section, dot, key = name.strip().partition(".")
        if not (equals and dot and section and key):
            raise ConfigError(f"{assignment!r} is no setting; expected section.key=value, as run.seed=1")
        merged.setdefault(section, {})[key] = _parse(text.strip())
    return merged


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def to_toml(sections: Mapping[str, tuple[Mapping[str, Any], Mapping[str, str]]]) -> str:
    """TOML of (values, documentation) by section. What is not set stands as a comment."""
    lines: list[str] = []
    for title, (values, docs) in sections.items():
        lines += ["", f"[{title}]"]
        for key, value in values.items():
            comment = f"  # {docs[key]}" if key in docs else ""
            lines.append(f"# {key} ={comment}" if value is None else f"{key} = {_toml_value(value)}{comment}")
    return "\n".join(lines[1:]) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    text = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in text) + '"'


def section_values(section: Section) -> tuple[Table, dict[str, str]]:
    """(values, documentation) for `to_toml`."""
    named = [field for field, _ in fields(type(section))]
    values = {field.name: getattr(section, field.name) for field in named}
    return values, {field.name: field.metadata["doc"] for field in named if field.metadata.get("doc")}
