"""The bundle that export writes: contents, names, types, inverse, and what happens when it cannot be written."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from checkpoint_cases import write_case
from export_helpers import (
    assert_outputs_close,
    export_seeded,
    open_onnx,
    random_call,
    run_onnx,
    run_session,
    run_torch,
    seeded_state,
    write_seeded,
)
from helpers import assert_close, small_config

from megalodon_deploy.bundle import MODEL_FILE, WEIGHTS_FILE, open_bundle
from megalodon_deploy.errors import BundleError, CheckpointError, UserError
from megalodon_deploy.export import export_checkpoint, load_bundle_model
from megalodon_deploy.export.precision import write_widened
from megalodon_deploy.export.weights import folds
from megalodon_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from megalodon_deploy.parameters import num_parameters, parameter_specs

FLOAT, HALF = onnx.TensorProto.FLOAT, {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
FLOAT32_ALWAYS = (
    "norm.scale",
    "norm.bias",
    ".alpha",
    ".cema.",
    "query_key.",
    "past_cema",
    "past_norm",
    "present_",
    "logits",
)


def load_graph(bundle_path: Path) -> onnx.ModelProto:
    return onnx.load(bundle_path / MODEL_FILE, load_external_data=False)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("share_emb", [False, True])
def test_every_parameter_is_folded_once(swiglu: bool, share_emb: bool) -> None:
    for affine in (True, False):
        config = small_config(swiglu=swiglu, share_emb=share_emb, rescale_nffn=swiglu, norm_affine=affine)
        sources = [name for fold in folds(config) for name in fold.sources]
        assert sorted(sources) == sorted(spec.name for spec in parameter_specs(config))
        targets = [spec.name for fold in folds(config) for spec in fold.targets]
        assert len(set(targets)) == len(targets)


def test_model_comes_back_from_the_bundle(tmp_path: Path) -> None:
    config = small_config(swiglu=True, rescale_nffn=True)
    model = load_bundle_model(export_seeded(tmp_path, config))
    original = seeded_state(config)
    assert set(model.state_dict()) == set(original)
    for name, value in model.state_dict().items():
        assert_close(value.numpy(), original[name].numpy(), 1e-6, name)


def test_model_with_extreme_coefficients_comes_back(tmp_path: Path) -> None:
    """Modes that remember nothing or nearly all: the parameters may differ, the function may not."""
    config = small_config(num_layers=1)
    state = seeded_state(config)
    cema = "layers.0.mega.cema"
    state[f"{cema}.alpha"] *= 20
    state[f"{cema}.delta"] *= 20
    state[f"{cema}.theta"][:8] = torch.tensor([-12.0, -6.0, -1.0, 0.0, 1.0, 3.0, 6.0, 12.0])[:, None, None]
    bundle = export_checkpoint(write_case(tmp_path / "ckpt", "native", config, state), tmp_path / "bundle")
    save_checkpoint(load_bundle_model(bundle), tmp_path / "back")
    feeds = random_call(config, [5, 0], 7)
    expected = run_torch(tmp_path / "ckpt", feeds)
    assert_outputs_close(run_torch(tmp_path / "back", feeds), expected, 1e-6)
    assert_outputs_close(run_onnx(bundle, feeds), expected, 5e-6)


def test_one_mode_comes_back(tmp_path: Path) -> None:
    config = small_config(num_layers=1, cema_ndim=1)
    bundle = export_seeded(tmp_path, config)
    theta = load_bundle_model(bundle).state_dict()["layers.0.mega.cema.theta"]
    assert_close(theta.numpy(), seeded_state(config)["layers.0.mega.cema.theta"].numpy(), 1e-5)


def test_manifest(tmp_path: Path) -> None:
    config = small_config()
    bundle = export_seeded(tmp_path, config, name="tiny", logits="all")
    manifest = open_bundle(bundle.path, verify_hashes=True).manifest
    assert (manifest.name, manifest.logits, manifest.precision, manifest.config) == ("tiny", "all", "fp32", config)
    assert set(manifest.files) == {MODEL_FILE, WEIGHTS_FILE}
    assert manifest.tokenizer.kind == "none"  # the checkpoint says nothing and has no vocabulary of 256
    assert manifest.source["layout"] == "native"
    assert len(manifest.source["fingerprint"]) == 64
    assert export_checkpoint(tmp_path / "ckpt", tmp_path / "unnamed").manifest.name == "unnamed"


def write_tokenizer(path: Path) -> None:
    if path.suffix == ".json":
        from tokenizers import Tokenizer, models

        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(path))
        return
    from sentencepiece import SentencePieceTrainer

    options = {"vocab_size": 9, "model_type": "char", "minloglevel": 2}
    with path.open("wb") as file:
        SentencePieceTrainer.train(sentence_iterator=iter(["ab cd ef"]), model_writer=file, **options)


@pytest.mark.parametrize(("file", "kind"), [("tokenizer.json", "tokenizer.json"), ("words.model", "sentencepiece")])
def test_tokenizer_is_copied(tmp_path: Path, file: str, kind: str) -> None:
    write_tokenizer(tmp_path / file)
    bundle = export_seeded(tmp_path, small_config(), tokenizer=tmp_path / file)
    assert bundle.manifest.tokenizer.kind == kind
    assert bundle.manifest.tokenizer.file in bundle.manifest.files
    copied = bundle.path / str(bundle.manifest.tokenizer.file)
    assert copied.read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.parametrize("file", ["tokenizer.json", "words.model"])
def test_what_is_no_tokenizer_is_not_exported(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_bytes(b"words")
    with pytest.raises(BundleError, match=file):
        export_seeded(tmp_path, small_config(), tokenizer=tmp_path / file)
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt", file}


@pytest.mark.parametrize(
    "options", [{"precision": "fp8"}, {"logits": "none"}, {"tokenizer": "no/such/tokenizer.json"}], ids=str
)
def test_mistaken_options_are_named(tmp_path: Path, options: dict[str, str]) -> None:
    with pytest.raises(UserError, match=next(iter(options.values()))):
        export_seeded(tmp_path, small_config(), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_progress_names_each_tensor_and_rises_to_one(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    config = small_config(chunk_size=64)  # rotary tables too large for the graph file
    bundle = export_seeded(tmp_path, config, progress=lambda *step: seen.append(step))
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions)
    assert 0 <= fractions[0] < fractions[-1] == 1
    written = {stage.removeprefix("writing ") for stage, _ in seen if stage.startswith("writing ")}
    initializers = onnx.load(bundle.model_path, load_external_data=False).graph.initializer
    assert written == {tensor.name for tensor in initializers if tensor.external_data}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("share_emb", [False, True])
def test_checker_names_and_types(tmp_path: Path, precision: str, share_emb: bool) -> None:
    config = small_config(share_emb=share_emb, swiglu=True)
    bundle = export_seeded(tmp_path, config, precision=precision)
    onnx.checker.check_model(bundle.model_path, full_check=True)
    model = load_graph(bundle.path)
    graph, activation = model.graph, HALF.get(precision, FLOAT)
    assert model.ir_version <= 11
    assert all(entry.version <= 24 for entry in model.opset_import if entry.domain == "")
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert all(name.startswith(("/layers.", "/call/", "/output/", "/embed")) for name in names)
    values = [*graph.input, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer if not tensor.name.startswith("constants.")}
    for name, kind in types.items():
        if name in ("tokens", "position"):
            continue
        assert kind == (FLOAT if any(part in name for part in FLOAT32_ALWAYS) else activation), name


def test_value_shapes_are_known(tmp_path: Path) -> None:
    """Every value of the graph has a type and a shape in the letters of the contract."""
    bundle = export_seeded(tmp_path, small_config())
    graph = load_graph(bundle.path).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.value_info, *graph.output]
    }
    for name in (name for node in graph.node for name in node.output if name):
        assert name in shapes, name
        assert set(map(str, shapes[name])) <= {"B", "T", "S", "S + T"} | {str(n) for n in range(2000)}, shapes[name]


def test_tied_matrix_is_stored_once(tmp_path: Path) -> None:
    config = small_config(share_emb=True, vocab_size=4000)
    bundle = export_seeded(tmp_path, config)
    matrix_bytes = 4 * config.vocab_size * config.model_dim
    stored = [tensor for tensor in load_graph(bundle.path).graph.initializer if config.vocab_size in tensor.dims]
    assert [tensor.name for tensor in stored] == ["embed.weight"]
    assert (bundle.path / WEIGHTS_FILE).stat().st_size < 4 * num_parameters(config) + matrix_bytes // 2


def test_export_is_deterministic(tmp_path: Path) -> None:
    first, second = (export_seeded(tmp_path / part, small_config()) for part in ("a", "b"))
    for name in (MODEL_FILE, WEIGHTS_FILE):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes(), name
    assert first.manifest.fingerprint == second.manifest.fingerprint


@pytest.mark.parametrize(("precision", "unit"), [("fp16", 2.0**-11), ("bf16", 2.0**-8)])
def test_half_precision(tmp_path: Path, precision: str, unit: float) -> None:
    """The graph computes the model with rounded weights, and those are the original ones to half a unit."""
    config = small_config(swiglu=True, rescale_nffn=True, scale_emb=True)
    bundle = export_seeded(tmp_path, config, precision=precision)
    model = load_bundle_model(bundle)
    for name, value in seeded_state(config).items():
        assert_close(model.state_dict()[name].numpy(), value.numpy(), unit, name)
    save_checkpoint(model, tmp_path / "rounded")
    feeds = random_call(config, [5, 0, 11], 1)
    widened = write_widened(bundle, tmp_path / "widened")
    onnx.checker.check_model(widened, full_check=True)
    assert_outputs_close(run_session(open_onnx(widened), feeds), run_torch(tmp_path / "rounded", feeds), 5e-6)


def test_fp16_runs_on_the_cpu(tmp_path: Path) -> None:
    config = small_config()
    bundle = export_seeded(tmp_path, config, precision="fp16")
    feeds = random_call(config, [5, 0, 11], 1)
    for name in feeds:
        if name.startswith(("past_key", "past_value")):
            feeds[name] = np.clip(feeds[name], -6e4, 6e4)
    half = {
        name: value.astype(np.float16) if "key" in name or "value" in name else value for name, value in feeds.items()
    }
    assert_outputs_close(run_onnx(bundle, half), run_torch(tmp_path / "ckpt", feeds), 2e-2)


def test_fp16_refuses_weights_beyond_its_range(tmp_path: Path) -> None:
    config = small_config()
    state = seeded_state(config)
    state["layers.1.nffn.fc2.weight"][0, 0] = 1e5
    ckpt = write_case(tmp_path / "ckpt", "native", config, state)
    with pytest.raises(CheckpointError, match=r"layers\.1\.nffn\.fc2\.weight.*1e\+05.*bf16"):
        export_checkpoint(ckpt, tmp_path / "bundle", precision="fp16")
    assert list(tmp_path.iterdir()) == [ckpt]
    export_checkpoint(ckpt, tmp_path / "bundle", precision="bf16")


def test_bfloat16_checkpoint_of_many_shards(tmp_path: Path) -> None:
    config = small_config(model_dim=24, num_layers=1)
    state = {name: value.to(torch.bfloat16) for name, value in seeded_state(config).items()}
    bundle = export_checkpoint(write_case(tmp_path / "ckpt", "released", config, state), tmp_path / "bundle")
    feeds = random_call(config, [3], 2)
    assert_outputs_close(run_onnx(bundle, feeds), run_torch(tmp_path / "ckpt", feeds), 5e-6)
    half = export_checkpoint(tmp_path / "ckpt", tmp_path / "half", precision="bf16")
    stored = load_bundle_model(half).state_dict()["layers.0.mega.wv.weight"].numpy()
    np.testing.assert_array_equal(
        stored.astype(ml_dtypes.bfloat16).astype(np.float32), state["layers.0.mega.wv.weight"].float().numpy()
    )


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """As a full disk: writes beyond the limit fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    ckpt = write_seeded(tmp_path / "ckpt", small_config())
    weights_bytes = 4 * num_parameters(small_config())
    for limit_bytes in (1000, weights_bytes // 2):
        with file_size_limit(limit_bytes), pytest.raises(BundleError, match="bundle: cannot be written"):
            export_checkpoint(ckpt, tmp_path / "bundle")
        assert list(tmp_path.iterdir()) == [ckpt]


def test_unwritable_target(tmp_path: Path) -> None:
    ckpt = write_seeded(tmp_path / "ckpt", small_config())
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BundleError, match="cannot be written"):
        export_checkpoint(ckpt, tmp_path / "file" / "bundle")


