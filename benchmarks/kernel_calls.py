"""The kernels of a benchmark as calls of the C interface on PyTorch's tensors, and what they should compute.

The same code drives the real library on a GPU and the emulated one on the CPU, where tests check it.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_cases import DTYPE_NUMBERS, Case, Tensor
from token_choice import choices_tensor, choose_tokens

from megalodon_deploy.model.operators.complex_ema import complex_ema, complex_ema_backward
from megalodon_deploy.model.operators.timestep_norm import timestep_norm, timestep_norm_backward

Tensors = dict[str, torch.Tensor]

EPSILON = 1e-5
TORCH_TYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int64": torch.int64,
}
# Largest error over the scale of the expected tensor: one rounding to the type, or sums of float32.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SUM_TOLERANCE = 2e-3  # of gradients, which are sums over all tokens


class Append(ctypes.Structure):
    """struct mgd_append."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("memory", ctypes.c_void_p),
        ("heads", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
    )


class Library:
    """libmegalodon, real or emulated."""

    def __init__(self, path: Path) -> None:
        self.functions = ctypes.CDLL(str(path))
        self.functions.mgd_status_string.restype = ctypes.c_char_p

    def workspace_bytes(self, case: Case) -> int:
        if not case.kernel.workspace:
            return 0
        function = getattr(self.functions, case.kernel.workspace_function)
        function.restype = ctypes.c_size_t
        return int(function(*(ctypes.c_int64(case.sizes[dim]) for dim in case.kernel.workspace)))

    def bind(self, case: Case, tensors: Tensors, stream: int | None = None) -> Callable[[], None]:
        """A call without arguments on `stream`; it raises RuntimeError with the library's message."""
        function = getattr(self.functions, case.kernel.function)
        arguments = _arguments(case, tensors, self.workspace_bytes(case), stream)

        def call() -> None:
            if status := function(*arguments):
                raise RuntimeError(f"{case.name}: {self.functions.mgd_status_string(status).decode()}")

        return call


def _arguments(case: Case, tensors: Tensors, workspace_bytes: int, stream: int | None) -> list[Any]:
    arguments: list[Any] = []
    for word in case.kernel.signature.split():
        if word == "dtype":
            arguments.append(DTYPE_NUMBERS[case.dtype])
        elif word == "memory_dtype":
            arguments.append(DTYPE_NUMBERS[case.memory_dtype])
        elif word == "epsilon":
            arguments.append(ctypes.c_float(EPSILON))
        elif word == "workspace":
            arguments += [_pointer(tensors["workspace"]), ctypes.c_size_t(workspace_bytes)]
        elif word == "appends":
            table = _append_table(case, tensors)
            arguments += [table, ctypes.c_int64(len(table))]
        elif word in case.sizes:
            arguments.append(ctypes.c_int64(case.sizes[word]))
        else:
            arguments.append(_pointer(tensors[word]) if word in tensors else None)
    return [*arguments, ctypes.c_void_p(stream)]


def _append_table(case: Case, tensors: Tensors) -> Any:
    pairs = [("new_key", "key", "Z"), ("new_value", "value", "V")]
    entries = [
        Append(
            tensors[rows].data_ptr(),
            tensors[memory].data_ptr(),
            case.sizes["H"],
            case.sizes[width] * tensors[rows].element_size(),
        )
        for rows, memory, width in pairs
    ]
    return (Append * len(entries))(*entries)


def _pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def make_tensors(library: Library, case: Case, device: str, seed: int = 0) -> Tensors:
    """Inputs with plausible numbers, outputs filled with NaN (tokens with -7), and the workspace."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {tensor.name: _input(case, tensor, device, generator) for tensor in case.inputs}
    for tensor in case.kernel.outputs:
        kind = TORCH_TYPES[case.type_of(tensor)]
        unwritten = torch.nan if kind.is_floating_point else -7
        tensors[tensor.name] = torch.full(tensor.shape(case.sizes), unwritten, dtype=kind, device=device)
    if case.kernel.workspace:
        size = library.workspace_bytes(case)
        tensors["workspace"] = torch.full((size,), 255, dtype=torch.uint8, device=device)  # NaN
    return tensors


def _input(case: Case, tensor: Tensor, device: str, generator: torch.Generator) -> torch.Tensor:
    shape, kind = tensor.shape(case.sizes), TORCH_TYPES[case.type_of(tensor)]
    if tensor.name == "position":
        return torch.full(shape, case.position, dtype=kind, device=device)
    if tensor.name == "choices":
        return choices_tensor(case.sizes["B"], case.sizes["R"], device)
    if tensor.name == "recent":
        order = torch.rand((shape[0], case.sizes["W"]), device=device, generator=generator).argsort(1)
        return order[:, : shape[1]].contiguous()
    if kind is torch.int8:
        return torch.randint(-127, 128, shape, dtype=kind, device=device, generator=generator)
    normal = torch.randn(shape, device=device, generator=generator)
    if tensor.name == "q" and tensor.dims == "DN2":
        uniform = torch.rand((*shape[:-1], 2), device=device, generator=generator)
        return torch.view_as_real(torch.polar(0.5 + 0.499 * uniform[..., 0], torch.pi * uniform[..., 1])).contiguous()
    if tensor.name == "logits":
        normal = 3 * normal
    if tensor.name == "q":
        normal = normal * case.sizes["Z"] ** -0.5  # the scale of attention
    if tensor.quantised_only:
        normal = normal.abs() / 64
    if tensor.dims == "BG4" and tensor.name.startswith("past"):
        normal = normal * torch.tensor([1, 2**-26, 0, 2**-26], device=device) + torch.tensor(
            [0, 0, 1, 0], device=device
        )
    return normal.to(kind)


def reference(case: Case, tensors: Tensors, *, precise: bool) -> Tensors:
    """Outputs by name in plain PyTorch; `precise` computes in float64, else as a model without our kernels would."""
    inputs = {tensor.name: tensors[tensor.name] for tensor in case.inputs}
    if precise:
        inputs = {name: value if value.dtype is torch.int64 else value.double() for name, value in inputs.items()}
    outputs = REFERENCES[case.kernel.name](case, inputs)
    return dict(zip((tensor.name for tensor in case.kernel.outputs), outputs, strict=True))


def _body(operator: Any) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The Python function of an op; on CUDA the op itself would call our kernels, and compilers do not look into it."""
    function: Callable[..., tuple[torch.Tensor, ...]] = operator._init_fn
    return function


