"""TensorRT engines as candidates, where there is a GPU to run them."""

from __future__ import annotations

from typing import Any

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.doctor import visible_gpus
from megalodon_deploy.engine import EngineInfo, check_engine, list_engines
from megalodon_deploy.engine.library import find_plugin_library
from megalodon_deploy.verify.candidates import carried_candidate, graph_contract
from megalodon_deploy.verify.comparison import Candidate
from megalodon_deploy.verify.not_run import NotRun


def engine_candidates(bundle: Bundle) -> tuple[list[Candidate], list[NotRun]]:
    """A candidate for each engine that this machine may be able to run, and the others with the reason why not."""
    engines = list_engines(bundle)
    if not engines:
        return [], [NotRun("TensorRT", "the bundle has no engine; `megalodon-deploy build` makes one")]
    gpus = visible_gpus()
    candidates, not_run = [], []
    for info in engines:
        name = f"engine {info.id}"
        if gpus is None:
            not_run.append(NotRun(name, "no NVIDIA GPU is visible on this machine"))
        elif info.precision == "bf16":
            not_run.append(NotRun(name, "Polygraphy's runner moves numpy arrays, which have no bf16"))
        elif info.bundle_weights:
            not_run.append(NotRun(name, "Polygraphy's runner would copy the weights for every call; --weights engine"))
        elif info.flavour != engines[0].flavour:
            not_run.append(NotRun(name, f"one process runs one flavour, here {engines[0].flavour}"))
        else:
            candidates.append(_candidate(bundle, info, name, gpus))
    return candidates, not_run


def _candidate(bundle: Bundle, info: EngineInfo, name: str, gpus: str) -> Candidate:
    import polygraphy.config

    polygraphy.config.USE_TENSORRT_RTX = info.flavour == "tensorrt-rtx"  # read when its TensorRT backend is imported
    from polygraphy.backend.trt import TrtRunner

    what = f"{info.flavour} {info.version} on {gpus}"
    contract = graph_contract(bundle, bundle.manifest.precision)
    return carried_candidate(
        name, what, bundle.config, contract, TrtRunner, lambda: _load(bundle, info), max_batch=info.max_batch
    )


def _load(bundle: Bundle, info: EngineInfo) -> Any:
    """The engine, once its hash is checked and its plugins are registered."""
    from polygraphy.backend.trt import engine_from_path
    from polygraphy.mod.trt_importer import lazy_import_trt

    path = check_engine(bundle, info)
    if info.plugins:
        lazy_import_trt().get_plugin_registry().load_library(str(find_plugin_library()))
    return engine_from_path(str(path))
