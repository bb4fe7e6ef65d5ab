"""A stream's state in a file, or in memory on its way from one stream to another.

A safetensors file; letters as in `megalodon_deploy.state`, P = position mod C:

| tensor | shape | dtype |
| --- | --- | --- |
| `past_key.{i}`, `past_value.{i}` | [1, H, P, dz], [1, H, P, dv] | the writer's activation, or see below |
| `past_key_scale.{i}`, `past_value_scale.{i}` | [1, H, P] where keys and values are quantised | float32 |
| `past_cema.{i}`, `past_norm.{i}`, `past_norm.final` | [1, D, N, 2], [1, G, 4] | float32 |
| `position` | [1] tokens consumed | int64 |
| `recent_tokens` | [R] last tokens, oldest first, for sampling penalties and unfinished characters | int64 |
| `pending_tokens` | [0] or [1] the last of `recent_tokens` when it is not consumed yet | int64 |
| `logits` | [V] what the last consumed token returned; [0] at position 0 and while a token is pending | float32 |
| `generator` | [2] seed and number of draws of `sampling.Generator`; [0] before the first draw | uint64 |

Keys and values are float32, float16 or bfloat16; quantised ones are int8, or the bits of fp8 e4m3 as uint8.
The metadata are `format`, `format_version`, `bundle_fingerprint` and `model_fingerprint`. A file resumes on every
backend of the bundle that it came from, and in every other export of the same checkpoint: keys and values are cast, or
quantised, to that bundle's type, and the text goes on as that export computes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import StateError
from megalodon_deploy.files import atomic_file
from megalodon_deploy.runtime.row_types import convert_rows, type_of_rows
from megalodon_deploy.runtime.sampling import HISTORY_TOKENS, Generator
from megalodon_deploy.state import LOGITS, POSITION, concrete_shape, state_specs

if TYPE_CHECKING:
    from megalodon_deploy.bundle import Manifest

FORMAT = "megalodon-stream"
FORMAT_VERSION = "1"
RECENT_TOKENS = "recent_tokens"
PENDING_TOKENS = "pending_tokens"
GENERATOR = "generator"
MAX_POSITION = 1 << 62  # far beyond any stream; sums with it still fit in int64

_ACTIVATION_DTYPES = ("float32", "float16", "bfloat16")
_FP8 = "float8_e4m3fn"
_UNUSED = np.dtype(np.float32)  # activation type of tensors that do not have it


@dataclass(frozen=True, kw_only=True)
class SavedStream:
    """Everything that a stream is, apart from the bundle it belongs to."""

    fingerprint: str  # of the bundle
    model_fingerprint: str = ""  # of the checkpoint behind it, "" when it is not known
    position: int
    tensors: Mapping[str, np.ndarray]  # state of one row, by `past_*` name
    recent: tuple[int, ...]
    pending: tuple[int, ...]
    logits: np.ndarray | None  # [V] float32
    generator: Generator | None

    def write(self, path: Path, config: MegalodonConfig) -> None:
        """Write the file, whole or not at all. Raises `StateError` when the stream has gone non-finite."""
        from safetensors.numpy import save

        check(self, config, "the stream cannot be saved")
        draws = [] if self.generator is None else [self.generator.seed, self.generator.draws]
        tensors = {
            **self.tensors,
            POSITION: np.array([self.position], np.int64),
            RECENT_TOKENS: np.array(self.recent, np.int64),
            PENDING_TOKENS: np.array(self.pending, np.int64),
            LOGITS: np.zeros(0, np.float32) if self.logits is None else self.logits,
            GENERATOR: np.array(draws, np.uint64),
        }
        metadata = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "bundle_fingerprint": self.fingerprint,
            "model_fingerprint": self.model_fingerprint,
        }
        with atomic_file(path) as temporary:
            # Its save_file would write another file first, of another name and with rights for this user alone.
            temporary.write_bytes(save({name: _storable(array) for name, array in tensors.items()}, metadata))

    def tensors_as(self, activation: np.dtype, config: MegalodonConfig) -> dict[str, np.ndarray]:
        """The tensors with key and value rows in a backend's type. Raises `StateError` on overflow."""
        tensors = convert_rows(self.tensors, config, activation)
        for spec in state_specs(config):
            if spec.is_rows:
                _check_finite(tensors[spec.past], f"resumed stream: {spec.past} in {tensors[spec.past].dtype}")
        return tensors


def read_saved_stream(path: Path, manifest: Manifest) -> SavedStream:
    """Read a file for a bundle. Raises `StateError` naming file, tensor, found and expected."""
    tensors, metadata = _load(path)
    for key, expected in (("format", FORMAT), ("format_version", FORMAT_VERSION)):
        if metadata.get(key) != expected:
            raise StateError(f"{path}: {key} is {metadata.get(key)!r}, expected {expected!r}; save the stream again")
    config = manifest.config
    origin = (metadata.get("bundle_fingerprint", ""), metadata.get("model_fingerprint", ""))
    check_origin(origin, manifest, str(path))
    position = int(_integers(tensors, POSITION, path, np.int64, lengths=(1,))[0])
    recent = _integers(tensors, RECENT_TOKENS, path, np.int64, lengths=range(HISTORY_TOKENS + 1))
    pending = _integers(tensors, PENDING_TOKENS, path, np.int64, lengths=(0, 1))
    draws = _integers(tensors, GENERATOR, path, np.uint64, lengths=(0, 2))
    if LOGITS not in tensors:
        raise StateError(f"{path}: tensor {LOGITS} is missing; save the stream again")
    logits = tensors.pop(LOGITS)
    saved = SavedStream(
        fingerprint=origin[0],
        model_fingerprint=origin[1],
        position=position,
        tensors=_from_bits(tensors),
        recent=tuple(map(int, recent)),
        pending=tuple(map(int, pending)),
        logits=logits if logits.size else None,
        generator=Generator(int(draws[0]), int(draws[1])) if len(draws) else None,
    )
    check(saved, config, str(path))
    return saved


