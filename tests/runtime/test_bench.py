"""The benchmark's arithmetic and report; times themselves are not judged."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime.fake_gpu import FakeCudaExecutor
from runtime.fake_tensorrt import engine_info

from megalodon_deploy.bundle import WEIGHTS_FILE, Bundle
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.errors import StateError, UserError
from megalodon_deploy.parameters import num_parameters
from megalodon_deploy.runtime.bench import bench_bundle, state_bytes_per_token, weight_bytes_per_token
from megalodon_deploy.runtime.bench.run import _Readers
from megalodon_deploy.runtime.bench.stock_tools import command_lines
from megalodon_deploy.runtime.bench.sweeps import BatchSweep
from megalodon_deploy.runtime.bench.tokens import UNTIMED_TOKENS, next_tokens, timed_tokens
from megalodon_deploy.runtime.session import Session

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


def test_sweeps_cover_batches_and_positions_at_one_place_in_the_chunk(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    chunk_size = bundle.config.chunk_size
    report = bench_bundle(bundle, compare="torch", batches=[4, 1], positions=[5, 1000, 1_000_000], **SMALL)
    for times in report.times:
        assert [batch.batch for batch in times.by_batch] == [1, 4]
        for batch in times.by_batch:
            assert batch.tokens_per_second == pytest.approx(batch.batch / batch.median_ms * 1e3)
        places = [position.position for position in times.by_position]
        assert len(places) == 3
        assert {place % chunk_size for place in places} == {5}
        assert all(abs(place - asked) < chunk_size for place, asked in zip(places, [5, 1000, 1_000_000], strict=True))
        assert all(0 < position.median_ms <= position.p95_ms for position in times.by_position)
        assert times.state_bytes_per_stream == bundle.session(times.backend).state_bytes
    assert report.stock_tools == []
    for options, message in (({"batches": [0]}, "num_slots = 0"), ({"positions": [0]}, "positions")):
        with pytest.raises(UserError, match=message):
            bench_bundle(bundle, **SMALL, **options)


@pytest.mark.parametrize("name", ["plot.svg", "plot.png"])
def test_a_plot_shows_what_was_measured(make_bundle: MakeBundle, tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from megalodon_deploy.runtime.bench.plot import write_plot

    report = bench_bundle(make_bundle(), batches=[1, 2], positions=[5, 1000], **SMALL)
    write_plot(report, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(b"<?xml" if name.endswith("svg") else b"\x89PNG")
    assert len(content) > 10_000
    with pytest.raises(UserError, match="gif"):
        write_plot(report, tmp_path / "plot.gif")


def test_a_gpu_is_measured_with_its_own_memory(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    gpu_session = Session(bundle, FakeCudaExecutor(bundle))
    reader = _Readers(1 << 16, 1 << 12, 1).of(gpu_session)
    reader.measure()
    assert len(reader.large) == len(reader.again) == 1
    assert reader.large[0] > 0
    sweep = BatchSweep(gpu_session, [1, 2, 16])
    sweep.measure(2)
    assert [times.batch for times in sweep.times()] == [1, 2], "the engine was built for 8 streams"


def test_a_timed_token_is_a_launch_and_one_wait(make_bundle: MakeBundle) -> None:
    executor = FakeCudaExecutor(make_bundle())
    stream, gpu = Session(make_bundle(), executor).stream(), executor.gpu
    stream.prefill([1, 2, 3])
    assert timed_tokens(stream.batch, [stream], 0) == []
    assert len(gpu.graphs) == 2, "what is made once is made before times are taken"
    launches, waits = gpu.launches, gpu.synchronizations
    assert len(timed_tokens(stream.batch, [stream], 7)) == 7
    assert gpu.launches - launches == gpu.synchronizations - waits == UNTIMED_TOKENS + 7
    assert len(gpu.graphs) == 2
    tensors = stream.snapshot().tensors
    stream.batch._memory.write(0, stream.position, {name: array * np.nan for name, array in tensors.items()})
    with pytest.raises(StateError, match="not finite"):
        next_tokens(stream.batch, [stream])


def test_stock_tools_get_the_shapes_of_a_step(make_bundle: MakeBundle) -> None:
    bundle = make_bundle()
    info = engine_info(bundle, max_batch=4)
    trtexec, polygraphy = command_lines(Path("dir with space/model.engine"), info, Path("lib/libmegalodon.so"))
    assert shlex.split(trtexec)[0] == "tensorrt_rtx"
    assert "--dynamicPlugins=lib/libmegalodon.so" in shlex.split(trtexec)
    assert "--loadEngine=dir with space/model.engine" in shlex.split(trtexec)
    assert "tokens:1x1,position:1,past_key.0:1x2x12x8" in trtexec
    words = shlex.split(polygraphy)
    assert words[:3] == ["POLYGRAPHY_USE_TENSORRT_RTX=1", "polygraphy", "run"]
    assert "past_key.0:[1,2,12,8]" in words
    assert "lib/libmegalodon_register.so" in words
    plain = command_lines(Path("e"), engine_info(bundle, flavour="tensorrt", plugins=()), Path("l"))
    assert plain[0].startswith("trtexec ")
    assert "lugins" not in "".join(plain)


def test_polygraphy_takes_its_line(make_bundle: MakeBundle, tmp_path: Path) -> None:
    """Its own parser, which then writes down what it would do."""
    pytest.importorskip("polygraphy", reason="Polygraphy is not installed")
    line = command_lines(tmp_path / "a file", engine_info(make_bundle()), Path("libmegalodon.so"))[1]
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        f"{line} --gen-script {tmp_path / 'script.py'}",
        shell=True,
        env=os.environ | {"PATH": programs},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    script = (tmp_path / "script.py").read_text()
    assert "Comparator.run(runners, warm_up=5" in script
    assert f"BytesFromPath('{tmp_path / 'a file'}')" in script
    assert ".add('past_key.0', None, [1, 2, 12, 8])" in script
    assert "LoadPlugins(plugins=['libmegalodon_register.so']" in script