def test_existing_bundle_is_kept_unless_told(tmp_path: Path) -> None:
    config = small_config()
    bundle = export_seeded(tmp_path, config)
    (bundle.path / "engines").mkdir()
    with pytest.raises(BundleError, match=r"exists already.*--overwrite"):
        export_checkpoint(tmp_path / "ckpt", bundle.path)
    export_checkpoint(tmp_path / "ckpt", bundle.path, precision="bf16", overwrite=True)
    assert open_bundle(bundle.path).manifest.precision == "bf16"
    assert not (bundle.path / "engines").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "ckpt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    ckpt = write_seeded(tmp_path / "ckpt", small_config())
    before = {path.name: path.read_bytes() for path in ckpt.iterdir()}
    with pytest.raises(BundleError, match="is not a bundle"):
        export_checkpoint(ckpt, ckpt, overwrite=overwrite)
    assert {path.name: path.read_bytes() for path in ckpt.iterdir()} == before


def test_damaged_checkpoint_leaves_nothing_behind(tmp_path: Path) -> None:
    config = small_config()
    state = seeded_state(config)
    state["output.final_norm.bias"][3] = np.nan
    ckpt = write_case(tmp_path / "ckpt", "native", config, state)
    with pytest.raises(CheckpointError, match=r"output\.final_norm\.bias"):
        export_checkpoint(ckpt, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [ckpt]


def test_bundle_with_a_missing_weight_is_named(tmp_path: Path) -> None:
    bundle = export_seeded(tmp_path, small_config())
    model = load_graph(bundle.path)
    for tensor in model.graph.initializer:
        if tensor.name == "layers.0.mega.wv.weight":
            tensor.name = "renamed"
    bundle.model_path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"layers\.0\.mega\.wv\.weight"):
        load_bundle_model(bundle)


def test_loaded_model_does_not_share_memory_with_the_bundle(tmp_path: Path) -> None:
    bundle = export_seeded(tmp_path, small_config())
    before = (bundle.path / WEIGHTS_FILE).read_bytes()
    model = load_bundle_model(bundle)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (bundle.path / WEIGHTS_FILE).read_bytes() == before
    assert load_checkpoint(tmp_path / "ckpt").config == model.config
