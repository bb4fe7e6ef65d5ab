"""What is compared with PyTorch on the CPU: the graph in ONNX Runtime, and the public runtime that users call.

| bundle | graph | session |
| --- | --- | --- |
| fp32 | as it is | ONNX Runtime |
| fp16 | widened to float32, and as it is | ONNX Runtime |
| bf16 | widened to float32: ONNX Runtime has no bf16 matrix product on the CPU | PyTorch |

A widened graph computes in float32 on the rounded weights, as the reference does, so float32's tolerance holds: it
checks the graph itself more sharply than half precision could.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from polygraphy.backend.base import BaseRunner

from megalodon_deploy.bundle import Bundle, Precision
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.export.precision import write_widened
from megalodon_deploy.runtime.executors.onnxruntime import has_int8_products, missing_on_cpu
from megalodon_deploy.runtime.session import Session, open_session
from megalodon_deploy.verify.compare import Contract
from megalodon_deploy.verify.comparison import Candidate, RunnerFactory
from megalodon_deploy.verify.not_run import NotRun
from megalodon_deploy.verify.onnx_values import OrtValueRunner, open_exact
from megalodon_deploy.verify.reference import Start
from megalodon_deploy.verify.runners import CarriedRunner
from megalodon_deploy.verify.schedule import Schedule
from megalodon_deploy.verify.session_streams import SessionRunner
from megalodon_deploy.verify.tolerance import ROW_KINDS, tolerances

WIDENED = "onnxruntime, widened"

ACTIVATIONS: dict[Precision, np.dtype] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


def cpu_candidates(bundle: Bundle) -> tuple[list[Candidate], list[NotRun]]:
    """What can run a bundle of this precision on any machine, and what cannot."""
    precision = bundle.manifest.precision
    missing = missing_on_cpu(bundle.manifest)
    candidates, not_run = [], []
    if precision != "fp32" or missing:  # the first to be named where several miss, because it is the sharpest
        what = f"the graph widened from {precision} to float32, on the CPU"
        load_widened = functools.partial(_load_widened, bundle)
        candidates.append(_onnx_candidate(bundle, WIDENED, what, "fp32", load_widened))
    if missing:
        not_run.append(NotRun("onnxruntime on the graph as it is", f"it has no {missing} on the CPU"))
    else:
        load = functools.partial(open_exact, bundle.model_path)
        candidates.append(_onnx_candidate(bundle, "onnxruntime", "the graph as it is, on the CPU", precision, load))
    candidates.append(session_candidate(bundle, session_backend(bundle)))
    return candidates, not_run


def session_backend(bundle: Bundle) -> str:
    """The backend of the public runtime that runs this precision on a CPU."""
    return "torch" if missing_on_cpu(bundle.manifest) else "onnxruntime"


def _onnx_candidate(bundle: Bundle, name: str, what: str, precision: Precision, load: Callable[[], Any]) -> Candidate:
    return carried_candidate(name, what, bundle.config, graph_contract(bundle, precision), OrtValueRunner, load)


def _load_widened(bundle: Bundle) -> Any:
    """The copy is gone once ONNX Runtime has read it."""
    with tempfile.TemporaryDirectory(prefix="megalodon-verify.") as folder:
        return open_exact(write_widened(bundle, Path(folder)))


def graph_contract(bundle: Bundle, precision: Precision) -> Contract:
    """Of the whole graph, computed in `precision`."""
    return Contract(
        logits=bundle.manifest.logits,
        activation=ACTIVATIONS[precision],
        tolerances=tolerances(bundle.config, precision),
    )


def carried_candidate(
    name: str,
    what: str,
    config: MegalodonConfig,
    contract: Contract,
    single: Callable[[Callable[[], Any]], BaseRunner],
    load: Callable[[], Any],
    *,
    max_batch: int | None = None,
) -> Candidate:
    """A candidate from `single`, a stock runner of single calls over what `load` returns; that is loaded once."""

    def open_graph() -> RunnerFactory:
        load_once = functools.cache(load)

        def make_runner(schedule: Schedule, start: Start) -> CarriedRunner:
            runner = single(load_once)
            return CarriedRunner(
                runner,
                config,
                positions=schedule.start_positions,
                start=start,
                num_rows=schedule.memory_rows,
                activation=contract.activation,
                name=name,
            )

        return make_runner

    return Candidate(name, what, contract, open_graph, max_batch)


def session_candidate(bundle: Bundle, backend: str, *, max_batch: int | None = None) -> Candidate:
    """Streams in one batch. Key and value rows stay inside; they show in what follows from them."""
    precision, name = bundle.manifest.precision, f"{backend} session"
    int8_products = backend == "onnxruntime" and has_int8_products(bundle.manifest)
    contract = Contract(
        logits="last",
        activation=ACTIVATIONS[precision],
        tolerances=tolerances(bundle.config, precision, int8_products=int8_products),
        hidden=frozenset(ROW_KINDS),
    )

    def session() -> Session:
        return open_session(bundle, backend)

    def open_runtime() -> RunnerFactory:
        load_once = functools.cache(session)
        return lambda schedule, start: SessionRunner(load_once, schedule, start, name=name)

    what = f"Session and Stream of the runtime, {precision}"
    return Candidate(name, what, contract, open_runtime, max_batch, session)
