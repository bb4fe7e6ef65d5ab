"""Stop strings that span pieces of text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon_deploy.errors import UserError
from megalodon_deploy.runtime.stop_strings import StopStrings

SHORT_TEXT = st.text("ab\u00e9", min_size=1, max_size=3)


@given(pieces=st.lists(st.text("ab\u00e9", max_size=3), max_size=12), strings=st.lists(SHORT_TEXT, max_size=3))
def test_text_ends_at_the_first_stop_string_however_it_is_cut(pieces: list[str], strings: list[str]) -> None:
    stops = StopStrings(strings)
    seen, given_out, stopped = "", "", False
    for piece in pieces:
        seen += piece
        text, stopped = stops.push(piece)
        given_out += text
        assert seen.startswith(given_out)
        if stopped:
            break
        held = seen[len(given_out) :]
        assert not held or any(string.startswith(held) for string in strings)
    starts = [seen.index(string) for string in strings if string in seen]
    assert stopped == bool(starts)
    expected = seen[: min(starts)] if stopped else seen
    assert given_out + stops.flush() == expected


@pytest.mark.parametrize("strings", ["end", ["end", ""], [3]])
def test_what_is_no_list_of_strings_gets_one_line(strings: object) -> None:
    with pytest.raises(UserError, match="stop_strings"):
        StopStrings(strings)  # type: ignore[arg-type]
