"""Command-line interface of `export` and `import`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pretrain_xla.command_line import Parser
from pretrain_xla.config import ModelConfig, RunConfig, build_config
from pretrain_xla.config_file import to_yaml
from pretrain_xla.errors import UserError
from pretrain_xla.interop import hub
from pretrain_xla.interop.config_json import choose_family
from pretrain_xla.interop.export import DTYPES, export_model, make_empty_folder
from pretrain_xla.interop.from_checkpoint import fit_tensors, resolve_architecture, usable_tokenizer
from pretrain_xla.interop.load import LoadedModel, find_model, load_model
from pretrain_xla.interop.special_tokens import write_special_tokens
from pretrain_xla.model import parameter_count
from pretrain_xla.redact import redacted, redacted_tree
from pretrain_xla.run_folder.checkpoint import CheckpointInfo, CheckpointStore
from pretrain_xla.run_folder.files import CONFIG_FILE, TOKENIZER_FOLDER
from pretrain_xla.run_folder.tensor_checks import check_finite
from pretrain_xla.tokenizers.checksums import recording_checksums
from pretrain_xla.tokenizers.load import known_tokenizers, load_tokenizer
from pretrain_xla.tokenizers.tokenizer import is_stored

MODEL_HELP = (
    "run folder, checkpoints folder or one checkpoint (also a URL); Hugging Face folder; .safetensors or .pt file; name on "
    "the Hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl, owner/name)"
)
# Options that an old checkpoint may not state, or that the user may want to reduce.
IMPORT_LEAVES = {
    "seq_length": "keep only this many positions",
    "vocab_size": "use only this many ids for tokens, and treat the rest as padding",
    "num_heads": "number of heads, where an old .pt file does not state it",
}


def export_command(arguments: Sequence[str]) -> None:
    """`export MODEL OUT`: write a model for plain transformers, and push it if asked to.

    Raises:
        UserError: there is no such model, no architecture computes it, or it cannot be written or pushed.
    """
    parser = Parser(
        "python -m pretrain_xla export",
        description="Write a model so that AutoModelForCausalLM.from_pretrained(OUT) opens it, with no custom code.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", help="new folder to write")
    parser.add_argument("--checkpoint", choices=("newest", "best"), default="newest", help="which checkpoint of a run")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="type of the weights (fp32)")
    parser.add_argument("--push-to", metavar="OWNER/NAME", help="upload it to this repository of the Hugging Face Hub")
    flags = parser.parse_args(list(arguments))
    if flags.push_to:
        hub.check_writable(flags.push_to)
    loaded = load_model(flags.model, flags.checkpoint)
    loaded.print_notes()
    for note in export_model(loaded, flags.out, dtype=flags.dtype, title=flags.push_to):
        print(f"note: {redacted(note)}")
    what = f"{choose_family(loaded.config).architecture}, {_size(loaded.config)}, {flags.dtype}"
    print(f"{redacted(loaded.where)} -> {flags.out}: {what}")
    if flags.push_to:
        message = f"Export of {os.path.basename(redacted(loaded.where))}"
        print(f"pushed to {hub.push_folder(flags.push_to, flags.out, message)}")


def import_command(arguments: Sequence[str]) -> None:
    """`import MODEL OUT`: write a run folder at step 0, which every command accepts.

    Raises:
        UserError: there is no such model, our model cannot compute it, or OUT cannot be written.
    """
    parser = Parser(
        "python -m pretrain_xla import",
        description="Convert a model from elsewhere to a run folder, to evaluate it, train it further or generate text.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", help="new folder to write")
    for leaf, words in IMPORT_LEAVES.items():
        parser.add_argument(f"--{leaf.replace('_', '-')}", type=int, metavar="N", help=words)
    activation = ("gelu", "gelu_exact")
    parser.add_argument(
        "--activation", choices=activation, help="GELU of an old .pt file: tanh form or exact (gelu_exact)"
    )
    flags = parser.parse_args(list(arguments))
    given = {leaf: getattr(flags, leaf) for leaf in (*IMPORT_LEAVES, "activation") if getattr(flags, leaf) is not None}
    tree = {"model": given, "train": {"from_checkpoint": flags.model}}
    config, notes = resolve_architecture(tree, frozenset(given), "command line")
    found = find_model(flags.model, stated=given)
    tokenizer, left_out = usable_tokenizer(found)
    for note in (*notes, *left_out):
        print(f"note: {redacted(note)}")
    weights = found.read()
    check_finite(weights, found.where)
    make_empty_folder(flags.out)
    tensors = fit_tensors(weights, config.model)
    made = LoadedModel(config.model, tensors, tokenizer, found.where, adds_bos=found.adds_bos, eos_ids=found.eos_ids)
    write_run(made, flags.out)
    print(
        f"{redacted(found.where)} -> {flags.out}: {_size(config.model)}; evaluate, train or generate from that folder"
    )


def write_run(loaded: LoadedModel, folder: str) -> None:
    """Write a model as a run at step 0: config.yaml, a checkpoint, and the tokenizer if it is stored in a file.

    Raises:
        UserError: the folder cannot be written.
    """
    name = loaded.tokenizer
    tree = {"model": loaded.config.model_dump(), "logging": {"run_dir": folder}}
    if name is not None and name in known_tokenizers():
        tree["data"] = {"tokenizer": name}
    config: RunConfig = build_config(tree, loaded.where)
    try:
        with open(os.path.join(folder, CONFIG_FILE), "w", encoding="utf-8") as file:
            file.write(to_yaml(config))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}): name another folder") from None
    tokenizer = load_tokenizer(name) if name is not None else None
    if tokenizer is not None and is_stored(tokenizer):
        inside = os.path.join(folder, TOKENIZER_FOLDER)
        with recording_checksums(inside):
            tokenizer.save(inside)
            write_special_tokens(inside, adds_bos=loaded.adds_bos, eos_ids=loaded.eos_ids)
    store = CheckpointStore(config.checkpoints_dir, limit=1)
    tensors = {f"model.{name}": tensor for name, tensor in loaded.tensors.items()}
    try:
        store.save(tensors, CheckpointInfo(0, None, "", redacted_tree(config.model_dump(mode="json"))))
    finally:
        store.close()


def _size(config: ModelConfig) -> str:
    return f"{parameter_count(config):,} parameters"
