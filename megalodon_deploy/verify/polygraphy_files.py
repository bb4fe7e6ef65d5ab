"""A bundle for the stock `polygraphy` tool: inputs, outputs, a data loader and the command lines, in one directory.

Stock Polygraphy knows single calls and no loop. So every call gets the state that PyTorch had before it as inputs, and
what PyTorch computes as outputs to compare with:

    DIR/
      inputs.json       a feed for each call: tokens, position, past tensors      --load-inputs
      outputs.json      what PyTorch computes for it, in the graph's types        --load-outputs
      data_loader.py    the same feeds, one at a time                             --data-loader-script
      polygraphy.sh     one command line per purpose
      lib/              the name by which TensorRT-RTX's parser opens its library

Past tensors of a row at position 0 are NaN and masked rows hold large numbers, as everywhere in this package.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.comparator import RunResults
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.engine.child import find_library
from megalodon_deploy.engine.library import REGISTER_FILE, default_build_dir, find_plugin_library
from megalodon_deploy.engine.profile import optimization_profile
from megalodon_deploy.engine.targets import FLAVOURS
from megalodon_deploy.errors import UserError
from megalodon_deploy.files import atomic_directory
from megalodon_deploy.runtime.executors.onnxruntime import has_int8_products
from megalodon_deploy.state import LOGITS, POSITION, TOKENS, state_bytes, state_specs
from megalodon_deploy.verify.candidates import ACTIVATIONS, graph_contract
from megalodon_deploy.verify.compare import expected_outputs
from megalodon_deploy.verify.memory import PoisonedMemory
from megalodon_deploy.verify.reference import CallByCallRunner, make_start
from megalodon_deploy.verify.runners import CAPACITY, make_feeds
from megalodon_deploy.verify.schedule import Schedule, Stretch, rows_used, walk
from megalodon_deploy.verify.tolerance import SCALE_FLOOR, tolerances
from megalodon_deploy.verify.weights import load_reference

SCRIPT_FILE = "polygraphy.sh"
_FULL_CHUNK_BYTES = 4 << 20  # of state in one call; calls deep in the chunks of larger models are left out
Arrays = dict[str, np.ndarray]


def write_polygraphy_files(bundle: Bundle, directory: Path, ckpt: str | Path | None = None) -> None:
    """Write `directory`, whole or not at all.

    Raises `UserError` when it exists, and for a bundle with bf16 or fp8 inputs: Polygraphy has numpy's types alone.
    """
    if bundle.manifest.precision == "bf16":
        raise UserError(f"{bundle.path}: Polygraphy's files hold no bf16 arrays; export in fp16 or fp32 for it")
    if bundle.config.kv_dtype == "fp8":
        raise UserError(f"{bundle.path}: Polygraphy's files hold no fp8 arrays; export with --kv-dtype int8 for it")
    if directory.exists():
        raise UserError(f"{directory} exists already; name a new directory")
    model, _ = load_reference(bundle, ckpt)
    feeds: list[Arrays] = []
    outputs: list[Arrays] = []
    purposes = []
    for seed, schedule in enumerate(_schedules(bundle.config)):
        start = make_start(model, schedule, ACTIVATIONS[bundle.manifest.precision], seed)
        runner = CallByCallRunner(model, schedule, start, name="pytorch")
        for feed, output in _calls(bundle, schedule, start, runner, seed):
            feeds.append(feed)
            outputs.append(output)
        purposes += [f"{call.num_tokens} tokens from position {call.positions[0]}" for call in schedule.calls]
    results = RunResults()
    results.add(outputs, runner_name="pytorch")
    with atomic_directory(directory) as folder:
        with G_LOGGER.verbosity():
            save_json(feeds, str(folder / "inputs.json"))
            results.save(str(folder / "outputs.json"))
        (folder / "data_loader.py").write_text(_DATA_LOADER)
        (folder / SCRIPT_FILE).write_text(_script(bundle, outputs, purposes))
        _link_library(folder / "lib")


def _schedules(config: MegalodonConfig) -> Iterator[Schedule]:
    """One row each: stock tools compare what an engine for one stream can run."""
    chunk = config.chunk_size
    yield walk("fresh", "", chunk, (0,), (Stretch(min(chunk, 16)), Stretch(1), Stretch(3)), rows_used)
    yield walk("later", "", chunk, (5 * chunk,), (Stretch(4), Stretch(1)), rows_used)
    if state_bytes(config, activation_bytes=4) <= _FULL_CHUNK_BYTES:
        yield walk("edge", "", chunk, (2 * chunk - 2,), (Stretch(1), Stretch(3)), rows_used)


def _calls(
    bundle: Bundle, schedule: Schedule, start: Mapping[str, np.ndarray], runner: CallByCallRunner, seed: int
) -> Iterator[tuple[Arrays, Arrays]]:
    """Inputs and outputs of the graph for each call, in the graph's types."""
    config, contract = bundle.config, graph_contract(bundle, bundle.manifest.precision)
    rows, activation = schedule.memory_rows, contract.activation
    memory = PoisonedMemory(config, schedule.start_positions, start, num_rows=rows, activation=activation)
    with runner:
        for call, feed in zip(schedule.calls, make_feeds(schedule, config.vocab_size, seed), strict=True):
            past = memory.past(call.positions, int(feed[CAPACITY]))
            inputs = {TOKENS: feed[TOKENS], POSITION: feed[POSITION]}
            inputs |= {name: array.copy() for name, array in past.items()}
            computed = runner.infer(feed)
            outputs = {}
            for name, tensor in expected_outputs(config, call, contract).items():
                array = computed[name][:, -tensor.shape[1] :] if name == LOGITS else computed[name]
                outputs[name] = np.array(array, tensor.dtype)
            problem = memory.advance(call.positions, call.num_tokens, outputs)
            assert problem is None, f"Bug: {problem}"
            yield inputs, outputs


