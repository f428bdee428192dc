"""`make train` in small: on the documentation inside Python, and on one's own text."""

import json
from pathlib import Path

from .conftest import run, summary

LEFT = {"config.yaml", "metrics.jsonl", "summary.json", "loss.png", "sample.txt", "checkpoints", "tokenizer"}


def test_quickstart_leaves_everything(tmp_path: Path) -> None:
    done = run("-m", "pretrain_xla", "quickstart", "--train-steps", "6", "--prompt", "The", cwd=tmp_path, fresh=True)
    assert done.status == 0, done.errors
    run_dir = tmp_path / "runs" / "quickstart"
    names = {path.name for path in run_dir.iterdir()}
    assert names >= LEFT
    assert any(name.startswith("events.out.tfevents") for name in names)
    counts = summary(run_dir)
    assert counts["graphs"] == {"train": 1, "validation": 1, "other": 0}
    assert counts["recompilations"] == counts["unplanned_host_transfers"] == 0
    assert counts["last_valid_loss"] < counts["first_valid_loss"]
    assert (run_dir / "sample.txt").read_text().startswith("The")
    assert (run_dir / "loss.png").stat().st_size > 10_000
    info = json.loads((tmp_path / "data" / "quickstart" / "dataset.json").read_text())
    assert info["splits"]["train"]["tokens"] > 500_000


def test_own_text(tmp_path: Path) -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven"]
    lines = ({"text": " ".join(words[(i * k + k) % 7] for k in range(200)) + f" end of story {i}."} for i in range(300))
    (tmp_path / "my text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("-m", "pretrain_xla", "quickstart", "--corpus", "my text.jsonl", "--train-steps", "4", cwd=tmp_path)
    assert done.status == 0, done.errors
    assert (tmp_path / "runs" / "own-my-text" / "sample.txt").exists()
    nothing = run("-m", "pretrain_xla", "quickstart", "--corpus", "nowhere", cwd=tmp_path)
    assert nothing.status == 2
    assert nothing.last_error.startswith("error: ")
    assert "nowhere" in nothing.last_error
