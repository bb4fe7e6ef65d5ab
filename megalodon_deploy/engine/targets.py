"""What engines are built for: the two TensorRT flavours and the GPUs that each covers.

TensorRT-RTX builds ahead of time for consumer GPUs, several at once, on a machine without a GPU. Full TensorRT builds
on the machine whose GPU will run the engine, and is the one for data-centre GPUs and Jetson.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from megalodon_deploy.bundle import AttentionKind, Bundle, Precision
from megalodon_deploy.errors import EngineError

Flavour = Literal["tensorrt-rtx", "tensorrt"]
# Where an engine's matrices are: inside it; in the bundle's weight file, from where they are bound as inputs; or inside
# it but in main memory, from where they are streamed as far as they find no room on the GPU.
EngineWeights = Literal["engine", "bundle", "streamed"]

RTX_CAPABILITIES = (75, 80, 86, 89, 120, 121)
# Turing has neither bf16 nor, in TensorRT-RTX, FP32 matrix products: it is built for only when asked. One more
# capability costs 8 bytes of engine and no time: kernels are compiled on the device.
RTX_DEFAULT_CAPABILITIES = (80, 86, 89, 120, 121)
_TURING = 75
AMPERE = 80  # where hardware-compatible engines of full TensorRT begin
# Types that only some GPUs have, as TensorRT-RTX refuses the others.
_CAPABILITIES_OF_TYPE = {"nvfp4": (120, 121), "fp8": (89, 120, 121)}


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
    flavour: Flavour, sm: Sequence[int] | None, *, precision: Precision, plugins: bool, types: Collection[str] = ()
) -> tuple[int, ...]:
    """Compute capabilities to build for, sorted; empty for full TensorRT, which takes this machine's GPU.

    `types`: of the bundle's codes, weights and rows alike.
    Raises `EngineError` for a GPU that the flavour cannot serve, or not with this precision.
    """
    if flavour == "tensorrt":
        if sm is not None:
            raise EngineError("target tensorrt builds for the GPU of this machine: leave out --sm")
        return ()
    limits = {kind: served for kind, served in _CAPABILITIES_OF_TYPE.items() if kind in types}
    if sm is None:
        return tuple(each for each in RTX_DEFAULT_CAPABILITIES if all(each in served for served in limits.values()))
    chosen = tuple(sorted(set(sm)))
    if not chosen:
        raise EngineError(f"no compute capability given; target tensorrt-rtx has {_listed(RTX_CAPABILITIES)}")
    for capability in chosen:
        if capability not in RTX_CAPABILITIES:
            raise EngineError(
                f"sm {capability}: target tensorrt-rtx serves {_listed(RTX_CAPABILITIES)} only; for data-centre GPUs "
                "and Jetson build with --target tensorrt on the machine that has one"
            )
        for kind, served in limits.items():
            if capability not in served:
                raise EngineError(
                    f"sm {capability} has no {kind}; of this target {_listed(served)} have it: build with "
                    f"--sm {','.join(map(str, served))}, or export without {kind}"
                )
    if _TURING in chosen and not (precision == "fp16" and plugins):
        raise EngineError(
            f"sm 75 has no FP32 or BF16 matrix products in TensorRT-RTX, this is {precision} "
            f"{'with' if plugins else 'without'} plugins: export with --precision fp16 and build with plugins, "
            "or leave out 75"
        )
    return chosen


def one_engine_each(target: str, sm: Sequence[int] | None, *, hardware_compatible: bool) -> list[Sequence[int] | None]:
    """The `sm` of each engine that a build makes: one for each compute capability, or one for all of them."""
    if sm is None or hardware_compatible or target == "tensorrt":
        return [sm]
    return [[each] for each in sorted(set(sm))]


def choose_attention(bundle: Bundle, attention: str | None, *, plugins: bool) -> AttentionKind:
    """`attention`, or what the bundle was exported for where it is None and there are `plugins`; raises `EngineError`
    when there is no such, or not without plugins."""
    if attention is None:
        return bundle.manifest.attention if plugins else "standard"
    if attention not in get_args(AttentionKind):
        raise EngineError(f"attention {attention!r} is none of: {', '.join(get_args(AttentionKind))}")
    if attention == "plugin" and not plugins:
        raise EngineError("attention as a plugin goes with plugins: leave out --no-plugins or --attention plugin")
    return cast(AttentionKind, attention)


def check_weights(weights: str) -> EngineWeights:
    """`weights` as one of the places; raises `EngineError` when there is no such."""
    if weights not in get_args(EngineWeights):
        raise EngineError(f"weights {weights!r} is none of: {', '.join(get_args(EngineWeights))}")
    return cast(EngineWeights, weights)


def check_version_compatible(flavour: Flavour) -> None:
    """Raises `EngineError` for a flavour whose engines run in no other version than their own."""
    if flavour == "tensorrt-rtx":
        raise EngineError(
            "target tensorrt-rtx has no version-compatible engines: its package lacks the runtime that they contain; "
            "build again for another version, or use --target tensorrt"
        )


def _listed(capabilities: Sequence[int]) -> str:
    return ", ".join(map(str, capabilities))
