"""The child process of a build: `python -m megalodon_deploy.engine.worker`, a job on stdin, events on stdout.

An event is a line of JSON: `{"progress": [stage, fraction]}`, and at the end `{"result": {...}}`, `{"refused": our
message}` or `{"failed": what others say}`. TensorRT's messages go to stderr.

TensorRT runs here and not in the caller because it aborts the process on some errors, needs a folder on
LD_LIBRARY_PATH before the process starts, and gives memory back only at exit.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from megalodon_deploy.engine.graph import PreparedGraph, prepare_graph
from megalodon_deploy.engine.job import BuildJob, BuildResult, engine_id
from megalodon_deploy.engine.library import cache_dir
from megalodon_deploy.engine.phases import PhaseTree
from megalodon_deploy.engine.targets import Flavour
from megalodon_deploy.errors import EngineError
from megalodon_deploy.state import CHUNK_ATTENTION, TOKENS

Report = Callable[[str, float], None]

_PARSED = 0.1  # share of the progress bar that reading and parsing take
# Share of TensorRT's own phases. TensorRT-RTX spends nearly all its time inside the last step that it announces.
_PHASES = {"tensorrt-rtx": 0.25, "tensorrt": 0.85}
_EVENT_STEP = 0.01  # progress is sent when it moved this far
_COMPILING = "Determining refit engines"  # TensorRT-RTX's name for the phase in which it compiles
_PR_SET_PDEATHSIG = 1
_CU_MAJOR, _CU_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a build is of no use to anyone without its caller
    events = _private_stdout()

    def send(kind: str, value: Any) -> None:
        events.write(json.dumps({kind: value}) + "\n")
        events.flush()

    job = BuildJob.from_json(sys.stdin.read())
    try:
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        send("failed", f"cannot import Polygraphy: {error}")
        return
    G_LOGGER.severity = G_LOGGER.ERROR
    G_LOGGER.colors = False
    try:
        result = build(job, lambda stage, fraction: send("progress", [stage, fraction]))
        send("result", asdict(result))
    except EngineError as error:
        send("refused", str(error))
    except (ImportError, OSError) as error:
        send("failed", " ".join(str(error).split()))
    except PolygraphyException:  # its text only says that TensorRT's last messages are errors
        send("failed", "")


def _private_stdout() -> TextIO:
    """The pipe to the caller, out of reach of whatever TensorRT prints: stdout now leads to stderr."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe


def build(job: BuildJob, report: Report) -> BuildResult:
    """Parse the model, build, write the engine file."""
    report("loading TensorRT", 0.0)
    from polygraphy.backend.trt import create_network, engine_bytes_from_network
    from polygraphy.mod.trt_importer import lazy_import_trt

    trt = lazy_import_trt()
    capabilities = job.capabilities or (_device_capability(),)
    name = engine_id(job, trt.__version__, capabilities)
    if (target := Path(job.engines_dir) / name).exists() and not job.overwrite:
        raise EngineError(f"{target} exists already; replace it with --overwrite")
    operators = _load_plugins(trt, job.plugin_library) if job.plugin_library else set()
    if job.attention == "standard":
        operators.discard(CHUNK_ATTENTION)
    report("reading the graph", 0.02)
    graph = prepare_graph(
        Path(job.model_path),
        operators,
        chunk_size=job.profile[TOKENS].max[1],
        weights_outside=job.weights == "bundle",
    )
    builder, network = create_network(strongly_typed=True)
    parser = _parse(trt, network, graph, job.model_path)
    num_plugin_layers = _check_plugin_layers(trt, network, graph)
    timings = _timing_cache(job, trt.__version__, capabilities)
    config = _config_creator(trt, job, report, timings)
    engine = engine_bytes_from_network((builder, network, parser), config=config, save_timing_cache=timings)
    report("writing the engine", 0.99)
    with open(job.engine_path, "wb") as file:
        file.write(engine)
    return BuildResult(
        engine_id=name,
        version=trt.__version__,
        capabilities=capabilities,
        plugins=tuple(sorted(graph.plugin_nodes)),
        num_plugin_layers=num_plugin_layers,
        narrowed=graph.narrowed,
        bundle_weights=graph.bundle_weights,
        peak_memory_bytes=_peak_memory_bytes(),
    )


def _load_plugins(trt: Any, library: str) -> set[str]:
    """Register the library's creators; the operators that they provide."""
    registry = trt.get_plugin_registry()
    before = {creator.name for creator in registry.all_creators}
    if registry.load_library(library) is None:
        raise EngineError(f"TensorRT {trt.__version__} cannot load the plugin library {library}; compile it again")
    return {creator.name for creator in registry.all_creators} - before


