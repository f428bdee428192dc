"""The words of `generate.py`: a prompt on the command line, from a pipe, or typed at `>>`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from pretrain_xla.data.tokenizer import decode_after
from pretrain_xla.errors import UserError
from pretrain_xla.generate.generator import Generator
from pretrain_xla.generate.sampling import Sampling


@dataclass(frozen=True)
class GenerateFlags:
    """Continue text with a trained model."""

    model: str
    """Run folder, checkpoints folder, or one checkpoint."""
    tokenizer: str | None = None
    """Tokenizer; none: the one the run was trained with."""
    seed: int = 42
    """Seed of the draws."""
    temperature: float = 1.0
    """0: always the likeliest token."""
    max_new_tokens: int = 100
    """Tokens to add at most."""
    top_k: int = 0
    """Draw among the k likeliest; 0: all."""
    top_p: float = 1.0
    """Draw among the fewest that reach this probability; 1: all."""
    prompt: str | None = None
    """Text to continue; none: ask for it."""
    output: str | None = None
    """File to write the text to, besides the screen."""
    checkpoint: Literal["newest", "best"] = "newest"
    """Which checkpoint of a run."""
    runtime: Literal["xla", "torch"] | None = None
    """none: xla where PJRT_DEVICE is set, else torch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """torch runtime: device."""


def generate_command(arguments: Sequence[str]) -> None:
    """Parse, load, and continue one prompt or as many as are typed.

    Raises:
        UserError: no checkpoint, no tokenizer, or a setting out of range.
    """
    flags = tyro.cli(Annotated[GenerateFlags, tyro.conf.arg(name="")], prog="generate.py", args=list(arguments))
    if flags.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {flags.max_new_tokens}: ask for at least 1")
    if flags.output is not None and flags.prompt is None:
        raise UserError(f"--output {flags.output} needs --prompt: what is typed at the prompt goes to the screen")
    if flags.output is not None:
        _check_writable(flags.output)
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p)
    runtime = flags.runtime or ("xla" if "PJRT_DEVICE" in os.environ else "torch")
    generator = Generator.load(
        flags.model, tokenizer=flags.tokenizer, runtime=runtime, device=flags.device, which=flags.checkpoint
    )
    try:
        if flags.prompt is not None:
            text = _print_stream(generator, flags.prompt, flags, sampling)
            if flags.output is not None:
                with open(flags.output, "w", encoding="utf-8") as file:
                    file.write(text + "\n")
            return
        while (line := _ask()) is not None:
            if line.strip():
                _print_stream(generator, line, flags, sampling)
    finally:
        generator.runtime.close()


def _check_writable(path: str) -> None:
    """Find out before the model is loaded, not after it has written."""
    try:
        with open(path, "a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UserError(f"--output {path} cannot be written ({error.strerror}): name another file") from None


def _ask() -> str | None:
    """A prompt from the person or the pipe; none at its end."""
    try:
        return input(">> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def _print_stream(generator: Generator, prompt: str, flags: GenerateFlags, sampling: Sampling) -> str:
    """Print the text as it comes; returns all of it."""
    print(prompt, end="", flush=True)
    tokens: list[int] = []
    shown = ""
    for token in generator.stream(prompt, max_new_tokens=flags.max_new_tokens, sampling=sampling, seed=flags.seed):
        tokens.append(token)
        text = decode_after(generator.tokenizer, prompt, tokens)
        if not text.endswith("\ufffd"):  # a character may need several tokens
            print(text[len(shown) :], end="", flush=True)
            shown = text
    text = decode_after(generator.tokenizer, prompt, tokens)
    print(text[len(shown) :], flush=True)
    return prompt + text
