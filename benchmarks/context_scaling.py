"""What does context cost? Megalodon and a transformer of the same size, from 4K to 2M tokens.

    python benchmarks/context_scaling.py --out benchmarks/results/context-scaling

writes context-scaling.json, .md and .svg. For each length, each model in a process of its own:

- whole text: the time to read that many tokens. Megalodon reads pieces and carries its state; the transformer attends
  to all of it at once with PyTorch's fused attention, up to `--most-read` tokens, for its time grows with the square.
- next token: the time of one more token behind that context (Megalodon: in the middle of a chunk). Beyond `--most-read`
  the transformer's keys and values are all alike: their number decides the time, not what they are.
- memory: bytes that a stream keeps, and the most that the process held beyond what it held before.

Times are processor time of one thread: other programs on the machine do not count in.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from child_process import most_resident_bytes, run_again
from transformer_baseline import Memory, Transformer

from megalodon_deploy.files import atomic_file
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.state import state_bytes
from megalodon_deploy.train import byte_model
from megalodon_deploy.train.log import pyplot_figure
from megalodon_deploy.verify import parse_count

MODELS = ("megalodon", "transformer")
VOCABULARY = 256
PIECE = 4096  # tokens that Megalodon reads at once
WARM_UP, STEPS = 4, 20
LENGTHS = "4096,16384,65536,262144,1048576,2097152"


class Stream(Protocol):
    """One stream of a model with random weights."""

    model: torch.nn.Module

    def read(self, num_tokens: int) -> None:
        """From the first token on."""

    def stand_behind(self, num_tokens: int) -> None:
        """As if so many had been read."""

    def step(self) -> None: ...

    def state_bytes(self) -> int: ...


class MegalodonStream:
    def __init__(self, arguments: argparse.Namespace) -> None:
        dim = arguments.dim
        # The widths of the published models: Z = D/4, E = 2D, F = 2.5 D.
        shape = {"z_dim": dim // 4, "ffn_hidden_dim": 5 * dim // 2, "chunk_size": arguments.chunk_size}
        self.model = Megalodon(byte_model(model_dim=dim, num_layers=arguments.layers, **shape)).eval()
        self.state = self.model.initial_state(1)

    def read(self, num_tokens: int) -> None:
        for begin in range(0, num_tokens, PIECE):
            self._call(min(PIECE, num_tokens - begin))

    def stand_behind(self, num_tokens: int) -> None:
        """Time does not depend on what the state holds; the place in the chunk is its middle."""
        chunk_size = self.model.config.chunk_size
        self._call(chunk_size // 2)
        self.state.position += num_tokens // chunk_size * chunk_size

    def step(self) -> None:
        self._call(1)

    def _call(self, num_tokens: int) -> None:
        _, self.state = self.model.hidden(torch.randint(VOCABULARY, (1, num_tokens)), self.state)

    def state_bytes(self) -> int:
        return state_bytes(self.model.config, activation_bytes=4)


class TransformerStream:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model = Transformer(arguments.dim, arguments.layers, VOCABULARY).eval()
        self.memory = Memory(self.model, 1, 0)

    def read(self, num_tokens: int) -> None:
        self.memory = Memory(self.model, 1, num_tokens)
        self._call(num_tokens)

    def stand_behind(self, num_tokens: int) -> None:
        self.memory = Memory(self.model, 1, num_tokens + WARM_UP + STEPS)
        self.memory.used = num_tokens

    def step(self) -> None:
        self._call(1)

    def _call(self, num_tokens: int) -> None:
        self.model.hidden(torch.randint(VOCABULARY, (1, num_tokens)), self.memory)

    def state_bytes(self) -> int:
        """Of the tokens that have been consumed."""
        return self.memory.used * self.memory.rows[..., :1, :].nbytes


def open_stream(kind: str, arguments: argparse.Namespace) -> Stream:
    torch.manual_seed(0)
    return MegalodonStream(arguments) if kind == "megalodon" else TransformerStream(arguments)


def seconds(call: Any, *parameters: Any) -> float:
    started = time.process_time()
    call(*parameters)
    return time.process_time() - started


@torch.no_grad()
def measure(kind: str, length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """In this process: what a context of `length` tokens costs."""
    stream = open_stream(kind, arguments)
    stream.read(arguments.chunk_size)
    before = most_resident_bytes()
    read = None
    if kind == "megalodon" or length <= arguments.most_read:
        read = seconds(open_stream(kind, arguments).read, length)
    stream.stand_behind(length)
    state_size = stream.state_bytes()
    times = [seconds(stream.step) for _ in range(WARM_UP + STEPS)][WARM_UP:]
    return {
        "model": kind,
        "context": length,
        "num_parameters": sum(parameter.numel() for parameter in stream.model.parameters()),
        "read_cpu_seconds": read,
        "next_token_cpu_ms": 1e3 * statistics.median(times),
        "state_bytes": state_size,
        "peak_bytes": most_resident_bytes() - before,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Megalodon / transformer in each cell."""
    lines = [
        "| context | next token, ms | read all, s | stream keeps, MB | peak memory, MB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for length in sorted({result["context"] for result in results}):
        pair = [next(r for r in results if (r["context"], r["model"]) == (length, kind)) for kind in MODELS]
        cells = [
            [f"{result['next_token_cpu_ms']:.2f}" for result in pair],
            [
                "not run" if result["read_cpu_seconds"] is None else f"{result['read_cpu_seconds']:.1f}"
                for result in pair
            ],
            [f"{result['state_bytes'] / 1e6:.1f}" for result in pair],
            [f"{result['peak_bytes'] / 1e6:.0f}" for result in pair],
        ]
        lines.append(f"| {length:,} | {' | '.join(' / '.join(cell) for cell in cells)} |")
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], target: Path) -> None:
    columns = ("read_cpu_seconds", "next_token_cpu_ms", "state_bytes")
    titles = ("time to read all, s", "time of the next token, ms", "a stream keeps, bytes")
    with pyplot_figure(target, panels=len(columns)) as panels:
        for axes, column, title in zip(panels, columns, titles, strict=True):
            for kind in MODELS:
                rows = [row for row in results if row["model"] == kind and row[column] is not None]
                axes.plot([row["context"] for row in rows], [row[column] for row in rows], "o-", label=kind)
            axes.set(title=title, xlabel="context, tokens", xscale="log", yscale="log")


def write(out: Path, document: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(document, indent=1) + "\n"), (".md", table(document["results"]))):
        with atomic_file(out.with_suffix(suffix)) as path:
            path.write_text(text)
    draw(document["results"], out.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--lengths", default=LENGTHS, help="tokens, separated by commas")
    parser.add_argument("--most-read", type=parse_count, default=65536, help="tokens that the transformer reads")
    parser.add_argument("--out", type=Path, required=True, help="names of the results, without an ending")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]), arguments)))
        return
    results = []
    for length in map(parse_count, arguments.lengths.split(",")):
        for kind in MODELS:
            results.append(run_again("--one", kind, str(length)))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    document = {
        "command": " ".join(["python", "benchmarks/context_scaling.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "settings": {name: getattr(arguments, name) for name in ("dim", "layers", "chunk_size", "most_read")},
        "results": results,
    }
    write(arguments.out, document)
    print(table(results), end="")


if __name__ == "__main__":
    main()
