"""Which engine of a bundle is loaded: the same one in C++ as in Python."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from runtime.fake_tensorrt import engine_info

from megalodon_deploy.bundle import ENGINE_INFO_FILE, ENGINES_DIR, Bundle, FileEntry
from megalodon_deploy.engine.info import EngineInfo
from megalodon_deploy.engine.weight_inputs import WeightPlace
from megalodon_deploy.errors import EngineError
from megalodon_deploy.runtime.executors.engine_choice import Place, choose_engine

PLACE = Place("tensorrt-rtx", "1.7.1.116", 89)
WEIGHTS = {"embed.weight": WeightPlace(4096, 123_456, (24, 5144)), "a b": WeightPlace(5_000_000_000, 7, (7,))}
# Of each field the values that engines draw from; the first is the likely one.
CHOICES: dict[str, list[Any]] = {
    "norm_update": ["float64", "float32"],
    "max_batch": [4, 8],
    "plugins": [("ComplexEMA",), ("ComplexEMA", "ChunkAttention"), ()],
    "weights": ["engine", "bundle", "streamed"],
    "hardware_compatible": [False, True],
    "version_compatible": [False, True],
    "compute_capabilities": [(89,), (80, 86, 89), (80,), (90,)],
    "version": ["1.7.1.116", "1.6.2.1", "1.10.0.3", "2.0.0.1"],
    "flavour": ["tensorrt-rtx", "tensorrt"],
}


def test_both_languages_choose_alike(build_dir: Path, bundle: Bundle, tmp_path: Path) -> None:
    random = np.random.default_rng(11)
    folders, expected = [], []
    for case in range(200):
        infos = [random_engine(random, bundle, f"engine{index}") for index in range(random.integers(1, 8))]
        folders.append(write_engines(bundle, infos, tmp_path / str(case)))
        expected.append(chosen(bundle, infos))
    command = [build_dir / "parity_tool", "engine", PLACE.flavour, "1.7.1", str(PLACE.capability), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == expected
    lines = Counter(line.split()[0] for line in expected)
    assert lines["none"] >= 5
    assert len(lines) == 8
    assert sum("embed.weight" in line for line in expected) >= 5


def random_engine(random: np.random.Generator, bundle: Bundle, name: str) -> EngineInfo:
    drawn = {
        field: values[0] if random.random() < 0.6 else values[random.integers(len(values))]
        for field, values in CHOICES.items()
    }
    places = WEIGHTS if drawn["weights"] == "bundle" else {}
    return engine_info(bundle, name, bundle_weights=places, engine=FileEntry("0", 0), **drawn)


def write_engines(bundle: Bundle, infos: list[EngineInfo], folder: Path) -> Path:
    """The same bundle with these engines."""
    folder.mkdir()
    for file in bundle.path.iterdir():
        if file.name != ENGINES_DIR:
            (folder / file.name).symlink_to(file)
    for info in infos:
        (folder / ENGINES_DIR / info.id).mkdir(parents=True)
        (folder / ENGINES_DIR / info.id / ENGINE_INFO_FILE).write_text(info.to_json())
    return folder


def chosen(bundle: Bundle, infos: list[EngineInfo]) -> str:
    """As the tool writes it."""
    try:
        info = choose_engine(bundle, infos, PLACE)
    except EngineError:
        return "none"
    places = sorted(info.bundle_weights.items())
    return " ".join([info.id, *(f"{name} {at.offset} {at.size_bytes}" for name, at in places)])
