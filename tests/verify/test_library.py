"""The runners as a user's own comparison has them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from megalodon_deploy import verify
from megalodon_deploy.bundle import Bundle
from megalodon_deploy.errors import EngineError
from megalodon_deploy.state import LOGITS, TOKENS
from megalodon_deploy.verify.compare import Contract

SCHEDULE = verify.walk(
    "mine", "a prompt, then steps over a chunk edge", 12, (0,), [verify.Stretch(11), *[verify.Stretch(1)] * 3]
)


def compare(bundle: Bundle, *candidates: str, contract: Contract | None = None) -> list[verify.Finding]:
    runners = {
        "onnxruntime": lambda: verify.onnxruntime_runner(bundle, SCHEDULE),
        "onnxruntime session": lambda: verify.session_runner(bundle, "onnxruntime", SCHEDULE),
    }
    contract = contract or verify.graph_contract(bundle, "fp32")
    compare = verify.ContractCompare(bundle.config, SCHEDULE, dict.fromkeys(candidates, contract))
    feeds = list(verify.make_feeds(SCHEDULE, bundle.config.vocab_size, seed=0))
    with G_LOGGER.verbosity():
        results = Comparator.run(
            [verify.pytorch_runner(bundle, SCHEDULE), *(runners[it]() for it in candidates)], feeds
        )
        Comparator.compare_accuracy(
            results, comparisons=[(0, index + 1) for index in range(len(candidates))], compare_func=compare
        )
    return compare.findings


def test_state_goes_on_from_call_to_call(bundle: Bundle) -> None:
    findings = compare(bundle, "onnxruntime")
    assert {finding.call for finding in findings} == {0, 1, 2, 3}
    assert [finding.describe() for finding in findings if not finding] == []


def test_a_session_shows_no_rows_and_the_contract_says_so(bundle: Bundle) -> None:
    missing = {finding.kind for finding in compare(bundle, "onnxruntime session") if not finding}
    assert missing == {"key", "value"}
    contract = verify.graph_contract(bundle, "fp32")
    contract = Contract(
        logits="last", activation=contract.activation, tolerances=contract.tolerances, hidden=frozenset(missing)
    )
    assert all(compare(bundle, "onnxruntime session", contract=contract))


def test_tokens_of_ones_own_are_fed(bundle: Bundle) -> None:
    tokens = np.arange(14)[None]
    feeds = list(verify.feeds_of(SCHEDULE, tokens))
    assert np.concatenate([feed[TOKENS] for feed in feeds], 1).tolist() == tokens.tolist()
    with verify.onnxruntime_runner(bundle, SCHEDULE) as runner:
        last = [runner.infer(feed)[LOGITS] for feed in feeds][-1]
    expected = bundle.session("onnxruntime").stream().prefill(tokens[0].tolist())
    np.testing.assert_allclose(last[0, -1], expected, atol=1e-5, equal_nan=False)


def test_an_engine_that_is_not_there_is_refused(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="engine a cannot run here: the bundle has no such engine"):
        verify.tensorrt_runner(bundle, "a", SCHEDULE)


def test_names_are_loaded_on_use() -> None:
    script = (
        "import megalodon_deploy.verify, sys; print([n for n in ('torch', 'onnx', 'polygraphy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        verify.nothing  # noqa: B018
    for name in verify._PUBLIC:
        assert getattr(verify, name) is not None
