"""Text generated during training, every `logging.sample_interval` steps, always with the same prompt and the same seed.

Prefill and decode are two separate graphs of one shape each, so the training step keeps its graph. The run's random state is
not touched: losses are the same with and without samples.
"""

from __future__ import annotations

from collections.abc import Callable

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.generate.continuation import Continuation, Request
from pretrain_xla.generate.decoder import Decoder
from pretrain_xla.generate.sampling import Sampling
from pretrain_xla.generate.text import prompt_ids
from pretrain_xla.model import GPT
from pretrain_xla.run_folder.files import tokenizer_of
from pretrain_xla.runtime import Runtime
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.tokenizer import decode_after

TOKENS = 100
SAMPLING = Sampling(temperature=0.8, top_k=50)


class Samples:
    """Continues `logging.sample_prompt` with the current weights.

    Raises:
        UserError: the data's tokenizer cannot be loaded, or has more ids than the model.
    """

    def __init__(self, config: RunConfig, model: GPT, runtime: Runtime) -> None:
        self._tokenizer = load_tokenizer(tokenizer_of(config.data))
        if self._tokenizer.vocab_size > config.model.vocab_size:
            raise UserError(
                f"sample_interval={config.logging.sample_interval}: tokenizer {self._tokenizer.name!r} has "
                f"{self._tokenizer.vocab_size} tokens and the model "
                f"{config.model.vocab_size}: set --tokenizer to that of the data"
            )
        self._model, self._prompt = model, config.logging.sample_prompt
        limit = config.model.seq_length
        ids = prompt_ids(self._tokenizer, self._prompt)
        self._ids = ids[-max(limit // 2, 1) :] if len(ids) > limit else ids
        # Stay within one context window: a longer text would be prefilled again, with a graph of another size.
        tokens = min(TOKENS, limit + 1 - len(self._ids))
        self._request = Request(tokens, SAMPLING, seed=config.train.seed, stops=(self._tokenizer.end_of_text,))
        self._decoder = Decoder(model, runtime, self._tokenizer.vocab_size)

    def __call__(self, progress: Callable[[int], None] | None = None) -> str:
        """The prompt and its continuation. Every process must call it; all get the same text.

        progress: called with the number of tokens so far.
        """
        was_training = self._model.training
        self._model.eval()
        tokens: list[int] = []
        for _, token in Continuation(self._decoder, [self._ids], self._request):
            tokens.append(token)
            if progress is not None:
                progress(len(tokens))
        self._model.train(was_training)
        return self._prompt + decode_after(self._tokenizer, self._prompt, tokens)
