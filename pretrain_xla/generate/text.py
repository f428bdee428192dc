"""From prompts to ids, and from tokens to text as they are generated: complete characters only, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain_xla.tokenizers.tokenizer import Tokenizer


def prompt_ids(tokenizer: Tokenizer, prompt: str, before: Sequence[int] = ()) -> list[int]:
    """Ids of a prompt, at least one.

    Unlike in a document, the name of end-of-text at the start of a prompt means that id. An empty prompt is end-of-text.

    Args:
        tokenizer: the model's.
        prompt: text to continue.
        before: ids that the model expects before every text.
    """
    end = tokenizer.end_of_text
    name, ends = tokenizer.decode([end]), 0
    while name and prompt.startswith(name):
        prompt, ends = prompt.removeprefix(name), ends + 1
    return [*before, *[end] * ends, *tokenizer.encode(prompt)] or [end]


class TextStream:
    """The text of one row of tokens.

    Attributes:
        text: what is final so far, without the prompt.
        tokens: the ids.
        ended: a stop string was generated; the text ends before it.
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
        """Add a token; returns the text that became final with it, possibly empty."""
        self.tokens.append(token)
        decoded = self._decoded()
        if decoded.endswith("\ufffd"):  # a character may need several tokens
            return ""
        return self._advance(decoded, len(decoded) - self._keep_back)

    def finish(self) -> str:
        """The rest of the text, after the last token."""
        decoded = self._decoded()
        return "" if self.ended else self._advance(decoded, len(decoded))

    def _decoded(self) -> str:
        """Like `decode_after`, with the prompt encoded once. Decoding is cheap, and may depend on all earlier tokens."""
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
