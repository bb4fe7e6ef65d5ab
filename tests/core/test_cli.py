"""The command line's manners: exit codes, one line for a user's mistake, light imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from megalodon_deploy import cli
from megalodon_deploy.errors import CheckFailedError, UserError

HEAVY = ("torch", "onnx", "onnx_ir", "onnxruntime", "numpy", "polygraphy", "tensorrt_rtx", "rich")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megalodon_deploy.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_lists_every_command() -> None:
    result = run("--help")
    assert result.returncode == 0
    for command in ("train", "export", "build", "verify", "generate", "bench", "inspect", "doctor"):
        assert f"\n  {command} " in result.stdout
        assert run(command, "--help").returncode == 0


def test_every_option_says_what_it_is_for_and_every_verb_fits_its_line() -> None:
    listed = run("--help").stdout
    for name, command in cli.cli.commands.items():
        assert "..." not in next(line for line in listed.splitlines() if line.startswith(f"  {name} "))
        for option in command.params:
            assert isinstance(option, click.Argument) or getattr(option, "help", None), f"{name} {option.name}"


@pytest.mark.parametrize(
    "command", [["train", "--data", ".", "--out", "x", "--steps", "1"], ["export", "--ckpt", ".", "--out", "x"]]
)
def test_without_pytorch_a_verb_names_the_extra(command: list[str]) -> None:
    script = "import sys; sys.modules['torch'] = None; from megalodon_deploy.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'megalodon-deploy[" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("code", ["import megalodon_deploy", "import megalodon_deploy.cli"])
def test_import_is_light(code: str) -> None:
    script = f"{code}; import sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_mistake_gets_one_line_and_exit_code_2(tmp_path: Path) -> None:
    result = run("inspect", str(tmp_path))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("megalodon-deploy: ")
    assert "is not a bundle" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_wrong_option_names_the_choices() -> None:
    result = run("export", "--ckpt", ".", "--out", "x", "--precision", "int3")
    assert result.returncode == 2
    assert "'fp32', 'fp16', 'bf16'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("a\nb"), 2),
        (CheckFailedError("a b"), 1),
        (OSError(28, "a b", "model.onnx.data"), 2),
        (FileExistsError("a b"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "cli", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == code
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    if code != 130:
        assert "a b" in printed
    if isinstance(error, OSError) and error.filename:
        assert "model.onnx.data" in printed


def test_our_own_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise ValueError("Bug: ours")

    monkeypatch.setattr(cli, "cli", fail)
    with pytest.raises(ValueError, match="ours"):
        cli.main()


def test_doctor_names_each_part_and_the_remedy_of_what_is_missing() -> None:
    result = run("doctor", "--json")
    assert result.returncode == 0
    findings = {finding["part"]: finding for finding in json.loads(result.stdout)}
    assert {"Python", "torch", "onnxruntime", "CUDA driver", "GPU", "nvcc", "plugin library"} <= set(findings)
    assert findings["Python"]["found"] == ".".join(map(str, sys.version_info[:3]))
    for finding in findings.values():
        assert finding["found"] or finding["remedy"]
        assert finding["enables"]
