"""A report as one HTML file that needs nothing else: style sheet and plots inside, no scripts, light and dark."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from megalodon_deploy.files import atomic_file
from megalodon_deploy.verify.report import VerifyReport
from megalodon_deploy.verify.report_plots import bisection_plot, drift_plots, layer_plot, position_plot

Row = Sequence[Any]


def write_html_report(report: VerifyReport, path: Path) -> None:
    """Write the file, whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(html_report(report), encoding="utf-8")


def html_report(report: VerifyReport) -> str:
    """The page."""
    title = f"{report.bundle['name']}: {'passed' if report.passed else 'failed'}"
    sections = [
        _head(report),
        _diagnoses(report),
        _bisection(report),
        _worst(report),
        _plots(report),
        _text(report),
        _long_stream(report),
        _compared(report),
        _not_run(report),
        _setting(report),
    ]
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _head(report: VerifyReport) -> str:
    worst = max((finding.share for finding in report.findings), default=float("inf"))
    facts = [
        ("comparisons", f"{len(report.findings):,}"),
        ("out of tolerance", f"{len(report.misses):,}"),
        ("largest error / tolerance", f"{worst:.2g}"),
        ("not run", str(len(report.not_run))),
        ("time", f"{report.seconds:.0f} s"),
    ]
    verdict = "passed" if report.passed else "failed"
    cards = "".join(f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in facts)
    bundle = report.bundle
    positions = {"last": "a call's last position", "all": "all positions"}[bundle["logits"]]
    return (
        f'<header><p class="badge {verdict}" id="verdict">{verdict}</p><h1>{escape(bundle["name"])}</h1>'
        f'<p class="lead">{escape(report.verdict())}</p>'
        f'<p class="muted">{escape(bundle["precision"])}, logits of {positions}, '
        f"fingerprint {escape(bundle['fingerprint'][:16])}, {_time(report.date)}</p>"
        f'<div class="cards">{cards}</div></header>'
    )


def _time(iso: str) -> str:
    return f"{datetime.fromisoformat(iso):%Y-%m-%d %H:%M} UTC"


def _diagnoses(report: VerifyReport) -> str:
    if not report.diagnoses:
        return ""
    items = "".join(
        f"<li><b>{escape(it.name)}</b> in {escape(it.candidate)}: {escape(it.explanation)}.<br>"
        f'<span class="muted">first: {escape(it.first.describe())}</span></li>'
        for it in report.diagnoses
    )
    return _section("What the misses look like", f'<ul class="plain">{items}</ul>')


def _bisection(report: VerifyReport) -> str:
    if report.bisection is None:
        return ""
    table = _table(("tensor", "error", "tolerance", "verdict"), report.bisection_rows())
    body = f"<p>{escape(report.bisection.describe())}</p>{_figure(bisection_plot(report.bisection))}"
    return _section("Along the graph", body + _details("every tensor of this call", table))


def _worst(report: VerifyReport) -> str:
    candidate, tensor, *others = report.table_header()
    header = (candidate, tensor, "", *others)  # the bar is seen on narrow screens, too
    rows = []
    for finding, row in zip(report.worst, report.table_rows(), strict=True):
        share = min(finding.share, 1.0)
        bar = f'<span class="bar {"ok" if finding.passed else "bad"}"><i style="width:{share:.1%}"></i></span>'
        cells = [escape(cell) for cell in row]
        rows.append([*cells[:2], bar, *cells[2:]])
    return _section("Worst error of each kind of tensor", _raw_table(header, rows))


def _plots(report: VerifyReport) -> str:
    candidates = dict.fromkeys(finding.candidate for finding in report.findings)
    by_layer = "".join(f"<h3>{escape(it)}</h3>{_figure(layer_plot(report.findings, it))}" for it in candidates)
    return _section("Error by position", _figure(position_plot(report.findings))) + _section("Error by layer", by_layer)


def _text(report: VerifyReport) -> str:
    if not report.text:
        return ""
    header = ("executor", "tokens", "divergence", "worst", "same choice", "loss", "PyTorch's loss", "alone")
    rows = [
        (
            it.candidate,
            it.num_tokens,
            f"{it.mean_divergence:.1e}",
            f"{it.largest_divergence:.1e}",
            f"{it.same_choice:.1%}",
            f"{it.loss:.5f}",
            f"{it.reference_loss:.5f}",
            f"{it.agreed} of {it.continued}",
        )
        for it in report.text
    ]
    note = (
        f"<p>Read: {escape(report.text[0].text)}. Divergence (Kullback-Leibler) and loss in nats a token; "
        "<i>same choice</i>: the most probable next token is the same; <i>alone</i>: tokens that both generate alike "
        "when they go on by themselves.</p>"
    )
    return _section("What it means for text", note + _table(header, rows))


def _long_stream(report: VerifyReport) -> str:
    long_stream = report.long_stream
    if long_stream is None:
        return ""
    rows = [
        (it.what, f"{it.value:.2g}", f"{it.limit:.2g}", "passed" if it.passed else "MISSED")
        for it in long_stream.checks
    ]
    checks = _table(("promise", "found", "limit", "verdict"), rows)
    figures = "".join(f"<h3>{escape(heading)}</h3>{_figure(svg)}" for heading, svg in drift_plots(long_stream))
    curves = _table(("what", "state", "first error", "last error", "worst error"), long_stream.table_rows())
    body = f"<p>Small model: {escape(long_stream.model)}.</p>{checks}{figures}{_details('every curve', curves)}"
    return _section(f"{long_stream.tokens:,} tokens", body)


def _compared(report: VerifyReport) -> str:
    note = f" {escape(report.reference['note'])}." if report.reference["note"] else ""
    reference = (
        "<p>Reference: PyTorch in float32, every row's whole stream in one parallel call, and call by call. "
        f"Weights of {escape(report.reference['weights'])}.{note}</p>"
    )
    candidates = _table(("executor", "what it is"), list(report.candidates.items()))
    schedules = _table(
        ("schedule", "what it does", "calls", "tokens"),
        [(it.name, it.purpose, len(it.calls), it.num_tokens) for it in report.schedules],
    )
    return _section("What was compared with what", reference + candidates + schedules)


def _not_run(report: VerifyReport) -> str:
    if not report.not_run:
        return ""
    return _section("Not run", _table(("what", "why"), [(it.what, it.why) for it in report.not_run]))


def _setting(report: VerifyReport) -> str:
    return _section(
        "Machine, versions, model",
        f'<div class="columns">{_pairs(report.machine)}{_pairs(report.versions)}{_pairs(report.config)}</div>',
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>"


def _details(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _table(header: Sequence[str], rows: Iterable[Row]) -> str:
    return _raw_table(header, [[escape(str(cell)) for cell in row] for row in rows])


def _raw_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr{_row_class(row)}>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: str) -> str:
    is_number = re.fullmatch(r"-?[0-9.,]+(e[-+][0-9]+)?%?", cell)
    return f'<td class="number">{cell}</td>' if is_number else f"<td>{cell}</td>"


def _row_class(row: Sequence[str]) -> str:
    return ' class="missed"' if any(cell.startswith("MISSED") for cell in row) else ""


def _pairs(values: Mapping[str, Any]) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in values.items())
    return f"<dl>{items}</dl>"
