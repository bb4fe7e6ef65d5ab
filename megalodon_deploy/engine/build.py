"""Build a TensorRT engine into a bundle."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from megalodon_deploy.bundle import ENGINE_FILE, ENGINE_INFO_FILE, ENGINES_DIR, Bundle, FileEntry
from megalodon_deploy.engine.child import Progress, check_installed, run_job
from megalodon_deploy.engine.info import EngineInfo, PluginLibraryInfo
from megalodon_deploy.engine.job import BuildJob, BuildResult
from megalodon_deploy.engine.library import check_abi, find_plugin_library
from megalodon_deploy.engine.needs import estimate_needs
from megalodon_deploy.engine.profile import optimization_profile
from megalodon_deploy.engine.targets import check_flavour, select_capabilities
from megalodon_deploy.errors import EngineError, MissingDependencyError
from megalodon_deploy.files import atomic_directory


def build_engine(
    bundle: Bundle,
    *,
    target: str = "tensorrt-rtx",
    sm: Sequence[int] | None = None,
    plugins: bool = True,
    max_batch: int = 1,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EngineInfo:
    """Build `bundle` for TensorRT; the engine lies in `bundle.path / "engines" / info.id` afterwards.

    `target` is `tensorrt-rtx`, for the compute capabilities `sm` (default: Ampere and later), or `tensorrt`, for the
    GPU of this machine. Engines take 1..max_batch rows of 1..C tokens. Without `plugins` all operators are
    standard ones, and TimestepNorm's update runs in float32, which drifts on streams of millions of tokens.

    Raises `MissingDependencyError` when TensorRT or the plugin library is not installed, and `EngineError`, in one
    line, for everything that TensorRT refuses; the bundle is then as it was.
    """
    flavour = check_flavour(target)
    precision = bundle.manifest.precision
    has_fp4 = "nvfp4" in bundle.manifest.weight_kinds
    capabilities = select_capabilities(flavour, sm, precision=precision, plugins=plugins, has_fp4=has_fp4)
    profile = optimization_profile(bundle.config, max_batch=max_batch)
    check_installed(flavour)
    library = _plugin_library() if plugins else None
    estimate_needs(bundle, plugins=plugins).check(bundle.path)
    engines_dir = bundle.path.resolve() / ENGINES_DIR
    started = time.monotonic()
    with _work_folder(engines_dir) as folder:
        job = BuildJob(
            flavour=flavour,
            model_path=str(bundle.model_path.resolve()),
            engine_path=str(folder / ENGINE_FILE),
            engines_dir=str(engines_dir),
            overwrite=overwrite,
            precision=precision,
            max_batch=max_batch,
            capabilities=capabilities,
            profile=profile,
            plugin_library=None if library is None else str(library),
        )
        result = run_job(job, progress)
        info = _describe(bundle, job, result, time.monotonic() - started)
        with atomic_directory(engines_dir / info.id, overwrite=overwrite) as directory:
            os.replace(job.engine_path, directory / ENGINE_FILE)
            (directory / ENGINE_INFO_FILE).write_text(info.to_json(), encoding="utf-8")
    if progress is not None:
        progress("done", 1.0)
    return info


def _plugin_library() -> Path:
    try:
        library = find_plugin_library()
    except MissingDependencyError as error:
        raise MissingDependencyError(f"{error}; or build with --no-plugins") from error
    check_abi(library)
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
        precision=job.precision,
        max_batch=job.max_batch,
        profile=job.profile,
        plugins=result.plugins,
        num_plugin_layers=result.num_plugin_layers,
        plugin_library=PluginLibraryInfo.of(Path(job.plugin_library)) if job.plugin_library else None,
        norm_update="float32" if result.narrowed else "float64",
        bundle_fingerprint=bundle.manifest.fingerprint,
        engine=FileEntry.of(Path(job.engine_path)),
        build_seconds=round(build_seconds, 3),
        peak_memory_bytes=result.peak_memory_bytes,
    )
