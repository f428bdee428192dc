"""Regular expressions in a `tokenizer.json`, tried before they are used.

`tokenizers` matches by backtracking: an expression such as `(x+x+)+y` takes longer with each character, until the library
gives up with a trace, and one with nested counts can take all memory when it is compiled. Whether an expression is one of
these cannot be told by looking at it, so a child process tries it on what usually brings it out, runs of one character, with
little time and memory. One that only fails on other text is met when it comes: then encoding ends in one line (see
`JsonTokenizer`), and one that is only slow there stays slow.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from typing import Any

from pretrain_xla.errors import UserError

SECONDS = 20.0  # for a child that needs a fraction of one, on a machine that is busy
_RUN = 1000  # characters: work that grows with the third power goes over the limit of the library
_USUAL = "aA0 \n_-'é漢!"
_MOST_PATTERNS = 64
_FAILED = 3  # exit status; any other says nothing of the expressions
_CHILD = """
import json, resource, sys
from tokenizers import Regex, pre_tokenizers
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
for number, (pattern, texts) in enumerate(json.load(sys.stdin)):
    print(number, flush=True)
    try:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        for text in texts:
            split.pre_tokenize_str(text)
    except BaseException:
        sys.exit({failed})
"""


def check_patterns(name: str, tree: Any) -> None:
    """Refuse a tokenizer whose regular expressions do not end in time.

    Args:
        name: the tokenizer, for messages.
        tree: what its `tokenizer.json` holds.

    Raises:
        UserError: naming the expression.
    """
    if patterns := tuple(dict.fromkeys(_patterns(tree))):
        bad = _first_bad(patterns)
        if bad is not None:
            raise UserError(
                f"tokenizer {name!r}: its regular expression {bad[:60]!r} fails, or takes time or memory without end, on plain "
                "text: do not use it"
            )


def _patterns(tree: Any) -> list[str]:
    """Every expression in the tree, but for its model, which has none and is large."""
    waiting = [value for key, value in tree.items() if key != "model"] if isinstance(tree, dict) else []
    found = []
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if isinstance(value.get("Regex"), str):
                found.append(value["Regex"])
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return found


@functools.lru_cache(maxsize=8)
def _first_bad(patterns: tuple[str, ...]) -> str | None:
    if len(patterns) > _MOST_PATTERNS:
        return patterns[_MOST_PATTERNS]
    trials = [(pattern, _texts(pattern)) for pattern in patterns]
    command = [sys.executable, "-c", _CHILD.format(failed=_FAILED)]
    started = ""
    try:
        done = subprocess.run(
            command,
            input=json.dumps(trials),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=SECONDS,
        )
        bad, started = done.returncode == _FAILED or done.returncode < 0, done.stdout
    except subprocess.TimeoutExpired as error:
        bad, started = True, (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else ""
    return patterns[max(0, len(started.split()) - 1)] if bad else None


def _texts(pattern: str) -> list[str]:
    """Runs of the letters of the expression itself, and of one of each usual kind.

    What follows a run stops an expression there, which must then go back; and it has all that an expression may insist on,
    without which the library does not begin.
    """
    own = dict.fromkeys(character for character in pattern[:200] if character.isprintable())
    tail = "\x01" + "".join(own) + _USUAL
    runs = sorted({*_USUAL, *filter(str.isalnum, own)})
    return [character * _RUN + tail for character in runs]
