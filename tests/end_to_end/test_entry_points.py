"""The original's command lines, verbatim, followed by flags that reduce the model's size."""

from pathlib import Path

import pytest

from .conftest import VOCAB_SIZE, losses, run, summary, torchrun

# The training command of the original's README with all of its flags; SMALL follows and overrides the sizes.
ORIGINAL = """
    --seed 1061109567
    --vocab-size 50304 --seq-length 1024 --d-model 768 --num-layers 12 --num-heads 12 --d-ff 3072
    --activation gelu --tie-weights
    --wandb-project pre-training-gpt2 --wandb-name gpt2-124m --wandb-logging-interval 100
    --optim-type adamw --learning-rate 0.0006 --betas 0.9 0.95 --weight-decay 0.1
    --decay-method cosine --warmup-steps 750 --min-lr 0.00006 --decay-steps 20000
    --train-batch-size 256 --eval-batch-size 256 --gradient-accum-step 1 --mixed-precision bf16
    --train-steps 20000 --valid-steps 100 --valid-interval 500 --save-interval 1000 --saved-checkpoint-limit 6
    --max-grad-norm 1.0
""".split()
SMALL = f"""
    --vocab-size {VOCAB_SIZE} --seq-length 32 --d-model 32 --num-layers 2 --num-heads 4 --d-ff 64
    --train-batch-size 8 --eval-batch-size 8 --train-steps 6 --valid-steps 2 --valid-interval 3 --save-interval 3
""".split()
ENTRY_POINTS = {
    "run_pretrain.py": ([], {}),
    "run_pretrain_xla.py": (["--mp-start-method", "spawn", "--use-syncfree-optim"], {"PJRT_DEVICE": "CPU"}),
}


def original(tokens: Path, checkpoints: Path) -> list[str]:
    folders = {"checkpoints-dir": checkpoints, "train-dir": tokens / "train", "valid-dir": tokens / "valid"}
    return [part for key, value in folders.items() for part in (f"--{key}", str(value))] + ORIGINAL + SMALL


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_the_readme_command_of_the_original(entry_point: str, tokens: Path, tmp_path: Path) -> None:
    more, extra = ENTRY_POINTS[entry_point]
    done = run(entry_point, *original(tokens, tmp_path), *more, fresh=True, **extra)
    assert done.status == 0, done.errors
    assert "note: --wandb-logging-interval, --wandb-name, --wandb-project have no effect" in done.output
    if more:
        assert "note: --use-syncfree-optim has no effect" in done.output
    assert len(losses(tmp_path)) == 6
    assert summary(tmp_path)["last_valid_loss"] < summary(tmp_path)["first_valid_loss"]
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "loss.png", "step_00000006"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)


def test_original_under_torchrun(tokens: Path, tmp_path: Path) -> None:
    done = torchrun(2, "run_pretrain.py", *original(tokens, tmp_path), "--ddp-backend", "gloo")
    assert done.status == 0, done.errors
    assert len(losses(tmp_path)) == 6
    assert summary(tmp_path)["mesh"] == {"data": 2}


@pytest.mark.parametrize("entry_point", ENTRY_POINTS)
def test_do_test_prints_loss_and_perplexity(entry_point: str, tokens: Path, tmp_path: Path) -> None:
    _, extra = ENTRY_POINTS[entry_point]
    assert run(entry_point, *original(tokens, tmp_path), **extra).status == 0
    trained = summary(tmp_path)["last_valid_loss"]
    done = run(entry_point, *original(tokens, tmp_path), "--do-test", **extra)
    assert done.status == 0, done.errors
    lines = [line.split(": ") for line in done.output.splitlines() if line.startswith(("Loss: ", "Perplexity: "))]
    printed = {name: float(value) for name, value in lines}
    assert printed["Loss"] == pytest.approx(trained, abs=1e-6)
    assert printed["Perplexity"] == pytest.approx(2.718281828**trained, rel=1e-4)


def test_wandb_offline_or_a_clear_error(tokens: Path, tmp_path: Path) -> None:
    done = run("run_pretrain.py", *original(tokens, tmp_path), "--wandb-logging", WANDB_MODE="offline")
    try:
        import wandb  # noqa: F401
    except ModuleNotFoundError:
        assert done.status == 2
        assert done.last_error.startswith("error: wandb_logging needs Weights & Biases: pip install wandb")
    else:
        assert done.status == 0, done.errors


def test_generate_greedy_is_the_same_on_both_runtimes(tokens: Path, tmp_path: Path) -> None:
    flags = [*original(tokens, tmp_path), "--vocab-size", "257", "--train-steps", "4"]
    assert run("run_pretrain.py", *flags).status == 0
    command = ["generate.py", "--model", str(tmp_path), "--tokenizer", "bytes", "--max-new-tokens", "40"]
    greedy = [*command, "--temperature", "0", "--prompt", "ab"]
    texts = [
        run(*greedy, "--runtime", "torch", fresh=True).output,
        run(*greedy, "--runtime", "xla", PJRT_DEVICE="CPU").output,
        run(*greedy, "--runtime", "xla", PJRT_DEVICE="CPU", CPU_NUM_DEVICES="2").output,
    ]
    assert texts[0].startswith("ab")
    assert len(texts[0].encode()) > 10  # longer than the context of 32 tokens, so the oldest are dropped
    assert texts[1:] == [texts[0]] * 2
    sampled = [*command, "--top-k", "9", "--top-p", "0.9", "--temperature", "0.7", "--prompt", "ab", "--seed"]
    first, other = (run(*sampled, seed).output for seed in ("1", "2"))
    assert first != other
    prompted = run(*command, "--temperature", "0", stdin="ab\n\ncd\n")
    assert prompted.status == 0
    assert prompted.output.startswith(texts[0])
    assert "\ncd" in prompted.output


def test_bad_generate_requests_give_one_line(tmp_path: Path) -> None:
    for arguments, expected in (
        (["--model", str(tmp_path)], "no complete checkpoint there"),
        (["--model", str(tmp_path), "--temperature", "-1"], "--temperature -1.0 is negative"),
        (["--model", str(tmp_path), "--top-p", "0"], "--top-p 0.0 is outside (0, 1]"),
    ):
        done = run("generate.py", *arguments)
        assert done.status == 2
        assert expected in done.last_error
        assert "Traceback" not in done.errors
