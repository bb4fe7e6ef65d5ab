"""Which GPUs a build is for, and which it refuses."""

from __future__ import annotations

import pytest

from megalodon_deploy.engine.targets import check_flavour, parse_capabilities, select_capabilities
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
