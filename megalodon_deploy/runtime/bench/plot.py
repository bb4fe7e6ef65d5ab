"""A picture of a report: time by position, throughput by batch."""

from __future__ import annotations

from pathlib import Path

from megalodon_deploy.errors import MissingDependencyError, UserError
from megalodon_deploy.files import atomic_file
from megalodon_deploy.runtime.bench.report import BenchReport

_FORMATS = (".svg", ".png", ".pdf")


def check_plot_path(path: Path) -> None:
    """Raises `UserError` for an unknown format, `MissingDependencyError` without matplotlib."""
    if path.suffix not in _FORMATS:
        raise UserError(f"--plot {path}: its name has to end with {', '.join(_FORMATS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("--plot needs matplotlib: pip install 'megalodon-deploy[plots]'") from error


def write_plot(report: BenchReport, path: Path) -> None:
    """Draw a report to an SVG, PNG or PDF file."""
    check_plot_path(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    by_position, by_batch = figure.subplots(1, 2)
    for times in report.times:
        positions = times.by_position
        by_position.plot([p.position for p in positions], [p.median_ms for p in positions], "o-", label=times.backend)
        batches = times.by_batch
        by_batch.plot([b.batch for b in batches], [b.tokens_per_second for b in batches], "o-", label=times.backend)
        limit_ms = times.decode_median_ms * times.share_of_bandwidth
        by_position.axhline(limit_ms, linestyle=":", color="gray")
    by_position.set(xscale="log", xlabel="position in the stream", ylabel="ms a token (dotted: bandwidth limit)")
    by_batch.set(xscale="log", yscale="log", xlabel="streams in a call", ylabel="tokens a second")
    for axes in (by_position, by_batch):
        axes.set_ylim(bottom=0 if axes is by_position else None)
        axes.grid(alpha=0.3)
        axes.legend()
    devices = ", ".join(dict.fromkeys(times.device for times in report.times))
    figure.suptitle(f"{report.bundle} {report.precision} on {devices}, {report.date}", fontsize=10)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:])