def _parse(trt: Any, network: Any, graph: PreparedGraph, model_path: str) -> Any:
    """Fill the network; the parser, which owns the weights, must outlive the build.

    Polygraphy's loaders take a path or bytes, not bytes whose external weights lie beside a path.
    """
    from polygraphy.backend.trt.util import check_onnx_parser_errors, get_trt_logger

    parser = trt.OnnxParser(network, get_trt_logger())
    check_onnx_parser_errors(parser, parser.parse(graph.model, path=model_path))
    return parser


def _check_plugin_layers(trt: Any, network: Any, graph: PreparedGraph) -> int:
    found: int = sum(network.get_layer(index).type == trt.LayerType.PLUGIN_V3 for index in range(network.num_layers))
    expected = sum(graph.plugin_nodes.values())
    assert found == expected, f"Bug: the parser made {found} plugin layers of {expected} nodes"
    return found


def _timing_cache(job: BuildJob, version: str, capabilities: Sequence[int]) -> str | None:
    """The file that keeps full TensorRT's timings of kernels for the next build; TensorRT-RTX times none."""
    if job.flavour == "tensorrt-rtx":
        return None
    path = cache_dir() / f"tensorrt-{version}-sm{capabilities[0]}.timings"
    path.parent.mkdir(parents=True, exist_ok=True)
    return str(path)


def _config_creator(trt: Any, job: BuildJob, report: Report, timings: str | None) -> Callable[[Any, Any], Any]:
    """A function (builder, network) -> builder configuration, as Polygraphy wants it."""
    from polygraphy.backend.trt import CreateConfig, Profile

    profile = Profile()
    for name, shapes in job.profile.items():
        profile.add(name, min=shapes.min, opt=shapes.opt, max=shapes.max)
    options: dict[str, Any] = {
        "profiles": [profile],
        "progress_monitor": _progress_monitor(trt, job.flavour, report),
        "weight_streaming": job.weights == "streamed",
    }
    if job.flavour == "tensorrt-rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        create = CreateConfigRTX(compute_capabilities=[divmod(sm, 10) for sm in job.capabilities], **options)
    else:
        levels = trt.HardwareCompatibilityLevel
        create = CreateConfig(
            load_timing_cache=timings,
            hardware_compatibility_level=levels.AMPERE_PLUS if job.hardware_compatible else None,
            version_compatible=job.version_compatible,
            **options,
        )

    def create_config(builder: Any, network: Any) -> Any:
        config = create(builder, network)
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default; a bundle in fp32 was exported to be exact
        return config

    return create_config


def _progress_monitor(trt: Any, flavour: Flavour, report: Report) -> Any:
    tree = PhaseTree()
    sent = 0.0

    def advance(phase: str, least: float) -> bool:
        """Report if progress moved by `least`; False when nobody reads it."""
        nonlocal sent
        fraction = max(sent, _PARSED + _PHASES[flavour] * tree.fraction())
        if fraction - sent < least:
            return True
        sent = fraction
        try:
            report("compiling" if phase == _COMPILING else phase.lower(), fraction)
        except OSError:
            return False
        return True

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the module has no type information
        """Called from TensorRT's threads. Returning False stops a build."""

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            tree.start(phase_name, parent_phase, num_steps)
            advance(phase_name, 0.0 if phase_name == _COMPILING else _EVENT_STEP)

        def step_complete(self, phase_name: str, step: int) -> bool:
            tree.step(phase_name, step)
            return advance(phase_name, _EVENT_STEP)

        def phase_finish(self, phase_name: str) -> None:
            tree.finish(phase_name)

    monitor = Monitor()
    trt.IProgressMonitor.__init__(monitor)
    return monitor


def _device_capability() -> int:
    """Compute capability of the first GPU, as 89 for 8.9. Raises `EngineError` without a driver or a GPU."""
    major, minor, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        cuda = None
    if cuda is None or cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(device), 0):
        raise EngineError("full TensorRT builds on the machine with the GPU, and there is none here")
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _CU_MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CU_MINOR, device)
    return major.value * 10 + minor.value


def _peak_memory_bytes() -> int:
    """Peak resident memory of this program. Not `getrusage`: its value survives exec and is the caller's own peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Bug: /proc/self/status has no VmHWM")


if __name__ == "__main__":
    main()
