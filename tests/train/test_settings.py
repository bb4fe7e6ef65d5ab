"""Settings from files, from the command line and back: nothing is taken silently, nothing is lost."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon_deploy.errors import ConfigError
from megalodon_deploy.train.settings import Section, override, read_toml, section_values, setting, to_toml


@dataclass(frozen=True, kw_only=True)
class SampleConfig(Section):
    folder: Path = setting("a place")
    names: tuple[str, ...] = setting("names", ())
    pair: tuple[float, float] = setting("two numbers", (0.5, 1.0), least=0, below=2)
    rate: float = setting("a rate", 1.0, above=0)
    count: int | None = setting("a count", None, least=1)
    mode: Literal["fast", "slow"] = setting("a choice", "fast")
    active: bool = setting("a switch", False)


def test_values_take_their_types() -> None:
    section = SampleConfig.from_table({"folder": "a/b", "names": "one", "pair": [0, 1], "rate": 2, "count": "none"})
    assert section == SampleConfig(folder=Path("a/b"), names=("one",), pair=(0.0, 1.0), rate=2.0)
    assert isinstance(section.rate, float)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"folder": "x", "raet": 1}, "unknown setting sample.raet; did you mean sample.rate?"),
        ({"folder": "x", "qqq": 1}, "unknown setting sample.qqq; there are: folder, names"),
        ({}, "sample.folder is not set: a place"),
        ({"folder": "x", "rate": 0}, "sample.rate = 0.0 is not above 0"),
        ({"folder": "x", "rate": float("nan")}, "sample.rate = nan is not a finite number"),
        ({"folder": "x", "rate": True}, "sample.rate = True: expected a number"),
        ({"folder": "x", "count": 0}, "sample.count = 0 is below 1"),
        ({"folder": "x", "count": 1.5}, "sample.count = 1.5: expected a whole number"),
        ({"folder": "x", "pair": [1.0, 2.0]}, "sample.pair = 2.0 is not below 2"),
        ({"folder": "x", "pair": [1.0]}, "sample.pair = .*expected 2 values"),
        ({"folder": "x", "mode": "medium"}, "sample.mode = 'medium' is none of fast, slow"),
        ({"folder": "x", "active": "yes"}, "sample.active = 'yes': expected true or false"),
    ],
)
def test_mistakes_are_one_line(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        SampleConfig.from_table(table)
    assert "\n" not in str(caught.value)


def test_python_values_are_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"sample\.rate = -1\.0 is not above 0"):
        SampleConfig(folder=Path("x"), rate=-1.0)


def test_overrides_are_toml_or_text() -> None:
    tables = override({"a": {"x": 1, "y": 2}}, ["a.x=[1, 2]", "a.z=**/*.py", "b.flag=true", 'b.text="1"', "a.e=x=y"])
    assert tables == {"a": {"x": [1, 2], "y": 2, "z": "**/*.py", "e": "x=y"}, "b": {"flag": True, "text": "1"}}
    for bad in ("a.x", "x=1", ".x=1", "a.=1"):
        with pytest.raises(ConfigError, match=r"expected section\.key=value"):
            override({}, [bad])


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(names=st.lists(TEXT, max_size=3), rate=st.floats(1e-9, 1e9), count=st.none() | st.integers(1, 10**9))
def test_what_is_written_is_read_back(names: list[str], rate: float, count: int | None) -> None:
    section = SampleConfig(folder=Path("a b"), names=tuple(names), rate=rate, count=count, active=True)
    tables = tomllib.loads(to_toml({"sample": section_values(section)}))
    assert SampleConfig.from_table(tables["sample"]) == section


def test_a_file_that_is_not_toml_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("[run\n")
    with pytest.raises(ConfigError, match=r"bad\.toml: not TOML"):
        read_toml(bad)
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        read_toml(tmp_path / "none.toml")