def _absolute_tolerances(bundle: Bundle, outputs: Sequence[Arrays], *, int8_products: bool) -> str:
    """Of each output, for the command line: the tolerance times the largest number that PyTorch has there."""
    kinds = {spec.present: spec.kind for spec in state_specs(bundle.config)} | {LOGITS: "logits"}
    allowed = tolerances(bundle.config, bundle.manifest.precision, int8_products=int8_products)
    items = []
    for name in outputs[0]:
        scale = max(float(np.abs(output[name].astype(np.float32)).max()) for output in outputs)
        kind = "norm mean" if kinds[name] == "norm" else kinds[name]
        items.append(f"'{name}:{allowed[kind] * max(scale, SCALE_FLOOR):.3g}'")
    return " ".join(items)


def _link_library(folder: Path) -> None:
    folder.mkdir()
    info = FLAVOURS["tensorrt-rtx"]
    assert info.parser_needs is not None, "Bug: TensorRT-RTX's parser needs its library"
    if library := find_library(info.library_package, info.parser_needs):
        (folder / info.parser_needs).symlink_to(library)


def _register_library() -> Path:
    """Where it is, or where `build-plugins` will put it."""
    try:
        return find_plugin_library().with_name(REGISTER_FILE)
    except UserError:
        return default_build_dir() / REGISTER_FILE


def _tool() -> str:
    """The tool of this environment, which need not be on the search path."""
    beside = Path(sys.executable).with_name("polygraphy")
    return str(beside) if beside.is_file() else "polygraphy"


def _script(bundle: Bundle, outputs: Sequence[Arrays], purposes: Sequence[str]) -> str:
    shapes: dict[str, Any] = optimization_profile(bundle.config, max_batch=1)
    lines = {
        which: " ".join(f"'{name}:[{','.join(map(str, getattr(shape, which)))}]'" for name, shape in shapes.items())
        for which in ("min", "opt", "max")
    }
    return _SCRIPT.format(
        calls="\n".join(f"#   {index}: {purpose}" for index, purpose in enumerate(purposes)),
        model=shlex.quote(str(bundle.model_path.resolve())),
        plugins=shlex.quote(str(_register_library())),
        tool=shlex.quote(_tool()),
        absolute=_absolute_tolerances(bundle, outputs, int8_products=False),
        absolute_cpu=_absolute_tolerances(bundle, outputs, int8_products=has_int8_products(bundle.manifest)),
        **lines,
    )


