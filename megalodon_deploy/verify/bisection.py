"""Where a graph goes wrong: the first tensor, in the model's order, that leaves its tolerance.

The calls of the schedule that missed are made again, with tensors between inputs and outputs compared as well, up to
the first call with a miss. PyTorch computes call by call beside it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from megalodon_deploy.bundle import Bundle, Precision
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.export.precision import write_widened
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.state import LOGITS, POSITION, TOKENS, state_specs
from megalodon_deploy.verify.candidates import ACTIVATIONS, graph_contract
from megalodon_deploy.verify.compare import ContractCompare, ExpectedTensor
from megalodon_deploy.verify.finding import Finding
from megalodon_deploy.verify.memory import PoisonedMemory
from megalodon_deploy.verify.onnx_values import OrtValueRunner
from megalodon_deploy.verify.reference import CallByCallRunner, make_start
from megalodon_deploy.verify.runners import CAPACITY, Feed, make_feeds
from megalodon_deploy.verify.schedule import Schedule
from megalodon_deploy.verify.taps import collect, load_tapped, tapped_names

REFERENCE = "PyTorch, call by call"
CANDIDATE = "onnxruntime, every tensor"


@dataclass(frozen=True)
class Bisection:
    """The tensors of one call in the model's order, each compared."""

    schedule: str
    call: int
    precision: Precision  # in which the graph ran
    findings: tuple[Finding, ...]

    @property
    def first(self) -> Finding | None:
        """The first one that is off; None when the graph is right with these tensors marked."""
        return next((finding for finding in self.findings if not finding.passed), None)

    def describe(self) -> str:
        if self.first is None:
            return (
                f"the graph computes schedule {self.schedule} right when its inner tensors are marked as outputs: "
                "what missed lies in an executor's optimisation, in an engine or in the runtime around the graph"
            )
        return f"first tensor out of tolerance: {self.first.describe()}"


def bisect(bundle: Bundle, model: Megalodon, schedule: Schedule, seed: int, *, widened: bool = False) -> Bisection:
    """Run a schedule's calls with inner tensors compared, up to the first call with a miss or to the end.

    `model` is the reference; `seed` is that of the verification, so that the calls are the same ones. `widened`: run
    the graph widened to float32, whose tolerances are sharper and which ONNX Runtime has for every precision.
    """
    precision: Precision = "fp32" if widened else bundle.manifest.precision
    with tempfile.TemporaryDirectory(prefix="megalodon-verify.") as folder:
        path = write_widened(bundle, Path(folder)) if widened else bundle.model_path
        names = tapped_names(onnx.load(path, load_external_data=False).graph, bundle.config)
        session = load_tapped(path, iter(names))
    contract = graph_contract(bundle, precision)
    start = make_start(model, schedule, ACTIVATIONS[bundle.manifest.precision], seed)
    memory = PoisonedMemory(
        bundle.config,
        schedule.start_positions,
        start,
        num_rows=schedule.memory_rows,
        activation=contract.activation,
    )
    compare = ContractCompare(bundle.config, schedule, {CANDIDATE: contract})
    reference = CallByCallRunner(model, schedule, start, name=REFERENCE)
    findings: list[Finding] = []
    with reference, OrtValueRunner(session) as runner:
        for index, feed in enumerate(make_feeds(schedule, bundle.config.vocab_size, seed)):
            found = _infer(runner, memory, schedule, index, feed)
            with collect(model) as inner:
                expected = reference.infer(feed)
            findings = _compare(bundle.config, schedule, compare, names, index, dict(expected) | inner, found)
            broken = memory.advance(schedule.calls[index].positions, schedule.calls[index].num_tokens, found)
            if broken or not all(findings):
                break
    return Bisection(schedule.name, index, precision, tuple(findings))


def _infer(
    runner: OrtValueRunner, memory: PoisonedMemory, schedule: Schedule, index: int, feed: Feed
) -> dict[str, np.ndarray]:
    past = memory.past(schedule.calls[index].positions, int(feed[CAPACITY]))
    inputs = {TOKENS: feed[TOKENS], POSITION: feed[POSITION], **past}
    return dict(runner.infer(inputs, check_inputs=False))


def _compare(
    config: MegalodonConfig,
    schedule: Schedule,
    compare: ContractCompare,
    names: Mapping[str, str],
    index: int,
    expected: Mapping[str, np.ndarray],
    found: Mapping[str, np.ndarray],
) -> list[Finding]:
    """Findings of all tensors that both sides have, in the model's order."""
    kinds = {spec.present: spec.kind for spec in state_specs(config)} | {LOGITS: "logits"}
    findings: list[Finding] = []
    for name, counterpart in names.items():
        array, kind = expected[counterpart], kinds.get(name, "activation")
        if name == LOGITS:
            array = array[:, -found[name].shape[1] :]
        blank = Finding(
            schedule=schedule.name, call=index, reference=REFERENCE, candidate=CANDIDATE, tensor=name, kind=kind
        )
        wanted = ExpectedTensor(name, kind, array.shape, found[name].dtype)
        findings += compare.compare_tensor(blank, wanted, array, found[name])
    return findings
