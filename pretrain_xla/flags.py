"""The config tree as flat command-line flags.

tyro builds the flags from plain dataclasses that mirror the tree, with the values of the YAML file as defaults. The result is
validated once, by `config.build_config`, after flags and file have been merged.
"""

from __future__ import annotations

import dataclasses
import operator
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro
from pydantic import BaseModel

from pretrain_xla.command_line import flags_of, tyro_errors, unknown_flag
from pretrain_xla.config import LEAVES, RunConfig, build_config
from pretrain_xla.config.old_settings import SWITCHES, apply, without_old_flags, without_old_settings
from pretrain_xla.config_file import load_yaml
from pretrain_xla.errors import UserError
from pretrain_xla.redact import is_redacted

# Leaves of the config that `--help` shows, in this order; `--help-all` shows all of them.
USUAL = tuple(
    """
    train_dir valid_dir
    train_steps train_batch_size gradient_accum_step mixed_precision seed from_checkpoint mode
    valid_interval valid_steps eval_batch_size rematerialization scan_layers strict_graph compile
    learning_rate warmup_steps decay_steps min_lr decay_method weight_decay max_grad_norm betas optim_type
    run_dir log_interval
    checkpoints_dir save_interval saved_checkpoint_limit keep_interval resume hub_repo
    mesh_data mesh_fsdp mesh_tensor topology
    d_model num_layers num_heads d_ff seq_length vocab_size dropout activation tie_weights
    eval_tasks eval_interval
    wandb_logging wandb_project wandb_name
    """.split()
)
SECTIONS = ("data", "train", "optim", "logging", "checkpoint", "parallel", "model", "evaluation", "wandb")
"""In the order in which `--help` shows them: the most used first."""


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A parsed command line.

    given: leaves that were set by flags. stated: those, and the leaves of the file. print_config: only print the resolved
    config. notes: notes for the user on settings that came from elsewhere.
    """

    config: RunConfig
    given: frozenset[str]
    stated: frozenset[str]
    print_config: bool
    notes: list[str]


Build = Callable[[dict[str, Any], frozenset[str], str], tuple[RunConfig, list[str]]]
"""(section → leaf → value, the stated leaves, origin of the values) → the config, and notes on it."""


def as_stated(tree: dict[str, Any], stated: frozenset[str], where: str) -> tuple[RunConfig, list[str]]:
    """The config of a tree, with nothing from elsewhere."""
    return build_config(tree, where), []


def parse_flags(
    arguments: Sequence[str],
    *,
    program: str,
    description: str,
    fixed: dict[str, Any] | None = None,
    build: Build = as_stated,
) -> Parsed:
    """Default < YAML (`--config`) < flag < `fixed` (leaf name → value that the entry point fixes, unless a flag sets it).

    `build` validates the tree, and may take leaves that were not stated from elsewhere.

    Raises:
        UserError: unknown flag, unreadable file, unknown key, bad value or impossible combination.
        SystemExit: with status 0, after `--help` or `--help-all`.
    """
    every = "--help-all" in arguments
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    file = _value_of("--config", arguments)
    where = f"--config {file}" if file is not None else "command line"
    tree, switches = without_old_settings(load_yaml(file) if file is not None else {}, where)
    arguments, typed_switches = without_old_flags(arguments)
    named = frozenset(leaf for leaf in LEAVES if _is_named(leaf, arguments))
    given = named | typed_switches.keys()
    for leaf, value in (fixed or {}).items():
        if leaf not in given:
            tree.setdefault(LEAVES[leaf], {})[leaf] = value
    _check_leaves(tree, where)
    if not every:
        description += " These are the most used flags; --help-all lists all of them."
    with tyro_errors(program):
        parsed, unknown = tyro.cli(
            _mirror(tree, every=every or "--help" not in arguments),
            prog=program,
            description=description,
            args=list(arguments),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
            return_unknown_args=True,
        )
    if unknown:
        names = (*LEAVES, *SWITCHES, "config", "print_config", "help", "help_all")
        known = [flag for leaf in names for flag in flags_of(leaf)]
        raise UserError(unknown_flag(unknown[0], known, "train"))
    sections = {
        name: {f.name: getattr(getattr(parsed, name), f.name) for f in dataclasses.fields(getattr(parsed, name))}
        for name in RunConfig.model_fields
    }
    apply(switches | typed_switches, sections, named)
    both = f"{where} and flags" if file is not None and given else where
    _check_not_redacted(sections, both)
    stated = given | {leaf for section in tree.values() for leaf in section}
    config, notes = build(sections, stated, both)
    return Parsed(config, given, stated, parsed.print_config, notes)


def _is_named(leaf: str, arguments: Sequence[str]) -> bool:
    return any(argument.split("=", 1)[0] in flags_of(leaf) for argument in arguments)


def _value_of(flag: str, arguments: Sequence[str]) -> str | None:
    """The last value given to a flag, as argparse and tyro would parse it."""
    value: str | None = None
    for index, argument in enumerate(arguments):
        if argument.startswith(flag + "="):
            value = argument.split("=", 1)[1]
        elif argument == flag:
            if index + 1 == len(arguments):
                raise UserError(f"{flag} needs the path of a file")
            value = arguments[index + 1]
    return value


def _check_leaves(tree: dict[str, Any], where: str) -> None:
    """Reject unknown keys and values of a wrong type in a file, but not yet combinations, which flags may fix."""
    for section, values in tree.items():
        for key, value in values.items():
            try:
                build_config({section: {key: value}}, where)
            except UserError as error:
                cause = str(error)
                if section not in RunConfig.model_fields or key not in _fields(section) or f"{section}.{key}" in cause:
                    raise
    if unknown := [section for section in tree if section not in RunConfig.model_fields]:
        build_config({unknown[0]: {}}, where)


def _check_not_redacted(sections: dict[str, dict[str, Any]], where: str) -> None:
    """Reject a URL whose secrets were removed when the config was saved: the server would only answer 403."""
    for values in sections.values():
        for leaf, value in values.items():
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and is_redacted(text):
                    raise UserError(
                        f"{where}: {leaf}={text}: its password or token was removed when this config was saved: give it "
                        f"again with --{leaf.replace('_', '-')}, or configure the credentials outside the URL"
                    )


def _fields(section: str) -> dict[str, Any]:
    model = RunConfig.model_fields[section].annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    return model.model_fields


def _plain(annotation: Any) -> Any:
    """A type without pydantic's bounds, for tyro; `build_config` checks the bounds."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        return _plain(typing.get_args(annotation)[0])
    if origin is tuple:
        plain = tuple(a if a is Ellipsis else _plain(a) for a in typing.get_args(annotation))
        return types.GenericAlias(tuple, plain)
    if origin is not None and origin is not typing.Literal:
        result: Any = None
        for argument in typing.get_args(annotation):
            result = _plain(argument) if result is None else result | _plain(argument)
        return result
    return annotation


