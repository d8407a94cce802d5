"""A Hub on loopback: the HTTP API that huggingface_hub, transformers, datasets and evaluate use, over a folder.

```python
with HubServer(folder) as hub:  # HF_ENDPOINT=hub.url for the client process
    hub.add_user("alice", token="hf_…", orgs=["org"])
```

On disk, `blobs/<sha256>` holds every file content once; `repos/<type>s/<id>/` holds `meta.json` (settings and refs) and
`commits/<sha>.json` (parent, title, path → blob). A commit writes a new file and then renames a `meta.json` into place.

Large files come from a second host name (`localhost`, while the Hub is `127.0.0.1`), like those of the real Hub's storage,
so that tests can detect a client that sends its token there. `hub.faults` is a list of [`Fault`]s.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

TYPES = ("model", "dataset", "space")
_PREFIX = {"model": "", "dataset": "datasets/", "space": "spaces/"}
#: Stored with LFS, as in the .gitattributes of a new repository on the real Hub.
LARGE_SUFFIXES = (".safetensors", ".parquet", ".bin", ".pt", ".png", ".jpg", ".arrow", ".zip")
LARGE_BYTES = 10 << 20
_GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_SUFFIXES).encode()


class HttpError(Exception):
    """Raised by a handler to answer with an error status; `code` becomes X-Error-Code."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers or {}


@dataclass
class Fault:
    """A failure of requests whose "METHOD path?query user=NAME" matches `pattern`.

    The URLs of large files name the user in their query, so a pattern can match all requests of one user.

    Args:
        kind: "cut" (the connection is reset before the request is served), "lost" (the request is served, and the answer
            is lost), "half" (half of the answer arrives), "slow" (the answer takes `seconds` longer), or an HTTP status.
        at: Number of the matching request that fails, from 1. With `stays`, all later ones fail too.
    """

    kind: str | int
    at: int = 1
    pattern: str = ""
    stays: bool = False
    seconds: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    seen: int = 0

    def hits(self, line: str) -> bool:
        if not re.search(self.pattern, line):
            return False
        self.seen += 1
        return self.seen >= self.at if self.stays else self.seen == self.at


@dataclass
class Request:
    """One entry of the log; a status of 0 means that the request got no answer."""

    method: str
    path: str
    user: str | None
    status: int
    bytes_in: int = 0
    authorization: str = ""
    host: str = ""


