"""Which engine of a bundle runs here, decided from what `engine.json` says before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.engine.info import EngineInfo
from megalodon_deploy.engine.profile import optimization_profile
from megalodon_deploy.engine.targets import AMPERE
from megalodon_deploy.errors import EngineError


@dataclass(frozen=True)
class Place:
    """Where an engine shall run."""

    flavour: str
    version: str  # of the installed TensorRT
    capability: int  # of the GPU, 89 for 8.9


def choose_engine(bundle: Bundle, engines: Sequence[EngineInfo], place: Place) -> EngineInfo:
    """The best engine for this place: one whose norms are updated in float64, then the one for most streams, then one
    that attends as the bundle was exported for, then one with its weights inside, then the one for the fewest kinds of
    GPU.

    Raises `EngineError`, saying what is in the way and what to do, when there is none.
    """
    build = f"`megalodon-deploy build {bundle.path} --target {place.flavour}`"
    if not engines:
        raise EngineError(f"{bundle.path} has no engine; build one: {build}")
    left = list(engines)
    major, minor = divmod(place.capability, 10)
    conditions: list[tuple[Callable[[EngineInfo], bool], Callable[[EngineInfo], str]]] = [
        (
            lambda info: info.flavour == place.flavour,
            lambda info: f"has engines for {info.flavour} only; build one: {build}",
        ),
        (
            lambda info: info.bundle_fingerprint == bundle.manifest.fingerprint,
            lambda info: f"engine {info.id} was built from another export; build it again: {build} --overwrite",
        ),
        (
            lambda info: _serves(info, place.capability),
            lambda info: (
                f"engine {info.id} is not for this GPU's compute capability {major}.{minor}, there are engines for "
                f"{_served(left)}; build one on or for it: {build}"
            ),
        ),
        (
            lambda info: _runs_in(info, place.version),
            lambda info: (
                f"engine {info.id} needs {place.flavour} {info.version}, {place.version} is installed; install that "
                f"version, or build again: {build}"
            ),
        ),
        (
            lambda info: dict(info.profile) == optimization_profile(bundle.config, max_batch=info.max_batch),
            lambda info: f"engine {info.id} has the shapes of another release; build it again: {build} --overwrite",
        ),
    ]
    for holds, objection in conditions:
        fitting = [info for info in left if holds(info)]
        if not fitting:
            raise EngineError(f"{bundle.path}: {objection(left[0])}")
        left = fitting
    return max(left, key=lambda info: _preference(info, bundle.manifest.attention))


def _preference(info: EngineInfo, attention: str) -> tuple[bool, int, bool, bool, bool, int, str]:
    return (
        info.norm_update == "float64",
        info.max_batch,
        info.attention == attention,
        info.weights == "engine",
        not info.hardware_compatible,
        -len(info.compute_capabilities),
        info.id,
    )


def _serves(info: EngineInfo, capability: int) -> bool:
    return capability in info.compute_capabilities or (info.hardware_compatible and capability >= AMPERE)


def _served(engines: Sequence[EngineInfo]) -> str:
    """The compute capabilities of engines, as 8.6, 8.9."""
    capabilities = sorted({each for info in engines for each in info.compute_capabilities})
    return ", ".join(f"{each // 10}.{each % 10}" for each in capabilities)


def _runs_in(info: EngineInfo, version: str) -> bool:
    """An engine needs the very version that built it, or one that is no older if it is version-compatible."""
    if not info.version_compatible:
        return info.version == version
    built, found = (_numbers(each) for each in (info.version, version))
    return built[:1] == found[:1] and built <= found


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdecimal()]
