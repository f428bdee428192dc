"""What Google Cloud's metadata server says of this VM. It answers on the VM alone, and without a login."""

from __future__ import annotations

import http.client
import os
import urllib.request

HOST = "169.254.169.254"
"""Its IP address, to avoid waiting for DNS. GCE_METADATA_HOST overrides it, as in Google's libraries."""

SECONDS = 3.0
"""Timeout. It answers in milliseconds; without one, the connection may hang."""


def instance_value(path: str) -> str | None:
    """The value under `instance/`. None means that it is empty or unknown to the server, or that there is no server."""
    host = os.environ.get("GCE_METADATA_HOST", HOST)
    url = f"http://{host}/computeMetadata/v1/instance/{path}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    # Without a proxy: the address is link-local.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=SECONDS) as answer:
            if answer.headers.get("Metadata-Flavor") != "Google":
                return None
            return str(answer.read(1_000_000).decode()).strip() or None
    except (OSError, ValueError, http.client.HTTPException):
        return None