def check_origin(origin: tuple[str, str], manifest: Manifest, where: str) -> None:
    """Raise `StateError` unless the bundle or the model that a stream comes from (fingerprints) is this one."""
    bundle, model = origin
    if bundle == manifest.fingerprint or (model and model == manifest.model_fingerprint):
        return
    raise StateError(
        f"{where}: the stream comes from bundle {bundle[:12] or 'unknown'} of another checkpoint, this bundle is "
        f"{manifest.fingerprint[:12]}; resume it with an export of the checkpoint that it came from"
    )


def check(saved: SavedStream, config: MegalodonConfig, where: str) -> None:
    """Raise `StateError`, starting with `where`, unless the content is a stream of a model with this config, whatever
    the type of its rows."""
    config = replace(config, kv_dtype=type_of_rows(saved.tensors))
    if not 0 <= saved.position <= MAX_POSITION:
        raise StateError(f"{where}: position is {saved.position}, expected 0 to {MAX_POSITION}")
    for token in (*saved.recent, *saved.pending):
        if not 0 <= token < config.vocab_size:
            raise StateError(f"{where}: token {token} is outside the vocabulary of {config.vocab_size}")
    if saved.pending and saved.pending != saved.recent[-1:]:
        raise StateError(f"{where}: {PENDING_TOKENS} is {saved.pending[0]}, which is not the last of {RECENT_TOKENS}")
    has_logits = saved.position > 0 and not saved.pending
    _check_array(saved.logits, LOGITS, (config.vocab_size,) if has_logits else None, ("float32",), where)
    specs = {spec.past: spec for spec in state_specs(config)}
    if unknown := sorted(set(saved.tensors) - set(specs)):
        raise StateError(f"{where}: unknown tensor {unknown[0]}; the file does not belong to this bundle")
    num_rows = saved.position % config.chunk_size
    for name, spec in specs.items():
        dtypes = _ACTIVATION_DTYPES if spec.is_activation else (spec.numpy_dtype(_UNUSED).name,)
        shape = concrete_shape(spec.past_shape, batch=1, capacity=num_rows)
        _check_array(saved.tensors.get(name), name, shape, dtypes, where)


def _check_array(
    array: np.ndarray | None, name: str, shape: tuple[int, ...] | None, dtypes: tuple[str, ...], where: str
) -> None:
    """`shape` None: the array has to be absent."""
    if array is None or shape is None:
        if (array is None) != (shape is None):
            raise StateError(f"{where}: tensor {name} is {'missing' if array is None else 'not expected here'}")
        return
    if array.shape != shape:
        raise StateError(f"{where}: {name} has shape {list(array.shape)}, expected {list(shape)}")
    if array.dtype.name not in dtypes:
        raise StateError(f"{where}: {name} is {array.dtype.name}, expected {' or '.join(dtypes)}")
    _check_finite(array, f"{where}: {name}")


def _storable(array: np.ndarray) -> np.ndarray:
    """Contiguous; fp8 as its bits: NumPy has no such type, and readers that go by NumPy's names refuse it."""
    array = np.ascontiguousarray(array)
    return array.view(np.uint8) if array.dtype.name == _FP8 else array


def _from_bits(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The reverse: no tensor of the state is made of bytes."""
    return {
        name: array.view(ml_dtypes.float8_e4m3fn) if array.dtype == np.uint8 else array
        for name, array in tensors.items()
    }


def _check_finite(array: np.ndarray, what: str) -> None:
    if not np.isfinite(array).all():
        raise StateError(f"{what} holds NaN or infinity: the stream is broken; start a new one")


def _load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise StateError(f"{path}: there is no such file")
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        text = " ".join(str(error).split())
        raise StateError(f"{path}: not a whole safetensors file ({text}); save the stream again") from error


def _integers(
    tensors: dict[str, np.ndarray], name: str, path: Path, dtype: type, lengths: tuple[int, ...] | range
) -> np.ndarray:
    """Take a vector of integers out of `tensors`."""
    array = tensors.pop(name, None)
    if array is None:
        raise StateError(f"{path}: tensor {name} is missing; save the stream again")
    if array.ndim != 1 or array.dtype != dtype or len(array) not in lengths:
        found = f"{array.dtype.name} {list(array.shape)}"
        raise StateError(f"{path}: {name} is {found}, expected a vector of {np.dtype(dtype).name} of {_words(lengths)}")
    return array


def _words(lengths: tuple[int, ...] | range) -> str:
    return f"length {min(lengths)} to {max(lengths)}" if len(lengths) > 1 else f"length {lengths[0]}"
