"""Parsing of the commands' flags, with errors of one line and exit status 2.

Flags are dataclasses for tyro, or argparse parsers where a command has positional arguments. For an error both print a usage
text or a box of many lines. Here the user gets one line instead: which flag, what is wrong, and what it should be.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import re
import typing
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, TypeVar

import tyro

from pretrain_xla.errors import UserError
from pretrain_xla.flag_names import our_name

Flags = TypeVar("Flags")


def parse(kind: type[Flags], arguments: Sequence[str], *, program: str, command: str) -> Flags:
    """Parse a command line into a dataclass of flags.

    Args:
        kind: the dataclass; its docstring is the description, and those of its fields are their help texts.
        arguments: the command line after the program's name.
        program: name of the program, for `--help` and messages.
        command: key of the table of other programs' flags in `flag_names`.

    Raises:
        UserError: a flag is unknown or missing, or a value is of a wrong type.
        SystemExit: with status 0, after `--help`.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    known = [flag for leaf in hints for flag in flags_of(leaf)]
    for argument in _flags_in(arguments):
        if argument not in (*known, "--help"):
            raise UserError(unknown_flag(argument, known, command))
    unnamed: Any = Annotated[_with_help(kind, hints), tyro.conf.arg(name="")]
    with tyro_errors(program):
        found: Flags = tyro.cli(unnamed, prog=program, args=list(arguments))
    return found


def _with_help(kind: type[Any], hints: dict[str, Any]) -> type[Any]:
    """The dataclass with help texts in which tyro does not keep the line breaks of the source."""
    texts: dict[str, str] = {}
    for parent in reversed(kind.__mro__[:-1]):
        (definition,) = ast.parse(inspect.getsource(parent)).body
        assert isinstance(definition, ast.ClassDef)
        for statement, text in itertools.pairwise(definition.body):
            match statement, text:
                case ast.AnnAssign(target=ast.Name(id=leaf)), ast.Expr(value=ast.Constant(value=str(words))):
                    texts[leaf] = " ".join(words.split())
    fields: list[Any] = []
    for field in dataclasses.fields(kind):
        annotated: Any = Annotated[hints[field.name], tyro.conf.arg(help=texts.get(field.name))]
        fields.append((field.name, annotated, dataclasses.field(default=field.default, kw_only=field.kw_only)))
    made = dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), frozen=True)
    made.__doc__ = kind.__doc__
    return made


def flags_of(leaf: str) -> tuple[str, ...]:
    """The spellings of a leaf as a flag: with dashes or underscores, with and without `no`."""
    dashed = leaf.replace("_", "-")
    return (f"--{dashed}", f"--no-{dashed}", f"--{leaf}", f"--no-{leaf}")


def unknown_flag(flag: str, known: Sequence[str], command: str) -> str:
    """The error message for an unknown flag, with the name that it has in this package, or the nearest spelling."""
    if (ours := our_name(command, flag)) is not None:
        return f"unknown argument {flag!r}: use {ours}"
    plain = [one for one in known if "_" not in one and not one.startswith("--no-")]
    near = difflib.get_close_matches(flag.split("=")[0].replace("_", "-"), plain, n=1)
    every = "--help-all" if command == "train" else "--help"
    return f"unknown argument {flag!r}" + (f"; did you mean {near[0]}?" if near else f"; see {every}")


@contextlib.contextmanager
def tyro_errors(program: str) -> typing.Iterator[None]:
    """Turn an error that tyro prints into a `UserError` of one line.

    Raises:
        UserError: tyro refused the command line.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as error:
        if error.code in (0, None):
            raise
        raise UserError(f"{_first_error(printed.getvalue())}; see {program} --help") from None


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are a `UserError`."""

    def error(self, message: str) -> NoReturn:
        """Reject the command line.

        Raises:
            UserError: always.
        """
        message = message.replace("the following arguments are required:", "missing:").removeprefix("argument ")
        if message.startswith("unrecognized arguments: "):
            known = [flag for action in self._actions for flag in action.option_strings]
            raise UserError(unknown_flag(message.removeprefix("unrecognized arguments: ").split()[0], known, self.prog))
        raise UserError(f"{message}; see {self.prog} --help")


def _flags_in(arguments: Sequence[str]) -> list[str]:
    names = [argument.split("=", 1)[0] for argument in arguments]
    return [name for name in names if re.match(r"--[A-Za-z]", name)]


_BOX = re.compile(r"\x1b\[[0-9;]*m|[│╭╮╰╯]")


def _first_error(printed: str) -> str:
    """The first error in tyro's box, without its frame and help text."""
    lines = [_BOX.sub("", line).rstrip() for line in printed.splitlines()]
    # After the title, rules separate the error from help. Without UTF-8 there is a rule below the title, too.
    _title, *inside = [line for line in lines if line.strip()] or [""]
    groups = itertools.groupby(inside, key=lambda line: not line.strip("─- "))
    error = next((list(group) for is_rule, group in groups if not is_rule), [])
    if not error:
        return " ".join(printed.split()) or "invalid command line"
    if "Missing from" in error[0]:
        # Each flag is indented less than its help text.
        indents = [len(line) - len(line.lstrip()) for line in error[1:]]
        names = [line.strip() for line, indent in zip(error[1:], indents, strict=True) if indent == min(indents)]
        return f"missing: {', '.join(names)}"
    words = " ".join(line.strip() for line in error).removeprefix("Error parsing ").rstrip(".")
    words = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not an integer", words)
    return re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", words)
