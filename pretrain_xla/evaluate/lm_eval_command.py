"""`python -m pretrain_xla lm-eval …`: lm-eval's command line with `--model pretrain_xla`.

lm-eval 0.4 looks up models in its own registry and reads no entry points of other packages, so the plain `lm_eval` command
cannot find ours. Here our model is registered, and the arguments are passed on unchanged.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from pretrain_xla.errors import UserError

MODEL = "pretrain_xla"


def lm_eval_command(arguments: Sequence[str]) -> None:
    """Register our model and run lm-eval's command line.

    Raises:
        UserError: lm-eval is not installed.
    """
    # From a checkout, our `evaluate.py` would be taken for the library of that name, which lm-eval imports.
    root = Path(__file__).resolve().parents[2]
    sys.path[:] = [path for path in sys.path if Path(path or os.getcwd()).resolve() != root]
    try:
        register()
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        raise UserError(f"lm-eval needs {error.name}: pip install lm-eval") from None
    words = list(arguments)
    runs = bool(words) and (words[0] == "run" or words[0].startswith("-")) and not {"--help", "-h"} & set(words)
    if runs and not _names_a_model(words):
        words += ["--model", MODEL]
    sys.argv = ["lm_eval", *words]
    cli_evaluate()


def _names_a_model(words: Sequence[str]) -> bool:
    """Whether the arguments, or the file that --config names, say which of lm-eval's models to use."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in ("--model", "-M") or word.startswith("--model="):
            return True
        if word in ("--config", "-C") or word.startswith("--config="):
            with contextlib.suppress(
                OSError, ValueError, RecursionError, yaml.YAMLError
            ):  # lm-eval reports what is wrong with it
                tree = yaml.safe_load(Path(word.partition("=")[2] or following).read_text(encoding="utf-8"))
                if isinstance(tree, dict) and "model" in tree:
                    return True
    return False


def register() -> None:
    """Register our model with lm-eval as `pretrain_xla`; call this before using lm-eval's Python API.

    Raises:
        ModuleNotFoundError: lm-eval is not installed.
    """
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target="pretrain_xla.evaluate.lm_eval_model:PretrainXlaLM")