def _mirror(tree: dict[str, Any], *, every: bool) -> type[Any]:
    """A dataclass of dataclasses with the tree's leaves, its help texts, and the file's values as defaults.

    every: show all leaves in the help text, instead of those in `USUAL`.
    """
    sections: list[Any] = []
    for name in SECTIONS:
        field = RunConfig.model_fields[name]
        leaves: list[Any] = []
        fields = _fields(name)
        order = {leaf: index for index, leaf in enumerate(USUAL)}
        for leaf in sorted(fields, key=lambda leaf: order.get(leaf, len(order))):
            info = fields[leaf]
            default = tree.get(name, {}).get(leaf, info.default)
            if isinstance(default, list):
                default = tuple(default)
            hint = "(default: none)" if default == () else None  # else tyro writes `(default: )`
            text = tyro.conf.arg(help=" ".join((info.description or "").split()), help_behavior_hint=hint)
            annotated: Any = operator.getitem(Annotated, (_plain(info.annotation), text))
            if not every and leaf not in USUAL:
                annotated = operator.getitem(Annotated, (annotated, tyro.conf.Suppress))
            leaves.append((leaf, annotated, dataclasses.field(default=default)))
        section = dataclasses.make_dataclass(name.capitalize(), leaves, frozen=True)
        section.__doc__ = (field.annotation.__doc__ or "").splitlines()[0] if field.annotation else ""
        sections.append((name, section, dataclasses.field(default_factory=_calls(section))))
    own = [
        (
            "config",
            Annotated[str | None, tyro.conf.arg(help="YAML file, such as those in configs/. Flags override it.")],
            None,
        ),
        ("print_config", Annotated[bool, tyro.conf.arg(help="Print the resolved settings as YAML, and exit.")], False),
    ]
    return dataclasses.make_dataclass("Run", [*own, *sections], frozen=True)


def _calls(section: type[Any]) -> Callable[[], Any]:
    return lambda: section()
