"""Command-line interface of `generate.py`: prompts from flags, a file or a pipe, or typed at `>>`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from pretrain_xla.command_line import parse
from pretrain_xla.errors import UserError, out_of_memory
from pretrain_xla.generate.continuation import Request
from pretrain_xla.generate.generator import Generator
from pretrain_xla.generate.sampling import Sampling
from pretrain_xla.generate.text import TextStream

MEMORY = (
    "continue fewer prompts at a time (--prompt, --prompt-file, --num-samples), or for fewer tokens (--max-new-tokens); "
    "`python -m pretrain_xla preflight` estimates what a model needs on a TPU"
)


@dataclass(frozen=True)
class GenerateFlags:
    """Generate text with a trained model."""

    model: str
    """Run folder, checkpoints folder, one checkpoint, or a pretrained model by name (gpt2)."""
    tokenizer: str | None = None
    """Tokenizer. None means the one the model was trained with."""
    seed: int = 42
    """Random seed."""
    temperature: float = 1.0
    """0 means greedy: always the most likely token."""
    max_new_tokens: int = 100
    """Maximum number of new tokens."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0 means all."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with at least this probability; 1 means all."""
    min_p: float = 0.0
    """Sample from tokens with at least this fraction of the highest probability; 0 means all."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that are already in the text become less likely."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Stop before this text; may be given several times. End-of-text always stops."""
    stop_token: tyro.conf.UseAppendAction[tuple[int, ...]] = ()
    """Stop at this token id; may be given several times."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue. If given several times, all are continued together. Without prompts, the user types them."""
    prompt_file: str | None = None
    """File with one prompt on each line, all continued together. None means no file."""
    num_samples: int = 1
    """Number of continuations of each prompt."""
    show_tokens: bool = False
    """Print each token by itself, as [id text]."""
    output: str | None = None
    """File to which the text is also written. None means no file."""
    checkpoint: Literal["newest", "best"] = "newest"
    """Which checkpoint of a run."""
    runtime: Literal["xla", "torch"] | None = None
    """None means xla if PJRT_DEVICE is set, else torch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """torch runtime: device."""
    cache: bool = True
    """--no-cache: process the whole text again for each token, for comparison."""

    def request(self) -> Request:
        """The request that the flags describe."""
        sampling = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        return Request(self.max_new_tokens, sampling, self.seed, self.stop_token, self.cache)


def generate_command(arguments: Sequence[str]) -> None:
    """Load the model and continue the given prompts, or those that the user types.

    Raises:
        UserError: no checkpoint, no tokenizer, an unreadable file, a setting out of range, or not enough memory.
    """
    with out_of_memory(MEMORY):
        _generate(parse(GenerateFlags, arguments, program="generate.py", command="generate"))


def _generate(flags: GenerateFlags) -> None:
    for name, value in (("max-new-tokens", flags.max_new_tokens), ("num-samples", flags.num_samples)):
        if value < 1:
            raise UserError(f"--{name} {value}: ask for at least 1")
    if "" in flags.stop:
        raise UserError("--stop '': name a text to stop at")
    prompts = [*flags.prompt, *(_prompts_of(flags.prompt_file) if flags.prompt_file is not None else [])]
    if flags.output is not None:
        if not prompts:
            raise UserError(f"--output {flags.output} needs --prompt: continuations of typed prompts go to the screen")
        _check_writable(flags.output)
    request = flags.request()
    runtime = flags.runtime or ("xla" if "PJRT_DEVICE" in os.environ else "torch")
    generator = Generator.load(
        flags.model, tokenizer=flags.tokenizer, runtime=runtime, device=flags.device, which=flags.checkpoint
    )
    with contextlib.closing(generator.runtime):
        vocab_size = generator.model.config.vocab_size
        for stop in flags.stop_token:
            if not 0 <= stop < vocab_size:
                raise UserError(f"--stop-token {stop}: the model's tokens are 0 to {vocab_size - 1}")
        if prompts:
            texts = _continue(generator, prompts, flags, request)
            if flags.output is not None:
                with open(flags.output, "w", encoding="utf-8") as file:
                    file.write("\n\n".join(texts) + "\n")
            return
        while (line := _ask()) is not None:
            if line.strip():
                _continue(generator, [line], flags, request)


def _prompts_of(path: str) -> list[str]:
    try:
        # Files from Windows start with a byte order mark (utf-8-sig). `splitlines` would also split at U+2028 and the like.
        with open(path, encoding="utf-8-sig") as file:
            prompts = [line for line in file.read().split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt-file {path} cannot be read ({error}): name a text file") from None
    if not prompts:
        raise UserError(f"--prompt-file {path} contains no prompt: write one on each line")
    return prompts


def _check_writable(path: str) -> None:
    """Check before the model is loaded; leaves no new file behind."""
    there = os.path.exists(path)
    try:
        with open(path, "a", encoding="utf-8"):
            pass
        if not there:
            os.unlink(path)
    except OSError as error:
        raise UserError(f"--output {path} cannot be written ({error.strerror}): name another file") from None


def _ask() -> str | None:
    """The next prompt from the user or the pipe, or None at the end."""
    try:
        return input(">> " if sys.stdin.isatty() else "").removeprefix("\ufeff")
    except (EOFError, KeyboardInterrupt):
        return None


def _continue(generator: Generator, prompts: Sequence[str], flags: GenerateFlags, request: Request) -> list[str]:
    """Print the texts and return them: a single one as it is generated, several when all are done."""
    prompts = [prompt for prompt in prompts for _ in range(flags.num_samples)]
    if flags.show_tokens:
        return _print_tokens(generator, prompts, request, flags.stop)
    if len(prompts) > 1:
        texts = generator.generate(prompts, request, flags.stop)
        for number, text in enumerate(texts, start=1):
            print(f"--- {number} of {len(texts)}\n{text}", flush=True)
        return texts
    text = prompts[0]
    print(text, end="", flush=True)
    for _, new in generator.stream(prompts, request, flags.stop):
        print(new, end="", flush=True)
        text += new
    print(flush=True)
    return [text]


def _print_tokens(
    generator: Generator, prompts: Sequence[str], request: Request, stop_strings: Sequence[str]
) -> list[str]:
    """Print `[id text]` for each token of the prompts and continuations, up to the token that completes a stop string."""

    def shown(token: int) -> str:
        return f"[{token} {generator.tokenizer.decode([token])!r}]"

    rows = [[shown(token) for token in generator.prompt_ids(prompt)] for prompt in prompts]
    streams = [TextStream(generator.tokenizer, prompt, stop_strings) for prompt in prompts]
    tokens = generator.tokens(prompts, request)
    for row, token in tokens:
        streams[row].add(token)
        if streams[row].ended:
            tokens.end(row)
        else:
            rows[row].append(shown(token))
    lines = [" ".join(row) for row in rows]
    print("\n".join(lines), flush=True)
    return lines
