"""What pyproject.toml cannot say: a wheel carries the sources of plugins/, which are compiled where they are needed."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPlugins(build_py):
    """Puts plugins/ into the package, without its tests; an editable installation has them in the checkout."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "megalodon_deploy" / "plugins"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("plugins", target, ignore=shutil.ignore_patterns("tests", "__pycache__"))


setup(cmdclass={"build_py": BuildWithPlugins})
