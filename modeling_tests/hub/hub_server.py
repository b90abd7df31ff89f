# SPDX-License-Identifier: Apache-2.0
"""A small server that speaks the part of the Hub's HTTP API that pushing and pulling a model needs.

Storage is addressed by content and history by commits, as on the Hub: a commit is a map of paths to blobs whose id is a
hash of it, a branch is a name for a commit, and large files go through git-lfs' batch API and are redirected on download.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKEN = "hf_of_the_test"


@dataclass
class Blob:
    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def entry(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.large:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass
class Repository:
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        parent = self.branches.get(branch, "")
        tree = json.dumps([parent, message, sorted((path, blob.oid) for path, blob in files.items())])
        sha = hashlib.sha1(tree.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


class HubServer:
    """Serves on 127.0.0.1 at a free port while its `with` block runs.

    endpoint: what HF_ENDPOINT has to be.
    storage: the same under another host name, for large files: clients take a redirect to the same host for a repository
        that was renamed.
    requests: (method, path) of everything that was asked.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    def add(self, repo: str, files: dict[str, Blob]) -> None:
        """A repository that is there already."""
        self.repositories[repo] = Repository()
        self.repositories[repo].commit("main", files, "initial commit")
        self.uploads.update({blob.sha256: blob.content for blob in files.values() if blob.large})

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        port = self._server.server_address[1]
        self.endpoint, self.storage = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "branch"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "large_files"),
        ("PUT", r"/upload/(?P<sha256>\w+)", "upload"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "file"),
        ("GET", r"/large/(?P<sha256>\w+)", "large_file"),
    )
    READ_ONLY = ("info", "tree", "paths_info", "file", "large_file")

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlparse(self.path).path
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
            method = "GET" if self.command == "HEAD" else self.command
            for verb, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, path)
                if match and verb == method:
                    signed = name == "upload" or self.headers.get("Authorization") == f"Bearer {TOKEN}"
                    if name not in self.READ_ONLY and not signed:
                        return self._answer({"error": "unauthorized"}, 401)
                    values = {key: value and unquote(value) for key, value in match.groupdict().items()}
                    return getattr(self, f"_{name}")(**values)
            return self._answer({"error": f"no such route: {self.command} {path}"}, 404)

    def _answer(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _files(self, repo: str, revision: str | None) -> tuple[str, dict[str, Blob]] | None:
        """The commit and its files; None after a 404 in the Hub's form."""
        repository = self.hub.repositories.get(repo)
        sha = repository.resolve(revision or "main") if repository else None
        if sha is None:
            code = "RevisionNotFound" if repository else "RepoNotFound"
            self._answer({"error": code}, 404, X_Error_Code=code)
            return None
        return sha, repository.commits[sha]

    def _create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
        url = f"{self.hub.endpoint}/{repo}"
        if repo in self.hub.repositories:
            return self._answer({"error": "exists", "url": url}, 409)
        self.hub.add(repo, {".gitattributes": Blob(b"", large=False)})
        self._answer({"url": url, "name": repo, "id": repo})

    def _validate(self) -> None:
        self._answer({"errors": [], "warnings": []})

    def _preupload(self, repo: str, revision: str) -> None:
        if (found := self._files(repo, revision)) is None:
            return
        answer = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith((".safetensors", ".bin")) or file["size"] > 10_000_000
            old = found[1].get(file["path"])
            answer.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": old and (old.sha256 if old.large else old.oid),
                }
            )
        self._answer({"files": answer, "commitOid": found[0]})

    def _large_files(self, repo: str) -> None:
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.uploads:
                answer["actions"] = {"upload": {"href": f"{self.hub.storage}/upload/{asked['oid']}", "header": {}}}
            objects.append(answer)
        self._answer({"transfer": "basic", "objects": objects})

    def _upload(self, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            return self._answer({"error": "the content is not what its name says"}, 400)
        self.hub.uploads[sha256] = self.body
        self._answer({})

    def _commit(self, repo: str, revision: str) -> None:
        if (found := self._files(repo, revision)) is None:
            return
        files, message = dict(found[1]), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = Blob(base64.b64decode(value["content"]), large=False)
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.uploads:
                    return self._answer({"error": f"{value['path']} was never uploaded"}, 400)
                files[value["path"]] = Blob(self.hub.uploads[value["oid"]], large=True)
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.repositories[repo].commit(revision, files, message)
        self._answer({"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{sha}", "commitOid": sha, "success": True})

    def _branch(self, repo: str, revision: str) -> None:
        start = json.loads(self.body or b"{}").get("startingPoint")
        if revision in self.hub.repositories[repo].branches:
            return self._answer({"error": "exists"}, 409)
        if (found := self._files(repo, start)) is not None:
            self.hub.repositories[repo].branches[revision] = found[0]
            self._answer({})

    def _info(self, repo: str, revision: str | None) -> None:
        if (found := self._files(repo, revision)) is not None:
            siblings = [{"rfilename": path} for path in sorted(found[1])]
            info = {"_id": repo, "id": repo, "modelId": repo, "sha": found[0], "private": False, "tags": []}
            self._answer({**info, "siblings": siblings, "downloads": 0, "likes": 0})

    def _tree(self, repo: str, revision: str, folder: str | None) -> None:
        if (found := self._files(repo, revision)) is not None:
            prefix = f"{folder}/" if folder else ""
            entries = [blob.entry(path) for path, blob in sorted(found[1].items()) if path.startswith(prefix)]
            if entries or not prefix:
                self._answer(entries)
            else:
                self._answer({"error": "EntryNotFound"}, 404, X_Error_Code="EntryNotFound")

    def _paths_info(self, repo: str, revision: str) -> None:
        if (found := self._files(repo, revision)) is not None:
            paths = json.loads(self.body)["paths"]
            self._answer([found[1][path].entry(path) for path in paths if path in found[1]])

    def _file(self, repo: str, revision: str, path: str) -> None:
        if (found := self._files(repo, revision)) is None:
            return
        sha, files = found
        blob = files.get(path)
        if blob is None:
            return self._answer({"error": path}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        if not blob.large:
            return self._answer(blob.content, ETag=f'"{blob.oid}"', X_Repo_Commit=sha)
        self._answer(
            b"",
            302,
            Location=f"{self.hub.storage}/large/{blob.sha256}",
            X_Repo_Commit=sha,
            X_Linked_Etag=f'"{blob.sha256}"',
            X_Linked_Size=str(len(blob.content)),
        )

    def _large_file(self, sha256: str) -> None:
        self._answer(self.hub.uploads[sha256], ETag=f'"{sha256}"')
