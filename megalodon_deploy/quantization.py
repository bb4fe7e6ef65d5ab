"""Which weights of a bundle are quantised, and how: what the user chose, checked, as the manifest keeps it.

Matrices are stored as [in, out]. A scale serves `block_size` weights of one column, or the whole column.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast, get_args

from megalodon_deploy.errors import UserError

WeightKind = Literal["int8", "int4", "fp8", "nvfp4"]
Method = Literal["nearest", "gptq"]

WHOLE_COLUMN = 0  # block size of one scale for each output
# int4 by whole columns is left out: TensorRT-RTX 1.7 then stores the matrix in floating point.
BLOCK_SIZES: dict[WeightKind, tuple[int, ...]] = {
    "int8": (WHOLE_COLUMN, 32, 64, 128),
    "int4": (32, 64, 128),
    "fp8": (WHOLE_COLUMN, 32, 64, 128),
    "nvfp4": (16,),
}
# int4 takes the largest that fits the model: on a CPU, a product with blocks of 128 takes three quarters of the time of
# one with blocks of 32.
DEFAULT_BLOCKS: dict[WeightKind, tuple[int, ...]] = {
    "int8": (WHOLE_COLUMN,),
    "int4": (128, 64, 32),
    "fp8": (WHOLE_COLUMN,),
    "nvfp4": (16,),
}
OUTPUT_WEIGHT = "output.output.weight"
EMBEDDING_WEIGHT = "embed.weight"  # [vocabulary, D]: its rows are looked up
_LAYER_MATRICES = [[name, "weight"] for name in ("wv", "wz_wr_wh1", "wh2", "fc1", "fc1_fc3", "fc2")]


@dataclass(frozen=True)
class WeightFormat:
    """How one matrix is stored. `fp8` is e4m3; `nvfp4` is e2m1 with e4m3 block scales under one scale a matrix."""

    kind: WeightKind
    block_size: int
    by_rows: bool = False  # a scale for each row, of which some are read at a time

    def blocks(self, in_dim: int) -> int:
        """Number of scales along a column."""
        return in_dim // self.block_size if self.block_size else 1

    def fits(self, in_dim: int) -> bool:
        return self.block_size == WHOLE_COLUMN or in_dim % self.block_size == 0

    def describe(self) -> str:
        if self.by_rows:
            return f"{self.kind} by rows"
        return f"{self.kind} by {f'blocks of {self.block_size}' if self.block_size else 'columns'}"


EMBEDDING_FORMATS: dict[str, WeightFormat | None] = {
    "none": None,
    "int8": WeightFormat("int8", WHOLE_COLUMN, by_rows=True),
}


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Formats of a bundle's matrices. `output`, `embedding` None: that matrix has the activation type."""

    weights: WeightFormat
    output: WeightFormat | None
    embedding: WeightFormat | None = None
    method: Method = "nearest"

    def format_of(self, name: str) -> WeightFormat | None:
        """Of the matrix with this name in the graph; None for everything that is not quantised."""
        if name == OUTPUT_WEIGHT:
            return self.output
        if name == EMBEDDING_WEIGHT:
            return self.embedding
        return self.weights if name.rsplit(".", 2)[-2:] in _LAYER_MATRICES else None

    def describe(self) -> str:
        output = "as the activations" if self.output is None else self.output.describe()
        embedding = "" if self.embedding is None else f", embedding {self.embedding.describe()}"
        return f"{self.weights.describe()}, output {output}{embedding}, {self.method}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Quantization:
        """The inverse. Raises `KeyError`, `TypeError` or `UserError` for what cannot be."""
        output, embedding = values["output"], values["embedding"]
        return cls(
            weights=make_format(values["weights"]["kind"], values["weights"]["block_size"]),
            output=None if output is None else make_format(output["kind"], output["block_size"]),
            embedding=None if embedding is None else _embedding_format(embedding["kind"]),
            method=_known("method", values["method"], get_args(Method)),
        )


def plan_quantization(
    weights: str,
    *,
    in_dims: Collection[int],
    block_size: int | None = None,
    output: str | None = None,
    embedding: str | None = None,
    method: Method = "nearest",
    shares_embedding: bool = False,
) -> Quantization:
    """Formats from a user's words, for matrices with `in_dims` inputs. Raises `UserError` naming what there is.

    `output` "none" leaves the output matrix as it is. Its default is int8 where the other weights have 4 bits, for its
    errors reach the logits directly; otherwise their kind; none where it is the embedding (`shares_embedding`).
    `embedding` None is "none".
    """
    form = make_format(weights, block_size, in_dims)
    if output is None:
        output = "none" if shares_embedding else "int8" if form.kind in ("int4", "nvfp4") else form.kind
    return Quantization(
        weights=form,
        output=None if output == "none" else make_format(output, None, in_dims),
        embedding=_embedding_format(embedding or "none"),
        method=method,
    )


def make_format(kind: str, block_size: int | None, in_dims: Collection[int] = ()) -> WeightFormat:
    """A checked format; `block_size` None: the first of the kind's defaults that divides all `in_dims`, or the last.

    Raises `UserError` naming what there is.
    """
    known = cast(WeightKind, _known("quantisation", kind, get_args(WeightKind)))
    if block_size is None:
        forms = [WeightFormat(known, size) for size in DEFAULT_BLOCKS[known]]
        return next((form for form in forms if all(map(form.fits, in_dims))), forms[-1])
    if block_size not in BLOCK_SIZES[known]:
        sizes = ", ".join(str(size) if size else "0 (one scale a column)" for size in BLOCK_SIZES[known])
        raise UserError(f"block size {block_size} cannot be had with {known}; there are: {sizes}")
    return WeightFormat(known, block_size)


def _embedding_format(kind: str) -> WeightFormat | None:
    return EMBEDDING_FORMATS[_known("quantisation of the embedding", kind, tuple(EMBEDDING_FORMATS))]


def _known(what: str, value: Any, known: tuple[Any, ...]) -> Any:
    if value not in known:
        raise UserError(f"{what} {value!r} is none of: {', '.join(known)}")
    return value
