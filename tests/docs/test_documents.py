"""What the documents show is run: every `megalodon-deploy` line and every Python block, in the order of the page."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def blocks(page: Path) -> list[tuple[str, str]]:
    return [(match[1], match[2]) for match in BLOCK.finditer(page.read_text())]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint and a text, as the pages assume."""
    from megalodon_deploy import Megalodon, save_checkpoint
    from megalodon_deploy.train import byte_model

    directory = tmp_path_factory.mktemp("workplace")
    (directory / "text").mkdir()
    shutil.copy(argparse.__file__, directory / "text" / "argparse.txt")
    save_checkpoint(Megalodon(byte_model(num_layers=1, model_dim=32, chunk_size=64)), directory / "my-checkpoint")
    return directory


def execute(command: list[str], directory: Path) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    result = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_commands_and_examples_run(page: Path, workplace: Path) -> None:
    for language, text in blocks(page):
        if language == "python":
            execute([sys.executable, "-c", text], workplace)
            continue
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("megalodon-deploy "):
                execute(shlex.split(line, comments=True), workplace)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