def _complex_ema(case: Case, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    return _body(complex_ema)(*inputs.values())


def _complex_ema_backward(case: Case, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    *forward, grad_y, grad_present = inputs.values()
    return _body(complex_ema_backward)(grad_y, grad_present, *forward)


def _timestep_norm(case: Case, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    return _body(timestep_norm)(*inputs.values(), EPSILON)


def _timestep_norm_backward(case: Case, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    *forward, grad_y, grad_present = inputs.values()
    return _body(timestep_norm_backward)(grad_y, grad_present, *forward, EPSILON)


def _norm_ema(case: Case, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    x, past_norm, position, weight, bias, past_cema, *coefficients = inputs.values()
    u, present_norm = _body(timestep_norm)(x, past_norm, position, weight, bias, EPSILON)
    y, present_cema = _body(complex_ema)(u, past_cema, position, *coefficients)
    return u, present_norm, y, present_cema


def _chunk_attention(case: Case, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    """All rows of memory are in use: a case's memory ends at its position."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    past_key, past_value = inputs["past_key"].to(k.dtype), inputs["past_value"].to(v.dtype)
    if case.is_quantised:
        past_key = past_key * inputs["past_key_scale"].unsqueeze(-1).to(k.dtype)
        past_value = past_value * inputs["past_value_scale"].unsqueeze(-1).to(v.dtype)
    key, value = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    scores = q @ key.transpose(-1, -2)
    T, rows = q.shape[2], key.shape[2]
    hidden = torch.ones(T, rows, dtype=torch.bool, device=q.device).triu(rows - T + 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return (weights.to(q.dtype) @ value,)


def _append_rows(case: Case, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    row = case.position % case.sizes["C"]
    results = []
    for rows in (inputs["new_key"], inputs["new_value"]):
        memory = rows.new_full((*rows.shape[:2], case.sizes["S"], rows.shape[3]), torch.nan)
        memory[:, :, row : row + rows.shape[2]] = rows
        results.append(memory)
    return tuple(results)


def _choose_token(case: Case, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    return (choose_tokens(inputs["logits"], inputs["recent"]),)


def _append_in_place(case: Case, tensors: Tensors) -> None:
    row = case.position % case.sizes["C"]
    for rows, memory in (("new_key", "key"), ("new_value", "value")):
        tensors[memory][:, :, row : row + case.sizes["T"]] = tensors[rows]


def timed_reference(case: Case, *, compiled: bool) -> Callable[[Tensors], Any]:
    """What a model without our kernels would run on these tensors."""

    def run(tensors: Tensors) -> Any:
        if case.kernel.name == "append_rows":
            return _append_in_place(case, tensors)
        return REFERENCES[case.kernel.name](case, {tensor.name: tensors[tensor.name] for tensor in case.inputs})

    return torch.compile(run) if compiled else run


REFERENCES: dict[str, Callable[[Case, Tensors], tuple[torch.Tensor, ...]]] = {
    "complex_ema": _complex_ema,
    "complex_ema_backward": _complex_ema_backward,
    "timestep_norm": _timestep_norm,
    "timestep_norm_backward": _timestep_norm_backward,
    "norm_ema": _norm_ema,
    "chunk_attention": _chunk_attention,
    "append_rows": _append_rows,
    "choose_token": _choose_token,
}


def worst_error(case: Case, found: Tensors, expected: Tensors) -> float:
    """The largest error of any output, in tolerances: at most 1 is right. NaN counts as infinite."""
    worst = 0.0
    for name, values in expected.items():
        if not found[name].is_floating_point():
            worst = worst if torch.equal(found[name], values) else math.inf
            continue
        tolerance = TOLERANCES[found[name].dtype]
        if case.phase == "backward" and name != "grad_x":
            tolerance = max(tolerance, SUM_TOLERANCE)
        if case.kernel.name == "norm_ema":  # its second half starts from numbers rounded to the activations' type
            tolerance = max(tolerance, TOLERANCES[TORCH_TYPES[case.dtype]])
        actual, values = _comparable(case, name, found[name].double()), _comparable(case, name, values.double())
        worst = max(worst, _relative_error(actual, values) / tolerance)
    return worst


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Over the scale of `expected`. Elements that are NaN there, which no call writes, must be so in `actual`."""
    if not torch.equal(actual.isnan(), expected.isnan()):
        return math.inf
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.nan_to_num(0), expected.nan_to_num(0)
    return float((actual - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)


def _comparable(case: Case, name: str, values: torch.Tensor) -> torch.Tensor:
    """A norm state is compared as the float64 numbers that its pairs of float32 stand for."""
    is_norm_state = any(tensor.name == name and tensor.dims == "BG4" for tensor in case.kernel.outputs)
    return values.unflatten(-1, (2, 2)).sum(-1) if is_norm_state else values
