"""Megalodon against a Llama-like transformer of the same size, trained side by side on the same text.

    python benchmarks/against_transformer.py --steps 300 --out benchmarks/results/against_transformer.json

Both models see the same windows of the standard library's source in the same order with the same optimiser. Their
steps take turns, so a busy machine slows both; peak memory is that of a process of its own for each model.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from child_process import most_resident_bytes, run_again
from torch import Tensor, nn
from transformer_baseline import Transformer

from megalodon_deploy.cpus import limit_spinning, usable_cpus
from megalodon_deploy.files import atomic_file
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.train import DataConfig, byte_model
from megalodon_deploy.train.data.rows import Batch, WindowRows, evaluation_batches, split
from megalodon_deploy.train.data.tokens import open_tokens
from megalodon_deploy.train.loss import chunked_cross_entropy

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
LEFT_OUT = ("*-packages", "*test*", "encodings", "pydoc_data")
VOCABULARY = 256
MODELS = ("megalodon", "transformer")


def build(kind: str, arguments: argparse.Namespace) -> tuple[nn.Module, Callable[[Tensor], Tensor], Tensor]:
    """(model, tokens [B, T] -> [B, T, D], output matrix [V, D])."""
    torch.manual_seed(0)
    dim, layers = arguments.dim, arguments.layers
    if kind == "transformer":
        transformer = Transformer(dim, layers, VOCABULARY)
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
    before = most_resident_bytes()
    for _ in range(3):
        runner.step(rows.next(slice(0, arguments.batch_size)))
    if arguments.device != "cpu":
        return torch.cuda.max_memory_allocated()
    return most_resident_bytes() - before + 4 * runner.num_parameters


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
            "peak_bytes": run_again("--memory-of", kind),
        }
        for kind, runner in runners.items()
    }


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
