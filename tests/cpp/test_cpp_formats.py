"""The committed C++ header holds what the Python modules say."""

from __future__ import annotations

from cpp.conftest import load_script


def test_formats_header_is_up_to_date() -> None:
    generator = load_script("generate_formats")
    assert generator.HEADER.read_text() == generator.formats_header(), "run cpp/generate_formats.py"
