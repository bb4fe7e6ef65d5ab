"""The numbers that define a Megalodon model, and the six published presets.

Field names are those of the released checkpoints' `config.json`. This module imports nothing heavy: the runtime reads
it on devices that have no PyTorch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from megalodon_deploy.errors import ConfigError

KeyValueType = Literal["activation", "fp8", "int8"]
MovingAverage = Literal["complex", "real", "none"]
StreamNorm = Literal["timestep", "layer"]
_CHOICES = {"KeyValueType": KeyValueType, "MovingAverage": MovingAverage, "StreamNorm": StreamNorm}
_OPTIONAL = ("kv_dtype", "ema", "stream_norm", "attention_norm", "two_hop")  # written where they are not the default


@dataclass(frozen=True, kw_only=True)
class MegalodonConfig:
    """Shape and switches of a Megalodon model. The letters are those used in every docstring of this package.

    Raises `ConfigError` when the numbers contradict each other.
    """

    vocab_size: int  # V: rows of the embedding, and number of logits
    model_dim: int  # D: width of the residual stream
    num_layers: int
    num_heads: int  # H
    z_dim: int  # Z: query and key width over all heads; dz = Z / H
    value_dim: int  # E: value width over all heads; dv = E / H
    ffn_hidden_dim: int  # F
    chunk_size: int  # C: attention sees the tokens of its own chunk only
    norm_num_groups: int = 32  # G: groups of TimestepNorm; D / G scalars each
    cema_ndim: int = 16  # N: complex modes per channel of the moving average
    norm_eps: float = 1e-5
    norm_affine: bool = True  # whether RMSNorm and LayerNorm have weights (TimestepNorm always has)
    rope_base: float = 10000.0
    swiglu: bool = False  # adds fc3: f = silu(n fc1) * (n fc3)
    rescale_nffn: bool = False  # adds alpha [D], a scale on the second hop
    scale_emb: bool = False  # embeddings times sqrt(D)
    share_emb: bool = False  # output matrix is the embedding
    kv_dtype: KeyValueType = "activation"  # in which a stream keeps keys and values; chosen at export, not trained
    # For studies of what each part is worth; the defaults are the released model, and only that is exported.
    ema: MovingAverage = "complex"  # real: without rotation, theta fixed; none: attention sees the norm's output
    stream_norm: StreamNorm = "timestep"  # layer: over the channels of each token, without memory
    attention_norm: bool = True  # RMSNorm of z, before queries and keys are made of it
    two_hop: bool = True  # the feed-forward part adds to the block's input; false: to its own input

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_type(field.name, str(field.type))
        for name, divisor in (("z_dim", "num_heads"), ("value_dim", "num_heads"), ("model_dim", "norm_num_groups")):
            value, by = getattr(self, name), getattr(self, divisor)
            if value % by:
                raise ConfigError(f"config: {name} = {value} is not a multiple of {divisor} = {by}")
        if self.key_head_dim % 2:
            raise ConfigError(f"config: z_dim / num_heads = {self.key_head_dim} is odd; rotary embedding needs pairs")

    def _check_type(self, name: str, kind: str) -> None:
        value = getattr(self, name)
        if kind in _CHOICES:
            if value not in get_args(_CHOICES[kind]):
                raise ConfigError(f"config: {name} = {value!r} is none of {', '.join(get_args(_CHOICES[kind]))}")
        elif kind == "bool":
            if not isinstance(value, bool):
                raise ConfigError(f"config: {name} = {value!r} is not true or false")
        elif kind == "int":
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"config: {name} = {value!r} is not a positive integer")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"config: {name} = {value!r} is not a positive number")

    @property
    def key_head_dim(self) -> int:
        """dz, the query and key width of one head."""
        return self.z_dim // self.num_heads

    @property
    def value_head_dim(self) -> int:
        """dv, the value width of one head."""
        return self.value_dim // self.num_heads

    @property
    def group_dim(self) -> int:
        """s = D / G, the scalars of one TimestepNorm group."""
        return self.model_dim // self.norm_num_groups

    def to_dict(self) -> dict[str, Any]:
        """JSON values; what the released model does not know only where it is not the default."""
        values = dataclasses.asdict(self)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {key: value for key, value in values.items() if key not in _OPTIONAL or value != defaults[key]}

    def released(self) -> MegalodonConfig:
        """The released model that computes the same. A real moving average is a complex one that does not rotate.

        Raises `ConfigError` for a variant that is none: it trains and is evaluated in PyTorch only.
        """
        variant = dataclasses.replace(self, ema="complex" if self.ema == "real" else self.ema)
        for name in ("ema", "stream_norm", "attention_norm", "two_hop"):
            if name in variant.to_dict():
                raise ConfigError(
                    f"config: {name} = {getattr(self, name)!r} is not the released model; such a variant trains and is "
                    "evaluated in PyTorch, but has no released or exported form"
                )
        return variant

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MegalodonConfig:
        """Build from JSON values; unknown and missing keys raise `ConfigError`."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - set(fields)):
            raise ConfigError(f"config: unknown key {unknown[0]!r}; known keys: {', '.join(fields)}")
        required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in values]:
            raise ConfigError(f"config: {missing[0]!r} is missing")
        return cls(**values)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> MegalodonConfig:
        """One of `PRESETS`, with single fields replaced: `preset("mega200M", vocab_size=256)`."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset {name!r}; there are: {', '.join(PRESETS)}")
        return dataclasses.replace(PRESETS[name], **overrides)


def _preset(layers: int, dim: int, heads: int, ffn: int, groups: int, **other: Any) -> MegalodonConfig:
    """The published models share Z = D/4, E = 2D, N = 16 and a vocabulary of 32,000."""
    shared: dict[str, Any] = {"vocab_size": 32000, "chunk_size": 2048, "z_dim": dim // 4, "value_dim": 2 * dim}
    dims = {
        "num_layers": layers,
        "model_dim": dim,
        "num_heads": heads,
        "ffn_hidden_dim": ffn,
        "norm_num_groups": groups,
    }
    return MegalodonConfig(**(shared | dims | other))


PRESETS: dict[str, MegalodonConfig] = {
    "mega200M": _preset(12, 1024, 1, 2560, 32),
    "mega1.3B": _preset(24, 2048, 2, 4864, 64),
    "mega1.3B_pg19": _preset(24, 2048, 2, 3584, 64, swiglu=True, scale_emb=True, share_emb=True),
    "mega7.1B": _preset(32, 4096, 4, 11264, 64),
    "mega7.3B": _preset(32, 4096, 4, 8192, 64, swiglu=True),
    "paper-7B": _preset(32, 4096, 4, 8192, 64, swiglu=True, chunk_size=4096, rope_base=100000.0),
}
