"""A stand-in for the Hugging Face hub on this machine: repositories at one commit each, over HTTP.

It answers what huggingface_hub asks a hub without Xet: the listing of a commit and its files, of
which those in LFS lie at another address, as on a CDN, and can be read from anywhere on. It is also
what a client takes for its proxy, so that a request to any other host ends here too. Every request
is noted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

LFS = (".safetensors", ".parquet", ".bin")
LISTING = re.compile(
    r"/api/(?P<repo>(models|datasets)/[^/]+/[^/]+)/tree/(?P<commit>[^/]+)(?P<folder>/.+)?"
)
COMMIT = re.compile(r"/api/(?P<repo>(models|datasets)/[^/]+/[^/]+)/revision/(?P<commit>[^/]+)")
FILE = re.compile(r"/(?P<repo>(datasets/)?[^/]+/[^/]+)/resolve/(?P<commit>[^/]+)/(?P<name>.+)")
BLOB = re.compile(r"/blobs/(?P<sha256>[0-9a-f]{64})")
JSON = {"Content-Type": "application/json"}
ABOUT_CLIENTS = "/api/agent-harnesses"  # what a client asks for once a day, online
# What a process takes from its surroundings, and a test must not.
FOREIGN = ("HF_", "HUGGING", "TRANSFORMERS_", "XDG_CACHE_HOME")


@dataclass
class Repository:
    """Files of one commit; a gated one lists them, but gives them to nobody."""

    commit: str
    files: Mapping[str, bytes]
    gated: bool = False

    @property
    def folders(self) -> set[str]:
        """Folders that hold a file."""
        return {name.rpartition("/")[0] for name in self.files} - {""}


@dataclass
class Hub:
    """Repositories by their path, such as ``datasets/Rowan/hellaswag``, and what was asked of them.

    ``broken_off`` holds the names of files whose next answer ends half-way.
    """

    url: str
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    broken_off: set[str] = field(default_factory=set)

    def blob(self, sha256: str) -> tuple[str, bytes]:
        """Return the name and content of a file in LFS."""
        return next(
            (name, content)
            for repository in self.repositories.values()
            for name, content in repository.files.items()
            if hashlib.sha256(content).hexdigest() == sha256
        )

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a process that knows this hub, and no other host.

        Args:
            home: folder of its hub cache.
        """
        own = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        proxies = {name: self.url for name in ("http_proxy", "https_proxy", "all_proxy")}
        proxies |= {name.upper(): value for name, value in proxies.items()}
        local = dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost")
        return {**own, **proxies, **local, "HF_ENDPOINT": self.url, "HF_HOME": str(home)}

    def files_given(self) -> list[str]:
        """Return the names of the files that were sent, once for each time."""
        paths = [urlsplit(r.split()[1]).path for r in self.requests if r.startswith("GET ")]
        blobs = [self.blob(m["sha256"])[0] for p in paths if (m := BLOB.fullmatch(p))]
        small = [m["name"] for p in paths if (m := FILE.fullmatch(p))]
        return sorted(blobs + [name for name in small if not name.endswith(LFS)])


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve an empty hub on a free port of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._note()
        path = unquote(urlsplit(self.path).path)
        if found := LISTING.fullmatch(path):
            self._list(found["repo"], found["commit"], (found["folder"] or "").lstrip("/"))
        elif found := COMMIT.fullmatch(path):
            self._describe(found["repo"], found["commit"])
        elif found := FILE.fullmatch(path):
            repo = found["repo"]
            repo = repo if repo.startswith("datasets/") else f"models/{repo}"
            self._give(repo, found["commit"], found["name"])
        elif found := BLOB.fullmatch(path):
            self._send(*self.server.hub.blob(found["sha256"]))
        elif path == ABOUT_CLIENTS:
            self._answer(200, b'{"standardEnvVars": [], "harnesses": {}}', JSON)
        else:
            self._refuse(404, "NotFound")

    do_GET = do_HEAD

    def do_CONNECT(self) -> None:
        """Refuse to be a proxy: some process wants another host."""
        self._note()
        self._refuse(403, "NoOtherHost")

    do_POST = do_CONNECT

    def log_message(self, *_: object) -> None:
        """Requests are noted, not printed."""

    def _note(self) -> None:
        self.server.hub.requests.append(f"{self.command} {self.path}")

    def _repository(self, repo: str, commit: str) -> Repository | None:
        """Return the repository at this commit, or answer as the hub does where it is not."""
        found = self.server.hub.repositories.get(repo)
        if found is None:
            self._refuse(401, "RepoNotFound")
        elif found.commit != commit:
            self._refuse(404, "RevisionNotFound")
            found = None
        return found

    def _list(self, repo: str, commit: str, folder: str) -> None:
        """List every file of the repository, or what lies in one folder."""
        if repository := self._repository(repo, commit):
            listing = [_entry(name, content) for name, content in repository.files.items()]
            if "recursive=true" not in self.path:
                listing += [{"type": "directory", "path": p, "oid": ""} for p in repository.folders]
                listing = [e for e in listing if e["path"].rpartition("/")[0] == folder]
            self._answer(200, json.dumps(listing).encode(), JSON)

    def _describe(self, repo: str, commit: str) -> None:
        if self._repository(repo, commit):
            about = {"id": repo.partition("/")[2], "sha": commit}
            self._answer(200, json.dumps(about).encode(), JSON)

    def _give(self, repo: str, commit: str, name: str) -> None:
        repository = self._repository(repo, commit)
        if repository is None:
            return
        if repository.gated:
            self._refuse(401, "GatedRepo")
        elif name not in repository.files:
            self._refuse(404, "EntryNotFound")
        else:
            content = repository.files[name]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{_git_id(content)}"'}
            if name.endswith(LFS):
                sha256 = hashlib.sha256(content).hexdigest()
                headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha256}"'}
                # By another name of this machine: a client follows no redirect to a CDN before it
                # has read these headers.
                address = self.server.hub.url.replace("127.0.0.1", "localhost")
                self._answer(302, b"", headers | {"Location": f"{address}/blobs/{sha256}"})
            else:
                self._answer(200, content, headers)

    def _send(self, name: str, content: bytes) -> None:
        """Send the part of a file in LFS that is asked for, or only half of it if told to."""
        headers, status, part = {"Accept-Ranges": "bytes"}, 200, content
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            self.server.hub.ranges.append(found[0])
            start, end = int(found[1]), int(found[2] or len(content) - 1) + 1
            part, status = content[start:end], 206
            place = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
            headers["Content-Range"] = place
        broken_off = name in self.server.hub.broken_off
        self.server.hub.broken_off.discard(name)
        self._answer(status, part, headers, broken_off=broken_off)

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": f"It says {code}."})

    def _answer(
        self, status: int, body: bytes, headers: Mapping[str, str], *, broken_off: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if broken_off else body)
            self.close_connection = self.close_connection or broken_off


def _entry(name: str, content: bytes) -> dict[str, object]:
    """Return what a listing says of a file."""
    entry = {"type": "file", "path": name, "size": len(content), "oid": _git_id(content)}
    if not name.endswith(LFS):
        return entry
    sha256 = hashlib.sha256(content).hexdigest()
    return {**entry, "lfs": {"oid": sha256, "size": len(content), "pointerSize": 134}}


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
