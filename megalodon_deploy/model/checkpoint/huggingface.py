"""The Hugging Face directory of megalodon-hf: `config.json` and safetensors or `.bin` files, sharded or not.

The package's arithmetic is the released one up to these points, which the weights absorb:

- Rotary embedding pairs element i of a head with element i + dz/2, not with its neighbour: rows of `wz`, and `gamma`
  and `beta`, are reordered.
- LayerNorm stores its weight as it is, not minus one.
- `wh2` has a bias: it joins that of `wh1`. The feed-forward matrices have biases: see `feed_forward`.
- `norm_affine` false takes TimestepNorm's weight and bias away as well: both are zero here.
- `rescale_nffn` is a constant of the layer, not a tensor.
- The output matrix is the embedding whenever the sizes agree, whatever `share_emb` says.

Its TimestepNorm is another function (`STATISTICS_WARNING`): no choice of weights makes up for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import CheckpointError
from megalodon_deploy.model.checkpoint import feed_forward
from megalodon_deploy.model.checkpoint.document import CONFIG_FILE, build_config, read_json
from megalodon_deploy.model.checkpoint.recipes import Recipe, lazy_tensor, shared_recipe, stored_name
from megalodon_deploy.model.checkpoint.tensor_file import TensorFile, open_tensor_file
from megalodon_deploy.model.checkpoint.tokenizer import find_tokenizer
from megalodon_deploy.model.checkpoint.types import Checkpoint, CheckpointWarning, TokenizerSource
from megalodon_deploy.model.checkpoint.validate import Shape, check_tensors, read_checked
from megalodon_deploy.parameters import ParameterSpec, parameter_specs

MODEL_TYPE = "megalodon"
STATISTICS_WARNING = (
    "the weights of megalodon-hf run with the released TimestepNorm, whose variance covers every scalar; "
    "megalodon-hf's own covers group means only, so its outputs are different ones: fine-tune before use"
)
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_EMBEDDING = "model.embed.weight"
_OUTPUT = "lm_head.weight"
_DEFAULTS: dict[str, Any] = {  # what the package takes when config.json does not say
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "rope_base": 10000.0,
    "swiglu": False,
    "rescale_nffn": False,
    "scale_emb": False,
}


def read_huggingface(path: Path) -> Checkpoint:
    """Open a directory, or one weight file with its `config.json` beside it."""
    directory = path if path.is_dir() else path.parent
    stated = read_json(directory / CONFIG_FILE)
    opened = [open_tensor_file(file) for file in ([path] if path.is_file() else _weight_paths(directory))]
    files = {name: file for file in opened for name in file.entries}
    stored_config = _config(directory / CONFIG_FILE, stated, shared=_is_shared(files))
    stored = _stored_shapes(stored_config, affine=stated.get("norm_affine", True))
    entries = {name: file.entries[name] for name, file in files.items()}
    check_tensors(directory if len(opened) > 1 else opened[0].path, entries, stored, optional={_OUTPUT})
    config, recipes = _recipes(stored_config, stored, files)
    tensors = {spec.name: lazy_tensor(spec, recipes[spec.name], files) for spec in parameter_specs(config)}
    warnings.warn(f"{directory}: {STATISTICS_WARNING}", CheckpointWarning, stacklevel=3)
    return Checkpoint(path, "megalodon-hf", config, _tokenizer(directory, config, stated), tuple(opened), tensors)


def _weight_paths(directory: Path) -> list[Path]:
    """One file, or those that the index lists."""
    for name in _WEIGHT_FILES:
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return [directory / name]
        if index.is_file():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not all(isinstance(value, str) for value in listed.values()):
                raise CheckpointError(f"{index}: has no weight_map from tensors to files")
            return [directory / Path(file).name for file in sorted(set(listed.values()))]
    raise CheckpointError(f"{directory}: no {' and no '.join(_WEIGHT_FILES)}; the weights are missing")


def _is_shared(files: Mapping[str, TensorFile]) -> bool:
    """Whether there is one matrix for input and output. Files of the package itself that have both hold it twice."""
    if _OUTPUT not in files or _EMBEDDING not in files:
        return True
    embedding, output = files[_EMBEDDING].read(_EMBEDDING), files[_OUTPUT].read(_OUTPUT)
    return embedding.data_ptr() == output.data_ptr() or torch.equal(embedding, output)


def _config(where: Path, stated: Mapping[str, Any], *, shared: bool) -> MegalodonConfig:
    """The configuration of the stored tensors; settings that Hugging Face adds to every model are passed over."""
    chunk_size, cache_length = stated.get("chunk_size"), stated.get("max_cache_len")
    if stated.get("cache_unbounded") or cache_length not in (None, chunk_size):
        setting = "cache_unbounded = true" if stated.get("cache_unbounded") else f"max_cache_len = {cache_length}"
        raise CheckpointError(
            f"{where}: {setting} is attention over another range than chunks of {chunk_size}; only that is supported"
        )
    if stated.get("output_size") not in (None, -1, stated.get("vocab_size")):
        raise CheckpointError(
            f"{where}: output_size is {stated['output_size']}, expected -1 or vocab_size = {stated.get('vocab_size')}"
        )
    fields = MegalodonConfig.__dataclass_fields__
    values = {key: value for key, value in stated.items() if key in fields and value is not None}
    return build_config(where, _DEFAULTS | values | {"share_emb": shared, "norm_affine": True})


def _stored_shapes(config: MegalodonConfig, *, affine: bool) -> dict[str, Shape]:
    """Every tensor that the package writes for this configuration."""
    shapes: dict[str, Shape] = {_OUTPUT: (config.vocab_size, config.model_dim)}
    for spec in parameter_specs(config):
        is_norm = "norm." in spec.name
        if (affine or not is_norm) and not spec.name.endswith(".nffn.alpha"):
            shapes |= shared_recipe(spec).parts
        if spec.name.endswith((".wh2.weight", ".fc1.weight", ".fc2.weight", ".fc3.weight")):
            shapes[stored_name(spec.name).removesuffix("weight") + "bias"] = spec.shape[:1]
    return shapes


def _recipes(
    config: MegalodonConfig, stored: Mapping[str, Shape], files: Mapping[str, TensorFile]
) -> tuple[MegalodonConfig, dict[str, Recipe]]:
    """How each released tensor is made, and the configuration they have then: biases may widen the hidden layer."""
    recipes = {spec.name: _recipe(spec, config, stored) for spec in parameter_specs(config)}
    biases = {name for name in stored if ".ffn." in name and name.endswith(("fc1.bias", "fc2.bias", "fc3.bias"))}
    active = {name for name in biases if bool(read_checked(files[name], name).any())}
    if active:
        widen = any(name.endswith("fc2.bias") for name in active)
        config = feed_forward.absorb_biases(config, recipes, stored, widen=widen)
    return config, recipes


def _recipe(spec: ParameterSpec, config: MegalodonConfig, stored: Mapping[str, Shape]) -> Recipe:
    name = stored_name(spec.name)
    if name.endswith((".attn.wz.weight", ".attn.wz.bias", ".attn.gamma", ".attn.beta")):
        axis = 0 if ".wz." in name else 1
        return Recipe({name: spec.shape}, partial(_adjacent_pairs, heads=config.num_heads, axis=axis))
    if name.endswith(".wh1.bias"):
        return Recipe({name: spec.shape, name.replace("wh1", "wh2"): spec.shape}, torch.add, torch.float32)
    if name.endswith(".ffn.alpha"):
        layer = int(name.split(".")[2])
        return Recipe({}, partial(torch.full, spec.shape, 0.1 * 0.5**layer))
    recipe = shared_recipe(spec)
    if not recipe.parts.keys() <= stored.keys():  # a norm without weights
        return Recipe({}, partial(torch.zeros, spec.shape))
    if name.endswith(".ffn.norm.weight"):
        return Recipe(recipe.parts, _minus_one, torch.float32)
    return recipe


def _adjacent_pairs(tensor: torch.Tensor, *, heads: int, axis: int) -> torch.Tensor:
    """Reorder `axis` from halves (i, i + dz/2) of each head to neighbours (2i, 2i + 1)."""
    before, after = tensor.shape[:axis], tensor.shape[axis + 1 :]
    halves = tensor.reshape(*before, heads, 2, -1, *after)
    return halves.transpose(axis + 1, axis + 2).reshape(tensor.shape)


def _minus_one(weight: torch.Tensor) -> torch.Tensor:
    return weight - 1.0


def _tokenizer(directory: Path, config: MegalodonConfig, stated: Mapping[str, Any]) -> TokenizerSource | None:
    eos = stated.get("eos_token_id")
    stop_tokens = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    return find_tokenizer(directory, vocab_size=config.vocab_size, stop_tokens=stop_tokens)
