"""A loopback Hugging Face Hub: as much of the protocol as huggingface_hub needs to create, push to and load a repository.

Standard library only, everything in memory; the one token is ``TOKEN``. What a client asks for and this server does not
know is answered with 404 and kept in ``HubServer.unhandled``, which a test should find empty.

    with HubServer() as hub:
        os.environ["HF_ENDPOINT"] = hub.url   # before huggingface_hub is imported
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_x"
USER = "tester"

LFS_SUFFIXES = (".safetensors", ".bin", ".pt")
REGULAR_LIMIT = 10 << 20  # bytes; larger files go to LFS


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return hashlib.sha256(self.content).hexdigest() if self.is_lfs else self.oid

    def entry(self, path: str) -> dict[str, Any]:
        size = len(self.content)
        lfs = {"lfs": {"oid": self.etag, "size": size, "pointerSize": 130}} if self.is_lfs else {}
        return {"type": "file", "path": path, "size": size, "oid": self.oid, **lfs}


Tree = dict[str, File]


@dataclass
class Repository:
    """Branches name commits; a commit is its whole tree."""

    name: str
    is_private: bool
    commits: dict[str, Tree] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)  # of the commits that were pushed

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)})

    def commit(self, branch: str, tree: Tree) -> str:
        sha = hashlib.sha1(f"{self.name} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        """The commit that a branch, or a commit's own name, stands for."""
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


