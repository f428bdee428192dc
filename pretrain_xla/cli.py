"""The command-line interface: `python -m pretrain_xla COMMAND`.

The scripts `run_pretrain_xla.py`, `run_pretrain.py`, `generate.py` and `evaluate.py` use it too. Errors that the user can fix
end here, in one line and exit status 2.
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

if TYPE_CHECKING:  # a command imports what it needs, so that a missing package is an error of one line
    from pretrain_xla.config import RunConfig

COMMANDS = """usage: python -m pretrain_xla COMMAND [--help]

  train            train a model, or only evaluate it (--mode evaluate)
  launch           train on a TPU slice of Google Cloud from here; launch status, logs, stop and ssh look after it
  supervise        run the command after `--`, and start it again if it ends before it is done
  verify           make steps of a run again, and compare their losses bit for bit with those logged
  preflight        estimate memory, time and cost of a training step on a TPU, without one
  doctor           check this machine and measure it: versions, devices, kernels, storage, rates, steps
  trace            print the model as a tree: shapes, parameters, operations
  prepare          tokenize text into token shards, in train/ and valid/
  inspect          inspect token shards: counts, histograms, first documents, checks
  train-tokenizer  train a tokenizer on text: byte-level BPE or SentencePiece
  export           convert a trained model to Hugging Face transformers
  import           convert a Hugging Face model or an old checkpoint to a run of this package
  generate         generate text with a trained model
  evaluate         evaluate a model: loss, perplexity, zero-shot tasks
  lm-eval          run EleutherAI's lm-eval on a model of this package (pip install lm-eval)
  quickstart       prepare text, train a small model, evaluate it and generate text, on this host
"""


@guarded
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m pretrain_xla`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(COMMANDS, end="")
    elif command == "--version":
        print(__version__)
    elif command == "train":
        pretrain(rest, program="python -m pretrain_xla train")
    elif command == "supervise":
        from pretrain_xla.supervise import supervise_command

        if status := supervise_command(rest):
            raise SystemExit(status)
    elif command == "launch":
        from pretrain_xla.launch.command import launch_command

        if status := launch_command(rest):
            raise SystemExit(status)
    elif command == "verify":
        from pretrain_xla.train.verify import verify_command

        if status := verify_command(rest):
            raise SystemExit(status)
    elif command == "preflight":
        from pretrain_xla.preflight.command import preflight_command

        if status := preflight_command(rest):
            raise SystemExit(status)
    elif command == "doctor":
        from pretrain_xla.doctor.command import doctor_command

        if status := doctor_command(rest):
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
    """Parse the flags of a run, and start it."""
    from pretrain_xla.config_file import to_yaml
    from pretrain_xla.flags import parse_flags
    from pretrain_xla.runtime.launched import speaks_first

    description = "Pretrain a GPT-2-scale model."
    parsed = parse_flags(arguments, program=program, description=description, fixed=fixed, build=_resolve)
    if parsed.print_config:
        print(to_yaml(parsed.config), end="")
        return
    config = parsed.config
    notes = unused_flags(config, parsed.given) + schedule_notes(config) + parsed.notes
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


def _resolve(tree: dict[str, Any], stated: frozenset[str], where: str) -> tuple[RunConfig, list[str]]:
    """The config of a run, with the architecture and tokenizer of its `from_checkpoint`, or the vocabulary size of its data."""
    from pretrain_xla.config import build_config

    is_new = tree["train"]["from_checkpoint"] is None
    if is_new and "vocab_size" in stated:
        return build_config(tree, where), []
    from pretrain_xla.interop.from_checkpoint import resolve_architecture, resolve_tokenizer, resolve_vocabulary

    if is_new:
        return resolve_vocabulary(tree, stated, where)

    config, notes = resolve_architecture(tree, stated, where)
    config, more = resolve_tokenizer(config, stated)
    return config, notes + more


def unused_flags(config: RunConfig, given: frozenset[str]) -> list[str]:
    """A note for each given flag that has no effect in this run."""
    xla, schedule = config.parallel.runtime == "xla", config.optim.decay_method
    decays = schedule not in ("noam", "constant")
    muon = config.optim.optim_type == "muon"
    of_muon = [leaf for leaf in type(config.optim).model_fields if leaf.startswith(("muon_", "cautious_"))]
    rules = {
        "compile": (not xla, "the xla runtime always compiles the whole step"),
        "device": (not xla, "the xla runtime takes its device from PJRT_DEVICE"),
        "ddp_backend": (not xla, "only the torch runtime uses it"),
        "mp_start_method": (xla, "only the xla runtime uses it; with the torch runtime, torchrun starts the processes"),
        "ddp": (xla, "with the torch runtime, torchrun starts the processes"),
        "mesh_data": (xla, "with the torch runtime, torchrun starts the processes"),
        "strict_graph": (
            xla or config.train.compile or config.parallel.device != "cpu",
            "nothing is compiled without --compile, and nothing waits for a CPU",
        ),
        "use_syncfree_optim": (False, "the optimizer never synchronises with the host"),
        **dict.fromkeys(of_muon, (muon, "only --optim-type muon uses it")),
        "head_learning_rate": (not config.model.tie_weights, "the head is the embedding (--tie-weights)"),
        "head_betas": (not config.model.tie_weights, "the head is the embedding (--tie-weights)"),
        "cooldown_steps": (
            schedule == "wsd" and config.optim.cooldown_fraction is None,
            "only --decay-method wsd has a cooldown" if schedule != "wsd" else "--cooldown-fraction is given",
        ),
        "cooldown_fraction": (schedule == "wsd", "only --decay-method wsd has a cooldown"),
        "min_lr": (
            decays and config.optim.min_lr_fraction is None,
            "--min-lr-fraction is given" if decays else f"--decay-method {schedule} does not use it",
        ),
        "min_lr_fraction": (decays, f"--decay-method {schedule} does not use it"),
        "decay_steps": (decays, f"--decay-method {schedule} does not use it"),
        "eval_tasks": (
            config.train.mode != "evaluate",
            "--mode evaluate only prints the validation loss; use evaluate.py for tasks",
        ),
        "eval_interval": (bool(config.evaluation.eval_tasks), "--eval-tasks is not given"),
        "spike_window": (config.train.spike_sigma is not None, "--spike-sigma is not given"),
        "scan_layers": (xla, "only the xla runtime compiles a loop over the layers"),
        "overlap_gradients": (xla, "it is an option of the TPU compiler"),
        "compile_cache": (xla, "only the xla runtime uses it"),
        "topology": (config.train.mode == "preflight", "only preflight uses it"),
        "sample_prompt": (config.logging.sample_interval is not None, "--sample-interval is not given"),
        "end_of_text": (config.data.separate_documents, "only --separate-documents uses it"),
        **{
            leaf: (bool(config.evaluation.eval_tasks), "--eval-tasks is not given")
            for leaf in ("eval_data", "eval_limit", "eval_stride", "eval_top_k")
        },
        "rope_theta": (config.model.positions == "rotary", "only --positions rotary uses it"),
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
    """A note if the learning rate schedule and the run do not end at the same step, as they usually should."""
    optim, steps = config.optim, config.train.train_steps
    if config.train.mode == "evaluate" or optim.decay_method in ("noam", "constant") or optim.decay_steps == steps:
        return []
    if optim.decay_steps < steps:
        then = f"the last {steps - optim.decay_steps:,} steps run at min_lr"
    else:
        then = "the learning rate does not reach min_lr"
    return [
        f"decay_steps={optim.decay_steps} and train_steps={steps}: {then}; with --decay-steps {steps} both end together"
    ]
