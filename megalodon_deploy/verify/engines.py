"""TensorRT engines as candidates, and the sessions that run them, where there is a GPU."""

from __future__ import annotations

import sys
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.doctor import first_gpu_capability, visible_gpus
from megalodon_deploy.engine import EngineInfo, check_engine, list_engines
from megalodon_deploy.engine.library import find_plugin_library
from megalodon_deploy.engine.targets import FLAVOURS, Flavour, check_flavour
from megalodon_deploy.errors import UserError
from megalodon_deploy.runtime.executors.engine_choice import Place, choose_engine
from megalodon_deploy.runtime.executors.tensorrt import TensorRTErrors, import_tensorrt, load_plugins
from megalodon_deploy.verify.candidates import carried_candidate, graph_contract, session_candidate
from megalodon_deploy.verify.comparison import Candidate
from megalodon_deploy.verify.not_run import NotRun


def engine_candidates(bundle: Bundle) -> tuple[list[Candidate], list[NotRun]]:
    """A candidate for each engine that can run on this machine and for the session over them; the others with the
    reason why not."""
    engines = list_engines(bundle)
    if not engines:
        return [], [NotRun("TensorRT", "the bundle has no engine; `megalodon-deploy build` makes one")]
    gpus, capability = visible_gpus(), first_gpu_capability()
    if gpus is None or capability is None:
        return [], [NotRun(f"engine {info.id}", "no NVIDIA GPU is visible on this machine") for info in engines]
    flavour = _flavour(engines)
    candidates, not_run = [], []
    for info in engines:
        if why := _obstacle(bundle, info, flavour, capability):
            not_run.append(NotRun(f"engine {info.id}", why))
        else:
            candidates.append(_candidate(bundle, info, flavour, gpus))
    try:
        candidates.append(_session(bundle, engines, flavour, capability))
    except UserError as error:
        not_run.append(NotRun(f"{flavour} session", str(error)))
    return candidates, not_run


def _flavour(engines: list[EngineInfo]) -> Flavour:
    """One process runs one flavour: that of the first engine whose TensorRT is installed, else of the first engine."""
    flavours = [check_flavour(info.flavour) for info in engines]
    return next((flavour for flavour in flavours if find_spec(FLAVOURS[flavour].module)), flavours[0])


def _obstacle(bundle: Bundle, info: EngineInfo, flavour: Flavour, capability: int) -> str | None:
    """Why Polygraphy cannot run an engine here."""
    if info.flavour != flavour:
        return f"one process runs one flavour, here {flavour}"
    if info.bundle_weights:
        return "Polygraphy's runner would copy the weights for every call; the session runs it, or --weights engine"
    try:
        choose_engine(bundle, [info], Place(flavour, import_tensorrt(flavour).__version__, capability))
    except UserError as error:
        return str(error)
    return _missing_runtime()


def _missing_runtime() -> str | None:
    """Polygraphy copies with CUDA's runtime library, which TensorRT and this package do not need to be installed."""
    from polygraphy.cuda import wrapper
    from polygraphy.logger import G_LOGGER

    try:
        with G_LOGGER.verbosity():
            wrapper()
    except OSError as error:
        return f"Polygraphy finds no CUDA runtime library ({error}): pip install nvidia-cuda-runtime"
    return None


def _candidate(bundle: Bundle, info: EngineInfo, flavour: Flavour, gpus: str) -> Candidate:
    _use_flavour(flavour)
    from megalodon_deploy.verify.engine_runner import EngineRunner

    errors = TensorRTErrors(import_tensorrt(flavour))
    what = f"{info.flavour} {info.version} on {gpus}"
    contract = graph_contract(bundle, bundle.manifest.precision)
    return carried_candidate(
        f"engine {info.id}",
        what,
        bundle.config,
        contract,
        partial(EngineRunner, errors),
        lambda: _load(bundle, info, flavour, errors),
        max_batch=info.max_batch,
    )


def _use_flavour(flavour: Flavour) -> None:
    """Polygraphy's modules take the flavour when they are imported, and its comparator has imported some of them."""
    import polygraphy.config
    from polygraphy.mod.trt_importer import lazy_import_trt

    polygraphy.config.USE_TENSORRT_RTX = flavour == "tensorrt-rtx"
    for name, module in list(sys.modules.items()):
        if name.startswith("polygraphy.") and type(vars(module).get("trt")).__name__ == "LazyModule":
            vars(module)["trt"] = lazy_import_trt()


def _load(bundle: Bundle, info: EngineInfo, flavour: Flavour, errors: TensorRTErrors) -> Any:
    """The engine, once its hash is checked and its plugins are registered."""
    from polygraphy.backend.trt import engine_from_path

    path, trt = check_engine(bundle, info), import_tensorrt(flavour)
    if info.plugins:
        load_plugins(trt, find_plugin_library(), info)
    with errors.told(f"{path}: TensorRT {trt.__version__} cannot load it"):
        return engine_from_path(str(path), runtime=trt.Runtime(errors.logger))


def _session(bundle: Bundle, engines: list[EngineInfo], flavour: Flavour, capability: int) -> Candidate:
    """The public runtime over the engine that it would choose; raises `UserError` where there is none."""
    place = Place(flavour, import_tensorrt(flavour).__version__, capability)
    info = choose_engine(bundle, engines, place)
    import_module("megalodon_deploy.runtime.cuda.driver")  # which says what is missing
    return session_candidate(bundle, flavour, max_batch=info.max_batch)
