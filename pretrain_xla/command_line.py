"""Command lines of every command, with one style of error: a line, and exit status 2.

Flags are dataclasses that tyro reads, or argparse parsers where a command has words without dashes. Both print a usage text
or a box of many lines when something is wrong; what the user needs of it is one line: which flag, what is wrong, what it
should be.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import itertools
import re
import typing
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, TypeVar

import tyro

from pretrain_xla.errors import UserError
from pretrain_xla.flag_names import called_here

Flags = TypeVar("Flags")


def parse(kind: type[Flags], arguments: Sequence[str], *, program: str, command: str) -> Flags:
    """A dataclass of flags, filled from a command line.

    Args:
        kind: the dataclass; its docstring is the description.
        arguments: what follows the program's name.
        program: its name, for `--help` and messages.
        command: the one whose table of other names is looked up, see `flag_names`.

    Raises:
        UserError: an unknown flag, a missing one, or a value that is not of its type.
        SystemExit: `--help`, with 0.
    """
    known = [flag for leaf in typing.get_type_hints(kind) for flag in flags_of(leaf)]
    for argument in _flags_in(arguments):
        if argument not in (*known, "--help"):
            raise UserError(unknown_flag(argument, known, command))
    unnamed: Any = Annotated[kind, tyro.conf.arg(name="")]
    with one_line(program):
        found: Flags = tyro.cli(unnamed, prog=program, args=list(arguments))
    return found


def flags_of(leaf: str) -> tuple[str, ...]:
    """The spellings of a leaf as a flag: with dashes or underscores, and with `no` before it."""
    dashed = leaf.replace("_", "-")
    return (f"--{dashed}", f"--no-{dashed}", f"--{leaf}", f"--no-{leaf}")


def unknown_flag(flag: str, known: Sequence[str], command: str) -> str:
    """The words for a flag that is not there: what it is called here, or the nearest spelling."""
    if (ours := called_here(command, flag)) is not None:
        return f"unknown argument {flag!r}: here it is {ours}"
    plain = [one for one in known if "_" not in one and not one.startswith("--no-")]
    near = difflib.get_close_matches(flag.split("=")[0].replace("_", "-"), plain, n=1)
    return f"unknown argument {flag!r}" + (f"; did you mean {near[0]}?" if near else "; --help lists all of them")


@contextlib.contextmanager
def one_line(program: str) -> typing.Iterator[None]:
    """Turn what tyro prints about a fault into a `UserError` of one line.

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
        raise UserError(f"{_first_fault(printed.getvalue())}; {program} --help lists all flags") from None


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are a `UserError`."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            UserError: always.
        """
        message = message.replace("the following arguments are required:", "missing:").removeprefix("argument ")
        if message.startswith("unrecognized arguments: "):
            known = [flag for action in self._actions for flag in action.option_strings]
            raise UserError(unknown_flag(message.removeprefix("unrecognized arguments: ").split()[0], known, self.prog))
        raise UserError(f"{message}; {self.prog} --help lists all flags")


def _flags_in(arguments: Sequence[str]) -> list[str]:
    names = [argument.split("=", 1)[0] for argument in arguments]
    return [name for name in names if re.match(r"--[A-Za-z]", name)]


_BOX = re.compile(r"\x1b\[[0-9;]*m|[│╭╮╰╯]")


def _first_fault(printed: str) -> str:
    """The first fault out of tyro's box, without its frame and help text."""
    lines = [_BOX.sub("", line).rstrip() for line in printed.splitlines()]
    # A title, and between rules first the fault, and then help; without UTF-8 there is a rule below the title, too.
    _title, *inside = [line for line in lines if line.strip()] or [""]
    groups = itertools.groupby(inside, key=lambda line: not line.strip("─- "))
    fault = next((list(group) for is_rule, group in groups if not is_rule), [])
    if not fault:
        return " ".join(printed.split()) or "this command line cannot be read"
    if "Missing from" in fault[0]:
        # Each flag is indented less than its help text.
        indents = [len(line) - len(line.lstrip()) for line in fault[1:]]
        names = [line.strip() for line, indent in zip(fault[1:], indents, strict=True) if indent == min(indents)]
        return f"missing: {', '.join(names)}"
    words = " ".join(line.strip() for line in fault).removeprefix("Error parsing ").rstrip(".")
    words = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is no whole number", words)
    return re.sub(r"could not convert string to float: (.*)", r"\1 is no number", words)
