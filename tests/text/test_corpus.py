from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
