from __future__ import annotations

import ast
import contextlib
import gc
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain_xla.errors import UserError
from pretrain_xla.text import corpus
from pretrain_xla.text.sources import open_source

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def documents():
    return list(open_source("quickstart").documents())


def test_is_several_megabytes_of_topics_and_modules(documents):
    assert sum(len(document.encode()) for document in documents) > 2e6
    assert len(documents) == len(set(documents)) > 500
    argparse = next(document for document in documents if document.startswith("module argparse\n"))
    assert "class ArgumentParser(_AttributeHolder, _ActionsContainer):" in argparse
    assert any('The "if" statement is used for conditional execution' in document for document in documents)
    assert not any(document.startswith(("module test.", "module pip.", "module tyro")) for document in documents)


def test_imports_none_of_the_modules_it_reads():
    code = (
        "import sys; from pretrain_xla.text.corpus import quickstart_documents; before = set(sys.modules)\n"
        "total = sum(map(len, quickstart_documents())); new = set(sys.modules) - before\n"
        "assert total and not new & {'antigravity', 'this', 'tkinter', 'idlelib', 'turtle', 'wsgiref'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_module_document_reads_definitions_under_if_and_try(tmp_path):
    source = tmp_path / "m.py"
    source.write_text(
        '"""About m."""\nif True:\n    async def f(x: int = 1, *, y) -> int:\n        """Does f."""\n'
        'class C(int):\n    def method(self):\n        """Does method."""\n        def inner():\n            """No."""\n'
    )
    assert corpus._module_document("m", source) == (
        "module m\n\nAbout m.\n\nasync def f(x: int=1, *, y):\n    Does f.\n\ndef C.method(self):\n    Does method."
    )
    source.write_text("x = 1\n")
    assert corpus._module_document("m", source) == ""
    source.write_text("not python at all\n")
    assert corpus._module_document("m", source) == ""


@contextlib.contextmanager
def parse_during_garbage_collection(times):
    """Parse other source the next few times that garbage is collected, as other threads can in the middle of `ast.parse`."""
    thresholds, left = gc.get_threshold(), [times]

    def parse(depth):  # from deep in the stack, so that the two recursion depths never agree by chance
        return parse(depth - 1) if depth else ast.parse("x = [1, (2, 3)]")

    def callback(phase, info):
        if left[0]:
            left[0] -= 1
            parse(depth=100)

    gc.callbacks.append(callback)
    gc.set_threshold(50)
    try:
        yield
    finally:
        gc.callbacks.remove(callback)
        gc.set_threshold(*thresholds)


def test_a_module_is_read_although_other_source_is_parsed_meanwhile():
    """A SystemError of Python before 3.11.8 and 3.12.2."""
    file = Path(ast.__file__)
    expected = corpus._module_document("ast", file)
    with parse_during_garbage_collection(times=1):
        assert corpus._module_document("ast", file) == expected
    assert "def parse(" in expected


@pytest.mark.skipif(sys.version_info >= (3, 11, 8), reason="this Python parses in two places at once")
def test_a_module_that_python_never_manages_to_parse_is_named():
    message = r"ast\.py: Python .* cannot parse it \(AST .*\): use a newer one"
    with pytest.raises(UserError, match=message), parse_during_garbage_collection(times=10**9):
        corpus._module_document("ast", Path(ast.__file__))
