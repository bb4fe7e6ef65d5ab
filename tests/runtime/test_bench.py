"""The benchmark's arithmetic and report; times themselves are not judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megalodon_deploy.bundle import WEIGHTS_FILE, Bundle
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import UserError
from megalodon_deploy.parameters import num_parameters
from megalodon_deploy.runtime.bench import bench_bundle, state_bytes_per_token, weight_bytes_per_token

MakeBundle = Callable[..., Bundle]
SMALL: dict[str, Any] = {"decode_tokens": 7, "prompt_tokens": 5, "rounds": 2, "threads": 1, "read_bytes": 1 << 20}


def test_a_report_holds_both_backends_and_survives_json(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    stages: list[float] = []
    report = bench_bundle(bundle, compare="torch", progress=lambda stage, fraction: stages.append(fraction), **SMALL)
    assert [times.backend for times in report.times] == ["onnxruntime", "torch"]
    for times in report.times:
        assert times.decode_tokens == 8, "two rounds of four"
        assert 0 < times.decode_median_ms <= times.decode_p95_ms <= times.decode_p99_ms
        read_bytes = report.weight_bytes_per_token + report.state_bytes_per_token
        limit_ms = read_bytes / report.bandwidth_bytes_per_second * 1e3
        assert times.share_of_bandwidth == pytest.approx(limit_ms / times.decode_median_ms)
        assert times.prefill_tokens_per_second == pytest.approx(5 / times.first_token_seconds)
    assert report.ratio == report.times[1].decode_median_ms / report.times[0].decode_median_ms
    document = json.loads(json.dumps(report.to_dict()))
    assert document["ratio"] == report.ratio
    assert document["versions"].keys() == {"numpy", "onnxruntime", "torch"}
    assert stages == [0.0, 0.5, 1.0]


def test_alone_there_is_no_ratio(make_bundle: MakeBundle) -> None:
    report = bench_bundle(make_bundle(), **SMALL)
    assert report.ratio is None
    assert len(report.times) == 1


@pytest.mark.parametrize("share_emb", [False, True])
def test_a_token_reads_all_weights_but_the_embedding(make_bundle: MakeBundle, share_emb: bool) -> None:
    config = MegalodonConfig.preset("mega200M", share_emb=share_emb)
    embedding = 0 if share_emb else (config.vocab_size - 1) * config.model_dim
    assert weight_bytes_per_token(config, "fp32") == 4 * (num_parameters(config) - embedding)
    assert weight_bytes_per_token(config, "fp16") < 0.51 * weight_bytes_per_token(config, "fp32")
    bundle = make_bundle()
    assert weight_bytes_per_token(bundle.config, "fp32") < bundle.manifest.files[WEIGHTS_FILE].size_bytes


def test_a_token_reads_the_rows_of_its_open_chunk() -> None:
    config = MegalodonConfig.preset("mega200M")
    row_bytes = 4 * config.num_layers * (config.z_dim + config.value_dim)
    empty = state_bytes_per_token(config, "fp32", np.array([2048]))
    assert state_bytes_per_token(config, "fp32", np.array([2048 + 9, 2048 + 11])) == empty + 10 * row_bytes


@pytest.mark.parametrize("name", ["decode_tokens", "prompt_tokens", "rounds"])
def test_counts_are_checked(make_bundle: MakeBundle, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} = 0"):
        bench_bundle(make_bundle(), **(SMALL | {name: 0}))
