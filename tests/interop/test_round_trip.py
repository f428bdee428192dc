"""A trained run, opened in `transformers`: the same continuation, token by token; and its model card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from pretrain_xla import cli
from pretrain_xla.errors import UserError
from pretrain_xla.generate import Generator, Request, Sampling
from pretrain_xla.interop.command import export_command, import_command
from pretrain_xla.interop.load import load_model
from pretrain_xla.tokenizers.load import load_tokenizer

from .conftest import open_in_transformers

MODERN = (
    "--num-heads 4 --num-kv-heads 2 --head-dim 8 --norm rmsnorm --positions rotary --gated --activation silu --no-bias "
    "--qk-norm"
)
GEMMA = MODERN.replace("rmsnorm", "rmsnorm_zero_centered").replace("silu", "gelu").replace(" --qk-norm", "") + (
    " --post-norm --scale-embeddings --attention-softcap 20 --logit-softcap 15 --query-scale 0.25"
)
MODELS = {"gpt2": "--num-heads 4", "qwen3": MODERN, "gemma2": GEMMA}
TEXT = "abcdefghijklmnopqrstuvwxyz, "  # each letter tells the next, which is learnt in moments


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model of the kind that the test names, trained for a moment on bytes of one text."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    documents = [json.dumps({"text": f"{number}: " + TEXT * 12}) for number in range(40)]
    Path("text.jsonl").write_text("\n".join(documents))
    cli.main(["prepare", "text.jsonl", "data", "--tokenizer", "bytes", "--valid-fraction", "0.5"])
    shape = (
        f"--vocab-size 257 --seq-length 64 --d-model 32 --num-layers 2 --d-ff 64 --tie-weights {MODELS[request.param]}"
    )
    loop = "--train-batch-size 8 --eval-batch-size 8 --train-steps 60 --warmup-steps 2 --learning-rate 0.02 --valid-steps 1"
    words = (
        f"train --runtime torch --device cpu --train-dir data/train --valid-dir data/valid --run-dir run {shape} {loop}"
    )
    cli.main([*words.split(), "--decay-steps", "60", "--min-lr", "0.001", "--no-tensorboard"])
    return tmp_path / "run"


@pytest.mark.parametrize("run", MODELS, indirect=True)
def test_the_same_continuation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.parent / "out"
    export_command([str(run), str(out)])
    assert "parameters, fp32" in capsys.readouterr().out
    assert "AutoTokenizer" in (out / "README.md").read_text()
    theirs, tokenizer = open_in_transformers(out), transformers.AutoTokenizer.from_pretrained(str(out))
    generator = Generator.load(str(run), tokenizer=None, runtime="torch", device="cpu")
    try:
        request = Request(max_new_tokens=40, sampling=Sampling(temperature=0))
        ours = [token for _, token in generator.tokens(["wxyz, ab"], request)]
        (text,) = generator.generate(["wxyz, ab"], request)
    finally:
        generator.runtime.close()
    prompt = tokenizer("wxyz, ab", return_tensors="pt")
    written = theirs.generate(**prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)[0]
    assert written[len(prompt["input_ids"][0]) :].tolist() == ours
    assert tokenizer.decode(written) == text
    assert len(set(ours)) > 5, "a loop of a few tokens would show little"


@pytest.mark.parametrize("run", ["gpt2"], indirect=True)
def test_the_folder_is_complete_and_the_model_card_states_what_is_known(run: Path) -> None:
    export_command(["run", "out", "--checkpoint", "best"])
    names = {path.name for path in Path("out").iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    card = Path("out/README.md").read_text()
    info = load_model("run").info
    assert info is not None
    assert info.valid_loss is not None
    for fact in (
        "`GPT2LMHeadModel`",
        "60 steps of 512 tokens, 30,720 in all",
        f"Validation loss {info.valid_loss:.4f}",
    ):
        assert fact in card
    assert "text.jsonl (`data/train`)" in card
    import_command(["out", "back"])
    back, original = load_model("back"), load_model("run")
    assert back.config == original.config
    for name, tensor in original.tensors.items():
        assert torch.equal(back.tensors[name][:257], tensor[:257]), name
    assert load_tokenizer(back.tokenizer or "").encode("abc") == list(b"abc")
    # What was imported is a run: it can be tested, trained further, and let write.
    train = "train --runtime torch --device cpu --train-dir data/train --valid-dir data/valid --no-tensorboard".split()
    loop = "--train-batch-size 8 --eval-batch-size 8 --valid-steps 1 --train-steps 2 --warmup-steps 1 --decay-steps 2".split()
    cli.main([*train, *loop, "--from-checkpoint", "back", "--run-dir", "more"])
    assert load_model("more").config == original.config
    with pytest.raises(SystemExit, match="2"):
        cli.main(["export", "nowhere", "out2"])
    assert not Path("out2").exists()


@pytest.mark.parametrize("run", ["gpt2"], indirect=True)
def test_a_shorter_context_is_a_prefix(run: Path) -> None:
    """Fewer positions: the weights are the same, and so is every logit within them."""
    import_command(["run", "short", "--seq-length", "16"])
    short = load_model("short")
    assert short.config.seq_length == 16
    assert torch.equal(
        short.tensors["position_embedding.weight"], load_model("run").tensors["position_embedding.weight"][:16]
    )
    with pytest.raises(UserError, match="its seq_length is 16, this run's is 32"):
        import_command(["short", "longer", "--seq-length", "32"])
