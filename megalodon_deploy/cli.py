"""The command line: one thin command per verb over the public Python functions.

Exit codes: 0 done, 1 a check failed, 2 a mistake of the user (one line on stderr, no traceback). Imports of a verb
happen when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from megalodon_deploy import __version__
from megalodon_deploy.console import format_bytes, print_table, progress_bar
from megalodon_deploy.cpus import limit_spinning
from megalodon_deploy.errors import CheckFailedError, UserError
from megalodon_deploy.files import atomic_file

Command = TypeVar("Command", bound=Callable[..., Any])
EXISTING = click.Path(exists=True, path_type=Path)
OUTPUT = click.Path(path_type=Path)
BACKEND = click.Choice(["onnxruntime", "torch"])
json_option = click.option("--json", "as_json", is_flag=True, help="Print machine-readable results on stdout.")
bundle_argument = click.argument("bundle_path", metavar="BUNDLE", type=EXISTING)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, package_name="megalodon-deploy")
def cli() -> None:
    """From a Megalodon checkpoint to a verified, streaming engine."""


def main() -> None:
    """Entry point: turn a user's mistake into one line and exit code 2."""
    warnings.showwarning = _show_warning
    try:
        cli(standalone_mode=False)
    except CheckFailedError as failure:
        _stop(str(failure), 1)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _stop("interrupted", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except UserError as error:
        _stop(str(error), 2)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _stop(f"{where}{error.strerror or error}", 2)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    """Our own warnings are for the user, in one line; those of libraries are for developers."""
    if category.__module__.startswith("megalodon_deploy"):
        click.echo(f"megalodon-deploy: warning: {message}", err=True)


def _stop(message: str, exit_code: int) -> None:
    click.echo(f"megalodon-deploy: {' '.join(message.split())}", err=True)
    sys.exit(exit_code)


def _echo_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))


@cli.command()
@click.option("--data", required=True, multiple=True, type=EXISTING, help="File or directory of text; repeatable.")
@click.option("--out", required=True, type=OUTPUT, help="Checkpoint directory to write.")
@click.option("--glob", help="Files taken in a directory; default: **/*.py.")
@click.option("--exclude", multiple=True, help="Name of files and directories to leave out; repeatable, wildcards.")
@click.option("--steps", type=int, help="Length of the run in steps; or:")
@click.option("--minutes", type=float, help="Length of the run in minutes.")
@click.option("--preset", help="A published model's dimensions, at vocabulary 256.")
@click.option("--layers", type=int)
@click.option("--dim", type=int, help="Model width D; the other widths follow.")
@click.option("--heads", type=int)
@click.option("--chunk-size", type=int)
@click.option("--batch-size", type=int, help="Windows of a step.")
@click.option("--seq-len", type=int, help="Tokens of a window.")
@click.option("--lr", "learning_rate", type=float, help="Peak learning rate.")
@click.option("--seed", type=int)
@click.option("--threads", type=int)
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint.")
@json_option
def train(as_json: bool, **options: Any) -> None:
    """Train a byte-level model on text and write its checkpoint."""
    limit_spinning()
    from megalodon_deploy.train import TrainConfig, byte_model
    from megalodon_deploy.train import train as run_training

    given = {name: value for name, value in options.items() if value not in (None, ())}
    shape = {name: given.pop(name) for name in ("preset", "layers", "dim", "heads", "chunk_size") if name in given}
    with progress_bar("train") as progress:
        result = run_training(TrainConfig(model=byte_model(**shape), **given), progress=progress)
    if as_json:
        _echo_json(result.to_dict())
    else:
        loss = "not measured" if result.held_out_loss is None else f"{result.held_out_loss:.3f} nats/byte"
        click.echo(f"{result.path}: {result.num_parameters:,} parameters, {result.steps} steps, held-out loss {loss}")
    if result.interrupted:
        _stop(f"interrupted after {result.steps} steps; the checkpoint is saved", 130)


