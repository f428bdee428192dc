"""The command line → a config → one call.

`python -m pretrain_xla COMMAND`, and the entry points at the top of the repository: `run_pretrain_xla.py`, `run_pretrain.py`,
`generate.py`, `evaluate.py`. What a user can fix ends here in one line and exit status 2.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pretrain_xla import __version__
from pretrain_xla.errors import UserError, guarded
from pretrain_xla.redact import redacted

if TYPE_CHECKING:  # what a command needs is imported where it begins, so that a missing package is a line
    from pretrain_xla.config import RunConfig

COMMANDS = """usage: python -m pretrain_xla COMMAND [--help]

  train            train (or, with --do-test, evaluate) a model
  preflight        compile the training step for a TPU that is not here: does it fit, how fast, what does it cost
  trace            show a model as a tree: shapes, parameters, operations
  prepare          text -> tokens -> shards in train/ and valid/
  inspect          look into token shards: counts, histograms, first documents, checks
  train-tokenizer  train a tokenizer on text: byte-level BPE or SentencePiece
  export           write a trained model for Hugging Face transformers
  import           make a model of Hugging Face's, or an old checkpoint, one of ours
  generate         continue a prompt with a trained model
  evaluate         loss, perplexity and zero-shot scores of a model
  lm-eval          EleutherAI's lm-eval on a model of ours (pip install lm-eval)
  quickstart       all of it on this machine: prepare, train, evaluate, generate
