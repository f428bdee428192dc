"""Regular expressions and replacements of a `tokenizer.json`, tried in a child process before they are used.

`tokenizers` matches by backtracking. An expression such as `(x+x+)+y` takes longer with each character, until the library gives
up with a stack trace, and one with nested counts can take all memory when it is compiled. That cannot be seen from the
expression. So a child process with little time and memory tries each one on the text that usually triggers this, runs of one
character. An expression that fails only on other text passes: encoding that text then ends in a one-line error (see
`JsonTokenizer`), and one that is only slow there stays slow.

Replacements that each lengthen the text make of one character more than any memory holds. If those of a file could lengthen
it a thousandfold, the child process tries them, too.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from pretrain_xla.errors import UserError

SECONDS = 20.0  # the child needs a fraction of a second, but the host may be busy
_CPU_SECONDS = 2  # that it may compute for, or one less
_RUN = 1000  # characters: work that grows with the third power exceeds the library's limit
_COMMON = "aA0 \n_-'é漢!"
_MAX_PATTERNS = 64
_FAILED = 3  # exit status; any other says nothing about the expressions
_MOST_GROWTH = 1000  # of a text by replacements that are not tried
_CHILD = """
import json, resource, sys, time
from tokenizers import Regex, Tokenizer, pre_tokenizers
trials, steps, text = json.load(sys.stdin)
seconds = int(time.process_time()) + {seconds}
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
for number, (pattern, texts) in enumerate(trials):
    print(number, flush=True)
    try:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        for run in texts:
            split.pre_tokenize_str(run)
    except BaseException:
        sys.exit({failed})
if steps:
    print(len(trials), flush=True)
    try:
        tokenizer = Tokenizer.from_str(steps)
    except BaseException:
        sys.exit(0)  # the file cannot be read, which is no matter of time
    try:
        tokenizer.decode(tokenizer.encode(text).ids)
    except BaseException:
        sys.exit({failed})
"""


def check_patterns(name: str, tree: Any) -> None:
    """Refuse a tokenizer whose regular expressions or replacements do not finish in time.

    Args:
        name: of the tokenizer, for messages.
        tree: the content of its `tokenizer.json`.

    Raises:
        UserError: naming the expression.
    """
    found = list(_mappings(tree))
    patterns = tuple(dict.fromkeys(each["Regex"] for each in found if isinstance(each.get("Regex"), str)))
    longer = [len(each["content"]) for each in found if each.get("type") == "Replace" and each.get("content")]
    steps = _steps(tree) if math.prod(longer) > _MOST_GROWTH else ""
    if (patterns or steps) and (bad := _first_bad(patterns, steps)) is not None:
        what = f"regular expression {bad[:60]!r} fails, or takes" if bad else "replacements of text fail, or take"
        raise UserError(f"tokenizer {name!r}: its {what} unlimited time or memory, on plain text: do not use it")


def _mappings(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in the tree; its model is left out, as it has no expressions and is large."""
    waiting = [value for key, value in tree.items() if key != "model"] if isinstance(tree, dict) else []
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _steps(tree: dict[str, Any]) -> str:
    """The same tokenizer with a vocabulary of a few words."""
    kept = {key: tree.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}
    model = {"type": "WordLevel", "vocab": {word: token for token, word in enumerate(_COMMON)}, "unk_token": "a"}
    others: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "post_processor": None,
    }
    return json.dumps(others | kept | {"model": model})


@functools.lru_cache(maxsize=8)
def _first_bad(patterns: tuple[str, ...], steps: str) -> str | None:
    """The first expression that does not finish, or "" for the steps. None means that all do."""
    if len(patterns) > _MAX_PATTERNS:
        return patterns[_MAX_PATTERNS]
    trials = [(pattern, _texts(pattern)) for pattern in patterns]
    child = _CHILD.format(failed=_FAILED, seconds=_CPU_SECONDS)
    started = ""
    try:
        done = subprocess.run(
            [sys.executable, "-c", child],
            input=json.dumps([trials, steps, _COMMON]),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=SECONDS,
        )
        bad, started = done.returncode == _FAILED or done.returncode < 0, done.stdout
    except subprocess.TimeoutExpired as error:
        bad, started = True, (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else ""
    return [*patterns, ""][max(0, len(started.split()) - 1)] if bad else None


def _texts(pattern: str) -> list[str]:
    """A run of each letter in the expression, and of one common character of each kind.

    The tail after a run makes the expression fail there, so that it must backtrack. The tail also contains every character that
    the expression may require, without which the library does not start matching.
    """
    own = dict.fromkeys(character for character in pattern[:200] if character.isprintable())
    tail = "\x01" + "".join(own) + _COMMON
    runs = sorted({*_COMMON, *filter(str.isalnum, own)})
    return [character * _RUN + tail for character in runs]
