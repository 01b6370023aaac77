"""A Hugging Face Hub on this machine: the few endpoints that an upload needs, with tokens."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

WRITER, READER = "hf_writer", "hf_reader"
"""A token that may write to repositories of `me`, and one that may not."""


class Hub:
    """State of the hub.

    Attributes:
        repos: by name, the content of each file of the newest revision by its path.
        private: whether each repository is.
        objects: large files that were sent, by sha256.
        asked: method and path of each request.
        damage: path of a file that loses its last byte when it is committed.
        broken: part of a path whose requests fail with status 500.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.url = self.damage = self.broken = ""

    def revision(self, repo: str) -> str:
        files = self.repos[repo]
        listed = [(name, hashlib.sha1(files[name]).hexdigest()) for name in sorted(files)]
        return hashlib.sha1(json.dumps(listed).encode()).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".gguf", "tokenizer.json"))


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer(b"")

    def do_POST(self):
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    do_PUT = do_POST

    def _answer(self, body: bytes):
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.broken and self.hub.broken in path:
            return self._send(400, {"error": "the hub is broken"})
        if path.startswith("/objects/"):  # of another server, which knows no tokens
            self.hub.objects[path.rpartition("/")[2]] = body
            return self._send(200, {})
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (WRITER, READER):
            return self._send(401, {"error": "Invalid username or password."})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body), token)
        _, _, kind, owner, name, *rest = path.split("/")
        repo = f"{owner}/{name}"
        if kind != "models" or repo not in self.hub.repos:
            return self._send(404, {"error": "Repository not found"}, "RepoNotFound")
        if self.command == "GET":
            return self._show(repo, rest)
        if token != WRITER:
            return self._send(403, {"error": "You don't have the required permissions."})
        return self._preupload(body) if rest[0] == "preupload" else self._commit(repo, body)

    def _create(self, asked: dict, token: str):
        repo = f"{asked['organization']}/{asked['name']}"
        if token != WRITER or asked["organization"] != "me":
            return self._send(403, {"error": "You don't have the rights to create a model here."})
        self.hub.repos[repo] = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.hub.private[repo] = asked.get("visibility") == "private" or asked.get("private", False)
        return self._send(200, {"url": f"{self.hub.url}/{repo}"})

    def _show(self, repo: str, rest: list[str]):
        if not rest or rest[0] == "revision":
            answer = {"id": repo, "sha": self.hub.revision(repo), "siblings": [], "tags": []}
            return self._send(200, answer)
        assert rest[:1] == ["tree"] and rest[1] == self.hub.revision(repo), rest
        found = []
        for path, content in self.hub.repos[repo].items():
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            row = {"type": "file", "path": path, "size": len(content), "oid": git}
            if is_large(path):
                digest = hashlib.sha256(content).hexdigest()
                row["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
                row["oid"] = "0" * 40
            found.append(row)
        return self._send(200, found)

    def _preupload(self, body: bytes):
        names = [one["path"] for one in json.loads(body)["files"]]
        modes = [{"path": n, "uploadMode": "lfs" if is_large(n) else "regular",
                  "shouldIgnore": False} for n in names]  # fmt: skip
        return self._send(200, {"files": modes})

    def _batch(self, asked: dict, token: str):
        if token != WRITER:
            return self._send(403, {"error": "You don't have the required permissions."})
        rows = []
        for one in asked["objects"]:
            row = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.objects:
                row["actions"] = {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}"}}
            rows.append(row)
        return self._send(200, {"transfer": "basic", "objects": rows})

    def _commit(self, repo: str, body: bytes):
        lines = [json.loads(line) for line in body.splitlines()]
        files = dict(self.hub.repos[repo])
        for line in lines:
            value = line["value"]
            if line["key"] == "header" and value["parentCommit"] != self.hub.revision(repo):
                return self._send(412, {"error": "A commit has happened since."})
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        if self.hub.damage:
            files[self.hub.damage] = files[self.hub.damage][:-1]
        self.hub.repos[repo] = files
        oid = self.hub.revision(repo)
        return self._send(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{oid}",
                                "commitOid": oid})  # fmt: skip

    def _send(self, status: int, document: object, code: str = ""):
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serve():
    """Yield a hub that answers at its `url`."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
