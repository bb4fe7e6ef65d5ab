"""Runners for a user's own comparisons with Polygraphy: each inference is one call of a schedule, and state goes on.

They work wherever Polygraphy takes a runner, and feed state back from call to call, which stock runners do not. Feeds
come from `make_feeds` or `feeds_of`; `ContractCompare` compares what they return. `start` holds past tensors by input
name for rows of the schedule that begin past position 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.errors import EngineError
from megalodon_deploy.runtime.session import open_session
from megalodon_deploy.verify.candidates import cpu_candidates
from megalodon_deploy.verify.comparison import Candidate
from megalodon_deploy.verify.engines import engine_candidates
from megalodon_deploy.verify.not_run import NotRun
from megalodon_deploy.verify.reference import CallByCallRunner
from megalodon_deploy.verify.runners import StreamRunner
from megalodon_deploy.verify.schedule import Schedule
from megalodon_deploy.verify.session_streams import SessionRunner
from megalodon_deploy.verify.weights import load_reference

Start = Mapping[str, np.ndarray]


def pytorch_runner(
    bundle: Bundle, schedule: Schedule, *, ckpt: str | Path | None = None, start: Start | None = None
) -> StreamRunner:
    """PyTorch in float32, with the bundle's weights or a checkpoint's: all state tensors, logits of all positions.

    Named "pytorch".
    """
    model, _ = load_reference(bundle, ckpt)
    return CallByCallRunner(model, schedule, start or {}, name="pytorch")


def onnxruntime_runner(bundle: Bundle, schedule: Schedule, *, start: Start | None = None) -> StreamRunner:
    """The graph in ONNX Runtime on the CPU, named "onnxruntime"; masked memory is poisoned.

    Raises `EngineError` for a precision that ONNX Runtime lacks on the CPU.
    """
    return _open("onnxruntime", cpu_candidates(bundle), schedule, start)


def tensorrt_runner(bundle: Bundle, engine: str, schedule: Schedule, *, start: Start | None = None) -> StreamRunner:
    """An engine of the bundle, TensorRT or TensorRT-RTX, by its ID; named "engine ID".

    Raises `EngineError`, saying why, where it cannot run.
    """
    return _open(f"engine {engine}", engine_candidates(bundle), schedule, start)


def session_runner(bundle: Bundle, backend: str, schedule: Schedule, *, start: Start | None = None) -> StreamRunner:
    """Streams of the public runtime, saved, forked and moved as the schedule says; named "BACKEND session"."""
    return SessionRunner(lambda: open_session(bundle, backend), schedule, start or {}, name=f"{backend} session")


def _open(
    name: str, found: tuple[Sequence[Candidate], Sequence[NotRun]], schedule: Schedule, start: Start | None
) -> StreamRunner:
    candidates, not_run = found
    for candidate in candidates:
        if candidate.name == name:
            return candidate.open()(schedule, start or {})
    why = next((item.why for item in not_run if item.what.startswith(name)), "the bundle has no such engine")
    raise EngineError(f"{name} cannot run here: {why}")
