"""A wheel, installed without a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout: a wheel of untracked files proves nothing")
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_it_carries_the_sources_of_plugins(installed: Path) -> None:
    def sources(plugins: Path) -> set[str]:
        names = (path.relative_to(plugins) for path in plugins.rglob("*") if path.is_file())
        return {str(name) for name in names if not {"tests", "__pycache__"} & set(name.parts)}

    assert sources(installed / "megalodon_deploy" / "plugins") == sources(ROOT / "plugins")
    assert not (installed / "megalodon_deploy" / "plugins" / "tests").exists()


def test_it_compiles_them(installed: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "megalodon_deploy.engine.toolchain", "build-cpu"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    library = tmp_path / "megalodon-deploy" / "onnxruntime" / "libmegalodon_onnxruntime.so"
    assert Path(done.stdout.strip()) == library
    assert library.is_file()
