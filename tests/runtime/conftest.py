"""Real bundles of small models, exported once for all tests of this room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runtime.small_models import SHORT_CHUNKS, make_model

from megalodon_deploy.bundle import Bundle
from megalodon_deploy.config import MegalodonConfig
from megalodon_deploy.export import export_checkpoint
from megalodon_deploy.model.checkpoint import save_checkpoint

MakeBundle = Callable[..., Bundle]


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> MakeBundle:
    """`make_bundle(config, **options of export_checkpoint)`: each one is exported once."""
    made: dict[str, Bundle] = {}

    def make(config: MegalodonConfig = SHORT_CHUNKS, **options: Any) -> Bundle:
        key = repr((config, sorted(options.items())))
        if key not in made:
            directory: Path = tmp_path_factory.mktemp("bundle")
            save_checkpoint(make_model(config), directory / "checkpoint")
            made[key] = export_checkpoint(directory / "checkpoint", directory / "bundle", **options)
        return made[key]

    return make