@cli.command()
@click.option("--ckpt", required=True, type=EXISTING, help="Checkpoint: a directory or a file, any supported layout.")
@click.option("--out", required=True, type=OUTPUT, help="Bundle directory to write.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True)
@click.option("--logits", type=click.Choice(["last", "all"]), default="last", show_default=True, help="Positions.")
@click.option("--name", help="Name of the model in the bundle; default: the directory's.")
@click.option("--tokenizer", type=EXISTING, help="tokenizer.json or SentencePiece model; default: the checkpoint's.")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
@json_option
def export(ckpt: Path, out: Path, as_json: bool, **options: Any) -> None:
    """Write a checkpoint as a bundle: an ONNX graph, its weights and a manifest."""
    from megalodon_deploy.export import export_checkpoint
    from megalodon_deploy.inspection import inspect_bundle

    with progress_bar("export") as progress:
        bundle = export_checkpoint(ckpt, out, progress=progress, **options)
    report = inspect_bundle(bundle)
    if as_json:
        _echo_json(report)
    else:
        weights = format_bytes(report["weights_bytes"])
        click.echo(f"{out}: {report['num_parameters']:,} parameters, {weights} of weights, {report['precision']}")


@cli.command()
@bundle_argument
@click.option("--target", type=click.Choice(["tensorrt-rtx", "tensorrt"]), default="tensorrt-rtx", show_default=True)
@click.option("--sm", metavar="LIST", help="Compute capabilities, like 80,86,89,120 (tensorrt-rtx).")
@click.option("--no-plugins", is_flag=True, help="Standard operators only, without our CUDA kernels.")
@click.option("--max-batch", type=int, default=1, show_default=True, help="Most streams in one call.")
@click.option("--overwrite", is_flag=True, help="Replace the engine of the same name.")
@json_option
def build(bundle_path: Path, target: str, sm: str | None, no_plugins: bool, as_json: bool, **options: Any) -> None:
    """Build a TensorRT engine into the bundle."""
    from megalodon_deploy.bundle import open_bundle
    from megalodon_deploy.engine import build_engine
    from megalodon_deploy.engine.targets import parse_capabilities

    capabilities = None if sm is None else parse_capabilities(sm)
    with progress_bar("build") as progress:
        info = build_engine(
            open_bundle(bundle_path),
            target=target,
            sm=capabilities,
            plugins=not no_plugins,
            progress=progress,
            **options,
        )
    if as_json:
        click.echo(info.to_json(), nl=False)
    else:
        size, memory = format_bytes(info.engine.size_bytes), format_bytes(info.peak_memory_bytes)
        click.echo(f"{bundle_path / 'engines' / info.id}: {size}, built in {info.build_seconds:.1f} s, peak {memory}")
    if info.norm_update == "float32":
        click.echo("note: norms are updated in float32, which drifts over millions of tokens", err=True)


@cli.command()
@bundle_argument
@click.option("--ckpt", type=EXISTING, help="The checkpoint; proves the weights' way into the bundle too.")
@json_option
def verify(bundle_path: Path, ckpt: Path | None, as_json: bool) -> None:
    """Compare the bundle with PyTorch, call by call, across chunk edges. Exit code 1 on a miss."""
    limit_spinning()
    from megalodon_deploy.bundle import open_bundle
    from megalodon_deploy.verify import verify_bundle

    with progress_bar("verify") as progress:
        report = verify_bundle(open_bundle(bundle_path, verify_hashes=True), ckpt=ckpt, progress=progress)
    if as_json:
        _echo_json(report.to_dict())
    else:
        print_table(report.table_rows(), header=report.table_header())
        for line in report.notes():
            click.echo(line)
    if not report.passed:
        raise CheckFailedError(f"{bundle_path}: {report.verdict()}")


@cli.command()
@bundle_argument
@click.option("--prompt", help="Text to go on from; '-' reads standard input.")
@click.option("--resume", type=EXISTING, help="Saved stream to go on from.")
@click.option("--save", type=OUTPUT, help="Write the stream here at the end.")
@click.option("--max-new-tokens", type=int, default=256, show_default=True)
@click.option(
    "--temperature", type=float, help="0: the most probable token, the default without other sampling options."
)
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--min-p", type=float)
@click.option("--repetition-penalty", type=float)
@click.option("--seed", type=int, help="The same seed gives the same text.")
@click.option("--stop", "stop_strings", multiple=True, help="Text to end before; repeatable.")
@click.option("--backend", type=BACKEND, default="onnxruntime", show_default=True)
@click.option("--threads", type=int)
@click.option("--stats", is_flag=True, help="Print speed and memory on stderr at the end.")
@click.option("--stats-json", type=OUTPUT, help="Write speed and memory here.")
def generate(
    bundle_path: Path,
    prompt: str | None,
    resume: Path | None,
    save: Path | None,
    max_new_tokens: int,
    stop_strings: tuple[str, ...],
    backend: str,
    threads: int | None,
    stats: bool,
    stats_json: Path | None,
    **sampling: Any,
) -> None:
    """Stream a completion to stdout as it is computed."""
    from megalodon_deploy.bundle import open_bundle
    from megalodon_deploy.runtime.sampling import SamplingParams

    given = {name: value for name, value in sampling.items() if value is not None}
    if not {"temperature", "top_k", "top_p", "min_p", "seed"} & set(given):
        given["temperature"] = 0.0
    params = SamplingParams(**given)
    stream = open_bundle(bundle_path).session(backend, threads=threads).stream(resume=resume)
    text = sys.stdin.read() if prompt == "-" else prompt or ""
    for piece in stream.generate(text, max_new_tokens=max_new_tokens, sampling=params, stop_strings=stop_strings):
        click.echo(piece.text, nl=False)
    click.echo()
    if save:
        stream.save(save)
    measured = stream.stats.to_dict()
    if stats_json:
        with atomic_file(stats_json) as path:
            path.write_text(json.dumps(measured, indent=2) + "\n")
    if stats:
        click.echo(_stats_line(measured), err=True)


def _stats_line(stats: dict[str, Any]) -> str:
    speeds = [
        f"{name} {stats[f'{name}_tokens']:,} tokens" + (f", {speed:,.1f} tokens/s" if speed else "")
        for name in ("prefill", "decode")
        for speed in [stats[f"{name}_tokens_per_second"]]
    ]
    memory = stats["peak_memory_bytes"]
    sizes = [
        f"state {format_bytes(stats['state_bytes'])}",
        *([f"peak memory {format_bytes(memory)}"] if memory else []),
    ]
    return "; ".join([*speeds, *sizes])


@cli.command()
@bundle_argument
@click.option("--backend", type=BACKEND, default="onnxruntime", show_default=True)
@click.option("--compare", type=BACKEND, help="Measure this backend in turns with the first.")
@click.option("--decode-tokens", type=int, default=200, show_default=True)
@click.option("--prompt-tokens", type=int, default=256, show_default=True)
@click.option("--rounds", type=int, default=5, show_default=True, help="Turns; each starts a fresh stream.")
@click.option("--threads", type=int)
@json_option
def bench(bundle_path: Path, as_json: bool, **options: Any) -> None:
    """Measure prefill and decode against this machine's memory bandwidth."""
    from megalodon_deploy.bundle import open_bundle
    from megalodon_deploy.runtime.bench import bench_bundle

    with progress_bar("bench") as progress:
        report = bench_bundle(open_bundle(bundle_path), progress=progress, **options)
    if as_json:
        _echo_json(report.to_dict())
        return
    header = ("backend", "ms/token", "p95", "p99", "of bandwidth limit", "prefill tokens/s", "first token ms", "load s")
    print_table([_bench_row(times) for times in report.times], header=header)
    limit, weights, state = (
        report.bandwidth_bytes_per_second,
        report.weight_bytes_per_token,
        report.state_bytes_per_token,
    )
    click.echo(
        f"a token reads {format_bytes(weights)} of weights and {format_bytes(state)} of state; "
        f"at {limit / 1e9:.1f} GB/s {1000 * (weights + state) / limit:.2f} ms is the limit"
    )
    if report.ratio is not None:
        click.echo(f"{report.times[0].backend} is {report.ratio:.2f} times as fast as {report.times[1].backend}")


def _bench_row(times: Any) -> tuple[str, ...]:
    return (
        times.backend,
        f"{times.decode_median_ms:.2f}",
        f"{times.decode_p95_ms:.2f}",
        f"{times.decode_p99_ms:.2f}",
        f"{times.share_of_bandwidth:.0%}",
        f"{times.prefill_tokens_per_second:,.0f}",
        f"{1000 * times.first_token_seconds:,.0f}",
        f"{times.load_seconds:.2f}",
    )


@cli.command()
@bundle_argument
@json_option
def inspect(bundle_path: Path, as_json: bool) -> None:
    """Show what a bundle holds: sizes, state of one stream, engines, origin."""
    from megalodon_deploy.bundle import open_bundle
    from megalodon_deploy.inspection import inspect_bundle, inspection_rows

    report = inspect_bundle(open_bundle(bundle_path))
    if as_json:
        _echo_json(report)
    else:
        print_table(inspection_rows(report))


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Show what this machine has, and what each missing part would enable."""
    from megalodon_deploy.doctor import diagnose

    findings = diagnose()
    if as_json:
        _echo_json([finding.to_dict() for finding in findings])
    else:
        rows = [(f.part, f.found or "missing", f.enables, "" if f.found else f.remedy) for f in findings]
        print_table(rows, header=("part", "found", "enables", "to get it"))


if __name__ == "__main__":
    main()
