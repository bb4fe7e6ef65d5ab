"""engine.json, the list of a bundle's engines, and the checks before one is loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megalodon_deploy.bundle import ENGINE_FILE, ENGINE_INFO_FILE, Bundle, FileEntry
from megalodon_deploy.engine import EngineInfo, check_engine, list_engines
from megalodon_deploy.engine.info import PluginLibraryInfo
from megalodon_deploy.engine.library import abi_version, find_plugin_library
from megalodon_deploy.engine.profile import optimization_profile
from megalodon_deploy.errors import EngineError

HandMade = Callable[..., Bundle]


def _write_engine(bundle: Bundle, name: str, **changes: object) -> EngineInfo:
    """An engine directory whose engine is a few bytes: nothing here loads it."""
    folder = bundle.path / "engines" / name
    folder.mkdir(parents=True)
    (folder / ENGINE_FILE).write_bytes(b"engine")
    info = EngineInfo(
        id=name,
        flavour="tensorrt-rtx",
        version="1.7.1.116",
        compute_capabilities=(80, 89),
        hardware_compatible=False,
        version_compatible=False,
        precision="fp16",
        max_batch=2,
        profile=optimization_profile(bundle.config, max_batch=2),
        plugins=("ComplexEMA",),
        num_plugin_layers=2,
        plugin_library=PluginLibraryInfo.of(find_plugin_library()),
        weights="engine",
        bundle_weights={},
        norm_update="float64",
        bundle_fingerprint=bundle.manifest.fingerprint,
        engine=FileEntry.of(folder / ENGINE_FILE),
        build_seconds=1.5,
        peak_memory_bytes=1 << 30,
    )
    info = dataclasses.replace(info, **changes)
    (folder / ENGINE_INFO_FILE).write_text(info.to_json())
    return info


@pytest.fixture
def bundle(hand_made: HandMade) -> Bundle:
    return hand_made("fp16")


def test_round_trip(bundle: Bundle) -> None:
    info = _write_engine(bundle, "b")
    plain = _write_engine(bundle, "a", plugins=(), plugin_library=None)
    assert list_engines(bundle) == [plain, info]
    assert json.loads(info.to_json())["profile"]["tokens"]["max"] == [2, 12]


def test_half_written_engines_are_not_listed(bundle: Bundle) -> None:
    _write_engine(bundle, ".b.tmp")
    assert list_engines(bundle) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format_version": 1', '"format_version": 9', "format version 9"),
        ('"precision"', '"position"', "precision|position"),
        ("{", "", "engine.json"),
        ('"sha256"', '"md5"', "md5|sha256"),
        ('"id": "x"', '"id": "../x"', "describes '../x'"),
    ],
)
def test_damaged_descriptions_are_named(bundle: Bundle, old: str, new: str, message: str) -> None:
    _write_engine(bundle, "x")
    path = bundle.path / "engines" / "x" / ENGINE_INFO_FILE
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(EngineError, match=message) as caught:
        list_engines(bundle)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_key(bundle: Bundle) -> None:
    info = _write_engine(bundle, "x")
    for key in dataclasses.asdict(info):
        document = json.loads(info.to_json())
        del document[key]
        with pytest.raises(EngineError, match=key):
            EngineInfo.from_json(json.dumps(document), Path("engine.json"))


def test_a_good_engine_passes(bundle: Bundle) -> None:
    info = _write_engine(bundle, "x")
    assert check_engine(bundle, info) == bundle.path / "engines" / "x" / ENGINE_FILE


def test_changed_missing_and_foreign_engines_are_refused(bundle: Bundle) -> None:
    info = _write_engine(bundle, "x")
    path = bundle.path / "engines" / "x" / ENGINE_FILE
    path.write_bytes(b"ENGINE")
    with pytest.raises(EngineError, match=r"sha256.*build it again"):
        check_engine(bundle, info)
    path.write_bytes(b"engine.")
    with pytest.raises(EngineError, match=r"7 bytes.*6.*build it again"):
        check_engine(bundle, info)
    path.unlink()
    with pytest.raises(EngineError, match=r"missing.*build it again"):
        check_engine(bundle, info)
    foreign = _write_engine(bundle, "y", bundle_fingerprint="0" * 64)
    with pytest.raises(EngineError, match=r"export 0000.*build it again"):
        check_engine(bundle, foreign)


def test_plugins_of_another_abi_are_refused(bundle: Bundle) -> None:
    library = find_plugin_library()
    other = PluginLibraryInfo(library.name, abi_version(library) + 1, "0" * 64)
    with pytest.raises(EngineError, match=r"ABI version.*build it again"):
        check_engine(bundle, _write_engine(bundle, "x", plugin_library=other))


def test_a_rebuilt_library_of_the_same_abi_is_fine(bundle: Bundle) -> None:
    library = find_plugin_library()
    rebuilt = PluginLibraryInfo(library.name, abi_version(library), "0" * 64)
    check_engine(bundle, _write_engine(bundle, "x", plugin_library=rebuilt))
