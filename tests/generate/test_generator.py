"""Continuing text: the same tokens as the plainest loop, whatever the padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain_xla.config import RunConfig
from pretrain_xla.data.tokenizer import BytesTokenizer
from pretrain_xla.errors import UserError
from pretrain_xla.generate.generator import Generator
from pretrain_xla.generate.sampling import Sampling
from pretrain_xla.model import GPT
from pretrain_xla.runtime.torch_runtime import TorchRuntime

from .conftest import make_model

GREEDY = Sampling(temperature=0)


@pytest.fixture
def runtime(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[TorchRuntime]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    runtime = TorchRuntime(config)
    yield runtime
    runtime.close()


@pytest.fixture
def generator(model: GPT, runtime: TorchRuntime) -> Generator:
    return Generator(model, BytesTokenizer(), runtime)


def tokens(generator: Generator, prompt: str, count: int, sampling: Sampling = GREEDY, seed: int = 0) -> list[int]:
    return list(generator.stream(prompt, max_new_tokens=count, sampling=sampling, seed=seed))


def plain_loop(model: GPT, prompt: bytes, count: int) -> list[int]:
    """The likeliest token, again and again, with no padding and no window of fixed length."""
    ids = list(prompt)
    model.eval()
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids[-model.config.seq_length :]]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("prompt", ["a", "ab cd", "exactly twel", "a prompt that is longer than the window"])
def test_greedy_is_the_plain_loop_before_and_beyond_the_window(prompt: str, generator: Generator, model: GPT) -> None:
    assert len("exactly twel") == model.config.seq_length
    expected = plain_loop(model, prompt.encode(), 20)
    assert BytesTokenizer().end_of_text not in expected
    assert len(set(expected)) > 1, "a loop of one token would show nothing"
    assert tokens(generator, prompt, 20) == expected


def test_it_ends_at_end_of_text_and_does_not_give_it_out(model: GPT, runtime: TorchRuntime) -> None:
    free = tokens(Generator(model, BytesTokenizer(), runtime), "abc", 20)
    last = next(token for token in free if token != free[0])
    ending = Generator(model, replace(BytesTokenizer(), end_of_text=last), runtime)
    assert tokens(ending, "abc", 20) == free[: free.index(last)]


def test_a_seed_repeats_the_text(generator: Generator) -> None:
    sampling = Sampling(temperature=1.5)
    assert tokens(generator, "abc", 12, sampling, 5) == tokens(generator, "abc", 12, sampling, 5)
    assert tokens(generator, "abc", 12, sampling, 5) != tokens(generator, "abc", 12, sampling, 6)


def test_the_text_begins_with_the_prompt(generator: Generator) -> None:
    text = generator.generate("abc", max_new_tokens=6, sampling=GREEDY, seed=0)
    assert text == "abc" + BytesTokenizer().decode(tokens(generator, "abc", 6))


def test_nothing_to_start_from_and_nothing_to_add(generator: Generator) -> None:
    assert len(tokens(generator, "", 3)) == 3
    assert tokens(generator, "abc", 0) == []


def test_a_tokenizer_that_is_not_the_models_is_refused(model: GPT, runtime: TorchRuntime) -> None:
    with pytest.raises(UserError, match=r"'bytes' has 300 tokens and the model 257: .*--tokenizer"):
        Generator(model, replace(BytesTokenizer(), vocab_size=300), runtime)


@pytest.mark.parametrize(("which", "step"), [("newest", 2), ("best", 1)])
def test_a_run_is_loaded_with_its_own_tokenizer(which: str, step: int, run_dir: Path, config: RunConfig) -> None:
    loaded = Generator.load(str(run_dir), tokenizer=None, runtime="torch", device="cpu", which=which)
    try:
        assert loaded.tokenizer == BytesTokenizer()
        assert tokens(loaded, "abc", 8) == plain_loop(make_model(config, seed=step), b"abc", 8)
    finally:
        loaded.runtime.close()