class Store:
    """Repositories stored in a folder."""

    def __init__(self, root: Path):
        self.root = root
        self.lock = threading.RLock()
        (root / "blobs").mkdir(parents=True, exist_ok=True)

    def _folder(self, kind: str, repo: str) -> Path:
        return self.root / "repos" / f"{kind}s" / repo

    def exists(self, kind: str, repo: str) -> bool:
        return (self._folder(kind, repo) / "meta.json").is_file()

    def meta(self, kind: str, repo: str) -> dict[str, Any]:
        return json.loads((self._folder(kind, repo) / "meta.json").read_text())

    def write_meta(self, kind: str, repo: str, meta: dict[str, Any]) -> None:
        path = self._folder(kind, repo) / "meta.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(meta))
        os.replace(temporary, path)

    def create(self, kind: str, repo: str, **settings: Any) -> None:
        self.write_meta(kind, repo, {"private": False, "gated": False, "refs": {}, **settings})
        self.commit(kind, repo, "main", "initial commit", {".gitattributes": self.put(_GITATTRIBUTES)}, [])

    def put(self, content: bytes) -> dict[str, Any]:
        sha256 = hashlib.sha256(content).hexdigest()
        path = self.root / "blobs" / sha256
        if not path.exists():
            temporary = path.with_name(f".{sha256}.{threading.get_ident()}")
            temporary.write_bytes(content)
            os.replace(temporary, path)
        git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        return {"sha256": sha256, "size": len(content), "git": git, "lfs": False}

    def blob(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256

    def commit(
        self, kind: str, repo: str, ref: str, title: str, added: dict[str, dict[str, Any]], deleted: list[str]
    ) -> str:
        with self.lock:
            meta = self.meta(kind, repo)
            parent = meta["refs"].get(ref)
            files = {} if parent is None else dict(self.load_commit(kind, repo, parent)["files"])
            for path in deleted:
                for name in [f for f in files if f == path or (path.endswith("/") and f.startswith(path))]:
                    del files[name]
            files |= added
            content = json.dumps({"parent": parent, "title": title, "files": files}, sort_keys=True)
            sha = hashlib.sha1(f"{content}{time.time_ns()}".encode()).hexdigest()
            path = self._folder(kind, repo) / "commits" / f"{sha}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            self.write_meta(kind, repo, meta | {"refs": meta["refs"] | {ref: sha}})
            return sha

    def load_commit(self, kind: str, repo: str, sha: str) -> dict[str, Any]:
        return json.loads((self._folder(kind, repo) / "commits" / f"{sha}.json").read_text())

    def resolve(self, kind: str, repo: str, revision: str) -> str | None:
        sha = self.meta(kind, repo)["refs"].get(revision)
        if sha is None and re.fullmatch(r"[0-9a-f]{7,40}", revision):
            matches = list((self._folder(kind, repo) / "commits").glob(f"{revision}*.json"))
            sha = matches[0].stem if len(matches) == 1 else None
        return sha

    def history(self, kind: str, repo: str, ref: str = "main") -> list[str]:
        """Returns the titles of the commits of a branch, newest first."""
        titles, sha = [], self.meta(kind, repo)["refs"].get(ref)
        while sha is not None:
            commit = self.load_commit(kind, repo, sha)
            titles.append(commit["title"])
            sha = commit["parent"]
        return titles


class HubServer:
    """Context manager that serves a [`Store`] on a free port of 127.0.0.1."""

    def __init__(self, root: Path):
        self.store = Store(Path(root))
        self.users: dict[str, dict[str, Any]] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self._signature = hashlib.sha256(os.urandom(16)).hexdigest()[:16]

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._http = _Http(("127.0.0.1", 0), Handler)
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.storage_url = f"http://localhost:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def add_user(self, name: str, token: str, orgs: tuple[str, ...] | list[str] = (), write: bool = True) -> None:
        self.users[token] = {"name": name, "orgs": list(orgs), "write": write}

    def head(self, kind: str, repo: str) -> str | None:
        """Returns the commit of main, or `None` if the repository does not exist."""
        return self.store.resolve(kind, repo, "main") if self.store.exists(kind, repo) else None

    def files(self, kind: str, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Returns the files of a revision as {path: content}."""
        sha = self.store.resolve(kind, repo, revision)
        assert sha is not None
        files = self.store.load_commit(kind, repo, sha)["files"]
        return {path: self.store.blob(entry["sha256"]).read_bytes() for path, entry in files.items()}

    def lines(self) -> list[str]:
        """Returns the log as lines "METHOD path"."""
        return [f"{request.method} {request.path}" for request in self.log]


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    address_family = socket.AF_INET

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that disconnect or were cut off need no traceback


class _Cut(Exception):
    """Raised to reset the connection."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    # -- request handling ------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        hub = self.hub
        parts = urlsplit(self.path)
        authorization = self.headers.get("Authorization", "")
        token = authorization.removeprefix("Bearer ").strip()
        self.user = hub.users.get(token)
        line = f"{self.command} {self.path} user={self.user['name'] if self.user else ''}"
        entry = Request(
            self.command,
            parts.path,
            self.user["name"] if self.user else None,
            0,
            authorization=authorization,
            host=self.headers.get("Host", ""),
        )
        hub.log.append(entry)
        with hub.store.lock:
            faults = [fault for fault in hub.faults if fault.hits(line)]
        try:
            for fault in faults:
                if fault.kind == "slow":
                    time.sleep(fault.seconds)
                elif fault.kind == "cut":
                    raise _Cut
                elif isinstance(fault.kind, int):
                    self._body()
                    raise HttpError(fault.kind, f"fault {fault.kind}", headers=fault.headers)
            body = self._body()
            entry.bytes_in = len(body)
            if token and self.user is None and parts.path.split("/")[1] != "storage":
                raise HttpError(401, "Invalid credentials in Authorization header")
            status, headers, content = self._answer(parts.path, parse_qs(parts.query), body)
            if any(fault.kind == "lost" for fault in faults):
                raise _Cut
        except _Cut:
            self._cut()
            return
        except HttpError as error:
            content = json.dumps({"error": error.message}).encode()
            headers = {"Content-Type": "application/json", "X-Error-Message": error.message, **error.headers}
            if error.code:
                headers["X-Error-Code"] = error.code
            status = error.status
        entry.status = status
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(content)))
        headers["X-Request-Id"] = f"req-{len(hub.log)}"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if any(fault.kind == "half" for fault in faults):
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self._cut()
            return
        self.wfile.write(content)

    def _cut(self) -> None:
        # With a linger time of 0, closing the socket sends a reset, like a machine that crashed.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # -- permissions -----------------------------------------------------------------------------------------

    def _readable(self, kind: str, repo: str, *, content: bool = False) -> dict[str, Any]:
        """Returns the settings of a repository. Raises if this user may not see it or, with `content`, read its files."""
        store = self.hub.store
        exists = store.exists(kind, repo)
        meta = store.meta(kind, repo) if exists else {}
        if not exists or (meta["private"] and not self._member(repo)):
            if self.user is None:
                raise HttpError(401, "Invalid username or password.", "RepoNotFound")
            raise HttpError(404, "Repository not found", "RepoNotFound")
        if content and meta["gated"] and not self._member(repo):
            if self.user is None:
                raise HttpError(401, f"Access to {kind} {repo} is restricted. Please log in.", "GatedRepo")
            raise HttpError(403, f"Access to {kind} {repo} is restricted; ask for access.", "GatedRepo")
        return meta

    def _member(self, repo: str) -> bool:
        owner = repo.split("/")[0]
        return self.user is not None and (owner == self.user["name"] or owner in self.user["orgs"])

    def _writable(self, repo: str) -> None:
        if self.user is None:
            raise HttpError(401, "Invalid username or password.")
        if not self._member(repo) or not self.user["write"]:
            raise HttpError(403, f"You don't have the rights to write in {repo.split('/')[0]}")

    def _revision(self, kind: str, repo: str, revision: str) -> str:
        sha = self.hub.store.resolve(kind, repo, revision)
        if sha is None:
            raise HttpError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # -- endpoints ------------------------------------------------------------------------------------

    def _answer(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, dict[str, str], bytes]:
        if path.startswith("/storage/"):
            return self._storage(path, query, body)
        if path == "/api/whoami-v2":
            if self.user is None:
                raise HttpError(401, "Invalid username or password.")
            orgs = [{"type": "org", "name": org} for org in self.user["orgs"]]
            return _json({"type": "user", "name": self.user["name"], "orgs": orgs, "auth": {"type": "access_token"}})
        if path == "/api/validate-yaml":
            return self._validate_yaml(json.loads(body))
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        match = re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/(.*))?", path)
        if match:
            kind, repo, rest = match.groups()
            return self._api(kind, repo, rest or "", query, body)
        match = re.fullmatch(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
        if match:
            return self._lfs_batch(match[1] or "model", match[2], json.loads(body))
        match = re.fullmatch(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if match:
            return self._file(match[1] or "model", match[2], unquote(match[3]), unquote(match[4]))
        raise HttpError(404, f"Not found: {path}")

    def _validate_yaml(self, payload: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        match = re.match(r"^---\n(.*?)\n---\n", payload["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            return _json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        if payload["repoType"] == "space" and not {"title", "sdk"} <= set(metadata or {}):
            return _json({"errors": [{"message": "a Space needs title and sdk"}], "warnings": []}, 400)
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return _json({"errors": [], "warnings": warnings})

    def _create(self, payload: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        if self.user is None:
            raise HttpError(401, "Invalid username or password.")
        kind = payload.get("type") or "model"
        repo = f"{payload.get('organization') or self.user['name']}/{payload['name']}"
        url = f"{self.hub.url}/{_PREFIX[kind]}{repo}"
        self._writable(repo)
        with self.hub.store.lock:
            if self.hub.store.exists(kind, repo):
                return _json({"error": f"You already created this {kind} repo", "url": url}, 409)
            if kind == "space" and not payload.get("sdk"):
                raise HttpError(400, "sdk is required")
            private = payload.get("visibility") == "private" or bool(payload.get("private"))
            self.hub.store.create(kind, repo, private=private, sdk=payload.get("sdk"))
        return _json({"url": url, "name": repo, "id": hashlib.sha1(url.encode()).hexdigest()[:24]})

    def _api(
        self, kind: str, repo: str, rest: str, query: dict[str, list[str]], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        verb, _, argument = rest.partition("/")
        meta = self._readable(kind, repo)
        if verb in ("", "revision"):
            return self._info(kind, repo, meta, unquote(argument) or "main", query)
        if verb == "settings" and self.command == "PUT":
            self._writable(repo)
            changes = json.loads(body)
            if "visibility" in changes:
                meta["private"] = changes["visibility"] == "private"
            if "gated" in changes:
                meta["gated"] = changes["gated"]
            self.hub.store.write_meta(kind, repo, meta)
            return _json({key: meta[key] for key in ("private", "gated")})
        if verb == "refs":
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": s} for n, s in meta["refs"].items()]
            return _json({"branches": branches, "tags": [], "converts": []})
        if verb == "preupload":
            self._writable(repo)
            return self._preupload(kind, repo, unquote(argument), json.loads(body))
        if verb == "commit":
            self._writable(repo)
            return self._commit(kind, repo, unquote(argument), body)
        if verb == "paths-info":
            paths = parse_qs(body.decode()).get("paths", [])
            return _json(self._paths_info(kind, repo, unquote(argument), paths))
        if verb == "tree":
            revision, _, folder = argument.partition("/")
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            return _json(self._tree(kind, repo, unquote(revision), unquote(folder).strip("/"), recursive))
        raise HttpError(404, f"Not found: {verb}")

    def _info(
        self, kind: str, repo: str, meta: dict[str, Any], revision: str, query: dict[str, list[str]]
    ) -> tuple[int, dict[str, str], bytes]:
        sha = self._revision(kind, repo, revision)
        blobs = query.get("blobs", ["false"])[0].lower() in ("true", "1")
        siblings = []
        for path, entry in sorted(self.hub.store.load_commit(kind, repo, sha)["files"].items()):
            sibling: dict[str, Any] = {"rfilename": path}
            if blobs:
                sibling |= {"size": entry["size"], "blobId": entry["git"]}
                if entry["lfs"]:
                    sibling["lfs"] = {"sha256": entry["sha256"], "size": entry["size"], "pointerSize": 130}
            siblings.append(sibling)
        info = {"_id": "0", "id": repo, "author": repo.split("/")[0], "sha": sha, "siblings": siblings, "tags": []}
        if kind == "model":
            info["modelId"] = repo
        if meta.get("sdk"):
            info["sdk"] = meta["sdk"]
        return _json(info | {"private": meta["private"], "gated": meta["gated"], "disabled": False, "downloads": 0})

    def _tree(self, kind: str, repo: str, revision: str, folder: str, recursive: bool) -> list[dict[str, Any]]:
        files = self._files(kind, repo, revision)
        under = f"{folder}/" if folder else ""
        entries: dict[str, dict[str, Any]] = {}
        for path, entry in sorted(files.items()):
            if not path.startswith(under):
                continue
            inside = path[len(under) :].split("/")
            for depth in range(1, len(inside)):
                parent = under + "/".join(inside[:depth])
                if recursive or depth == 1:
                    entries.setdefault(parent, _folder_info(parent))
            if recursive or len(inside) == 1:
                entries[path] = _file_info(path, entry)
        if not entries and folder:
            raise HttpError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        return list(entries.values())

    def _paths_info(self, kind: str, repo: str, revision: str, paths: list[str]) -> list[dict[str, Any]]:
        files = self._files(kind, repo, revision)
        entries = []
        for path in paths:
            path = path.strip("/")
            if path in files:
                entries.append(_file_info(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                entries.append(_folder_info(path))
        return entries

    def _files(self, kind: str, repo: str, revision: str) -> dict[str, dict[str, Any]]:
        return self.hub.store.load_commit(kind, repo, self._revision(kind, repo, revision))["files"]

    # -- writing -------------------------------------------------------------------------------------------------

    def _preupload(self, kind: str, repo: str, revision: str, payload: dict) -> tuple[int, dict[str, str], bytes]:
        files = self._files(kind, repo, revision)
        answers = []
        for file in payload["files"]:
            large = file["path"].endswith(LARGE_SUFFIXES) or file["size"] > LARGE_BYTES
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in files:
                entry = files[file["path"]]
                answer["oid"] = entry["sha256"] if entry["lfs"] else entry["git"]
            answers.append(answer)
        return _json({"files": answers})

    def _lfs_batch(self, kind: str, repo: str, payload: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        self._readable(kind, repo)
        self._writable(repo)
        objects = []
        for item in payload["objects"]:
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if not self.hub.store.blob(item["oid"]).exists():
                href = self._signed(item["oid"])
                answer["actions"] = {"upload": {"href": href}}
            objects.append(answer)
        return _json({"transfer": "basic", "objects": objects})

    def _commit(self, kind: str, repo: str, revision: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        store = self.hub.store
        added: dict[str, dict[str, Any]] = {}
        deleted: list[str] = []
        header: dict[str, Any] = {}
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                header = value
            elif item["key"] == "file":
                added[value["path"]] = store.put(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                blob = store.blob(value["oid"])
                if not blob.exists():
                    raise HttpError(400, f"{value['path']} points to a file that was not uploaded: {value['oid']}")
                added[value["path"]] = store.put(blob.read_bytes()) | {"lfs": True}
            elif item["key"] in ("deletedFile", "deletedFolder"):
                name = value["path"] if item["key"] == "deletedFile" else value["path"].rstrip("/") + "/"
                deleted.append(name)
        with store.lock:
            head = self._revision(kind, repo, revision)
            if header.get("parentCommit", head) != head:
                raise HttpError(412, "A commit has happened since. Please refresh and try again.")
            files = store.load_commit(kind, repo, head)["files"]
            for name in deleted:
                if name not in files and not name.endswith("/"):
                    raise HttpError(404, "A file with this name doesn't exist", "EntryNotFound")
            sha = store.commit(kind, repo, revision, header["summary"], added, deleted)
        url = f"{self.hub.url}/{_PREFIX[kind]}{repo}/commit/{sha}"
        return _json({"success": True, "commitOid": sha, "commitUrl": url})

    # -- reading files -------------------------------------------------------------------------------------------

    def _file(self, kind: str, repo: str, revision: str, path: str) -> tuple[int, dict[str, str], bytes]:
        self._readable(kind, repo, content=True)
        sha = self._revision(kind, repo, revision)
        entry = self.hub.store.load_commit(kind, repo, sha)["files"].get(path)
        if entry is None:
            raise HttpError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if entry["lfs"]:
            location = self._signed(entry["sha256"])
            headers |= {
                "X-Linked-ETag": f'"{entry["sha256"]}"',
                "X-Linked-Size": str(entry["size"]),
                "Location": location,
            }
            return 302, headers, b""
        headers |= {"ETag": f'"{entry["git"]}"', "Content-Type": "text/plain; charset=utf-8"}
        return self._ranged(self.hub.store.blob(entry["sha256"]).read_bytes(), headers)

    def _signed(self, oid: str) -> str:
        user = self.user["name"] if self.user else ""
        return f"{self.hub.storage_url}/storage/{oid}?signature={self.hub._signature}&user={user}"

    def _storage(self, path: str, query: dict[str, list[str]], body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Answers requests to the storage host, which checks signatures instead of users."""
        if query.get("signature") != [self.hub._signature]:
            raise HttpError(403, "SignatureDoesNotMatch")
        oid = path.removeprefix("/storage/")
        if self.command == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                raise HttpError(400, "BadDigest")
            self.hub.store.put(body)
            return 200, {"ETag": f'"{oid}"'}, b""
        blob = self.hub.store.blob(oid)
        if not re.fullmatch(r"[0-9a-f]{64}", oid) or not blob.exists():
            raise HttpError(404, "NoSuchKey")
        return self._ranged(blob.read_bytes(), {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def _ranged(self, content: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        requested = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not requested or requested.groups() == ("", ""):
            return 200, headers | {"Content-Length": str(len(content))}, content
        first, last = requested.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= len(content):
            raise HttpError(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
        part = content[start:stop]
        span = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}", "Content-Length": str(len(part))}
        return 206, headers | span, part


def _json(value: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(value).encode()


def _file_info(path: str, entry: dict[str, Any]) -> dict[str, Any]:
    info = {"type": "file", "path": path, "size": entry["size"], "oid": entry["git"]}
    if entry["lfs"]:
        info["lfs"] = {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 130}
    return info


def _folder_info(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(quote(path).encode()).hexdigest()}


def hub_environment(hub: HubServer, home: Path, token: str | None = None) -> dict[str, str]:
    """Returns the environment of a process that uses only this Hub, with cache and token in `home`."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
    }
    home.mkdir(parents=True, exist_ok=True)
    if token is not None:
        (home / "token").write_text(token)
    return inherited | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # Xet needs another service; without it, uploads are plain HTTP
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "20",
        "HF_EVALUATE_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "160",
    }
