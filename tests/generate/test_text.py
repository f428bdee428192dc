"""Streaming text from tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain_xla.generate.text import TextStream
from pretrain_xla.tokenizers.bytes_tokenizer import BytesTokenizer


@given(text=st.text(st.sampled_from("abé漢😀"), max_size=12), stops=st.lists(st.text("abé漢", min_size=1, max_size=3)))
def test_pieces_make_the_text_up_to_the_first_stop(text: str, stops: list[str]) -> None:
    stream = TextStream(BytesTokenizer(), "漢", stops)
    pieces = []
    for token in text.encode():
        pieces.append(stream.add(token))
        assert "\ufffd" not in pieces[-1], "a character comes whole"
        if stream.ended:
            break
    pieces.append(stream.finish())
    places = [text.find(stop) for stop in stops if stop in text]
    assert stream.ended == bool(places)
    # The stop that is complete first ends the text, which may not be the one that begins first.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert "".join(pieces) == stream.text
    if not places:
        assert stream.text == text
    else:
        complete = min(end for end, _ in ends)
        assert stream.text == text[: min(begin for end, begin in ends if end == complete)]


def test_a_prompt_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    tokenizer = BytesTokenizer()
    encode = tokenizer.encode
    monkeypatch.setattr(BytesTokenizer, "encode", lambda self, text: encoded.append(text) or encode(text))
    stream = TextStream(tokenizer, "abc")
    assert [stream.add(token) for token in b"def"] + [stream.finish()] == ["d", "e", "f", ""]
    assert encoded == ["abc"]


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    stream = TextStream(BytesTokenizer())
    assert [stream.add(token) for token in (97, 0xE6, 0xBC)] == ["a", "", ""]
    assert stream.finish() == "\ufffd"
