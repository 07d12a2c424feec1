"""A Hugging Face Hub on loopback, in memory: what huggingface_hub 2.4 asks to push a model and to load it back.

Answers, headers and codes are those that the client reads. It knows less than the Hub, and differs in this:

- There is one user, `USER`, and there are models alone. Revisions are `main` and whole commit ids: no branches, tags
  or pull requests. What it does not speak gets 501, so that a test notices.
- Objects are stored with LFS and in one part; never Xet, which the Hub prefers. `.gitignore` is not applied.
- A stranger who asks for what is not there or private gets 401, as from the Hub; the client takes that alone for a
  missing repository over https only, so here it comes with the code `RepoNotFound`.
- Lists have no pages, tags come from the model card alone, and the storage's URLs are not signed.
- A card's metadata is checked for the fields that `model-index` requires and for a few licenses, not for languages.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.commands import ROOT
from tests.hub_cards import check_card, read_metadata
from tests.hub_repositories import DATE, Answer, File, HubError, Repository, as_json

USER = "tester"
LARGEST_REGULAR = 10_000_000  # bytes
GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.png filter=lfs diff=lfs merge=lfs -text\n"


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub:` serves until the block ends.

    Attributes:
        endpoint: For `HfApi(endpoint=...)` or `HF_ENDPOINT`.
        repositories: By id, "tester/name".
        requests: Method and path, in the order of arrival.
        fail_uploads_after: Uploads are refused once the server holds so many objects: with 403, as for a URL that has
            expired. The client raises that at once; after a 500 it tries for 23 seconds.
    """

    daemon_threads = False  # so that the end waits for them

    def __init__(self, token: str = "hf_test"):
        super().__init__(("127.0.0.1", 0), _Request)
        self.token = token
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        # To the client, another host: it must not send its token there.
        self.storage = f"http://localhost:{self.server_port}/storage"
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.fail_uploads_after: int | None = None
        self.lock = threading.Lock()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))

    def __enter__(self) -> "HubServer":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a test may kill a client
            super().handle_error(request, client_address)

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """For a process that takes this server for the Hub and `home` for its cache; with `token=""`, a stranger's."""
        foreign = ("HF_", "HUGGING", "TRANSFORMERS_", "WORLD_SIZE", "RANK")
        return {key: value for key, value in os.environ.items() if not key.startswith(foreign)} | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token if token is None else token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "no_proxy": "127.0.0.1,localhost",
        }

    def run(
        self, *arguments: object, home: Path, token: str | None = None, expect_success: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """`python ARGUMENTS` in that environment: `"-c", snippet` or `"-m", module`, and what they are given.

        A process of its own, as the client reads the environment once; the tests' process is offline.
        """
        command = [sys.executable, *map(str, arguments)]
        environment = self.environment(home, token)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert (done.returncode == 0) == expect_success, done.stdout + done.stderr
        return done


class _Request(BaseHTTPRequestHandler):
    """One request. By HTTP/1.0 it has a connection and a thread of its own: none is left open at the end."""

    server: HubServer
    timeout = 10  # seconds that a client may be silent

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        # Read even if it will be refused: a client that cannot send the rest sees a broken connection instead.
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            self.server.requests.append((self.command, unquote(url.path)))
            try:
                status, headers, body = self.dispatch(url.path)
            except HubError as error:
                status, headers, body = error.answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

    def log_message(self, *message: object) -> None:
        """Quiet."""

    def dispatch(self, path: str) -> Answer:
        method = "GET" if self.command == "HEAD" else self.command
        for of_route, pattern, route in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and of_route == method:
                authorization = self.headers.get("Authorization")
                if authorization and path.startswith("/storage/"):
                    raise HubError(400, "Only one auth mechanism allowed")  # as S3 has it
                self.known = authorization == f"Bearer {self.server.token}"
                if authorization and not self.known:
                    raise HubError(401, "Invalid credentials in Authorization header")
                return route(self, *(group and unquote(group) for group in match.groups()))
        raise HubError(501, f"tests/hub_server.py does not speak {self.command} {path}")

    def log_in(self) -> None:
        if not self.known:
            raise HubError(401, "Invalid username or password.")

    def repository(self, repo_id: str) -> Repository:
        """That repository, if the client may see it."""
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and not self.known):
            if self.known:
                raise HubError(404, "Repository not found", "RepoNotFound")
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        return repository

    def repository_to_change(self, repo_id: str) -> Repository:
        repository = self.repository(repo_id)
        self.log_in()
        return repository

    def who_am_i(self) -> Answer:
        self.log_in()
        access = {"type": "access_token", "accessToken": {"displayName": "tests", "role": "write"}}
        return as_json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": access})

    def create(self) -> Answer:
        self.log_in()
        asked = json.loads(self.body)
        if asked.get("type", "model") != "model":
            raise HubError(501, f"tests/hub_server.py has no {asked['type']}s")
        owner = asked.get("organization") or USER
        if owner != USER:
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        repo_id = f"{owner}/{asked['name']}"
        url = {"url": f"{self.server.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.server.repositories:
            return as_json({"error": "You already created this model repo", **url}, 409)
        repository = Repository(private=asked.get("visibility") == "private")
        repository.commit("initial commit", {".gitattributes": File(GIT_ATTRIBUTES)})
        self.server.repositories[repo_id] = repository
        return as_json(url)

    def validate_yaml(self) -> Answer:
        errors, warnings = check_card(json.loads(self.body)["content"])
        found = [[{"message": text} for text in texts] for texts in (errors, warnings)]
        return as_json({"errors": found[0], "warnings": found[1]}, 400 if errors else 200)

    def preupload(self, repo_id: str, revision: str) -> Answer:
        files = self.repository_to_change(repo_id).at(revision).files
        answers = []
        for asked in json.loads(self.body)["files"]:
            binary = b"\0" in base64.b64decode(asked["sample"])
            large = asked["size"] > LARGEST_REGULAR or asked["path"].endswith((".safetensors", ".png"))
            mode = "lfs" if binary or large else "regular"
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False})
            if asked["path"] in files:
                answers[-1]["oid"] = files[asked["path"]].etag
        return as_json({"files": answers})

    def lfs_batch(self, repo_id: str) -> Answer:
        repository = self.repository_to_change(repo_id)
        objects = [{"oid": asked["oid"], "size": asked["size"]} for asked in json.loads(self.body)["objects"]]
        for answer in objects:
            if answer["oid"] not in repository.objects:
                verify = f"{self.server.endpoint}/{repo_id}.git/info/lfs/objects/verify"
                upload = f"{self.server.storage}/{repo_id}/{answer['oid']}"
                answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        return as_json({"transfer": "basic", "objects": objects})

    def store(self, repo_id: str, oid: str) -> Answer:
        held = sum(len(repository.objects) for repository in self.server.repositories.values())
        if self.server.fail_uploads_after is not None and held >= self.server.fail_uploads_after:
            raise HubError(403, "Request has expired")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content does not have this SHA-256")
        self.server.repositories[repo_id].objects[oid] = self.body
        return 200, {"ETag": f'"{oid}"'}, b""

    def verify(self, repo_id: str) -> Answer:
        asked = json.loads(self.body)
        content = self.repository_to_change(repo_id).objects.get(asked["oid"])
        if content is None or len(content) != asked["size"]:
            raise HubError(400, "No object of this SHA-256 and size was uploaded")
        return as_json({})

    def commit(self, repo_id: str, revision: str) -> Answer:
        repository = self.repository_to_change(repo_id)
        parent = repository.at(revision)
        if revision != "main" or "create_pr" in self.query:
            raise HubError(501, "tests/hub_server.py commits to main alone")
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        if header["value"].get("parentCommit", parent.id) != parent.id:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations:
            apply(operation["key"], operation["value"], files, repository.objects)
        new = repository.commit(header["value"]["summary"], files)
        url = f"{self.server.endpoint}/{repo_id}/commit/{new.id}"
        return as_json({"success": True, "commitOid": new.id, "commitUrl": url, "hookOutput": ""})

    def info(self, repo_id: str, revision: str | None) -> Answer:
        repository = self.repository(repo_id)
        commit = repository.at(revision or "main")
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
        if "blobs" in self.query:
            for sibling, file in zip(siblings, commit.files.values(), strict=True):
                sibling |= {"size": len(file.content), "blobId": file.blob_id}
                if file.lfs:
                    sibling["lfs"] = {"sha256": file.sha256, "size": len(file.content), "pointerSize": len(file.blob)}
        card = read_metadata(commit.files.get("README.md", File(b"")).content.decode()) or {}
        named = {name: card[name] for name in ("library_name", "pipeline_tag") if name in card}
        facts = {"id": repo_id, "modelId": repo_id, "author": USER, "sha": commit.id, "private": repository.private}
        facts |= named | {"tags": [*card.get("tags", ()), *named.values()], "cardData": card, "siblings": siblings}
        return as_json(facts | {"gated": False, "disabled": False, "downloads": 0, "likes": 0, "lastModified": DATE})

    def tree(self, repo_id: str, revision: str, folder: str | None) -> Answer:
        repository = self.repository(repo_id)
        commit = repository.at(revision)
        prefix = f"{folder}/" if folder else ""
        below = [path.split("/") for path in commit.files if path.startswith(prefix)]
        if not below:
            raise HubError(404, f'{folder} does not exist on "{revision}"', "EntryNotFound", commit.id)
        level = prefix.count("/") + 1
        recursive, expand = (self.query.get(name, ["false"]) == ["true"] for name in ("recursive", "expand"))
        depths = [range(level, len(parts) + 1 if recursive else level + 1) for parts in below]
        paths = {"/".join(parts[:depth]) for parts, levels in zip(below, depths, strict=True) for depth in levels}
        return as_json([repository.entry(commit, path, expand) for path in sorted(paths)])

    def resolve(self, repo_id: str, revision: str, path: str) -> Answer:
        """A regular file itself; for a large one, where the storage has it."""
        commit = self.repository(repo_id).at(revision)
        file = commit.files.get(path)
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound", commit.id)
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.etag}"'}
        if not file.lfs:
            return self.part(file.content, headers)
        headers["Location"] = f"{self.server.storage}/{repo_id}/{file.sha256}"
        return 302, headers | {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}, b""

    def load(self, repo_id: str, oid: str) -> Answer:
        return self.part(self.server.repositories[repo_id].objects[oid], {"ETag": f'"{oid}"'})

    def part(self, content: bytes, headers: dict[str, str]) -> Answer:
        """What the request's `Range` asks for, or all."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 200, headers | {"Accept-Ranges": "bytes"}, content
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first > last:
            return 416, headers | {"Content-Range": f"bytes */{len(content)}"}, b""
        return 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}, content[first : last + 1]


def apply(key: str, value: dict[str, Any], files: dict[str, File], objects: dict[str, bytes]) -> None:
    """One line of a commit, done to `files`."""
    path = value["path"]
    if key == "file":
        files[path] = File(base64.b64decode(value["content"], validate=True))
        errors, _ = check_card(files[path].content.decode()) if path == "README.md" else ([], [])
        if errors:
            raise HubError(400, errors[0])
    elif key == "lfsFile":
        if value["oid"] not in objects:
            raise HubError(400, f"{path}: its LFS object was not uploaded")
        files[path] = File(objects[value["oid"]], lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        folder = path.rstrip("/") + "/"
        gone = [name for name in files if (name == path if key == "deletedFile" else name.startswith(folder))]
        if not gone:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise HubError(501, f"tests/hub_server.py knows no {key}")


REPO, REVISION, OID = r"([^/]+(?:/[^/]+)?)", r"([^/]+)", r"([0-9a-f]{64})"
ROUTES = (
    ("GET", r"/api/whoami-v2", _Request.who_am_i),
    ("POST", r"/api/repos/create", _Request.create),
    ("POST", r"/api/validate-yaml", _Request.validate_yaml),
    ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", _Request.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", _Request.lfs_batch),
    ("PUT", rf"/storage/{REPO}/{OID}", _Request.store),
    ("GET", rf"/storage/{REPO}/{OID}", _Request.load),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", _Request.verify),
    ("POST", rf"/api/models/{REPO}/commit/{REVISION}", _Request.commit),
    ("GET", rf"/api/models/{REPO}(?:/revision/{REVISION})?", _Request.info),
    ("GET", rf"/api/models/{REPO}/tree/{REVISION}(?:/(.+))?", _Request.tree),
    ("GET", rf"/{REPO}/resolve/{REVISION}/(.+)", _Request.resolve),
)
