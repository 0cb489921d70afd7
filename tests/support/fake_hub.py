"""A Hugging Face hub on this machine, as far as downloading a repository goes."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class FakeHub:
    """`repositories` maps an id to commits, a commit to files by path, and other revisions to commits.

    `sizes` overrides what the hub says of a file's size; `fetched` collects the names that were downloaded.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Mapping[str, Path]]] = {}
        self.names: dict[str, dict[str, str]] = {}
        self.sizes: dict[str, int] = {}
        self.fetched: list[str] = []
        self.url = ""

    def add(self, repository: str, commit: str, files: Mapping[str, Path], *names: str) -> None:
        """A commit of `repository`, and the branches and tags that lead to it."""
        self.commits.setdefault(repository, {})[commit] = files
        self.names.setdefault(repository, {}).update(dict.fromkeys(names, commit))

    def size(self, name: str, path: Path) -> int:
        return self.sizes.get(name, path.stat().st_size)

    def find(self, repository: str, revision: str) -> tuple[str, Mapping[str, Path]] | None:
        commit = self.names.get(repository, {}).get(revision, revision)
        files = self.commits.get(repository, {}).get(commit)
        return None if files is None else (commit, files)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub that listens on a free port of this machine at `url`, for the time of the block."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def do_GET(self, body: bool = True) -> None:
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if parts[:2] == ["api", "models"] and len(parts) >= 6:
                self.describe("/".join(parts[2:4]), parts[4], parts[5])
            elif len(parts) > 4 and parts[2] == "resolve":
                self.file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), body)
            else:
                self.refuse("RepoNotFound")

        def describe(self, repository: str, what: str, revision: str) -> None:
            found = hub.find(repository, revision)
            if found is None:
                self.refuse("RevisionNotFound" if repository in hub.commits else "RepoNotFound")
                return
            commit, files = found
            tree = [
                {"type": "file", "path": name, "size": hub.size(name, path), "oid": _oid(path)}
                for name, path in files.items()
            ]
            record = {"id": repository, "modelId": repository, "sha": commit, "siblings": []}
            self.answer(json.dumps(record if what == "revision" else tree).encode(), {}, True)

        def file(self, repository: str, revision: str, name: str, body: bool) -> None:
            found = hub.find(repository, revision)
            if found is None or name not in found[1]:
                self.refuse("EntryNotFound")
                return
            path = found[1][name]
            headers = {
                "X-Repo-Commit": found[0],
                "ETag": f'"{_oid(path)}"',
                "X-Linked-ETag": f'"{_oid(path)}"',
            }
            headers["X-Linked-Size"] = str(hub.size(name, path))
            if body:
                hub.fetched.append(name)
            self.answer(path.read_bytes(), headers, body)

        def refuse(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self, content: bytes, headers: Mapping[str, str], body: bool) -> None:
            self.send_response(200)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _oid(path: Path) -> str:
    """What names a file's content: git's id of a blob has this form."""
    return hashlib.sha1(path.read_bytes()).hexdigest()
