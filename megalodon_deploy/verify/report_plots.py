"""The plots of a report: error by position, by layer, over a long stream, and along the graph on a miss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megalodon_deploy.verify.bisection import Bisection
from megalodon_deploy.verify.finding import Finding
from megalodon_deploy.verify.long_stream import LongStream
from megalodon_deploy.verify.operator_drift import Curve
from megalodon_deploy.verify.plots import Axis, Series, plot
from megalodon_deploy.verify.tolerance import KINDS

_FLOOR = 1e-6  # of an error over its tolerance; smaller ones are drawn there
_CEILING = 1e6  # what could not be compared is drawn there
_COLOURS = {kind: colour for colour, kind in enumerate(kind for kind in KINDS if kind != "activation")}
_SHARE = Axis(label="error / tolerance", is_log=True, floor=_FLOOR)


def position_plot(findings: Sequence[Finding]) -> str:
    """Every call's worst error of each kind, by the token at which it is."""
    series = []
    for colour, candidate in enumerate(_candidates(findings)):
        worst: dict[tuple[str, int, str], Finding] = {}
        for finding in findings:
            key = (finding.schedule, finding.call, finding.kind)
            if finding.candidate == candidate and finding.position is not None:
                worst[key] = max(worst.get(key, finding), finding, key=lambda it: it.share)
        shown = list(worst.values())
        points = [(1.0 + (finding.position or 0), _height(finding)) for finding in shown]
        series.append(Series(candidate, colour, points, [_label(finding) for finding in shown]))
    x = Axis(label="token of the stream", is_log=True, floor=1.0)
    return plot("Error over tolerance, by position in the stream", series, x, _SHARE, limit=1.0)


def layer_plot(findings: Sequence[Finding], candidate: str) -> str:
    """One candidate's worst error of each kind in each layer."""
    mine = [finding for finding in findings if finding.candidate == candidate and finding.kind]
    layers = sorted({_layer(finding) for finding in mine}, key=lambda name: (not name.isdigit(), name.zfill(6)))
    series = []
    for kind in dict.fromkeys(finding.kind for finding in mine):
        worst: dict[str, Finding] = {}
        for finding in mine:
            if finding.kind == kind:
                layer = _layer(finding)
                worst[layer] = max(worst.get(layer, finding), finding, key=lambda it: it.share)
        found = sorted(worst.items(), key=lambda item: layers.index(item[0]))
        points = [(float(layers.index(layer)), _height(finding)) for layer, finding in found]
        series.append(
            Series(
                kind, _COLOURS.get(kind, 0), points, [_label(finding) for _, finding in found], is_line=len(points) > 1
            )
        )
    title = f"Error over tolerance, by layer: {candidate}"
    return plot(title, series, Axis(label="layer", names=layers), _SHARE, limit=1.0)


def bisection_plot(bisection: Bisection) -> str:
    """The tensors of the call that missed, in the model's order."""
    findings = bisection.findings
    points = [(float(index), _height(finding)) for index, finding in enumerate(findings)]
    groups = {"within tolerance": True, "out of tolerance": False}
    series = [
        Series(
            name,
            2 if passed else 1,
            [point for point, finding in zip(points, findings, strict=True) if finding.passed is passed],
            [_label(finding) for finding in findings if finding.passed is passed],
        )
        for name, passed in groups.items()
    ]
    x = Axis(label=f"tensors of call {bisection.call} of schedule {bisection.schedule}, in the model's order")
    return plot("Error over tolerance along the graph", series, x, _SHARE, limit=1.0)


def drift_plots(long_stream: LongStream) -> list[tuple[str, str]]:
    """(heading, plot): norms of the drifting signals, the moving average, the small model."""
    groups = [
        ("Norm statistics: mean of the drifting signal", "norm mean, drifting"),
        ("Norm statistics: variance of the drifting signal", "norm var, drifting"),
        ("Moving-average state", "moving-average state"),
        ("Small model: logits", "small model, logits"),
        ("Small model: norm statistics", "small model, norm statistics"),
    ]
    return [
        (heading, _curves(heading, [curve for curve in long_stream.curves if curve.what == what]))
        for heading, what in groups
    ]


def drift_figure(long_stream: LongStream, style: str) -> str:
    """An SVG file of its own: what a norm's mean loses, token by token. `style` is the page's style sheet."""
    svg = _curves("Norm statistics", [it for it in long_stream.curves if it.what == "norm mean, drifting"])
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).replace(
        "<title>", f"<style>{style}</style><title>", 1
    )


def _curves(heading: str, curves: Iterable[Curve]) -> str:
    series = [
        Series(
            curve.state,
            colour,
            [(float(position), error) for position, error in zip(curve.positions, curve.errors, strict=True)],
            [f"{curve.state}: {error:.1e}" for error in curve.errors],
            is_line=True,
        )
        for colour, curve in enumerate(curves)
    ]
    x = Axis(label="tokens", is_log=True, floor=1.0)
    y = Axis(label="error against float64", is_log=True, floor=1e-17)
    return plot(f"{heading}: error against float64, by position", series, x, y, height=240)


def _candidates(findings: Iterable[Finding]) -> list[str]:
    return list(dict.fromkeys(finding.candidate for finding in findings))


def _layer(finding: Finding) -> str:
    """The logits come right behind the final norm."""
    layer = finding.tensor.rpartition(".")[2]
    return layer if layer.isdigit() else "end"


def _height(finding: Finding) -> float:
    return min(finding.share, _CEILING)


def _label(finding: Finding) -> str:
    if finding.problem is not None:
        return f"{finding.tensor}: {finding.problem}"
    return f"{finding.tensor}, {finding.schedule} call {finding.call}: {finding.share:.2g} of the tolerance"
