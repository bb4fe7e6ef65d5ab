"""Inside lm-eval itself: its own runs of small local tasks, and the numbers it is handed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalodon_deploy import Megalodon, load_checkpoint, save_checkpoint
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.model.checkpoint import TokenizerSource
from megalodon_deploy.train import byte_model

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")

QUESTIONS = [("one plus one is", ["two", "ten"], 0), ("a cat is an", ["iron", "animal"], 1)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lm_eval")
    torch.manual_seed(0)
    model = Megalodon(byte_model(num_layers=1, model_dim=32, chunk_size=10))
    save_checkpoint(model, root / "checkpoint", tokenizer=TokenizerSource("bytes"))
    export_checkpoint(root / "checkpoint", root / "bundle")
    lines = [{"question": q, "choices": c, "answer": a, "text": f"{q} {c[a]}"} for q, c, a in QUESTIONS]
    (root / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def task(place: Path, name: str, **values: Any) -> dict[str, Any]:
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(place / "questions.jsonl")}}}
    return {"task": name, "test_split": "test", **source, **values}


def log_probabilities(place: Path, text: bytes) -> np.ndarray:
    """Of every byte of `text` after a new line, in one call."""
    tokens = torch.tensor([[10, *text]])
    with torch.no_grad():
        logits, _ = load_checkpoint(place / "checkpoint")(tokens[:, :-1])
    return logits[0].double().log_softmax(-1)[torch.arange(len(text)), tokens[0, 1:]].numpy()


@pytest.mark.parametrize("kind", ["checkpoint", "bundle"])
def test_lm_eval_runs_its_tasks(place: Path, kind: str) -> None:
    from megalodon_deploy.evaluation.lm_eval_model import MegalodonLM

    tasks = [
        task(
            place,
            "choice",
            output_type="multiple_choice",
            doc_to_text="{{question}}",
            doc_to_choice="{{choices}}",
            doc_to_target="{{answer}}",
            metric_list=[{"metric": "acc"}],
        ),
        task(
            place,
            "rolling",
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[{"metric": "bits_per_byte"}],
        ),
        task(
            place,
            "greedy",
            output_type="generate_until",
            doc_to_text="{{question}}",
            doc_to_target="{{choices[answer]}}",
            generation_kwargs={"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
            metric_list=[{"metric": "exact_match"}],
        ),
    ]
    results = lm_eval.simple_evaluate(model=MegalodonLM(str(place / kind)), tasks=tasks, bootstrap_iters=0)["results"]
    assert results["choice"]["acc,none"] in (0.0, 0.5, 1.0)
    assert 0.0 <= results["greedy"]["exact_match,none"] <= 1.0
    texts = [f"{q} {c[a]}".encode() for q, c, a in QUESTIONS]
    total = sum(log_probabilities(place, text).sum() for text in texts)
    expected = -total / np.log(2) / sum(map(len, texts))
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)


def test_the_numbers_are_those_of_the_model(place: Path) -> None:
    from lm_eval.api.instance import Instance

    from megalodon_deploy.evaluation.lm_eval_model import MegalodonLM

    model = MegalodonLM(str(place / "checkpoint"))

    def request(kind: str, *arguments: Any) -> Instance:
        return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    before, after = "one plus ", "one is two"
    ((value, _),) = model.loglikelihood([request("loglikelihood", before, after)])
    tokens = torch.tensor([list((before + after).encode())])
    with torch.no_grad():
        logits, _ = load_checkpoint(place / "checkpoint")(tokens)
    table = logits[0].double().log_softmax(-1)
    # The space at the context's end counts with the continuation, as in lm-eval's own models.
    places = torch.arange(len(before) - 2, tokens.shape[1] - 1)
    assert value == pytest.approx(table[places, tokens[0, places + 1]].sum().item(), abs=1e-4)

    ((_, is_greedy),) = model.loglikelihood([request("loglikelihood", "one", chr(int(table[2].argmax()) % 128))])
    assert isinstance(is_greedy, bool)
    settings = {"until": ["\n\n"], "max_gen_toks": 4}
    (text,) = model.generate_until([request("generate_until", "one", settings)])
    state, token, expected = None, list(b"one"), b""
    for _ in range(4):
        with torch.no_grad():
            logits, state = load_checkpoint(place / "checkpoint")(torch.tensor([token]), state)
        token = [int(logits[0, -1].argmax())]
        expected += bytes(token)
    assert text == expected.decode(errors="replace")