"""


@guarded
def main(arguments: Sequence[str] | None = None) -> None:
    """The package's own command line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(COMMANDS, end="")
    elif command == "--version":
        print(__version__)
    elif command == "train":
        pretrain(rest, program="python -m pretrain_xla train")
    elif command == "preflight":
        from pretrain_xla.preflight.command import preflight_command

        if status := preflight_command(rest):
            raise SystemExit(status)
    elif command == "trace":
        from pretrain_xla.trace_command import trace_command

        trace_command(rest)
    elif command == "prepare":
        from pretrain_xla.prepare.command import prepare_command

        prepare_command(rest)
    elif command == "inspect":
        from pretrain_xla.prepare.inspect_command import inspect_command

        if status := inspect_command(rest):
            raise SystemExit(status)
    elif command == "train-tokenizer":
        from pretrain_xla.prepare.command import train_tokenizer_command

        train_tokenizer_command(rest)
    elif command == "generate":
        from pretrain_xla.generate.command import generate_command

        generate_command(rest)
    elif command == "evaluate":
        from pretrain_xla.evaluate.command import evaluate_command

        evaluate_command(rest)
    elif command == "lm-eval":
        from pretrain_xla.evaluate.lm_eval_command import lm_eval_command

        lm_eval_command(rest)
    elif command == "export":
        from pretrain_xla.interop.command import export_command

        export_command(rest)
    elif command == "import":
        from pretrain_xla.interop.command import import_command

        import_command(rest)
    elif command == "quickstart":
        from pretrain_xla.quickstart import quickstart_command

        quickstart_command(rest)
    else:
        known = re.findall(r"^  (\S+)", COMMANDS, re.MULTILINE)
        near = difflib.get_close_matches(command, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else "; `python -m pretrain_xla --help` lists them"
        raise UserError(f"unknown command {command!r}{hint}")


@guarded
def run_pretrain(runtime: str) -> None:
    """The entry point `run_pretrain.py` (runtime torch) or `run_pretrain_xla.py` (runtime xla)."""
    program = "run_pretrain.py" if runtime == "torch" else "run_pretrain_xla.py"
    pretrain(sys.argv[1:], program=program, fixed={"runtime": runtime})


def pretrain(arguments: Sequence[str], *, program: str, fixed: dict[str, Any] | None = None) -> None:
    """Parse the flags of a run and start it."""
    from pretrain_xla.config_file import to_yaml
    from pretrain_xla.flags import parse_flags
    from pretrain_xla.runtime.launched import speaks_first

    description = "Pretrain a GPT-2-scale model."
    parsed = parse_flags(arguments, program=program, description=description, fixed=fixed, build=_adopt)
    if parsed.print_config:
        print(to_yaml(parsed.config), end="")
        return
    config = parsed.config
    notes = effectless(config, parsed.given) + schedule_notes(config) + parsed.notes
    if speaks_first(config.parallel.runtime):
        for line in notes:
            print(f"note: {redacted(line)}", flush=True)
    if config.train.mode == "preflight":
        from pretrain_xla.preflight.command import preflight

        if status := preflight(config):
            raise SystemExit(status)
        return
    from pretrain_xla.train.run import start_run

    start_run(config)


def _adopt(tree: dict[str, Any], stated: frozenset[str], where: str) -> tuple[RunConfig, list[str]]:
    """The config of a run, with what it takes from the model that it begins from, or from its data."""
    from pretrain_xla.config import build_config

    begins_anew = tree["train"]["from_checkpoint"] is None
    if begins_anew and "vocab_size" in stated:
        return build_config(tree, where), []
    from pretrain_xla.interop.from_checkpoint import resolve_architecture, resolve_tokenizer, resolve_vocabulary

    if begins_anew:
        return resolve_vocabulary(tree, stated, where)

    config, notes = resolve_architecture(tree, stated, where)
    config, more = resolve_tokenizer(config, stated)
    return config, notes + more


def effectless(config: RunConfig, given: frozenset[str]) -> list[str]:
    """One line for each given flag that changes nothing in this mode."""
    xla = config.parallel.runtime == "xla"
    rules = {
        "compile": (not xla, "the xla runtime always compiles the whole step"),
        "device": (not xla, "the xla runtime takes its device from PJRT_DEVICE"),
        "ddp_backend": (not xla, "it belongs to the torch runtime"),
        "mp_start_method": (xla, "it belongs to the xla runtime; torchrun starts the processes here"),
        "ddp": (xla, "torchrun decides on data parallelism here"),
        "mesh_data": (xla, "torchrun decides on data parallelism here"),
        "strict_graph": (
            xla or config.train.compile or config.parallel.device != "cpu",
            "nothing is compiled without --compile, and nothing waits for a CPU",
        ),
        "use_syncfree_optim": (False, "the optimizer never synchronises with the host"),
        "cooldown_steps": (config.optim.decay_method == "wsd", "only --decay-method wsd cools down"),
        "min_lr": (config.optim.decay_method not in ("noam", "constant"), "this --decay-method has no floor"),
        "decay_steps": (config.optim.decay_method not in ("noam", "constant"), "this --decay-method has no end"),
        "eval_tasks": (
            not config.train.do_test,
            "--do-test prints the validation loss; evaluate.py scores tasks",
        ),
        "eval_interval": (bool(config.evaluation.eval_tasks), "there are no --eval-tasks"),
        "scan_layers": (xla, "only the xla runtime compiles a loop over the layers"),
        "overlap_gradients": (xla, "it is an option of the TPU's compiler"),
        "compile_cache": (xla, "it belongs to the xla runtime"),
        "topology": (config.train.mode == "preflight", "only preflight compiles for a TPU that is not here"),
        "sample_prompt": (config.logging.sample_interval is not None, "there is no --sample-interval"),
        "end_of_text": (config.data.separate_documents, "only --separate-documents looks for it"),
        **{
            leaf: (bool(config.evaluation.eval_tasks), "there are no --eval-tasks")
            for leaf in ("eval_data", "eval_limit", "eval_stride", "eval_top_k")
        },
        "rope_theta": (config.model.positions == "rotary", "only --positions rotary has a base"),
    }
    lines = [
        f"--{leaf.replace('_', '-')} has no effect: {why}"
        for leaf, (works, why) in rules.items()
        if leaf in given and not works
    ]
    if not config.wandb.wandb_logging:
        unused = sorted(leaf for leaf in given if leaf.startswith("wandb_") and leaf != "wandb_logging")
        if unused:
            names = ", ".join(f"--{leaf.replace('_', '-')}" for leaf in unused)
            lines.append(f"{names} {'has' if len(unused) == 1 else 'have'} no effect: --wandb-logging is not given")
    return lines


def schedule_notes(config: RunConfig) -> list[str]:
    """A line where the learning rate does not come to its end with the run, as it mostly should."""
    optim, steps = config.optim, config.train.train_steps
    if config.train.do_test or optim.decay_method in ("noam", "constant") or optim.decay_steps == steps:
        return []
    if optim.decay_steps < steps:
        then = f"the last {steps - optim.decay_steps:,} steps run at min_lr"
    else:
        then = "the learning rate does not come down to min_lr"
    return [
        f"decay_steps={optim.decay_steps} and train_steps={steps}: {then}; --decay-steps {steps} ends both together"
    ]
