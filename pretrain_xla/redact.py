"""Hide user names, passwords and tokens of URLs in all output.

A run uses its URLs as they are typed (`s3://KEY:SECRET@bucket/data`, `https://host/file?token=…`). Its messages, `config.yaml`,
`checkpoint.json`, `dataset.json` and model card show `HIDDEN` in place of the credentials.
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "***"

# An AWS secret key may contain slashes. Digits between the colon and a slash are a port, not a password.
_PASSWORD = re.compile(
    r"(?<![A-Za-z])(?!github:)([A-Za-z][\w+.-]*://)[^/\s:@'\"\[]*:(?!:)(?!\d+(?:[/?#]|$))(?:[^\s/'\"]*@|[^\s@'\"]*@)"
)
_USER_OF_WEB = re.compile(r"(https?://)[^/\s:@'\"]+@")
_QUERY = re.compile(r"([A-Za-z][\w+.-]*://[^\s?#'\"]*)([?#][^\s'\"]*)")
_PARAMETER = re.compile(r"([?&#;])([^=&#;]+)=([^&#;]*)")
_SECRET_KEY = re.compile(r"token|sig|key|secret|pass|pwd|auth|cred|policy|session|sas|code|hmac|jwt", re.IGNORECASE)
_LONGEST_PLAIN_VALUE = 15  # characters; a longer value may be a signature, whatever its key


def redacted(text: str) -> str:
    """The text with `HIDDEN` for the user, the password and secrets in the query of each URL."""
    if "://" not in text:
        return text
    text = _PASSWORD.sub(rf"\g<1>{HIDDEN}@", text)
    text = _USER_OF_WEB.sub(rf"\g<1>{HIDDEN}@", text)
    return _QUERY.sub(lambda match: match[1] + _PARAMETER.sub(_hide_value, match[2]), text)


def redacted_tree(tree: Any) -> Any:
    """The same for every string in mappings and lists."""
    if isinstance(tree, dict):
        return {key: redacted_tree(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [redacted_tree(value) for value in tree]
    return redacted(tree) if isinstance(tree, str) else tree


def is_redacted(text: str) -> bool:
    """Whether something is hidden in this URL."""
    return f"://{HIDDEN}@" in text or f"={HIDDEN}" in text


def _hide_value(parameter: re.Match[str]) -> str:
    begin, key, value = parameter.groups()
    hide = bool(value) and (_SECRET_KEY.search(key) or len(value) > _LONGEST_PLAIN_VALUE)
    return f"{begin}{key}={HIDDEN if hide else value}"
