"""The committed C++ header is what the table of `megalodon_deploy.state` says."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def test_state_layout_header_is_up_to_date(repository: Path) -> None:
    spec = importlib.util.spec_from_file_location("generate_headers", repository / "plugins" / "generate_headers.py")
    assert spec is not None
    assert spec.loader is not None
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert generator.HEADER.read_text() == generator.state_layout_header(), "run plugins/generate_headers.py"
