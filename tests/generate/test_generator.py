"""Generation compared with a plain loop, for any padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain_xla.config import RunConfig
from pretrain_xla.errors import UserError
from pretrain_xla.generate.continuation import Request
from pretrain_xla.generate.generator import Generator
from pretrain_xla.generate.sampling import Sampling
from pretrain_xla.model import GPT
from pretrain_xla.runtime.torch_runtime import TorchRuntime
from pretrain_xla.tokenizers.bytes_tokenizer import BytesTokenizer

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


def tokens(
    generator: Generator, prompt: str, count: int, sampling: Sampling = GREEDY, seed: int = 0, **changes: Any
) -> list[int]:
    return [token for _, token in generator.tokens([prompt], Request(count, sampling, seed, **changes))]


def plain_loop(model: GPT, prompt: bytes, count: int) -> list[int]:
    """The likeliest token, again and again, with no padding and no cache; a full window moves on by half its length."""
    ids, begin = list(prompt), 0
    model.eval()
    with torch.no_grad():
        for _ in range(count):
            while len(ids) - begin > model.config.seq_length:
                begin += model.config.seq_length // 2
            ids.append(int(model(torch.tensor([ids[begin:]]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("prompt", ["a", "ab cd", "exactly twel", "a prompt that is longer than the window"])
def test_greedy_is_the_plain_loop_before_and_beyond_the_window(prompt: str, generator: Generator, model: GPT) -> None:
    assert len("exactly twel") == model.config.seq_length
    expected = plain_loop(model, prompt.encode(), 20)
    assert BytesTokenizer().end_of_text not in expected
    assert len(set(expected)) > 1, "a loop of one token would show nothing"
    assert tokens(generator, prompt, 20) == expected
    assert tokens(generator, prompt, 20, cached=False) == expected


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
    (text,) = generator.generate(["abc"], Request(6, GREEDY))
    assert text == "abc" + BytesTokenizer().decode(tokens(generator, "abc", 6))


def test_nothing_to_start_from_and_nothing_to_add(generator: Generator) -> None:
    assert len(tokens(generator, "", 3)) == 3
    assert tokens(generator, "abc", 0) == []


def test_a_tokenizer_that_is_not_the_models_is_refused(model: GPT, runtime: TorchRuntime) -> None:
    with pytest.raises(UserError, match=r"'bytes' has 300 tokens and the model 257: .*--tokenizer"):
        Generator(model, replace(BytesTokenizer(), vocab_size=300), runtime)


PROMPTS = ["a", "ab cd", "a prompt that is longer than the window", "exactly twel", "four"]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.3), Sampling(0.9, 20, 0.9, 0.01, 1.2)], ids=str)
def test_a_batch_is_its_rows_alone_with_and_without_cache(sampling: Sampling, generator: Generator) -> None:
    """Rows outgrow their windows at different times."""
    request = Request(25, sampling, seed=5)
    together = rows_of(generator, PROMPTS, request)
    assert together == rows_of(generator, PROMPTS, replace(request, cached=False))
    assert together[0] == rows_of(generator, PROMPTS[:1], request)[0]
    if sampling is GREEDY:  # in others the chance of a row depends on its number
        assert together == [rows_of(generator, [prompt], request)[0] for prompt in PROMPTS]
    else:
        assert len(set(map(tuple, rows_of(generator, ["same"] * 4, request)))) == 4, "samples differ"


def test_rows_end_by_themselves(model: GPT, runtime: TorchRuntime) -> None:
    free = rows_of(Generator(model, BytesTokenizer(), runtime), PROMPTS, Request(25, GREEDY))
    stops = (free[1][4], free[3][15])
    expected = [row[: min([row.index(stop) for stop in stops if stop in row], default=25)] for row in free]
    assert len({len(row) for row in expected}) > 2
    assert rows_of(Generator(model, BytesTokenizer(), runtime), PROMPTS, Request(25, GREEDY, stops=stops)) == expected


def rows_of(generator: Generator, prompts: list[str], request: Request) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in prompts]
    for row, token in generator.tokens(prompts, request):
        rows[row].append(token)
    return rows


def test_a_stop_string_ends_the_text_before_it(generator: Generator) -> None:
    whole = generator.generate(["abc", "xyz"], Request(20, GREEDY))
    stop = whole[0][8:10]
    stopped = generator.generate(["abc", "xyz"], Request(20, GREEDY), [stop, "never comes"])
    assert stopped == [text[: text.index(stop, 3)] if stop in text[3:] else text for text in whole]
    pieces = [text for _, text in generator.stream(["abc"], Request(20, GREEDY), [stop])]
    assert "abc" + "".join(pieces) == stopped[0]
    assert len(pieces) > 1, "it comes in pieces"


@pytest.mark.parametrize(("which", "step"), [("newest", 2), ("best", 1)])
def test_a_run_is_loaded_with_its_own_tokenizer(which: str, step: int, run_dir: Path, config: RunConfig) -> None:
    loaded = Generator.load(str(run_dir), tokenizer=None, runtime="torch", device="cpu", which=which)
    try:
        assert loaded.tokenizer == BytesTokenizer()
        assert tokens(loaded, "abc", 8) == plain_loop(make_model(config, seed=step), b"abc", 8)
    finally:
        loaded.runtime.close()
