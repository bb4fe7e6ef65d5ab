"""Build a TensorRT engine into a bundle."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megalodon_deploy.bundle import ENGINE_FILE, ENGINE_INFO_FILE, ENGINES_DIR, Bundle, FileEntry
from megalodon_deploy.engine.child import Progress, check_installed, run_job
from megalodon_deploy.engine.info import EngineInfo, PluginLibraryInfo
from megalodon_deploy.engine.job import BuildJob, BuildResult
from megalodon_deploy.engine.library import check_abi, check_plugins, find_plugin_library
from megalodon_deploy.engine.needs import estimate_needs
from megalodon_deploy.engine.profile import optimization_profile
from megalodon_deploy.engine.targets import (
    Flavour,
    check_flavour,
    check_version_compatible,
    check_weights,
    choose_attention,
    one_engine_each,
    select_capabilities,
)
from megalodon_deploy.errors import EngineError, MissingDependencyError
from megalodon_deploy.files import atomic_directory


def build_engine(
    bundle: Bundle,
    *,
    target: str = "tensorrt-rtx",
    sm: Sequence[int] | None = None,
    plugins: bool = True,
    max_batch: int = 1,
    weights: str = "engine",
    attention: str | None = None,
    hardware_compatible: bool = False,
    version_compatible: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EngineInfo:
    """Build `bundle` for TensorRT; the engine lies in `bundle.path / "engines" / info.id` afterwards.

    `target` is `tensorrt-rtx`, for all the compute capabilities `sm` (default: Ampere and later), or `tensorrt`, for
    the GPU of this machine; with `hardware_compatible` for all of Ampere and later. `version_compatible` engines, which
    only `tensorrt` has, run in later releases of the same major version too. Engines take 1..max_batch rows of 1..C
    tokens. Without `plugins` all operators are standard ones, and TimestepNorm's update runs in float32, which drifts
    on streams of millions of tokens. `weights`: "engine" puts them into the engine; "bundle" leaves the matrices in
    the bundle's weight file, so that neither engine nor build grow with the model; "streamed" engines keep what finds
    no room on the GPU in main memory. `attention`: "standard", TensorRT's operators, or our "plugin";
    None: what the bundle was exported for.

    Raises `MissingDependencyError` when TensorRT or the plugin library is not installed, and `EngineError`, in one
    line, for everything that TensorRT refuses; the bundle is then as it was.
    """
    flavour = check_flavour(target)
    place, attended = check_weights(weights), choose_attention(bundle, attention, plugins=plugins)
    if version_compatible:
        check_version_compatible(flavour)
    capabilities = _capabilities(bundle, flavour, sm, plugins=plugins)
    profile = optimization_profile(bundle.config, max_batch=max_batch)
    check_installed(flavour)
    library = _plugin_library() if plugins else None
    estimate_needs(bundle, plugins=plugins, weights=place).check(bundle.path)
    engines_dir = bundle.path.resolve() / ENGINES_DIR
    started = time.monotonic()
    with _work_folder(engines_dir) as folder:
        job = BuildJob(
            flavour=flavour,
            model_path=str(bundle.model_path.resolve()),
            engine_path=str(folder / ENGINE_FILE),
            engines_dir=str(engines_dir),
            overwrite=overwrite,
            precision=bundle.manifest.precision,
            max_batch=max_batch,
            capabilities=capabilities,
            profile=profile,
            plugin_library=None if library is None else str(library),
            weights=place,
            attention=attended,
            hardware_compatible=hardware_compatible and flavour == "tensorrt",
            version_compatible=version_compatible,
        )
        result = run_job(job, progress)
        info = _describe(bundle, job, result, time.monotonic() - started)
        with atomic_directory(engines_dir / info.id, overwrite=overwrite) as directory:
            os.replace(job.engine_path, directory / ENGINE_FILE)
            (directory / ENGINE_INFO_FILE).write_text(info.to_json(), encoding="utf-8")
    if progress is not None:
        progress("done", 1.0)
    return info


def build_engines(
    bundle: Bundle,
    *,
    target: str = "tensorrt-rtx",
    sm: Sequence[int] | None = None,
    plugins: bool = True,
    weights: str = "engine",
    hardware_compatible: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> list[EngineInfo]:
    """An engine for each of the compute capabilities `sm`, one after the other; one for all with `hardware_compatible`.

    Options and errors are `build_engine`'s. What can be known is refused before the first build; when a later one
    fails, the engines before it are there.
    """
    flavour = check_flavour(target)
    _capabilities(bundle, flavour, sm, plugins=plugins)
    groups = one_engine_each(target, sm, hardware_compatible=hardware_compatible)
    needs = estimate_needs(bundle, plugins=plugins, weights=check_weights(weights), num_engines=len(groups))
    needs.check(bundle.path)

    def share(index: int) -> Progress | None:
        """The part of the whole progress that is this build's."""
        if progress is None:
            return None
        return lambda stage, fraction: progress(stage, (index + fraction) / len(groups))

    return [
        build_engine(
            bundle,
            target=target,
            sm=group,
            plugins=plugins,
            weights=weights,
            hardware_compatible=hardware_compatible,
            progress=share(index),
            **options,
        )
        for index, group in enumerate(groups)
    ]


def _capabilities(bundle: Bundle, flavour: Flavour, sm: Sequence[int] | None, *, plugins: bool) -> tuple[int, ...]:
    manifest = bundle.manifest
    types = {*manifest.weight_kinds, bundle.config.kv_dtype}
    return select_capabilities(flavour, sm, precision=manifest.precision, plugins=plugins, types=types)


def _plugin_library() -> Path:
    try:
        library = find_plugin_library()
    except MissingDependencyError as error:
        raise MissingDependencyError(f"{error}; or build with --no-plugins") from error
    check_abi(library)
    check_plugins(library)
    return library


@contextmanager
def _work_folder(engines_dir: Path) -> Iterator[Path]:
    """A hidden folder in the bundle, where the engine grows and from where it can be renamed; gone afterwards."""
    try:
        engines_dir.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=engines_dir, prefix=".build."))
    except OSError as error:
        raise EngineError(f"{engines_dir}: cannot write there ({error.strerror}); copy the bundle elsewhere") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            engines_dir.rmdir()  # when no engine came of it and none was there


def _describe(bundle: Bundle, job: BuildJob, result: BuildResult, build_seconds: float) -> EngineInfo:
    return EngineInfo(
        id=result.engine_id,
        flavour=job.flavour,
        version=result.version,
        compute_capabilities=result.capabilities,
        hardware_compatible=job.hardware_compatible,
        version_compatible=job.version_compatible,
        precision=job.precision,
        max_batch=job.max_batch,
        profile=job.profile,
        plugins=result.plugins,
        num_plugin_layers=result.num_plugin_layers,
        plugin_library=PluginLibraryInfo.of(Path(job.plugin_library)) if job.plugin_library else None,
        weights=job.weights,
        bundle_weights=result.bundle_weights,
        norm_update="float32" if result.narrowed else "float64",
        bundle_fingerprint=bundle.manifest.fingerprint,
        engine=FileEntry.of(Path(job.engine_path)),
        build_seconds=round(build_seconds, 3),
        peak_memory_bytes=result.peak_memory_bytes,
    )
