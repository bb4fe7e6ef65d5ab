"""The whole path on this machine: train a small model, export, verify, build an engine, stream text.

Runs the commands that a user would type, and shows each. Everything is written below one directory (`demo`), over
what an earlier demo left there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megalodon_deploy.console import format_bytes, print_table

PROGRAM = "megalodon-deploy"
STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))
LEFT_OUT = ["*-packages", "*test*", "encodings", "pydoc_data"]  # other people's code, tests, tables, prose
PROMPT = "class FileReader:"
NEW_TOKENS = 800  # bytes: six chunks of the default model
Row = tuple[str, str, str, str]


class StepFailedError(Exception):
    """A command of the demo that ended with an error, which it has printed itself."""

    def __init__(self, verb: str, exit_code: int) -> None:
        super().__init__(f"the demo stops: `{PROGRAM} {verb}` failed with exit code {exit_code}; its message is above")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="how long to train (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where to write (default: %(default)s)")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    # Ctrl-C reaches the running command too, which saves what it has; the demo waits for that.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    started = time.monotonic()
    try:
        rows = run_demo(Demo(console), arguments.out, arguments.minutes)
    except StepFailedError as failure:
        console.print(f"\n[bold red]{failure}")
        return 1
    console.print()
    print_table(rows, header=("step", "result", "written to", "size"), title="What the demo did")
    console.print(f"\nDone in {time.monotonic() - started:.0f} s. Go on with: {PROGRAM} --help")
    return 0


def run_demo(demo: Demo, out: Path, minutes: float) -> list[Row]:
    checkpoint, bundle = out / "checkpoint", out / "bundle"
    return [
        train(demo, checkpoint, minutes),
        export(demo, checkpoint, bundle),
        verify(demo, checkpoint, bundle),
        build(demo, bundle),
        generate(demo, bundle, out / "generate.json"),
    ]


class Demo:
    """Runs commands, shown as typed."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def heading(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}")

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def result(self, *command: str | Path) -> dict[str, Any]:
        """What the command prints with `--json`. Its progress and messages go to the terminal."""
        finished = self._run([*command, "--json"], stdout=subprocess.PIPE)
        if finished.returncode:
            raise StepFailedError(str(command[0]), finished.returncode)
        document: dict[str, Any] = json.loads(finished.stdout)
        return document

    def stream(self, *command: str | Path, before: str) -> None:
        """Let the command write to the terminal itself, after the text `before`."""
        finished = self._run(command, before=before)
        if finished.returncode:
            raise StepFailedError(str(command[0]), finished.returncode)

    def _run(
        self, command: Sequence[str | Path], *, stdout: int | None = None, before: str = ""
    ) -> subprocess.CompletedProcess[str]:
        words = [str(word) for word in command]
        self.console.print(f"$ {PROGRAM} {shlex.join(words)}", style="cyan", markup=False, soft_wrap=True)
        print(before, end="", flush=True)
        program = Path(sys.executable).with_name(PROGRAM)  # of this environment, whatever PATH says
        return subprocess.run([str(program), *words], stdout=stdout, text=True, check=False)


def train(demo: Demo, checkpoint: Path, minutes: float) -> Row:
    demo.heading("1. Train a byte-level model on the source code of Python's standard library")
    text = ("--data", STANDARD_LIBRARY, "data.glob=**/*.py", f"data.exclude={json.dumps(LEFT_OUT)}")
    cache = f"data.cache={checkpoint.parent / 'tokens'}"
    length = ("--minutes", f"{minutes:g}", "data.rows=windows")
    result = demo.result("train", *text, cache, *length, "--out", checkpoint, "--overwrite")
    learned = f"loss {result['first_loss']:.2f} -> {result['train_loss']:.2f} nats/byte"
    held_out = f"{result['held_out_loss']:.2f} on files it has not seen"
    demo.say(f"{result['num_parameters']:,} parameters, {result['tokens']:,} bytes read: {learned}, {held_out}")
    return (
        "train",
        f"{learned} (held out {result['held_out_loss']:.2f}), {result['tokens_per_second']:,.0f} tokens/s",
        str(checkpoint),
        size_of(checkpoint),
    )


def export(demo: Demo, checkpoint: Path, bundle: Path) -> Row:
    demo.heading("2. Export it: one ONNX graph for prefill and decode, and its weights")
    result = demo.result("export", "--ckpt", checkpoint, "--out", bundle, "--overwrite")
    what = f"{result['num_parameters']:,} parameters, {result['precision']}"
    state = f"{format_bytes(result['state_bytes_per_stream']['full_chunk'])} of state per stream"
    demo.say(f"{what}, {state}, however long the stream gets")
    return ("export", f"{what}, {state}", str(bundle), size_of(bundle))


def verify(demo: Demo, checkpoint: Path, bundle: Path) -> Row:
    demo.heading("3. Verify it: PyTorch and ONNX Runtime, call by call, across chunk edges")
    result = demo.result("verify", bundle, "--ckpt", checkpoint)
    for item in result["not_run"]:
        demo.say(f"not run: {item['what']}: {item['why']}")
    demo.say(result["verdict"])
    return ("verify", result["verdict"], "-", "-")


def build(demo: Demo, bundle: Path) -> Row:
    demo.heading("4. Compile it: a TensorRT-RTX engine with CUDA kernels for CEMA and TimestepNorm")
    command = ("build", bundle, "--target", "tensorrt-rtx")
    if importlib.util.find_spec("tensorrt_rtx") is None:
        reason = f"TensorRT-RTX has no package for {platform.system()} {platform.machine()}, or it is not installed"
        demo.say(f"skipped `{PROGRAM} {shlex.join(str(word) for word in command)}`: {reason}")
        return ("build", f"not built: {reason}", "-", "-")
    (result,) = demo.result(*command)["engines"]
    targets = ", ".join(f"{capability / 10:.1f}" for capability in result["compute_capabilities"])
    what = f"{result['flavour']} {result['version']}, {result['num_plugin_layers']} plugin layers"
    demo.say(f"{what}, for GPUs of compute capability {targets}, built in {result['build_seconds']:.1f} s")
    engine = bundle / "engines" / result["id"]
    return ("build", f"{what}, in {result['build_seconds']:.1f} s", str(engine), size_of(engine))


def generate(demo: Demo, bundle: Path, stats_path: Path) -> Row:
    demo.heading("5. Stream a completion with ONNX Runtime")
    # A lower temperature feeds on itself in a model this small: it falls into endless indentation.
    sampling = ("--max-new-tokens", str(NEW_TOKENS), "--temperature", "1", "--seed", "1")
    demo.stream("generate", bundle, "--prompt", PROMPT, *sampling, "--stats-json", stats_path, before=PROMPT)
    stats = json.loads(stats_path.read_text(encoding="utf-8"))
    config = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["config"]
    edges = (stats["prefill_tokens"] + stats["decode_tokens"]) // config["chunk_size"]
    speed = f"{stats['decode_tokens_per_second']:,.0f} tokens/s"
    result = f"{NEW_TOKENS} bytes past {edges} chunk edges, {speed}"
    demo.say(result)
    return ("generate", result, str(stats_path), size_of(stats_path))


def size_of(path: Path) -> str:
    """Bytes of a file, or of all files below a directory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return format_bytes(sum(file.stat().st_size for file in files))


if __name__ == "__main__":
    sys.exit(main())
