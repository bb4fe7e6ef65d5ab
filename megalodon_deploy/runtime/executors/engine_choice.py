"""Which engine of a bundle runs here, decided from what `engine.json` says before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.engine.info import EngineInfo
from megalodon_deploy.engine.profile import optimization_profile
from megalodon_deploy.errors import EngineError


@dataclass(frozen=True)
class Place:
    """Where an engine shall run."""

    flavour: str
    version: str  # of the installed TensorRT
    capability: int  # of the GPU, 89 for 8.9


def choose_engine(bundle: Bundle, engines: Sequence[EngineInfo], place: Place) -> EngineInfo:
    """The best engine for this place: one whose norms are updated in float64, then the one for most streams.

    Raises `EngineError`, saying what is in the way and what to do, when there is none.
    """
    build = f"`megalodon-deploy build {bundle.path} --target {place.flavour}`"
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
            lambda info: place.capability in info.compute_capabilities,
            lambda info: (
                f"engine {info.id} is not for this GPU's compute capability {major}.{minor}; build one on or for it: "
                f"{build}"
            ),
        ),
        (
            lambda info: info.version == place.version,
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
    if not engines:
        raise EngineError(f"{bundle.path} has no engine; build one: {build}")
    left = list(engines)
    for holds, objection in conditions:
        fitting = [info for info in left if holds(info)]
        if not fitting:
            raise EngineError(f"{bundle.path}: {objection(left[0])}")
        left = fitting
    return max(left, key=lambda info: (info.norm_update == "float64", info.max_batch, info.id))
