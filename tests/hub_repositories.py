"""Repositories of a Hub in memory: files, commits, large objects; and errors in the Hub's form."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

DATE = "2026-01-01T00:00:00.000Z"  # of all: time is no matter here

Answer = tuple[int, dict[str, str], bytes]  # status, headers, body


def as_json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value, default=str).encode()


class HubError(Exception):
    """An answer that the client raises; `code` is the Hub's name of the error, `commit_id` where a file is missing."""

    def __init__(self, status: int, message: str, code: str | None = None, commit_id: str | None = None):
        super().__init__(message)
        named = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit_id}
        self.answer = as_json({"error": message}, status, {name: text for name, text in named.items() if text})


@dataclass(frozen=True)
class File:
    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob(self) -> bytes:
        """What git stores: the content, or the pointer to it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return pointer.encode() if self.lfs else self.content

    @property
    def blob_id(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.blob) + self.blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    """All files as they are after it, by their path."""

    id: str
    message: str
    files: dict[str, File]

    def under(self, path: str) -> dict[str, str]:
        """Blob ids of the file or of the folder's files."""
        return {name: file.blob_id for name, file in self.files.items() if f"{name}/".startswith(f"{path}/")}


@dataclass
class Repository:
    """Commits from the first to the last, and the large objects that were uploaded, committed or not."""

    private: bool
    commits: list[Commit] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)

    def commit(self, message: str, files: dict[str, File]) -> Commit:
        blobs = sorted((path, file.blob_id) for path, file in files.items())
        parent = self.commits[-1].id if self.commits else None
        self.commits.append(Commit(hashlib.sha1(repr((parent, message, blobs)).encode()).hexdigest(), message, files))
        return self.commits[-1]

    def at(self, revision: str) -> Commit:
        found = [commit for commit in self.commits if revision in ("main", commit.id)]
        if not found:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[-1]

    def entry(self, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
        """A file or folder as the tree lists it."""
        file = commit.files.get(path)
        if file is None:
            folder = hashlib.sha1(repr(commit.under(path)).encode()).hexdigest()
            entry = {"type": "directory", "oid": folder, "size": 0, "path": path}
        else:
            entry = {"type": "file", "oid": file.blob_id, "size": len(file.content), "path": path}
        if file and file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.blob)}
        if expand:
            last = commit
            for earlier in reversed(self.commits[: self.commits.index(commit)]):
                if earlier.under(path) != commit.under(path):
                    break
                last = earlier
            entry["lastCommit"] = {"id": last.id, "title": last.message, "date": DATE}
        return entry
