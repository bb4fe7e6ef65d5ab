"""Which GPUs a build is for, and which it refuses."""

from __future__ import annotations

import pytest

from megalodon_deploy.engine.targets import (
    check_flavour,
    check_version_compatible,
    check_weights,
    one_engine_each,
    parse_capabilities,
    select_capabilities,
)
from megalodon_deploy.errors import EngineError


def test_default_is_ampere_and_later() -> None:
    chosen = select_capabilities("tensorrt-rtx", None, precision="fp32", plugins=False)
    assert min(chosen) == 80
    assert {86, 89, 120} <= set(chosen)


def test_chosen_are_sorted_once() -> None:
    assert select_capabilities("tensorrt-rtx", [89, 80, 89], precision="bf16", plugins=True) == (80, 89)


@pytest.mark.parametrize("capability", [70, 87, 90, 100, 110])
def test_other_gpus_belong_to_full_tensorrt(capability: int) -> None:
    with pytest.raises(EngineError, match=rf"sm {capability}.*--target tensorrt "):
        select_capabilities("tensorrt-rtx", [80, capability], precision="fp16", plugins=True)


def test_turing_is_half_precision_with_plugins_only() -> None:
    assert select_capabilities("tensorrt-rtx", [75], precision="fp16", plugins=True) == (75,)
    for precision, plugins in (("fp32", True), ("bf16", True), ("fp16", False)):
        with pytest.raises(EngineError, match=rf"sm 75 .*{precision}"):
            select_capabilities("tensorrt-rtx", [75, 80], precision=precision, plugins=plugins)


def test_no_capability_is_an_error() -> None:
    with pytest.raises(EngineError, match="no compute capability"):
        select_capabilities("tensorrt-rtx", [], precision="fp16", plugins=True)


def test_full_tensorrt_takes_this_machines_gpu() -> None:
    assert select_capabilities("tensorrt", None, precision="fp16", plugins=True) == ()
    with pytest.raises(EngineError, match="leave out --sm"):
        select_capabilities("tensorrt", [90], precision="fp16", plugins=True)


@pytest.mark.parametrize(
    ("types", "default", "refused"),
    [({"fp8"}, (89, 120, 121), 86), ({"nvfp4", "int8"}, (120, 121), 89), ({"nvfp4", "fp8"}, (120, 121), 89)],
)
def test_types_that_only_some_gpus_have(types: set[str], default: tuple[int, ...], refused: int) -> None:
    assert select_capabilities("tensorrt-rtx", None, precision="fp16", plugins=True, types=types) == default
    with pytest.raises(EngineError, match=rf"sm {refused} has no .* have it: build with --sm .*120,121, or export"):
        select_capabilities("tensorrt-rtx", [120, refused], precision="fp16", plugins=True, types=types)


def test_an_engine_for_each_gpu_or_one_for_all() -> None:
    assert one_engine_each("tensorrt-rtx", [89, 80, 89], hardware_compatible=False) == [[80], [89]]
    assert one_engine_each("tensorrt-rtx", [89, 80], hardware_compatible=True) == [[89, 80]]
    assert one_engine_each("tensorrt-rtx", None, hardware_compatible=False) == [None]
    assert one_engine_each("tensorrt", None, hardware_compatible=True) == [None]


def test_what_a_flavour_lacks_is_refused_with_what_there_is() -> None:
    check_version_compatible("tensorrt")
    with pytest.raises(EngineError, match=r"tensorrt-rtx has no version-compatible engines.*--target tensorrt"):
        check_version_compatible("tensorrt-rtx")
    assert check_weights("bundle") == "bundle"
    with pytest.raises(EngineError, match="'stripped' is none of: engine, bundle, streamed"):
        check_weights("stripped")


def test_parse() -> None:
    assert parse_capabilities("80, 86,120") == (80, 86, 120)


@pytest.mark.parametrize("text", ["", "80,", "8.6", "sm80", "80;86", "-80"])
def test_parse_refuses(text: str) -> None:
    with pytest.raises(EngineError, match="--sm"):
        parse_capabilities(text)


def test_unknown_target_is_named() -> None:
    assert check_flavour("tensorrt") == "tensorrt"
    with pytest.raises(EngineError, match=r"'cuda'.*tensorrt-rtx"):
        check_flavour("cuda")
