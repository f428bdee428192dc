"""Scores compared with lm-eval's, computed with transformers on the same items, example by example."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from pretrain_xla.evaluate import Evaluation, Settings
from pretrain_xla.evaluate.evaluation import Result
from pretrain_xla.evaluate.lm_eval_command import register
from pretrain_xla.tokenizers.load import load_tokenizer
from pretrain_xla.tokenizers.train import train_tokenizer

from .conftest import ORIGINAL, SHARED, TEXT, Trio, silent

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("accelerate", reason="lm-eval's transformers model needs it")
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

TASKS = Path(lm_eval.__file__).parent / "tasks"
YAMLS = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "winogrande": "winogrande/default.yaml",
    "lambada": "lambada/lambada_openai.yaml",
}


def their_samples(task: str, file: Path, model: Any) -> list[dict[str, Any]]:
    """lm-eval's own task (its prompts, its choices, its metrics) on a local file, one sample for each item."""
    split = "test" if task in ("arc_easy", "lambada") else "validation"
    folder = file.parent / f"lm_eval_{task}"
    folder.mkdir(exist_ok=True)
    (folder / "task.yaml").write_text(
        f"include: {TASKS / YAMLS[task]}\ntask: local_{task}\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs:\n  data_files:\n    {split}: {file}\n  cache_dir: {folder}\n"
        f"training_split: null\nvalidation_split: {'validation' if split == 'validation' else 'null'}\n"
        f"test_split: {'test' if split == 'test' else 'null'}\n"
    )
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=[f"local_{task}"], task_manager=manager, bootstrap_iters=0)
    assert found is not None
    samples = sorted(found["samples"][f"local_{task}"], key=lambda sample: sample["doc_id"])
    # A mean over the samples, or lm-eval's own aggregate where that is something else.
    results = found["results"][f"local_{task}"]
    return [{**sample, "results": results} for sample in samples]


def our_result(task: str, file: Path, trio: Trio) -> Result:
    evaluation = Evaluation(
        trio.ours, trio.runtime, lambda: trio.tokenizer, [f"{task}={file}"], Settings(), batch_size=2
    )
    return evaluation(silent)[0]


def assert_same(task: str, ours: Result, theirs: list[dict[str, Any]]) -> None:
    assert ours.items == len(theirs) > 0
    for example, sample in zip(ours.examples, theirs, strict=True):
        if task == "lambada":
            logprob, greedy = sample["filtered_resps"][0]
            assert example["logprob"] == pytest.approx(logprob, rel=1e-5, abs=1e-4)
            assert example["acc"] == int(greedy)
            continue
        logprobs = [logprob for logprob, _ in sample["filtered_resps"]]
        assert example["logprobs"] == pytest.approx(logprobs, rel=1e-5, abs=1e-4)
        for name in ("acc", "acc_norm"):
            if name in sample:
                assert (example[name] == example["gold"]) == bool(sample[name])
    results = theirs[0]["results"]
    for name, value in ours.scores.items():
        assert value == pytest.approx(results[f"{name},none"], rel=1e-5), name


@pytest.fixture(scope="module")
def hflm(trio: Trio) -> Any:
    return HFLM(pretrained=trio.theirs, tokenizer=trio.their_tokenizer, device="cpu", batch_size=3)


@pytest.mark.parametrize("task", YAMLS)
def test_to_the_example(task: str, trio: Trio, hflm: Any, write: Callable[..., Path]) -> None:
    items = ORIGINAL[task]
    if (
        task == "hellaswag"
    ):  # lm-eval asserts that no choice is longer than the model; what we do then is tested elsewhere
        items = [items[0], {**items[1], "endings": [*items[1]["endings"][:3], "Answer: water."]}, items[2]]
    if task == "piqa":
        items = items[:2]
    file = write(f"{task}.jsonl", items)
    assert_same(task, our_result(task, file, trio), their_samples(task, file, hflm))


@pytest.mark.parametrize("task", ["hellaswag", "lambada"])
def test_to_the_example_on_the_real_items(task: str, trio: Trio, hflm: Any, tmp_path: Path) -> None:
    source = SHARED / "eval" / {"hellaswag": "hellaswag_val.jsonl.gz", "lambada": "lambada_test_openai.jsonl"}[task]
    if not source.exists():
        pytest.skip(f"{source} is not there")
    with gzip.open(source, "rt") if source.suffix == ".gz" else source.open() as file:
        records = [json.loads(line) for _, line in zip(range(60), file, strict=False)]
    ours = tmp_path / "ours.jsonl"
    ours.write_text("".join(json.dumps(record) + "\n" for record in records))
    theirs = tmp_path / "theirs.jsonl"
    if task == "hellaswag":  # to the form that lm-eval reads; its own clean-up leaves what is clean as it is
        records = [
            {
                "ind": number,
                "activity_label": record["query"].split(": ", 1)[0],
                "ctx_a": record["query"].split(": ", 1)[1],
                "ctx_b": "",
                "endings": record["choices"],
                "label": str(record["gold"]),
            }
            for number, record in enumerate(records)
            if max(len(trio.tokenizer.encode(choice)) for choice in record["choices"]) < trio.ours.config.seq_length
        ]
        kept = [
            {"query": f"{r['activity_label']}: {r['ctx_a']}", "choices": r["endings"], "gold": r["label"]}
            for r in records
        ]
        assert len(kept) > 20
        ours.write_text("".join(json.dumps(record) + "\n" for record in kept))
    theirs.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert_same(task, our_result(task, ours, trio), their_samples(task, theirs, hflm))


