"""What the kernel benchmark measures: each kernel's tensors, arithmetic and C signature, at the shapes of the models.

Letters: B rows, T tokens, D channels, N modes, G groups, H heads, Z and V widths of a head's keys and values, S rows of
key/value memory, C tokens of a chunk, W tokens of the vocabulary, R of them under a repetition penalty. Imports nothing
heavy: the plan can be printed anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megalodon_deploy.config import MegalodonConfig

MODELS = ("mega200M", "mega1.3B", "paper-7B")
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3": 1, "int8": 1, "int64": 8}
DTYPE_NUMBERS = {"float32": 0, "float16": 1, "bfloat16": 2, "float8_e4m3": 3, "int8": 4}  # enum mgd_dtype

PENALISED_TOKENS = 64

Phase = Literal["decode", "prefill", "backward"]
Sizes = dict[str, int]


@dataclass(frozen=True)
class Tensor:
    """`dims` are letters or digits. `kind` is a type, "activation", or "memory" for that of key/value memory.

    `passes`: how often a call must at least move it; 0 for what it leaves alone. `quantised_only`: it is there only
    where the memory's type is not that of the activations.
    """

    name: str
    dims: str
    kind: str = "float32"
    passes: int = 1
    quantised_only: bool = False

    def shape(self, sizes: Sizes) -> tuple[int, ...]:
        return tuple(int(dim) if dim.isdigit() else sizes[dim] for dim in self.dims)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A function of the C interface.

    `signature` lists its arguments: a letter is that size, "dtype" and "memory_dtype" are numbers of types, "null" a
    missing tensor, "workspace" a pointer and its bytes, "appends" a table of (rows, memory) pairs and its length, any
    other word the tensor of that name.
    """

    name: str
    function: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    signature: str
    workspace: str = ""  # letters that the function's _workspace_bytes takes; empty: it needs none
    phases: tuple[Phase, ...] = ("decode", "prefill")
    memory_types: tuple[str, ...] = ("activation",)
    flops: Callable[[Sizes], int] = lambda sizes: 0
    unit: Literal["float32", "matrix"] = "float32"  # what does the arithmetic: scalar float32, or matrix units

    @property
    def workspace_function(self) -> str:
        return f"{self.function}_workspace_bytes"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one shape and type."""

    kernel: Kernel
    phase: Phase
    model: str
    dtype: str  # of the activations
    memory_dtype: str
    sizes: Sizes
    position: int  # of every row

    @property
    def name(self) -> str:
        memory = f"/{self.memory_dtype}" if self.is_quantised else ""
        return (
            f"{self.kernel.name} {self.phase} {self.model} {self.dtype}{memory} B{self.sizes['B']} T{self.sizes['T']}"
        )

    def type_of(self, tensor: Tensor) -> str:
        return {"activation": self.dtype, "memory": self.memory_dtype}.get(tensor.kind, tensor.kind)

    def bytes_of(self, tensor: Tensor) -> int:
        return math.prod(tensor.shape(self.sizes)) * BYTES[self.type_of(tensor)]

    @property
    def is_quantised(self) -> bool:
        return self.memory_dtype != self.dtype

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in self.kernel.inputs if self.is_quantised or not tensor.quantised_only)

    @property
    def traffic_bytes(self) -> int:
        """The least that any implementation moves: every input read once, every output written once."""
        return sum(tensor.passes * self.bytes_of(tensor) for tensor in (*self.inputs, *self.kernel.outputs))

    @property
    def footprint_bytes(self) -> int:
        return sum(self.bytes_of(tensor) for tensor in (*self.inputs, *self.kernel.outputs))

    @property
    def flops(self) -> int:
        return self.kernel.flops(self.sizes)


def _activation(name: str, dims: str, passes: int = 1) -> Tensor:
    return Tensor(name, dims, "activation", passes)


POSITION = Tensor("position", "B", "int64")
EMA_COEFFICIENTS = (Tensor("p", "DN"), Tensor("q", "DN2"), Tensor("gamma", "DN2"), Tensor("omega", "D"))
EMA_INPUTS = (_activation("x", "BTD"), Tensor("past", "BDN2"), POSITION, *EMA_COEFFICIENTS)
WEIGHT, BIAS = Tensor("weight", "D"), Tensor("bias", "D")
NORM_INPUTS = (_activation("x", "BTD"), Tensor("past", "BG4"), POSITION, WEIGHT)

# A mode's step is q h + p x (10 operations without the products by zero) and its part of y (4).
EMA_FORWARD_FLOPS = 12
# The states again (10), the same recurrence for the adjoint (12), and the gradients of p, q, gamma and x (2, 8, 4, 2).
EMA_BACKWARD_FLOPS = 38


def _attention_flops(sizes: Sizes) -> int:
    """Two for each product that a token forms with a row of memory or with a token up to itself."""
    T = sizes["T"]
    pairs = T * sizes["S"] + T * (T + 1) // 2
    return 2 * sizes["B"] * sizes["H"] * pairs * (sizes["Z"] + sizes["V"])


def _ema_flops(per_mode: int) -> Callable[[Sizes], int]:
    return lambda sizes: per_mode * math.prod(sizes[dim] for dim in "BTDN")


def _forward(name: str, inputs: Sequence[Tensor], **options: Any) -> Kernel:
    """From x, the past state and coefficients to y and the present state."""
    outputs = (_activation("y", "BTD"), Tensor("present", inputs[1].dims))
    return Kernel(name=name, function=f"mgd_{name}", inputs=tuple(inputs), outputs=outputs, **options)


def _backward(name: str, inputs: Sequence[Tensor], coefficients: Sequence[Tensor], **options: Any) -> Kernel:
    """From the same inputs and gradients of y and of the present state to those of x, past and coefficients."""
    state = inputs[1].dims
    return Kernel(
        name=name,
        function=f"mgd_{name}",
        inputs=(*inputs, _activation("grad_y", "BTD"), Tensor("grad_present", state)),
        outputs=(
            _activation("grad_x", "BTD"),
            Tensor("grad_past", state),
            *(Tensor(f"grad_{tensor.name}", tensor.dims) for tensor in coefficients),
        ),
        phases=("backward",),
        **options,
    )


KERNELS = (
    _forward(
        "complex_ema",
        EMA_INPUTS,
        signature="dtype B T D N x past position p q gamma omega null y present workspace",
        workspace="BTDN",
        flops=_ema_flops(EMA_FORWARD_FLOPS),
    ),
    _backward(
        "complex_ema_backward",
        EMA_INPUTS,
        EMA_COEFFICIENTS,
        signature="dtype B T D N x past position p q gamma omega grad_y grad_present grad_x grad_past grad_p grad_q "
        "grad_gamma grad_omega workspace",
        workspace="BTDN",
        flops=_ema_flops(EMA_BACKWARD_FLOPS),
    ),
    _forward(
        "timestep_norm",
        (*NORM_INPUTS, BIAS),
        signature="dtype B T D G x past position weight bias epsilon null y present workspace",
        workspace="BTG",
    ),
    _backward(
        "timestep_norm_backward",
        NORM_INPUTS,
        (WEIGHT, BIAS),
        signature="dtype B T D G x past position weight epsilon grad_y grad_present grad_x grad_past grad_weight "
        "grad_bias workspace",
        workspace="BTDG",
    ),
    Kernel(
        name="norm_ema",
        function="mgd_timestep_norm_complex_ema",
        inputs=(
            _activation("x", "BTD"),
            Tensor("past_norm", "BG4"),
            POSITION,
            WEIGHT,
            BIAS,
            Tensor("past_cema", "BDN2"),
            *EMA_COEFFICIENTS,
        ),
        outputs=(
            _activation("u", "BTD"),
            Tensor("present_norm", "BG4"),
            _activation("y", "BTD"),
            Tensor("present_cema", "BDN2"),
        ),
        signature="dtype B T D G N x past_norm position weight bias epsilon past_cema p q gamma omega u present_norm y "
        "present_cema workspace",
        workspace="BTDGN",
        phases=("decode",),
        flops=_ema_flops(EMA_FORWARD_FLOPS),
    ),
    Kernel(
        name="chunk_attention",
        function="mgd_chunk_attention",
        inputs=(
            _activation("q", "BHTZ"),
            _activation("k", "BHTZ"),
            _activation("v", "BHTV"),
            Tensor("past_key", "BHSZ", "memory"),
            Tensor("past_value", "BHSV", "memory"),
            POSITION,
            Tensor("past_key_scale", "BHS", quantised_only=True),
            Tensor("past_value_scale", "BHS", quantised_only=True),
        ),
        outputs=(_activation("out", "BHTV"),),
        signature="dtype memory_dtype B H T S Z V q k v past_key past_value position past_key_scale past_value_scale C "
        "out workspace",
        workspace="BHSV",
        memory_types=("activation", "float8_e4m3", "int8"),
        flops=_attention_flops,
        unit="matrix",
    ),
    Kernel(
        name="append_rows",
        function="mgd_append_rows",
        inputs=(_activation("new_key", "BHTZ", 2), _activation("new_value", "BHTV", 2), POSITION),
        outputs=(_activation("key", "BHSZ", 0), _activation("value", "BHSV", 0)),  # as many rows as there are new ones
        signature="appends B T S C position",
        phases=("decode",),
    ),
    Kernel(
        name="choose_token",
        function="mgd_choose_tokens",
        inputs=(Tensor("logits", "BW"), Tensor("choices", "B8", "int64"), Tensor("recent", "BR", "int64")),
        outputs=(Tensor("tokens", "B", "int64"),),
        signature="B W logits choices recent R tokens workspace",
        workspace="BW",
        phases=("decode",),
    ),
)


def sizes_of(config: MegalodonConfig, *, batch: int, tokens: int, rows: int) -> Sizes:
    return {
        "B": batch,
        "T": tokens,
        "D": config.model_dim,
        "N": config.cema_ndim,
        "G": config.norm_num_groups,
        "H": config.num_heads,
        "Z": config.key_head_dim,
        "V": config.value_head_dim,
        "S": rows,
        "C": config.chunk_size,
        "W": config.vocab_size,
        "R": min(PENALISED_TOKENS, config.vocab_size),
    }


def make_case(
    kernel: Kernel, phase: Phase, model: str, config: MegalodonConfig, *, batch: int, dtype: str, memory_dtype: str
) -> Case:
    """Decode: the last token of a full chunk, with memory of a row for each token before. Else: a whole first chunk."""
    is_decode = phase == "decode"
    tokens, past = (1, config.chunk_size - 1) if is_decode else (config.chunk_size, 0)
    memory_dtype = dtype if memory_dtype == "activation" else memory_dtype
    rows = past + (kernel.name == "append_rows")  # there must be a row to write
    return Case(
        kernel=kernel,
        phase=phase,
        model=model,
        dtype=dtype,
        memory_dtype=memory_dtype,
        sizes=sizes_of(config, batch=batch, tokens=tokens, rows=rows),
        position=past,
    )


def plan(
    *,
    models: Sequence[str] = MODELS,
    dtypes: Sequence[str] = ("bfloat16",),
    batches: Sequence[int] = (1, 8),
    only: str = "",
) -> Iterator[Case]:
    """Every case whose name contains `only`. Batches beyond the first are for decode."""
    for kernel in KERNELS:
        for phase in kernel.phases:
            for model in models:
                config = MegalodonConfig.preset(model)
                for dtype in dtypes:
                    for memory_dtype in kernel.memory_types if phase == "decode" else ("activation",):
                        for batch in batches if phase == "decode" else batches[:1]:
                            case = make_case(
                                kernel, phase, model, config, batch=batch, dtype=dtype, memory_dtype=memory_dtype
                            )
                            if only in case.name:
                                yield case
