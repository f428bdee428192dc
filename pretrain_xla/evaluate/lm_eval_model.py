"""A model of ours with lm-eval's model interface. Needs `pip install lm-eval`; only `lm_eval_command.py` imports this file.

Requests are scored with the same rows and graphs as our own tasks: `loglikelihood` by pairs, `loglikelihood_rolling` by windows
without overlap, `generate_until` by our generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows
from tqdm import tqdm

from pretrain_xla.errors import UserError
from pretrain_xla.evaluate.command import build, tokenizer_of
from pretrain_xla.evaluate.rows import cut
from pretrain_xla.evaluate.scorer import Row, Scorer
from pretrain_xla.generate import Generator, Request, Sampling
from pretrain_xla.interop.load import load_model
from pretrain_xla.interop.special_tokens import before_text

DEFAULT_BATCH_SIZE = 8


class PretrainXlaLM(TemplateLM):
    """`--model pretrain_xla`; the arguments are the keys of `--model_args`.

    Args:
        pretrained: as --model of `evaluate.py`.
        tokenizer: None means the model's own.
        checkpoint: `newest` or `best`.
        runtime: `xla` or `torch`. None means xla where PJRT_DEVICE is set.
        mixed_precision: `bf16`, or none for fp32.
        mesh_fsdp: xla: devices over which the weights are sharded.
        mesh_tensor: xla: devices over which each matrix product is split.
        batch_size: lm-eval's --batch_size: rows of full length in a batch.
        device: lm-eval's --device, for the torch runtime: `cpu`; any other value means CUDA if available.
        max_batch_size: lm-eval's; ignored, because shapes are static.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        checkpoint: str = "newest",
        runtime: str | None = None,
        mixed_precision: str | None = None,
        mesh_fsdp: int = 1,
        mesh_tensor: int = 1,
        batch_size: int | str = DEFAULT_BATCH_SIZE,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        loaded = load_model(str(pretrained), checkpoint)
        loaded.print_notes()
        started, model = build(
            loaded,
            runtime=runtime,
            # lm-eval's default is cuda:0, even on hosts without CUDA.
            device="cpu" if device == "cpu" else "auto",
            mixed_precision=mixed_precision,
            mesh=(int(mesh_fsdp), int(mesh_tensor)),
        )
        if started.process_count > 1:
            raise UserError("lm-eval runs in one process here, which uses all devices of its mesh: start it only once")
        self._tokenizer = tokenizer_of(loaded, tokenizer)
        self._before = before_text(self._tokenizer) if loaded.adds_bos else ()
        self._generator = Generator(  # places the model
            model, self._tokenizer, started, before=self._before, ends=loaded.eos_ids
        )
        rows = DEFAULT_BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
        self._scorer = Scorer(model, started, rows)

    @property
    def eot_token_id(self) -> int:
        """Id of end-of-text."""
        return self._tokenizer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        """Id before a text without context: the one that the model expects there, or end-of-text.

        Some models have perplexities of millions after end-of-text instead.
        """
        return self._before[0] if self._before else self.eot_token_id

    @property
    def max_length(self) -> int:
        """Tokens that the model takes."""
        return self._scorer.max_length

    @property
    def tokenizer_name(self) -> str:
        """Used by lm-eval for cache names."""
        return self._tokenizer.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
        """Ids of a text, after the ids that the model expects before one, unless lm-eval asks for none."""
        before = () if add_special_tokens is False else self._before
        return [*before, *self._tokenizer.encode(string)]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **unused: Any,
    ) -> list[tuple[float, bool]]:
        rows = [cut([*context, *continuation], len(context), self.max_length) for _, context, continuation in requests]
        answers = self._answers(rows, disable_tqdm)
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts, each in windows of full length that score every token once."""
        rows: list[Row] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            found = get_rolling_token_windows(
                token_list=self._tokenizer.encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for inputs, predicted in found:
                tokens = np.array([*inputs, predicted[-1]], np.int32)
                rows.append(Row(tokens, len(tokens) - len(predicted)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._answers(rows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each up to the first of its stop strings."""
        texts = []
        for request in tqdm(requests, desc="pretrain_xla generate_until", disable=disable_tqdm):
            prompt, options = request.args
            text = self._continue(prompt, dict(options))
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def _continue(self, prompt: str, options: dict[str, Any]) -> str:
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(options))
        stops = handle_stop_sequences(kwargs["until"], eos=None)
        temperature = float(kwargs.get("temperature", 1.0)) if kwargs["do_sample"] else 0.0
        sampling = Sampling(temperature, int(kwargs.get("top_k", 0)), float(kwargs.get("top_p", 1.0)))
        request = Request(int(kwargs["max_gen_toks"]), sampling, seed=0)
        parts = self._generator.stream([prompt], request, [stop for stop in stops if stop])
        text = "".join(part for _, part in parts)
        return postprocess_generated_text(text, stops, think_end_token=None)

    def _answers(self, rows: Sequence[Row], disable_tqdm: bool) -> list[tuple[float, bool]]:
        with tqdm(total=len(rows), desc="pretrain_xla loglikelihood", disable=disable_tqdm) as bar:
            scores = self._scorer(rows, lambda done: bar.update(done - bar.n))
        return [(score.logprob, score.greedy) for score in scores]
