"""Command lines of NVIDIA's own tools that time the engine part of a step: no sampling, no state between calls."""

from __future__ import annotations

import shlex
from pathlib import Path

from megalodon_deploy.engine.info import EngineInfo
from megalodon_deploy.engine.library import REGISTER_FILE

_TRTEXEC = {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}  # TensorRT-RTX's has another name


def command_lines(engine: Path, info: EngineInfo, library: Path) -> list[str]:
    """For one token of one stream with a full chunk of memory, as a decode step calls the engine."""
    shapes = {name: (1, *shape.opt[1:]) for name, shape in info.profile.items()}
    dims = ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
    trtexec = [_TRTEXEC[info.flavour], f"--loadEngine={engine}", f"--shapes={dims}"]
    trtexec += ["--useCudaGraph", "--noDataTransfers", "--useSpinWait", "--warmUp=500", "--duration=10"]
    polygraphy = ["polygraphy", "run", str(engine), "--model-type", "engine", "--trt"]
    # It times only runners that run in sequence, and then keeps every iteration's outputs, hence a few iterations.
    polygraphy += ["--sequential-runners", "--warm-up", "5", "--iterations", "20", "--input-shapes"]
    polygraphy += [f"{name}:[{','.join(map(str, shape))}]" for name, shape in shapes.items()]
    if info.plugins:
        trtexec.append(f"--dynamicPlugins={library}")
        polygraphy += ["--plugins", str(library.with_name(REGISTER_FILE))]
    prefix = "POLYGRAPHY_USE_TENSORRT_RTX=1 " if info.flavour == "tensorrt-rtx" else ""
    return [shlex.join(trtexec), prefix + shlex.join(polygraphy)]
