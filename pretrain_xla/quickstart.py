"""`make train`: the whole pipeline on this host, through the XLA compiler, in a few minutes.

It prepares text (by default Python's built-in documentation, so that nothing is downloaded), trains `configs/quickstart.yaml`,
validates, saves a checkpoint and generates a sample.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pretrain_xla.command_line import parse
from pretrain_xla.config import RunConfig, build_config
from pretrain_xla.config_file import load_yaml
from pretrain_xla.errors import UserError
from pretrain_xla.prepare.command import show_dataset
from pretrain_xla.prepare.dataset import prepare
from pretrain_xla.text.sources import open_source
from pretrain_xla.train.run import start_run

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
PROMPT = "The with statement"


@dataclass(frozen=True)
class QuickstartFlags:
    """Prepare text, train a small model through XLA, evaluate it and generate text."""

    corpus: str | None = None
    """Your own text: a file, .jsonl or folder. None means Python's built-in documentation."""
    text_column: str = "text"
    """Key or column with the text, in .jsonl, .parquet and .arrow files."""
    valid_fraction: float = 0.05
    """Share of the documents held out for validation."""
    prompt: str = PROMPT
    """Prompt of the sample."""
    train_steps: int | None = None
    """Number of training steps. None means that of configs/quickstart.yaml."""


def quickstart_command(arguments: Sequence[str]) -> None:
    """Run the whole pipeline, and print what to do next.

    Raises:
        UserError: the corpus cannot be read or is too small, or a folder cannot be written.
    """
    flags = parse(QuickstartFlags, arguments, program="python -m pretrain_xla quickstart", command="quickstart")
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    name = "quickstart" if flags.corpus is None else _name_of(flags.corpus)
    config = _config(name, flags.train_steps)
    console = Console(highlight=False)
    console.rule("1. text to tokens")
    info = prepare(
        open_source(flags.corpus or "quickstart", text_column=flags.text_column),
        f"data/{name}",
        train_vocab_size=config.model.vocab_size,
        valid_fraction=flags.valid_fraction,
        overwrite=flags.corpus is not None,
    )
    show_dataset(info)
    console.rule("2. training, through the XLA compiler")
    start_run(config)
    console.rule("3. a sample")
    sample = _write_sample(config, flags.prompt)
    console.print(sample, markup=False, soft_wrap=True)
    console.rule("next steps")
    for line in (
        f"look      {config.run_dir}/loss.png, {config.run_dir}/summary.json; tensorboard --logdir {config.run_dir}",
        f"write     python generate.py --model {config.run_dir}",
        "own text  make train CORPUS=path/to/text",
        "for real  python -m pretrain_xla prepare TEXT fineweb_edu",
        "          PJRT_DEVICE=TPU python run_pretrain_xla.py --config configs/modern_124m.yaml    (on a TPU VM)",
    ):
        console.print(line, markup=False, soft_wrap=True)


def _name_of(corpus: str) -> str:
    """Folder name for the user's corpus."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", os.path.basename(corpus.rstrip("/")).split(".")[0]).strip("-")
    return f"own-{stem or 'corpus'}"


def _config(name: str, train_steps: int | None) -> RunConfig:
    if not CONFIG.exists():
        raise UserError(f"{CONFIG} does not exist: run from a checkout of the repository")
    tree = load_yaml(str(CONFIG))
    tree["data"] |= {"train_dir": f"data/{name}/train", "valid_dir": f"data/{name}/valid"}
    tree["logging"] |= {"run_dir": f"runs/{name}"}
    if train_steps is not None:
        tree["train"] |= {"train_steps": train_steps}
        optim = tree["optim"]
        optim |= {
            "decay_steps": train_steps,
            "warmup_steps": min(optim["warmup_steps"], train_steps),
            "muon_momentum_warmup": min(optim.get("muon_momentum_warmup", 0), train_steps // 2),
        }
    return build_config(tree, str(CONFIG))


def _write_sample(config: RunConfig, prompt: str) -> str:
    # Imported late, because it imports the runtimes.
    from pretrain_xla.generate import Generator, Request, Sampling

    generator = Generator.load(config.run_dir, tokenizer=None, runtime="xla", device="auto")
    try:
        request = Request(120, Sampling(temperature=0.7, top_k=50), seed=config.train.seed)
        (text,) = generator.generate([prompt], request)
    finally:
        generator.runtime.close()
    with open(os.path.join(config.run_dir, "sample.txt"), "w", encoding="utf-8") as file:
        file.write(text + "\n")
    return text
