"""The part of the Hugging Face Hub's REST API that pushing and fetching a model uses, on a real HTTP server.

Repositories are dictionaries of path → bytes, one for each commit. Two tokens: `hf_write` of the user `alice`, who may write
in her own namespace, and `hf_read`, who may write nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
REPO = r"(?P<repo>[^/]+/[^/]+)"
LARGE = 1000  # bytes from which a file is uploaded by itself, through LFS


class Hub(ThreadingHTTPServer):
    """What the server holds. commits: repository → its states, oldest first. slow: held while an upload must wait."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, list[Files]] = {}
        self.messages: dict[str, list[str]] = {}
        self.private: dict[str, bool] = {}
        self.objects: Files = {}
        self.slow = threading.Event()
        self.slow.set()
        self.failing = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def files(self, repository: str) -> Files:
        return self.commits[repository][-1]

    def put(self, repository: str, files: Files, message: str = "put") -> None:
        """A commit that nobody pushed."""
        self.commits.setdefault(repository, []).append(files)
        self.messages.setdefault(repository, []).append(message)


def sha(repository: str, number: int) -> str:
    return hashlib.sha1(f"{repository}/{number}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    ROUTES: tuple[tuple[str, str, str], ...] = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", rf"/api/models/{REPO}/auth-check/write", "auth_check"),
        ("POST", rf"/api/models/{REPO}/preupload/main", "preupload"),
        ("POST", rf"/api/models/{REPO}/commit/main", "commit"),
        ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", "tree"),
        ("GET", rf"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>\w+)", "lfs_put"),
        ("GET|HEAD", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def route(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        for method, pattern, name in self.ROUTES:
            if self.command in method.split("|") and (match := re.fullmatch(pattern, path)):
                getattr(self, name)(**{k: v for k, v in match.groupdict().items() if v is not None})
                return
        self.answer(404, {"error": f"no route for {self.command} {path}"})

    do_GET = do_POST = do_PUT = do_HEAD = route

    def answer(self, status: int, tree: Any = None, **headers: str) -> None:
        body = b"" if tree is None else json.dumps(tree).encode()
        self.raw(status, body, {"Content-Type": "application/json"} | headers)

    def raw(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def may_write(self, repo: str) -> bool:
        return self.token == "hf_write" and repo.startswith("alice/")

    def refuse(self) -> None:
        self.answer(403, {"error": "you have no right to write here"})

    def whoami(self) -> None:
        if self.token not in ("hf_write", "hf_read"):
            self.answer(401, {"error": "Invalid username or password."})
            return
        self.answer(200, {"type": "user", "name": "alice", "auth": {"accessToken": {"role": self.token[3:]}}})

    def create(self) -> None:
        tree = json.loads(self.body)
        name = f"{tree.get('organization') or 'alice'}/{tree['name']}"
        if not self.may_write(name):
            self.refuse()
        elif name in self.server.commits:
            self.answer(409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"})
        else:
            self.server.private[name] = tree.get("visibility") == "private" or tree.get("private") is True
            self.server.put(name, {".gitattributes": b""}, "initial commit")
            self.answer(200, {"url": f"{self.server.url}/{name}"})

    def validate(self) -> None:
        """A card's heading; any will do."""
        self.answer(200, {"errors": [], "warnings": []})

    def auth_check(self, repo: str) -> None:
        if self.may_write(repo):
            self.answer(200)
        else:
            self.refuse()

    def exists(self, repo: str) -> bool:
        if repo in self.server.commits:
            return True
        self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return False

    def preupload(self, repo: str) -> None:
        if not self.may_write(repo):
            self.refuse()
            return
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["size"] >= LARGE else "regular", "shouldIgnore": False}
            for file in json.loads(self.body)["files"]
        ]
        self.answer(200, {"files": modes})

    def lfs_batch(self, repo: str) -> None:
        self.server.slow.wait()
        if self.server.failing:
            self.answer(400, {"error": "the store is out of order"})
            return
        objects = []
        for entry in json.loads(self.body)["objects"]:
            actions = {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}"}}
            objects.append(entry if entry["oid"] in self.server.objects else entry | {"actions": actions})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.objects[oid] = self.body
        self.answer(200)

    def commit(self, repo: str) -> None:
        if not self.may_write(repo):
            self.refuse()
            return
        files, message = dict(self.server.files(repo)), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFolder":
                files = {path: data for path, data in files.items() if not path.startswith(value["path"])}
        self.server.put(repo, files, message)
        oid = sha(repo, len(self.server.commits[repo]) - 1)
        self.answer(200, {"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid})

    def state(self, repo: str, revision: str = "main") -> tuple[str, Files]:
        states = self.server.commits[repo]
        known = {sha(repo, number): number for number in range(len(states))}
        number = known.get(revision, len(states) - 1)
        return sha(repo, number), states[number]

    def info(self, repo: str, revision: str = "main") -> None:
        if self.exists(repo):
            oid, files = self.state(repo, revision)
            siblings = [{"rfilename": path} for path in files]
            self.answer(200, {"id": repo, "sha": oid, "private": False, "tags": [], "siblings": siblings})

    def tree(self, repo: str, revision: str) -> None:
        if self.exists(repo):
            entries = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in self.state(repo, revision)[1].items()
            ]
            self.answer(200, entries)

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if not self.exists(repo):
            return
        oid, files = self.state(repo, revision)
        if path not in files:
            self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=oid)
            return
        data = files[path]
        self.raw(200, data, {"X-Repo-Commit": oid, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'})


@contextmanager
def serve() -> Iterator[Hub]:
    """A running server, on a free port of this machine alone."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.slow.set()
        hub.shutdown()
        hub.server_close()
        thread.join()
