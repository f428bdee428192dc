"""Regular expressions of a `tokenizer.json`, tried in a child process before they are used.

`tokenizers` matches by backtracking. An expression such as `(x+x+)+y` takes longer with each character, until the library gives
up with a stack trace, and one with nested counts can take all memory when it is compiled. That cannot be seen from the
expression. So a child process with little time and memory tries each one on the text that usually triggers this, runs of one
character. An expression that fails only on other text passes: encoding that text then ends in a one-line error (see
`JsonTokenizer`), and one that is only slow there stays slow.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from typing import Any

from pretrain_xla.errors import UserError

SECONDS = 20.0  # the child needs a fraction of a second, but the host may be busy
_RUN = 1000  # characters: work that grows with the third power exceeds the library's limit
_COMMON = "aA0 \n_-'é漢!"
_MAX_PATTERNS = 64
_FAILED = 3  # exit status; any other says nothing about the expressions
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
    """Refuse a tokenizer whose regular expressions do not finish in time.

    Args:
        name: of the tokenizer, for messages.
        tree: the content of its `tokenizer.json`.

    Raises:
        UserError: naming the expression.
    """
    if patterns := tuple(dict.fromkeys(_patterns(tree))):
        bad = _first_bad(patterns)
        if bad is not None:
            raise UserError(
                f"tokenizer {name!r}: its regular expression {bad[:60]!r} fails, or takes unlimited time or memory, on plain "
                "text: do not use it"
            )


def _patterns(tree: Any) -> list[str]:
    """Every expression in the tree; its model is left out, as it has none and is large."""
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
    if len(patterns) > _MAX_PATTERNS:
        return patterns[_MAX_PATTERNS]
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
    """A run of each letter in the expression, and of one common character of each kind.

    The tail after a run makes the expression fail there, so that it must backtrack. The tail also contains every character that
    the expression may require, without which the library does not start matching.
    """
    own = dict.fromkeys(character for character in pattern[:200] if character.isprintable())
    tail = "\x01" + "".join(own) + _COMMON
    runs = sorted({*_COMMON, *filter(str.isalnum, own)})
    return [character * _RUN + tail for character in runs]
