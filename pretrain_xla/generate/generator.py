"""A model that continues text: model and tokenizer on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from pretrain_xla.config import build_config
from pretrain_xla.errors import UserError
from pretrain_xla.generate.continuation import Continuation, Request
from pretrain_xla.generate.decoder import Decoder
from pretrain_xla.generate.text import TextStream, prompt_ids
from pretrain_xla.interop.load import load_model
from pretrain_xla.interop.special_tokens import before_text
from pretrain_xla.model import GPT, Execution
from pretrain_xla.runtime import Runtime, start
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.tokenizer import Tokenizer


class Generator:
    """A model and its tokenizer on a device. A text ends at end-of-text, or at a stop token of the request."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        runtime: Runtime,
        *,
        before: Sequence[int] = (),
        ends: Sequence[int] = (),
    ) -> None:
        """Place a model on a device.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            runtime: the device.
            before: ids that it expects before every text.
            ends: ids that end a text, in addition to the tokenizer's end-of-text.
        """
        self.tokenizer, self.runtime = tokenizer, runtime
        self._before, self._ends = tuple(before), tuple(ends)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise UserError(
                f"tokenizer {tokenizer.name!r} has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}: "
                "it is not the model's: name the right one with --tokenizer"
            )
        self.model = runtime.prepare_model(model.eval(), Execution())
        self._decoder = Decoder(self.model, runtime, tokenizer.vocab_size)

    @staticmethod
    def load(path: str, *, tokenizer: str | None, runtime: str, device: str, which: str = "newest") -> Generator:
        """Load a trained model.

        Args:
            path: a run folder, checkpoints folder, one checkpoint, or anything else that `load_model` accepts.
            tokenizer: see `load_tokenizer`. None means the one that the model was trained with.
            runtime: `xla` or `torch`.
            device: for torch, `auto`, `cpu` or `cuda`.
            which: `newest` or `best` checkpoint.

        Raises:
            UserError: there is no such model, it is damaged, or no tokenizer fits it.
        """
        found = load_model(path, which)
        found.print_notes()
        if tokenizer is None and found.tokenizer is None:
            raise UserError(f"{found.where} comes without a tokenizer: name one with --tokenizer")
        loaded = load_tokenizer(tokenizer or str(found.tokenizer))
        parallel = {"runtime": runtime, "device": device}
        config = build_config({"model": found.config.model_dump(), "parallel": parallel}, found.where)
        model = GPT(config.model)
        model.load_state_dict(found.tensors, strict=True)
        before = before_text(loaded) if found.adds_bos else ()
        return Generator(model, loaded, start(config), before=before, ends=found.eos_ids)

    def prompt_ids(self, prompt: str) -> list[int]:
        """See `text.prompt_ids`."""
        return prompt_ids(self.tokenizer, prompt, self._before)

    def tokens(self, prompts: Sequence[str], request: Request) -> Continuation:
        """New tokens of each prompt, as `(row, token)`; an empty prompt starts after end-of-text."""
        texts = [self.prompt_ids(prompt) for prompt in prompts]
        stops = (self.tokenizer.end_of_text, *self._ends, *request.stops)
        return Continuation(self._decoder, texts, replace(request, stops=stops))

    def stream(
        self, prompts: Sequence[str], request: Request, stop_strings: Sequence[str] = ()
    ) -> Iterator[tuple[int, str]]:
        """New text of each prompt as it is generated, as `(row, text)`.

        Args:
            prompts: continued in one batch; the texts do not depend on each other.
            request: how to continue them.
            stop_strings: a text ends before the first of these.
        """
        streams = [TextStream(self.tokenizer, prompt, stop_strings) for prompt in prompts]
        tokens = self.tokens(prompts, request)
        for row, token in tokens:
            if text := streams[row].add(token):
                yield row, text
            if streams[row].ended:
                tokens.end(row)
        for row, stream in enumerate(streams):
            if text := stream.finish():
                yield row, text

    def generate(self, prompts: Sequence[str], request: Request, stop_strings: Sequence[str] = ()) -> list[str]:
        """Each prompt with its continuation."""
        texts = list(prompts)
        for row, text in self.stream(prompts, request, stop_strings):
            texts[row] += text
        return texts
