"""Write the notebooks for Kaggle and Colab from their one source, examples/notebooks/source.py.

python scripts/make_notebooks.py            # write them
python scripts/make_notebooks.py --check    # only say whether they are up to date; exit status 1 if not
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "notebooks"
NOTEBOOKS = ("kaggle", "colab")
_CELL = re.compile(r"^# %%(.*)$", re.MULTILINE)


def notebook(source: str, name: str) -> dict[str, Any]:
    """The notebook of that name, in Jupyter's format 4.5, without outputs."""
    _, *parts = _CELL.split(source)
    cells: list[dict[str, Any]] = []
    for marker, body in zip(parts[::2], parts[1::2], strict=True):
        words = marker.split()
        only = [word for word in words if word in NOTEBOOKS]
        if not only or name in only:
            cells.append(_cell(words, body.strip("\n"), len(cells)))
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def _cell(words: list[str], body: str, number: int) -> dict[str, Any]:
    is_text = "[markdown]" in words
    if is_text:
        body = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
    cell: dict[str, Any] = {
        "cell_type": "markdown" if is_text else "code",
        "id": f"cell-{number}",
        "metadata": {"tags": ["parameters"]} if "parameters" in words else {},
        "source": body.splitlines(keepends=True),
    }
    return cell if is_text else cell | {"execution_count": None, "outputs": []}


def rendered() -> dict[Path, str]:
    """Path of each notebook → its text."""
    source = (FOLDER / "source.py").read_text(encoding="utf-8")
    return {
        FOLDER / f"{name}.ipynb": json.dumps(notebook(source, name), indent=1, ensure_ascii=False) + "\n"
        for name in NOTEBOOKS
    }


def main(arguments: list[str]) -> int:
    """Write or check the notebooks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    flags = parser.parse_args(arguments)
    old = [path for path, text in rendered().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in old:
        if flags.check:
            print(f"{path} is not up to date: python scripts/make_notebooks.py")
        else:
            path.write_text(rendered()[path], encoding="utf-8")
            print(f"wrote {path}")
    return 1 if old and flags.check else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