class HubError(Exception):
    """An error in the Hub's own words: HTTP status and X-Error-Code."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class HubServer:
    """The server and its state; ``requests`` lists the (method, path) of all that was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.unhandled: list[tuple[str, str]] = []
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.storage_url = f"http://localhost:{self._http.server_port}/lfs"  # another host, as the real Hub's storage is

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def files(self, repo_id: str, revision: str = "main") -> Tree:
        """What a repository holds at a branch or commit."""
        repository = self.repositories[repo_id]
        return repository.commits[repository.branches.get(revision, revision)]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.body = self._read_body()
        self.is_authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        with self.hub.lock:
            self.hub.requests.append((self.command, url.path))
            try:
                self._route(url.path)
            except HubError as error:
                self._reply({"error": error.code}, error.status, {"X-Error-Code": error.code, "X-Error-Message": error.code})

    do_GET = do_POST = do_PUT = do_HEAD = handle_request  # noqa: N815 (the base class's names)

    def _route(self, path: str) -> None:
        for methods, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)  # before unquoting: a branch "refs/pr/1" comes as one "refs%2Fpr%2F1"
            if match and self.command in methods:
                return answer(self, *(unquote(group or "") for group in match.groups()))
        self.hub.unhandled.append((self.command, path))
        raise HubError(404, "NotImplemented")

    # Account and repositories

    def _whoami(self) -> None:
        self._require_token()
        self._reply({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def _validate_yaml(self) -> None:
        self._reply({"errors": [], "warnings": []})

    def _create_repository(self) -> None:
        self._require_token()
        request = json.loads(self.body)
        name = f"{request.get('organization') or USER}/{request['name']}"
        status = 409 if name in self.hub.repositories else 200
        is_private = bool(request.get("private")) or request.get("visibility") == "private"
        self.hub.repositories.setdefault(name, Repository(name, is_private))
        self._reply({"url": f"{self.hub.url}/{name}", "id": name, "name": name}, status)

    def _create_branch(self, name: str, branch: str) -> None:
        repository = self._repository(name, write=True)
        if branch.startswith("refs/"):
            raise HubError(400, "BadRequest")
        if branch in repository.branches:
            raise HubError(409, "BranchAlreadyExists")
        repository.branches[branch] = repository.branches["main"]
        self._reply({})

    # Upload

    def _preupload(self, name: str, revision: str) -> None:
        sha, tree = self._tree(self._repository(name, write=True), revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) or file["size"] > REGULAR_LIMIT else "regular",
                "shouldIgnore": False,
                "oid": tree[file["path"]].oid if file["path"] in tree else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._reply({"files": files, "commitOid": sha})

    def _lfs_batch(self, name: str) -> None:
        self._repository(name, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.lfs:
                answer["actions"] = {"upload": {"href": f"{self.hub.storage_url}/{wanted['oid']}"}}
            objects.append(answer)
        self._reply({"transfer": "basic", "objects": objects})

    def _put_lfs(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "ChecksumMismatch")
        self.hub.lfs[oid] = self.body
        self._reply({})

    def _commit(self, name: str, revision: str) -> None:
        repository = self._repository(name, write=True)
        tree, message = dict(self._tree(repository, revision)[1]), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                tree[value["path"]] = File(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                tree[value["path"]] = File(self._stored(value["oid"]), True)
            elif operation["key"] == "deletedFile":
                tree.pop(value["path"])
            elif operation["key"] == "header":
                message = value["summary"]
        pull_request = None
        if self.query.get("create_pr") == "1":
            pull_request = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
            revision = f"refs/pr/{pull_request}"
        sha = repository.commit(revision, tree)
        repository.messages[sha] = message
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "hookOutput": ""}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{pull_request}"
        self._reply(answer)

    # Download

    def _model_info(self, name: str, revision: str) -> None:
        repository = self._repository(name)
        sha, tree = self._tree(repository, revision or "main")
        self._reply(
            {
                "_id": "0",
                "id": name,
                "modelId": name,
                "sha": sha,
                "private": repository.is_private,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in tree],
            }
        )

    def _list_tree(self, name: str, revision: str, folder: str) -> None:
        _, tree = self._tree(self._repository(name), revision)
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        inside = {path: file for path, file in tree.items() if path.startswith(prefix)}
        if prefix and not inside:
            raise HubError(404, "EntryNotFound")
        parents = {path[:end] for path in inside for end in _slashes(path) if end > len(prefix)}
        entries = [file.entry(path) for path, file in inside.items()]
        entries += [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(parents)]
        if self.query.get("recursive", "false").lower() not in ("true", "1"):
            entries = [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]
        self._reply(entries)

    def _paths_info(self, name: str, revision: str) -> None:
        _, tree = self._tree(self._repository(name), revision)
        is_json = self.body.startswith(b"{")
        paths = (json.loads(self.body) if is_json else parse_qs(self.body.decode()))["paths"]
        self._reply([tree[path].entry(path) for path in paths if path in tree])

    def _list_refs(self, name: str) -> None:
        branches = self._repository(name).branches.items()
        named = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        self._reply({"branches": named, "tags": [], "converts": []})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        sha, tree = self._tree(self._repository(name), revision)
        if path not in tree:
            self._reply({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        file = tree[path]
        if file.is_lfs:
            linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
            self._reply(b"", 302, {"Location": f"{self.hub.storage_url}/{file.etag}", "X-Repo-Commit": sha, **linked})
        else:
            self._send_file(file.content, {"ETag": f'"{file.etag}"', "X-Repo-Commit": sha})

    def _get_lfs(self, oid: str) -> None:
        self._send_file(self._stored(oid), {"ETag": f'"{oid}"'})

    def _stored(self, oid: str) -> bytes:
        if oid not in self.hub.lfs:
            raise HubError(404, "LfsObjectNotFound")
        return self.hub.lfs[oid]

    def _send_file(self, content: bytes, headers: dict[str, str]) -> None:
        wanted = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self._reply(content, 200, {"Accept-Ranges": "bytes", **headers})
            return
        first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
        self._reply(content[first : last + 1], 206, {"Content-Range": f"bytes {first}-{last}/{len(content)}", **headers})

    # Shared

    def _repository(self, name: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository and repository.is_private and not self.is_authorized:
            raise HubError(401, "RepoNotFound")  # the real Hub hides private repositories in the same way
        if not repository:
            raise HubError(404, "RepoNotFound")
        if write:
            self._require_token()
        return repository

    def _require_token(self) -> None:
        if not self.is_authorized:
            raise HubError(401, "Unauthorized")

    @staticmethod
    def _tree(repository: Repository, revision: str) -> tuple[str, Tree]:
        sha = repository.find(revision)
        if sha is None:
            raise HubError(404, "RevisionNotFound")
        return sha, repository.commits[sha]

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        is_file = isinstance(content, bytes)
        body = content if is_file else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if is_file else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _slashes(path: str) -> list[int]:
    return [i for i, character in enumerate(path) if character == "/"]


_REPO = r"([^/]+/[^/]+)"
_REVISION = r"([^/]+)"
_API = f"/api/models/{_REPO}"
_READ, _POST = ("GET", "HEAD"), ("POST",)
_ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (_READ, "/api/whoami-v2", _Handler._whoami),
    (_POST, "/api/validate-yaml", _Handler._validate_yaml),
    (_POST, "/api/repos/create", _Handler._create_repository),
    (_POST, f"{_API}/branch/(.+)", _Handler._create_branch),
    (_POST, f"{_API}/preupload/{_REVISION}", _Handler._preupload),
    (_POST, f"{_API}/commit/{_REVISION}", _Handler._commit),
    (_POST, f"{_API}/paths-info/{_REVISION}", _Handler._paths_info),
    (_READ, f"{_API}(?:/revision/{_REVISION})?", _Handler._model_info),
    (_READ, f"{_API}/tree/{_REVISION}(?:/(.*))?", _Handler._list_tree),
    (_READ, f"{_API}/refs", _Handler._list_refs),
    (_POST, rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    (("PUT",), "/lfs/([0-9a-f]{64})", _Handler._put_lfs),
    (_READ, "/lfs/([0-9a-f]{64})", _Handler._get_lfs),
    (_READ, f"/{_REPO}/resolve/{_REVISION}/(.+)", _Handler._resolve),
]
