"""`make demo` from end to end, in small: every command runs, and its result is in the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[2] / "examples" / "demo.py"


def run_demo(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_demo_runs_to_its_end(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    finished = run_demo("--minutes", "0.01", "--out", out)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for verb in ("train", "export", "verify", "build", "generate"):
        assert f"megalodon-deploy {verb} " in finished.stdout
    assert "passed: " in finished.stdout
    assert json.loads((out / "generate.json").read_text())["decode_tokens"] > 700
    assert (out / "checkpoint" / "latest" / "config.json").is_file()
    assert {path.name for path in out.iterdir()} == {"checkpoint", "tokens", "bundle", "generate.json"}


def test_the_demo_stops_at_a_failing_step(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "thesis.txt").write_text("years of work")
    finished = run_demo("--minutes", "0.01", "--out", tmp_path)
    assert finished.returncode == 1
    assert "`megalodon-deploy train` failed with exit code 2" in finished.stdout
    assert "Traceback" not in finished.stdout + finished.stderr
    assert (tmp_path / "checkpoint" / "thesis.txt").read_text() == "years of work"
