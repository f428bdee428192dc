"""From tokens to text while they come: whole characters only, and an end at a string."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain_xla.tokenizers.tokenizer import Tokenizer


def prompt_ids(tokenizer: Tokenizer, prompt: str, before: Sequence[int] = ()) -> list[int]:
    """The ids that a prompt begins a text with, at least one.

    A prompt is no document, which could forge a border: where it begins with the name of end-of-text, it means that id. An
    empty one begins where a document does.

    Args:
        tokenizer: the model's.
        prompt: text to continue.
        before: ids that the model has learnt to see before every text.
    """
    end = tokenizer.end_of_text
    name, ends = tokenizer.decode([end]), 0
    while name and prompt.startswith(name):
        prompt, ends = prompt.removeprefix(name), ends + 1
    return [*before, *[end] * ends, *tokenizer.encode(prompt)] or [end]


class TextStream:
    """The text of one row of tokens.

    Attributes:
        text: what is certain so far, without the prompt.
        tokens: the ids.
        ended: a stop string has come; the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str = "", stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop_strings = tokenizer, tuple(stop_strings)
        self._before = tokenizer.encode(prompt)
        self._before_length = len(tokenizer.decode(self._before))
        self._keep_back = max(map(len, self._stop_strings), default=1) - 1
        self.text = ""
        self.tokens: list[int] = []
        self.ended = False

    def add(self, token: int) -> str:
        """Take a token; returns the text that is certain by now and was not before (perhaps none)."""
        self.tokens.append(token)
        decoded = self._decoded()
        if decoded.endswith("\ufffd"):  # a character may need several tokens
            return ""
        return self._advance(decoded, len(decoded) - self._keep_back)

    def finish(self) -> str:
        """What was kept back, at the end of the tokens."""
        decoded = self._decoded()
        return "" if self.ended else self._advance(decoded, len(decoded))

    def _decoded(self) -> str:
        """As `decode_after` has it, with the prompt encoded once: decoding is cheap, and may need all that came before."""
        return self._tokenizer.decode([*self._before, *self.tokens])[self._before_length :]

    def _advance(self, decoded: str, certain: int) -> str:
        shown = len(self.text)
        found = [at for stop in self._stop_strings if (at := decoded.find(stop, max(shown - self._keep_back, 0))) >= 0]
        if found:
            self.ended = True
            certain = min(found)
        new = decoded[shown : max(certain, shown)]
        self.text += new
        return new
