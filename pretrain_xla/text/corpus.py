"""The quick start's corpus: a few MB of real English and Python that come with every Python, so nothing is downloaded.

It is the language reference (the topics of `help()`) and the docstrings of the standard library with their signatures. The
sources are parsed and never imported: no code runs, and no module is left out because a C library is missing. The content
depends on the version of Python alone.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import platform
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from pretrain_xla.errors import UserError

QUICKSTART = "quickstart"
_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@functools.cache
def quickstart_documents() -> tuple[str, ...]:
    """One document for each topic of the language reference, then one for each module of the standard library.

    Both are in order of name. The first call takes seconds: about 700 modules are parsed.

    Raises:
        UserError: this Python has no documentation or no sources.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "this Python has no `pydoc_data`: use one from python.org, or prepare text of your own"
        ) from None
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _modules(root)
    if not files:
        raise UserError(
            f"{root}: has no sources of the standard library: use another Python, or prepare text of your own"
        )
    reference = dict.fromkeys(topics[name].strip("\n") for name in sorted(topics))  # some have two names
    modules = (_module_document(name, files[name]) for name in sorted(files))
    return (*reference, *filter(None, modules))


def quickstart_version() -> str:
    """What the corpus depends on: the version of Python and this file."""
    return f"python-{platform.python_version()}-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]}"


def _modules(root: Path) -> dict[str, Path]:
    """Dotted name → source file of every module below `root`, except for tests and installed packages."""
    found = {}
    for file in root.rglob("*.py"):
        parts = file.relative_to(root).with_suffix("").parts
        if _SKIPPED.isdisjoint(parts) and all(part.isidentifier() for part in parts):
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


def _module_document(name: str, file: Path) -> str:
    """The docstrings of a module and of its definitions, in source order; "" if it has none."""
    try:
        tree = _parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return ""
    except SystemError as error:
        raise UserError(
            f"{file}: Python {platform.python_version()} cannot parse it ({error}): use a newer one"
        ) from None
    parts = list(_described(tree, ""))
    about = (ast.get_docstring(tree) or "").strip()
    if not about and not parts:
        return ""
    return "\n\n".join([f"module {name}", *([about] if about else []), *parts])


def _parse(source: bytes, attempts: int = 10) -> ast.Module:
    """The syntax tree.

    Before 3.11.8 and 3.12.2, `ast.parse` raises SystemError when garbage collection lets another `ast.parse` of the process run
    in the middle of it (CPython issue 106905). Such a collision is rare, so another attempt succeeds. A lock would not do: it
    keeps out neither other libraries' calls nor those of finalizers in the same thread.

    Raises:
        SyntaxError, ValueError: it is not Python.
        SystemError: every attempt failed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            return ast.parse(source)
    except SystemError:
        if attempts == 1:
            raise
        return _parse(source, attempts - 1)


def _described(scope: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    """Signature and docstring of each documented class and function in the scope, methods after their class."""
    for node in _definitions(scope):
        about = (ast.get_docstring(node) or "").strip()
        if about:
            yield f"{_signature(node, prefix)}\n{textwrap.indent(about, '    ')}"
        if isinstance(node, ast.ClassDef):
            yield from _described(node, f"{prefix}{node.name}.")


def _definitions(scope: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Classes and functions of a scope, also those under `if` and `try`, but not nested ones."""
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.If | ast.Try | ast.ExceptHandler):
            yield from _definitions(node)


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"class {prefix}{node.name}({bases}):" if bases else f"class {prefix}{node.name}:"
    keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{keyword} {prefix}{node.name}({ast.unparse(node.args)}):"
