"""Calibrated codes, layer by layer: text runs through the float32 layers, each already quantised layer behind it.

A layer is read, fed with what the layers before it give, its matrices' inputs are summed up as second moments, its
matrices are quantised, and the layer runs again with the quantised ones to feed the next. One layer is in memory at a
time. Shapes: T tokens of a window, D channels; matrices [K, N] and moments [K, K] as in `gptq`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from megalodon_deploy.export.codes import QuantizedMatrix
from megalodon_deploy.export.gptq import quantize_gptq
from megalodon_deploy.export.text import read_windows
from megalodon_deploy.export.weights import Fold, folds
from megalodon_deploy.model.attention import Rotation, plan_attention
from megalodon_deploy.model.block import Block, Call, LayerState
from megalodon_deploy.model.checkpoint import Checkpoint, TokenizerSource
from megalodon_deploy.model.layers import TimestepNorm
from megalodon_deploy.model.model_state import ModelState
from megalodon_deploy.quantization import OUTPUT_WEIGHT, Quantization, WeightFormat

_MOST_WINDOWS = 32


class Calibration:
    """Gives the quantised matrices of a model in the order of `folds`; a layer is computed when its first is asked for.

    Raises `UserError` for a text that cannot be used.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: Path,
        tokenizer: TokenizerSource | None,
        quantization: Quantization,
        dtype: torch.dtype,
    ) -> None:
        config = checkpoint.config
        self._checkpoint, self._quantization, self._dtype = checkpoint, quantization, dtype
        tokens_BT = read_windows(text, tokenizer, config.vocab_size, most=_MOST_WINDOWS).tokens
        embedding_VD = self._tensor("embed.weight") * (math.sqrt(config.model_dim) if config.scale_emb else 1.0)
        self._windows = [embedding_VD[tokens_T][None] for tokens_T in tokens_BT]  # [1, T, D] into the next layer
        num_tokens = tokens_BT.shape[1]
        rotation = Rotation.at(
            torch.arange(num_tokens)[None] % config.chunk_size, config.key_head_dim, config.rope_base, torch.float32
        )
        attend = plan_attention([0], num_tokens, config.chunk_size, torch.device("cpu"))
        self._call = Call(torch.zeros(1, dtype=torch.int64), rotation, attend)
        self._past = ModelState.zeros(config, 1, dtype=torch.float32).tensors
        self._next_layer = 0
        self._ready: dict[str, QuantizedMatrix] = {}

    @torch.inference_mode()
    def __call__(self, name: str, form: WeightFormat) -> QuantizedMatrix:
        """The matrix `name` of the graph."""
        while name not in self._ready:
            if name == OUTPUT_WEIGHT:
                self._quantize_output()
            else:
                self._quantize_layer(self._next_layer)
                self._next_layer += 1
        return self._ready.pop(name)

    def _tensor(self, name: str) -> Tensor:
        return self._checkpoint.tensor(name, torch.float32)

    def _quantize_layer(self, layer: int) -> None:
        prefix = f"layers.{layer}."
        with torch.device("meta"):
            block = Block(self._checkpoint.config, layer)
        names = {name: f"{prefix}{name}" for name, _ in block.named_parameters()}
        block.load_state_dict({name: self._tensor(full) for name, full in names.items()}, assign=True)
        block.eval()
        mine = [fold for fold in self._folds() if fold.targets[0].name.startswith(prefix)]
        inputs = {fold.targets[0].name: fold.sources[0].removeprefix(prefix).removesuffix(".weight") for fold in mine}
        moments = _moments(block, inputs, lambda: self._run(block, layer))
        for fold in mine:
            matrix = self._quantize(fold, moments.pop(fold.targets[0].name))
            parts = fold.unfold(matrix.dequantized().numpy())
            for source, part in zip(fold.sources, parts, strict=True):
                block.get_parameter(source.removeprefix(prefix)).data = torch.from_numpy(part)
        self._windows = self._run(block, layer)

    def _quantize_output(self) -> None:
        with torch.device("meta"):
            norm = TimestepNorm(self._checkpoint.config)
        prefix = "output.final_norm"
        norm.load_state_dict({name: self._tensor(f"{prefix}.{name}") for name in ("weight", "bias")}, assign=True)
        past = self._past["past_norm.final"]
        normal = (norm(x_1TD, past, self._call.position)[0] for x_1TD in self._windows)
        (fold,) = (fold for fold in self._folds() if fold.targets[0].name == OUTPUT_WEIGHT)
        self._quantize(fold, _second_moments(normal))

    def _folds(self) -> list[Fold]:
        """Those of quantised matrices that multiply."""
        found = [(fold, self._quantization.format_of(fold.targets[0].name)) for fold in folds(self._checkpoint.config)]
        return [fold for fold, form in found if form is not None and not form.by_rows]

    def _quantize(self, fold: Fold, moments_KK: Tensor) -> QuantizedMatrix:
        name = fold.targets[0].name
        form = self._quantization.format_of(name)
        assert form is not None, f"Bug: {name} is not quantised"
        (matrix_KN,) = fold.fold(*(self._tensor(source).numpy() for source in fold.sources))
        self._ready[name] = quantize_gptq(torch.from_numpy(matrix_KN), moments_KK, form, self._dtype)
        return self._ready[name]

    def _run(self, block: Block, layer: int) -> list[Tensor]:
        """The layer's output of every window."""
        kinds = {kind: f"past_{kind}.{layer}" for kind in LayerState._fields}
        past = LayerState(**{kind: self._past[name] for kind, name in kinds.items() if name in self._past})
        return [block(x_1TD, past, self._call)[0] for x_1TD in self._windows]


def _moments(block: nn.Module, inputs: dict[str, str], run: Callable[[], object]) -> dict[str, Tensor]:
    """Sums of x x^T over what `run` feeds to the modules `inputs` (by key): [K, K] each."""
    sums: dict[str, Tensor] = {}

    def watch(key: str, module: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            added = _second_moments([given[0]])
            sums[key] = sums[key].add_(added) if key in sums else added

        return block.get_submodule(module).register_forward_pre_hook(hook)

    handles = [watch(key, module) for key, module in inputs.items()]
    run()
    for handle in handles:
        handle.remove()
    return sums


def _second_moments(inputs: Iterable[Tensor]) -> Tensor:
    """Sum of x x^T [K, K] over inputs [..., K]."""
    total: Tensor | None = None
    for x in inputs:
        flat = x.reshape(-1, x.shape[-1])
        total = flat.t() @ flat if total is None else total.addmm_(flat.t(), flat)
    assert total is not None, "Bug: no calibration text"
    return total
