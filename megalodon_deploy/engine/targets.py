"""What engines are built for: the two TensorRT flavours and the GPUs that each covers.

TensorRT-RTX builds ahead of time for consumer GPUs, several at once, on a machine without a GPU. Full TensorRT builds
on the machine whose GPU will run the engine, and is the one for data-centre GPUs and Jetson.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from megalodon_deploy.bundle import Precision
from megalodon_deploy.errors import EngineError

Flavour = Literal["tensorrt-rtx", "tensorrt"]

RTX_CAPABILITIES = (75, 80, 86, 89, 120, 121)
# Turing has neither bf16 nor, in TensorRT-RTX, FP32 matrix products: it is built for only when asked. One more
# capability costs 8 bytes of engine and no time: kernels are compiled on the device.
RTX_DEFAULT_CAPABILITIES = (80, 86, 89, 120, 121)
_TURING = 75
_FP4_CAPABILITIES = (120, 121)


@dataclass(frozen=True)
class FlavourInfo:
    """How a flavour is imported and installed."""

    module: str  # Python module
    library_package: str  # package that holds the shared libraries
    parser_needs: str | None  # a library that the ONNX parser opens by a name the package lacks
    install: str  # what to do when the module is missing


FLAVOURS: dict[Flavour, FlavourInfo] = {
    "tensorrt-rtx": FlavourInfo(
        module="tensorrt_rtx",
        library_package="tensorrt_rtx_libs",
        parser_needs="libtensorrt_rtx.so",
        install="pip install 'megalodon-deploy[build]'",
    ),
    "tensorrt": FlavourInfo(
        module="tensorrt",
        library_package="tensorrt_libs",
        parser_needs=None,
        install="pip install 'megalodon-deploy[tensorrt]' on the machine that has the GPU (on Jetson, JetPack has it)",
    ),
}


def check_flavour(target: str) -> Flavour:
    """`target` as a flavour; raises `EngineError` when there is no such."""
    if target not in FLAVOURS:
        raise EngineError(f"target {target!r} is none of: {', '.join(get_args(Flavour))}")
    return target


def parse_capabilities(text: str) -> tuple[int, ...]:
    """`"80,86"` -> (80, 86); raises `EngineError` on anything but numbers and commas."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise EngineError(f"--sm {text!r}: write compute capabilities as numbers with commas, like 80,86,89,120")
    return tuple(int(part) for part in parts)


def select_capabilities(
    flavour: Flavour, sm: Sequence[int] | None, *, precision: Precision, plugins: bool, has_fp4: bool = False
) -> tuple[int, ...]:
    """Compute capabilities to build for, sorted; empty for full TensorRT, which takes this machine's GPU.

    Raises `EngineError` for a GPU that the flavour cannot serve, or not with this precision.
    """
    if flavour == "tensorrt":
        if sm is not None:
            raise EngineError("target tensorrt builds for the GPU of this machine: leave out --sm")
        return ()
    chosen = tuple(sorted(set(sm))) if sm is not None else _FP4_CAPABILITIES if has_fp4 else RTX_DEFAULT_CAPABILITIES
    if not chosen:
        raise EngineError(f"no compute capability given; target tensorrt-rtx has {_listed(RTX_CAPABILITIES)}")
    for capability in chosen:
        if capability not in RTX_CAPABILITIES:
            raise EngineError(
                f"sm {capability}: target tensorrt-rtx serves {_listed(RTX_CAPABILITIES)} only; for data-centre GPUs "
                "and Jetson build with --target tensorrt on the machine that has one"
            )
        if has_fp4 and capability not in _FP4_CAPABILITIES:
            raise EngineError(
                f"sm {capability} has no fp4; of this target {_listed(_FP4_CAPABILITIES)} have it: build with "
                f"--sm {','.join(map(str, _FP4_CAPABILITIES))}, or export with --quantize int4"
            )
    if _TURING in chosen and not (precision == "fp16" and plugins):
        raise EngineError(
            f"sm 75 has no FP32 or BF16 matrix products in TensorRT-RTX, this is {precision} "
            f"{'with' if plugins else 'without'} plugins: export with --precision fp16 and build with plugins, "
            "or leave out 75"
        )
    return chosen


def _listed(capabilities: Sequence[int]) -> str:
    return ", ".join(map(str, capabilities))