_DATA_LOADER = '''"""Feeds for `polygraphy run --data-loader-script`: the calls of inputs.json, one at a time."""

from pathlib import Path

from polygraphy.json import load_json


def load_data():
    yield from load_json(str(Path(__file__).with_name("inputs.json")))
'''

_SCRIPT = """#!/usr/bin/env bash
# Stock Polygraphy on one bundle: bash polygraphy.sh PURPOSE [more options of polygraphy]
#   onnxrt     ONNX Runtime on the CPU against PyTorch
#   loader     the same, the feeds from data_loader.py
#   trt        TensorRT with our plugins against PyTorch; needs an NVIDIA GPU
#   trt-rtx    TensorRT-RTX likewise
#   both       ONNX Runtime and TensorRT against PyTorch and each other; needs an NVIDIA GPU
#   build-rtx  a TensorRT-RTX engine with our plugins, model.engine; needs no GPU
# Stock Polygraphy only warns about an output that one side lacks; `megalodon-deploy verify` fails.
# Calls:
{calls}
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"
POLYGRAPHY=${{POLYGRAPHY:-{tool}}}
MODEL=${{MODEL:-{model}}}
PLUGINS=${{PLUGINS:-{plugins}}}
CPU=(--onnxrt --providers cpu)
INPUTS=(--load-inputs inputs.json)
COMPARE=(--load-outputs outputs.json --validate --rtol 0 --atol {absolute})
# ONNX Runtime by itself rounds what it multiplies with int8 and int4 matrices to int8
COMPARE_CPU=(--load-outputs outputs.json --validate --rtol 0 --atol {absolute_cpu})
SHAPES=(--trt-min-shapes {min} --trt-opt-shapes {opt} --trt-max-shapes {max})
ENGINE=(--strongly-typed --plugins "$PLUGINS" --onnx-flags ENABLE_PLUGIN_OVERRIDE "${{SHAPES[@]}}")
use_rtx() {{ export POLYGRAPHY_USE_TENSORRT_RTX=1 LD_LIBRARY_PATH="$PWD/lib${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"; }}

purpose=${{1:-}}; shift || true
case $purpose in trt | trt-rtx | both | build-rtx)
    [ -f "$PLUGINS" ] || {{
        echo "$PLUGINS is missing: python -m megalodon_deploy.engine.toolchain build-plugins, or set PLUGINS" >&2
        exit 2
    }} ;;
esac
case $purpose in
onnxrt) "$POLYGRAPHY" run "$MODEL" "${{CPU[@]}}" "${{INPUTS[@]}}" "${{COMPARE_CPU[@]}}" "$@" ;;
loader) "$POLYGRAPHY" run "$MODEL" "${{CPU[@]}}" --data-loader-script data_loader.py "${{COMPARE_CPU[@]}}" "$@" ;;
trt) "$POLYGRAPHY" run "$MODEL" --trt "${{INPUTS[@]}}" "${{COMPARE[@]}}" "${{ENGINE[@]}}" "$@" ;;
trt-rtx) use_rtx; "$POLYGRAPHY" run "$MODEL" --trt "${{INPUTS[@]}}" "${{COMPARE[@]}}" "${{ENGINE[@]}}" "$@" ;;
both) "$POLYGRAPHY" run "$MODEL" "${{CPU[@]}}" --trt "${{INPUTS[@]}}" "${{COMPARE_CPU[@]}}" "${{ENGINE[@]}}" "$@" ;;
build-rtx) use_rtx; "$POLYGRAPHY" convert "$MODEL" --convert-to trt --output model.engine "${{ENGINE[@]}}" "$@" ;;
*) sed -n '2,/^set /{{/^set /d;s/^# \\{{0,1\\}}//;p}}' "${{BASH_SOURCE[0]}}" >&2; exit 2 ;;
esac
"""