def test_our_model_inside_lm_eval(trio: Trio, hflm: Any, write: Callable[..., Path]) -> None:
    register()
    register()  # twice does no harm
    arguments = {"pretrained": str(trio.run_dir), "runtime": "torch", "device": "cpu"}
    ours = lm_eval.api.registry.get_model("pretrain_xla").create_from_arg_obj(arguments, {"batch_size": "auto"})
    assert ours.max_length == hflm.max_length
    assert ours.eot_token_id == hflm.eot_token_id == hflm.prefix_token_id
    file = write("lambada.jsonl", ORIGINAL["lambada"])
    own, their = their_samples("lambada", file, ours), their_samples("lambada", file, hflm)
    assert own[0]["results"]["acc,none"] == their[0]["results"]["acc,none"]
    for left, right in zip(own, their, strict=True):
        assert left["filtered_resps"][0][0] == pytest.approx(right["filtered_resps"][0][0], rel=1e-5)
    text = " ".join(item["text"] for item in ORIGINAL["lambada"])
    rolling = [_instance("loglikelihood_rolling", (string,)) for string in (text, "wait", "a roof " * 40)]
    expected = hflm.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert ours.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(expected, rel=1e-5)
    assert all(math.isfinite(value) for value in expected)


def test_a_model_that_learnt_with_a_token_before_its_texts(
    trio: Trio, write: Callable[..., Path], tmp_path: Path
) -> None:
    register()
    trio.theirs.save_pretrained(tmp_path)
    train_tokenizer([TEXT], 400, str(tmp_path), min_frequency=1, special_tokens=["<s>"])
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    begin = made.token_to_id("<s>")
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    made.save(str(tmp_path / "tokenizer.json"))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", bos_token="<s>")
    hflm = HFLM(pretrained=trio.theirs, tokenizer=fast, device="cpu", batch_size=3)
    arguments = {"pretrained": str(tmp_path), "runtime": "torch", "device": "cpu"}
    ours = lm_eval.api.registry.get_model("pretrain_xla").create_from_arg_obj(arguments)
    assert ours.prefix_token_id == hflm.prefix_token_id == begin != ours.eot_token_id
    pairs = [
        _instance("loglikelihood", pair) for pair in (("A man sits", " on a roof"), ("", "wait"), (TEXT, " or two"))
    ]
    expected = [logprob for logprob, _ in hflm.loglikelihood(pairs, disable_tqdm=True)]
    found = [logprob for logprob, _ in ours.loglikelihood(pairs, disable_tqdm=True)]
    assert found == pytest.approx(expected, rel=1e-5)
    free = [_instance("generate_until", ("A man sits", {"max_gen_toks": 12, "until": []}))]
    assert ours.generate_until(free, disable_tqdm=True) == hflm.generate_until(free, disable_tqdm=True)
    file = write("lambada.jsonl", ORIGINAL["lambada"])
    arguments = {"load_tokenizer": lambda: load_tokenizer(str(tmp_path)), "tasks": [f"lambada={file}"]}
    own = Evaluation(trio.ours, trio.runtime, settings=Settings(), batch_size=2, begins=True, **arguments)(silent)[0]
    assert_same("lambada", own, their_samples("lambada", file, hflm))
    # Whole texts: by default lm-eval would put the token there twice.
    hflm = HFLM(pretrained=trio.theirs, tokenizer=fast, add_bos_token=False, device="cpu", batch_size=3)
    requests = [_instance("loglikelihood_rolling", (text,)) for text in (TEXT, "wait")]
    expected = hflm.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(expected, rel=1e-5)


def test_generation_inside_lm_eval(trio: Trio, hflm: Any) -> None:
    register()
    arguments = {"pretrained": str(trio.run_dir), "runtime": "torch", "device": "cpu"}
    ours = lm_eval.api.registry.get_model("pretrain_xla").create_from_arg_obj(arguments)
    free = {"max_gen_toks": 12, "until": []}
    requests = [_instance("generate_until", (prompt, free)) for prompt in ("A man sits", "Question: What")]
    expected = hflm.generate_until(requests, disable_tqdm=True)
    assert ours.generate_until(requests, disable_tqdm=True) == expected
    assert all(len(text) > 4 for text in expected)
    stop = expected[0][2:4]
    stopped = [_instance("generate_until", ("A man sits", {"max_gen_toks": 12, "until": [stop]}))]
    assert ours.generate_until(stopped, disable_tqdm=True) == [expected[0].split(stop)[0]]


def _instance(kind: Any, arguments: tuple[Any, ...]) -> Any:
    return lm_eval.api.instance.Instance(request_type=kind, doc={}, arguments=arguments, idx=0)
