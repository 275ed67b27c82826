"""A hub in a folder: answers the client of huggingface_hub and of datasets as the real one does, over HTTP; and takes
what is pushed to it."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", COMMIT)


@contextmanager
def hub_server(root: Path, token: str | None = None) -> Iterator[tuple[str, list[str]]]:
    """The address of a hub with the repositories ``root/models/OWNER/NAME`` and ``root/datasets/OWNER/NAME``.

    With a ``token`` its models are gated: who does not send it is refused as the hub refuses. Second: the files
    handed out, as they are.
    """
    served: list[str] = []
    stored: dict[str, bytes] = {}  # what was uploaded and is not committed yet, by SHA-256
    private: set[str] = set()

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            address = urlsplit(self.path)
            match unquote(address.path).strip("/").split("/"):
                case ["api", ("models" | "datasets") as kind, owner, name, *rest]:
                    folder, query = root / kind / owner / name, parse_qs(address.query)
                    if not folder.is_dir():
                        self.refuse(404, "RepoNotFound")
                    else:
                        self.about(folder, f"{owner}/{name}", rest, "true" in query.get("recursive", [""])[0].lower())
                case ["datasets", owner, name, "resolve", _, *path]:
                    self.send_file(root / "datasets" / owner / name, path)
                case [_, _, "resolve", revision, *_] if revision not in REVISIONS:
                    self.refuse(404, "RevisionNotFound")
                case [owner, name, "resolve", _, *path]:
                    if token and self.headers.get("Authorization") != f"Bearer {token}":
                        self.refuse(401, "GatedRepo")
                    else:
                        self.send_file(root / "models" / owner / name, path)
                case _:
                    self.refuse(404, "EntryNotFound")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            """A repository is made; its files are announced, put into the store by their digests, and committed."""
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/api/validate-yaml":
                self.send_json({"warnings": [], "errors": []})
                return
            if token and self.headers.get("Authorization") != f"Bearer {token}":
                self.refuse(401, "Unauthorized")
                return
            match unquote(urlsplit(self.path).path).strip("/").split("/"):
                case ["api", "repos", "create"]:
                    asked = json.loads(body)
                    name = f"{asked['organization']}/{asked['name']}"
                    (root / "models" / name).mkdir(parents=True)
                    if asked.get("visibility") == "private" or asked.get("private"):
                        private.add(name)
                    self.send_json({"url": f"http://{self.headers['Host']}/{name}", "name": name})
                case ["api", "models", owner, name, "preupload", "main"]:
                    modes = [
                        {"path": file["path"], "shouldIgnore": False,
                         "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                        for file in json.loads(body)["files"]
                    ]  # fmt: skip
                    self.send_json({"files": modes})
                case [owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                    place = f"http://{self.headers['Host']}/lfs"
                    objects = [
                        {**asked, "actions": {"upload": {"href": f"{place}/{asked['oid']}"}}}
                        for asked in json.loads(body)["objects"]
                    ]
                    self.send_json({"transfer": "basic", "objects": objects})
                case ["api", "models", owner, name, "commit", "main"]:
                    self.commit(root / "models" / owner / name, [json.loads(line) for line in body.splitlines()])
                    said = {"commitUrl": f"http://{self.headers['Host']}/{owner}/{name}/commit/{COMMIT}"}
                    self.send_json({**said, "commitOid": COMMIT, "success": True})
                case _:
                    self.refuse(404, "EntryNotFound")

        def do_PUT(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            oid = self.path.rsplit("/", 1)[-1]
            assert hashlib.sha256(body).hexdigest() == oid
            stored[oid] = body
            self.answer(200, b"", {})

        def commit(self, folder: Path, lines: list[dict]) -> None:
            for value in (line["value"] for line in lines if line["key"] in ("file", "lfsFile")):
                path = folder / value["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(stored[value["oid"]] if "oid" in value else base64.b64decode(value["content"]))

        def about(self, folder: Path, repository: str, rest: list[str], recursive: bool) -> None:
            match rest:
                case [_, revision, *_] if revision not in REVISIONS:
                    self.refuse(404, "RevisionNotFound")
                case [] | ["revision", _]:
                    names = [{"rfilename": path} for path in files(folder)]
                    self.send_json(
                        {
                            "id": repository,
                            "sha": COMMIT,
                            "private": repository in private,
                            "siblings": names,
                            "tags": [],
                        }
                    )
                case ["tree", _, *path] if (folder / "/".join(path)).is_dir():
                    below = folder / "/".join(path)
                    found = sorted(below.rglob("*") if recursive else below.iterdir())
                    self.send_json([entry(folder, path) for path in found])
                case _:
                    self.refuse(404, "EntryNotFound")

        def send_file(self, folder: Path, path: list[str]) -> None:
            file = folder / "/".join(path)
            if not file.is_file():
                self.refuse(404, "EntryNotFound" if folder.is_dir() else "RepoNotFound")
                return
            body = file.read_bytes()
            if self.command == "GET":
                served.append("/".join([folder.parent.name, folder.name, *path]))
            self.answer(200, body, {"ETag": f'"{blob(file)}"', "X-Repo-Commit": COMMIT})

        def send_json(self, value: object) -> None:
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_args) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # by default 5: fewer than two workers open at once, and each beyond waits a second

    server = Server(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", served
    finally:
        server.shutdown()
        server.server_close()


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def blob(file: Path) -> str:
    """The name that git gives the contents."""
    body = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def entry(folder: Path, path: Path) -> dict:
    kind = {"type": "directory", "oid": COMMIT, "size": 0}
    if path.is_file():
        kind = {"type": "file", "oid": blob(path), "size": path.stat().st_size}
    return {**kind, "path": path.relative_to(folder).as_posix()}
