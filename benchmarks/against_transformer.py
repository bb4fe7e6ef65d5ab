"""Megalodon against a Llama-like transformer of the same size, trained side by side on the same text.

    python benchmarks/against_transformer.py --steps 300 --out benchmarks/results/against_transformer.json

Both models see the same windows of the standard library's source in the same order with the same optimiser. Their
steps take turns, so a busy machine slows both; peak memory is that of a process of its own for each model. The
transformer is what the field trains: RMSNorm, rotary positions, PyTorch's fused causal attention, SwiGLU.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megalodon_deploy.cpus import limit_spinning, usable_cpus
from megalodon_deploy.files import atomic_file
from megalodon_deploy.model.attention import Rotation
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.train import DataConfig, byte_model
from megalodon_deploy.train.data.rows import Batch, WindowRows, evaluation_batches, split
from megalodon_deploy.train.data.tokens import open_tokens
from megalodon_deploy.train.loss import chunked_cross_entropy

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
LEFT_OUT = ("*-packages", "*test*", "encodings", "pydoc_data")
VOCABULARY = 256
MODELS = ("megalodon", "transformer")


class TransformerBlock(nn.Module):
    """Pre-norm attention and SwiGLU, as in Llama."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.gate_up, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BTD: Tensor, rotation: Rotation) -> Tensor:
        batch, num_tokens, _ = x_BTD.shape
        qkv = self.qkv(self.attention_norm(x_BTD)).view(batch, num_tokens, 3, self.heads, -1)
        q, k = rotation(qkv[:, :, :2]).unbind(2)
        heads = (tensor.transpose(1, 2) for tensor in (q, k, qkv[:, :, 2]))
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x_BTD = x_BTD + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.ffn_norm(x_BTD)).chunk(2, -1)
        return x_BTD + self.down(functional.silu(gate) * up)


class Transformer(nn.Module):
    """A Llama-like language model."""

    def __init__(self, dim: int, layers: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.head_dim = dim // heads
        self.embed = nn.Embedding(VOCABULARY, dim)
        self.layers = nn.ModuleList(TransformerBlock(dim, heads, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)
        self.output = nn.Linear(dim, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        for block in self.layers:  # residual branches start small, as in GPT-2 and its heirs
            for linear in (block.out, block.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * layers))

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.embed(tokens_BT)
        positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).unsqueeze(0)
        rotation = Rotation.at(positions, self.head_dim, 10000.0, x_BTD.dtype)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotation)
        return self.norm(x_BTD)


def build(kind: str, arguments: argparse.Namespace) -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    """(model, tokens [B, T] -> [B, T, D], output matrix [V, D])."""
    torch.manual_seed(0)
    dim, layers = arguments.dim, arguments.layers
    if kind == "transformer":
        transformer = Transformer(dim, layers, dim // 64, 8 * dim // 3 // 32 * 32)
        return transformer, transformer.hidden, transformer.output.weight
    # The widths of the published models: Z = D/4, E = 2D, F = 2.5 D.
    config = byte_model(
        model_dim=dim,
        num_layers=layers,
        z_dim=dim // 4,
        ffn_hidden_dim=5 * dim // 2,
        chunk_size=arguments.chunk_size,
    )
    megalodon = Megalodon(config)
    return megalodon, lambda tokens: megalodon.hidden(tokens)[0], megalodon.output_matrix


class Runner:
    """A model, its optimiser, and the time of each step."""

    def __init__(self, kind: str, arguments: argparse.Namespace) -> None:
        self.model, self.hidden, self.matrix = build(kind, arguments)
        self.model.to(arguments.device)
        self.device, self.steps, self.rate = arguments.device, arguments.steps, arguments.learning_rate
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True
        )
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []  # of all threads: another program's work does not count
        self.losses: list[float] = []

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def loss(self, batch: Batch) -> Tensor:
        """Sum over the batch."""
        tokens, targets = (torch.from_numpy(x).to(self.device) for x in (batch.tokens, batch.targets))
        return chunked_cross_entropy(self.hidden(tokens).flatten(0, 1), self.matrix, targets.flatten(), 2048)

    def step(self, batch: Batch) -> None:
        done = len(self.losses)
        warm, left = min(1.0, (done + 1) / (0.05 * self.steps)), 1 + math.cos(math.pi * done / self.steps)
        self.optimizer.param_groups[0]["lr"] = self.rate * warm * (0.1 + 0.45 * left)
        started, cpu_started = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad()
        loss = self.loss(batch) / batch.num_targets
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - started)
        self.cpu_seconds.append(time.process_time() - cpu_started)

    @torch.no_grad()
    def held_out_loss(self, batches: list[Batch]) -> float:
        return sum(self.loss(batch).item() for batch in batches) / sum(batch.num_targets for batch in batches)


def open_data(arguments: argparse.Namespace) -> tuple[WindowRows, list[Batch]]:
    data = DataConfig(paths=(STANDARD_LIBRARY,), glob="**/*.py", exclude=LEFT_OUT)
    train, held_out = split(open_tokens(data, lambda stage, fraction: None), 0.05)
    shape = {"seq_len": arguments.seq_len, "batch_size": arguments.batch_size}
    return WindowRows(train, seed=0, **shape), evaluation_batches("windows", held_out, num_rows=64, **shape)


def peak_bytes(kind: str, arguments: argparse.Namespace) -> int:
    """Bytes that three steps of the model need beyond those of a process that has only loaded PyTorch."""
    runner, (rows, _) = Runner(kind, arguments), open_data(arguments)
    if arguments.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    before = _most_resident_bytes()
    for _ in range(3):
        runner.step(rows.next(slice(0, arguments.batch_size)))
    if arguments.device != "cpu":
        return torch.cuda.max_memory_allocated()
    return _most_resident_bytes() - before + 4 * runner.num_parameters


def _most_resident_bytes() -> int:
    """Of this process so far; `getrusage` would count its parent's too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train both, one step each in turn."""
    rows, evaluation = open_data(arguments)
    runners = {kind: Runner(kind, arguments) for kind in MODELS}
    for step in range(arguments.steps):
        batch = rows.next(slice(0, arguments.batch_size))
        for runner in runners.values():
            runner.step(batch)
        if (step + 1) % max(1, arguments.steps // 10) == 0:
            shown = ", ".join(f"{kind} {runner.losses[-1]:.3f}" for kind, runner in runners.items())
            print(f"step {step + 1}: {shown}", file=sys.stderr, flush=True)
    return {
        kind: {
            "num_parameters": runner.num_parameters,
            "step_seconds_median": statistics.median(runner.seconds),
            "step_cpu_seconds_median": statistics.median(runner.cpu_seconds),
            "held_out_loss": runner.held_out_loss(evaluation),
            "peak_bytes": _peak_in_child(kind),
        }
        for kind, runner in runners.items()
    }


def _peak_in_child(kind: str) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", kind]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory-of", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(peak_bytes(arguments.memory_of, arguments))
        return
    result = compare(arguments)
    mine, other = (result[kind] for kind in MODELS)
    ratios = {name: mine[name] / other[name] for name in mine}
    document = {
        "command": " ".join(["python", "benchmarks/against_transformer.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {arguments.threads} threads",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("out", "memory_of")},
        "models": result,
        "megalodon_over_transformer": ratios,
    }
    text = json.dumps(document, indent=2) + "\n"
    if arguments.out:
        with atomic_file(arguments.out) as path:
            path.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    limit_spinning()
    main()
