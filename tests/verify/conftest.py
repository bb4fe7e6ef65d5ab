"""A stand-in for an exported graph: the PyTorch model's own one-chunk call behind the graph's names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from export_helpers import write_seeded
from helpers import small_config
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.model.checkpoint import save_checkpoint
from megalodon_deploy.model.megalodon import Megalodon
from megalodon_deploy.state import LOGITS, POSITION, TOKENS, state_specs
from megalodon_deploy.verify import verification, verify_bundle
from megalodon_deploy.verify.candidates import carried_candidate
from megalodon_deploy.verify.compare import Contract
from megalodon_deploy.verify.comparison import compare_candidate, run_references
from megalodon_deploy.verify.finding import Finding
from megalodon_deploy.verify.long_stream import LongStream, run_long_stream
from megalodon_deploy.verify.reference import CallByCallRunner, WholeSequenceRunner, make_start
from megalodon_deploy.verify.report import VerifyReport
from megalodon_deploy.verify.runners import make_feeds
from megalodon_deploy.verify.schedule import Schedule
from megalodon_deploy.verify.tolerance import tolerances

Arrays = dict[str, np.ndarray]
Fault = Callable[[Arrays], Arrays]
Find = Callable[..., list[Finding]]
Verify = Callable[..., VerifyReport]
LONG_STREAM_TOKENS = 20_000


class ModelAsGraph(BaseRunner):
    """Single calls of the contract's graph, computed by PyTorch; `before` and `after` may spoil inputs and outputs."""

    def __init__(self, model: Megalodon, before: Fault, after: Fault) -> None:
        super().__init__(prefix="model-as-graph")
        self._model = model
        self._before, self._after = before, after

    def get_input_metadata_impl(self) -> TensorMetadata:
        metadata = TensorMetadata()
        for name in (TOKENS, POSITION, *(spec.past for spec in state_specs(self._model.config))):
            metadata.add(name, dtype=np.float32, shape=None)
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
        self.inference_time = 0.0
        feed = self._before({name: array.copy() for name, array in feed_dict.items()})
        past = {name: torch.from_numpy(array) for name, array in feed.items() if name.startswith("past_")}
        with torch.no_grad():
            logits_BTV, present = self._model.forward_one_chunk(
                torch.from_numpy(feed[TOKENS]), torch.from_numpy(feed[POSITION]), past
            )
        outputs = {LOGITS: logits_BTV[:, -1:], **present}
        return OrderedDict(self._after({name: tensor.numpy() for name, tensor in outputs.items()}))


@pytest.fixture(scope="session")
def model() -> Megalodon:
    """Every parameter matters: norm weights, biases, gamma and beta are initialised to zero."""
    torch.manual_seed(0)
    model = Megalodon(small_config(vocab_size=256)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="session")
def checkpoint(model: Megalodon, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_checkpoint(model, path)
    return path


@pytest.fixture(scope="session")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_checkpoint(checkpoint, tmp_path_factory.mktemp("bundle") / "tiny")


@pytest.fixture(scope="session")
def quantized_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for blocks of 4-bit weights."""
    sizes = {"model_dim": 64, "z_dim": 32, "value_dim": 64, "ffn_hidden_dim": 96, "norm_num_groups": 4}
    return write_seeded(tmp_path_factory.mktemp("checkpoint") / "quantized", small_config(vocab_size=256, **sizes))


@pytest.fixture(scope="session")
def report(bundle: Bundle, checkpoint: Path) -> VerifyReport:
    """Of the right bundle, over the default text."""
    return verify_bundle(bundle, ckpt=checkpoint)


@pytest.fixture(scope="session")
def long_stream(bundle: Bundle) -> LongStream:
    return run_long_stream(bundle, LONG_STREAM_TOKENS, None)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("To be, or not to be: that is the question. ")
    return path


@pytest.fixture
def verify_copy(text: Path, references: dict[object, object], monkeypatch: pytest.MonkeyPatch) -> Verify:
    """verify_copy(bundle, ckpt, **options): `verify_bundle` over a short text. What PyTorch computes with a checkpoint
    is computed once: the copies of a bundle differ in their graphs."""
    compute = verification._compute_references

    def compute_once(bundle: Bundle, options: verification.VerifyOptions, *rest: object) -> object:
        key = (options.ckpt, bundle.config, bundle.manifest.precision, repr(bundle.manifest.quantization))
        if key not in references:
            references[key] = compute(bundle, options, *rest)
        return references[key]

    def verify(bundle: Bundle, ckpt: Path, *, bisect: bool = False) -> VerifyReport:
        monkeypatch.setattr(verification, "_compute_references", compute_once)
        return verify_bundle(bundle, ckpt=ckpt, text=text, bisect=bisect)

    return verify


@pytest.fixture(scope="session")
def references() -> dict[object, object]:
    """What PyTorch computed, by checkpoint and the kind of bundle."""
    return {}


@pytest.fixture(scope="session")
def find(model: Megalodon) -> Find:
    """find(schedule, before=..., after=...): findings of a stand-in graph over a schedule, against both references."""

    def unchanged(arrays: Arrays) -> Arrays:
        return arrays

    def find(schedule: Schedule, *, before: Fault = unchanged, after: Fault = unchanged) -> list[Finding]:
        config, float32 = model.config, np.dtype(np.float32)
        contract = Contract(logits="last", activation=float32, tolerances=tolerances(config, "fp32"))
        candidate = carried_candidate(
            "graph", "", config, contract, lambda load: ModelAsGraph(model, before, after), lambda: None
        )
        start = make_start(model, schedule, float32, seed=1)
        feeds = list(make_feeds(schedule, config.vocab_size, seed=2))
        runners = [
            WholeSequenceRunner(model, schedule, start, name="whole"),
            CallByCallRunner(model, schedule, start, name="calls"),
        ]
        references = run_references(schedule, runners, feeds, lambda who, effort: None)
        runner = candidate.open()(schedule, start)
        return compare_candidate(config, schedule, candidate, runner, feeds, references, lambda who, effort: None)

    return find
