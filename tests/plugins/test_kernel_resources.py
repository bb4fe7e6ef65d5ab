"""Registers, stack and shared memory of every kernel on every GPU, from the real library."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernel_resources import KernelUse, find_cuobjdump, parse_resources, read_resources, table

from megalodon_deploy.errors import MissingDependencyError

ARCHITECTURES = {75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121}
# Kernels of training and of prefill that may keep something on the stack, with the reason.
MAY_LEAVE_REGISTERS = {"complex_ema::backward_kernel<Layout<32, 8> >": "gradients for N > 32, which no model has"}


@pytest.fixture(scope="module")
def uses(plugin_path: Path) -> list[KernelUse]:
    try:
        find_cuobjdump()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    return read_resources(plugin_path)


def test_every_kernel_is_there_for_every_architecture(uses: list[KernelUse]) -> None:
    architectures = {use.architecture for use in uses}
    kernels = {use.kernel for use in uses}
    assert architectures == ARCHITECTURES
    assert len(uses) == len(architectures) * len(kernels)
    assert any(kernel.startswith("complex_ema::") for kernel in kernels)


def test_no_kernel_leaves_the_registers(uses: list[KernelUse]) -> None:
    spilling = {use.kernel for use in uses if use.leaves_registers}
    assert spilling == set(MAY_LEAVE_REGISTERS), table([use for use in uses if use.leaves_registers])


def test_a_block_fits_every_gpu(uses: list[KernelUse]) -> None:
    """48 KiB of shared memory is what a launch may use everywhere without asking for more."""
    assert max(use.shared_bytes for use in uses) <= 48 * 1024


OUTPUT = """
Fatbin elf code:
================
arch = sm_100a
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN9megalodon4norm6kernelI6__halfLi4EEEvNS_4CallE:
  REG:60 STACK:8 SHARED:1240 LOCAL:16 CONSTANT[0]:1000 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_the_output_of_cuobjdump_is_understood() -> None:
    name = "_ZN9megalodon4norm6kernelI6__halfLi4EEEvNS_4CallE"
    assert list(parse_resources(OUTPUT)) == [(name, 100, (60, 8, 16, 1240))]


def test_the_table_shows_what_is_worst() -> None:
    uses = [KernelUse("a<4>", 80, 10, 0, 0, 8), KernelUse("a<4>", 90, 12, 24, 0, 4), KernelUse("b", 90, 7, 0, 0, 0)]
    assert [line.split() for line in table(uses).splitlines()] == [
        ["kernel", "sm_80", "sm_90", "stack", "local", "shared"],
        ["a<4>", "10", "12", "24", "0", "8"],
        ["b", "-", "7", "0", "0", "0"],
    ]
    assert uses[1].leaves_registers
    assert not uses[0].leaves_registers
