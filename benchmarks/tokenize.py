"""Tokens a second: `python benchmarks/tokenize.py`; what is measured, and against what, is said in `tokenize_speed.py`."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder would hide Python's own `tokenize`
    from benchmarks.tokenize_speed import main

    main(sys.argv[1:])
else:
    # Another script of this folder runs, and its imports found this file where they wanted Python's own: give them that.
    _own = Path(os.__file__).with_name("tokenize.py")
    exec(compile(_own.read_text(), str(_own), "exec"), globals())
