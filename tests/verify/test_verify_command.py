"""`megalodon-deploy verify` on the command line: what is printed, written and returned, whatever happens at the end."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from megalodon_deploy import verify as verification
from megalodon_deploy.bundle import Bundle
from megalodon_deploy.cli import cli
from megalodon_deploy.errors import CheckFailedError, UserError
from megalodon_deploy.verify.report import VerifyReport


@pytest.fixture
def command(bundle: Bundle, report: VerifyReport, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The verb over a bundle that was verified before."""
    monkeypatch.setattr(verification, "verify_bundle", lambda *_, **__: report)
    return ["verify", str(bundle.path)]


def test_json_is_all_that_is_printed(command: list[str]) -> None:
    done = CliRunner().invoke(cli, [*command, "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["passed"]


def test_a_miss_is_printed_before_it_fails(
    command: list[str], report: VerifyReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    missed = dataclasses.replace(report.findings[0], error=1.0)
    failed = dataclasses.replace(report, findings=(missed, *report.findings[1:]))
    monkeypatch.setattr(verification, "verify_bundle", lambda *_, **__: failed)
    done = CliRunner().invoke(cli, command)
    assert isinstance(done.exception, CheckFailedError)
    assert "MISSED" in done.stdout
    assert not json.loads(CliRunner().invoke(cli, [*command, "--json"]).stdout)["passed"]


def test_what_was_found_is_printed_where_the_page_cannot_be_written(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(cli, [*command, "--html", str(tmp_path / "file" / "report.html")])
    assert isinstance(done.exception, OSError)
    assert "comparisons within tolerance" in done.stdout


def test_a_folder_is_no_page(command: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, [*command, "--html", str(tmp_path)])
    assert done.exit_code == 2
    assert "is a directory" in done.output


@pytest.mark.parametrize("option", [["--json"], ["--html", "page"], ["--bisect"], ["--tokens", "5"]])
def test_files_for_stock_polygraphy_are_all_that_is_made(command: list[str], tmp_path: Path, option: list[str]) -> None:
    done = CliRunner().invoke(cli, [*command, "--emit-polygraphy", str(tmp_path / "files"), *option])
    assert isinstance(done.exception, UserError)
    assert "only writes files" in str(done.exception)
    assert not (tmp_path / "files").exists()


def test_the_line_that_says_what_to_run_runs(command: list[str], tmp_path: Path) -> None:
    target = tmp_path / "fi les"
    done = CliRunner().invoke(cli, [*command, "--emit-polygraphy", str(target)], catch_exceptions=False)
    line = done.stdout.partition("see: ")[2]
    shown = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert "build-rtx" in shown.stderr
