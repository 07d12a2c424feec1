"""The stand-in for the Hub, asked by the real clients: what is pushed comes back, and errors are the Hub's own."""

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.hub_server import GIT_ATTRIBUTES, File, HubServer, Repository

CLIENT = """
import json, sys
from pathlib import Path
from huggingface_hub import (CommitOperationAdd, CommitOperationDelete, HfApi, get_hf_file_metadata, hf_hub_download,
                             hf_hub_url, snapshot_download)

api, one, folder = HfApi(), "tester/one", sys.argv[1]

def push(private=False):
    api.create_repo(one, private=private, exist_ok=True)
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return commit("Weights", [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files])

def commit(message, operations):
    return api.create_commit(one, operations, commit_message=message).oid

def tree(*arguments, **options):
    return list(api.list_repo_tree(one, *arguments, **options))

def error(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__ + ": " + str(error)
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


# The first is kept by git, the others by LFS.
FILES = {"notes/a b.txt": b"as it is\n", "model.safetensors": b"weights", "picture.png": b"pixels", "raw": b"\0\1"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "pushed" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "pushed"


@pytest.fixture
def repository(hub: HubServer) -> Repository:
    """`tester/one` with those files, as if they had been pushed."""
    files = {path: File(content, lfs=path != "notes/a b.txt") for path, content in FILES.items()}
    repository = Repository(private=False, objects={file.sha256: file.content for file in files.values()})
    repository.commit("Weights", files)
    hub.repositories["tester/one"] = repository
    return repository


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The cache of the one who pushes."""
    return tmp_path / "home"


def ask(hub: HubServer, home: Path, *expressions: str, folder: Path | str = "", token: str | None = None) -> list[Any]:
    """What a client in a process of its own makes of each, by way of JSON."""
    code = f"{CLIENT}\nprint(json.dumps([{', '.join(expressions)}]))"
    return json.loads(hub.run("-c", code, folder, home=home, token=token).stdout)


def errors(hub: HubServer, home: Path, *expressions: str, **options: Any) -> list[str]:
    """The errors that they end with, as `type: message`."""
    return ask(hub, home, *(f"error(lambda: {expression})" for expression in expressions), **options)


def uploads(hub: HubServer) -> int:
    return sum(method == "PUT" for method, _ in hub.requests)


def test_a_push_is_one_commit_of_the_same_bytes(hub: HubServer, folder: Path, home: Path):
    [commit_id] = ask(hub, home, "push()", folder=folder)
    first, pushed = hub.repositories["tester/one"].commits
    assert (first.message, list(first.files)) == ("initial commit", [".gitattributes"])
    assert (pushed.message, pushed.id) == ("Weights", commit_id)
    assert {path: file.content for path, file in pushed.files.items() if path not in first.files} == FILES
    assert {path for path, file in pushed.files.items() if file.lfs} == {"model.safetensors", "picture.png", "raw"}
    assert uploads(hub) == 3


def test_a_second_push_of_the_same_sends_nothing(hub: HubServer, folder: Path, home: Path):
    first, second = ask(hub, home, "push()", "push()", folder=folder)
    assert first == second == hub.repositories["tester/one"].commits[-1].id
    assert uploads(hub) == 3
    assert len(hub.repositories["tester/one"].commits) == 2


def test_a_push_that_was_interrupted_sends_only_what_is_missing(hub: HubServer, folder: Path, home: Path):
    hub.fail_uploads_after = 2
    assert errors(hub, home, "push()", folder=folder)[0].startswith("RuntimeError: Error while uploading")
    repository = hub.repositories["tester/one"]
    assert (len(repository.objects), len(repository.commits)) == (2, 1)
    hub.fail_uploads_after = None
    hub.requests.clear()
    ask(hub, home, "push()", folder=folder)
    assert (uploads(hub), len(repository.objects), len(repository.commits)) == (1, 3, 2)


def test_a_fresh_cache_gets_the_same_bytes(hub: HubServer, folder: Path, home: Path, tmp_path: Path):
    [commit_id] = ask(hub, home, "push()", folder=folder)
    snapshot = Path(ask(hub, tmp_path / "elsewhere", "snapshot_download(one)", token="")[0])
    assert snapshot.name == commit_id
    assert snapshot.is_relative_to(tmp_path / "elsewhere")
    files = {
        path.relative_to(snapshot).as_posix(): path.read_bytes() for path in snapshot.rglob("*") if path.is_file()
    }
    assert files == FILES | {".gitattributes": GIT_ATTRIBUTES}


def test_an_older_commit_can_still_be_had(hub: HubServer, repository: Repository, home: Path):
    [second] = ask(hub, home, "commit('New', [CommitOperationAdd('raw', b'new')])")
    read = "Path(hf_hub_download(one, 'raw', revision='{}')).read_text()"
    texts = ask(hub, home, *map(read.format, (repository.commits[0].id, second, "main")))
    assert texts == ["\0\1", "new", "new"]


def test_a_private_repository_is_not_found_by_strangers(
    hub: HubServer, repository: Repository, home: Path, tmp_path: Path
):
    repository.private = True
    looks = ("api.model_info(one).private", "len(tree())", "Path(hf_hub_download(one, 'raw')).read_text()")
    assert ask(hub, home, *looks) == [True, 4, "\0\1"]
    calls = (*looks, "snapshot_download(one)", "commit('No', [CommitOperationAdd('raw', b'new')])")
    for error in errors(hub, tmp_path / "stranger", *calls, token=""):
        assert error.startswith("RepositoryNotFoundError: 401")
    for error in errors(hub, tmp_path / "stranger", *calls, token="hf_other"):
        assert error.startswith("HfHubHTTPError")
        assert "Invalid credentials in Authorization header" in error
    assert len(repository.commits) == 1


def test_a_stranger_changes_nothing(hub: HubServer, repository: Repository, home: Path):
    calls = ("api.create_repo('two')", "commit('No', [CommitOperationAdd('raw', b'new')])")
    for error in errors(hub, home, *calls, token=""):
        assert error.startswith("HfHubHTTPError")
        assert "401" in error
    assert list(hub.repositories) == ["tester/one"]
    assert len(repository.commits) == 1


def test_what_is_missing_has_its_own_error(hub: HubServer, repository: Repository, home: Path):
    kinds = {
        "hf_hub_download(one, 'none')": "RemoteEntryNotFoundError",
        "tree('none')": "RemoteEntryNotFoundError",
        "hf_hub_download(one, 'raw', revision='none')": "RevisionNotFoundError",
        "snapshot_download(one, revision='none')": "RevisionNotFoundError",
        "hf_hub_download('tester/two', 'raw')": "RepositoryNotFoundError",
        "snapshot_download('tester/two')": "RepositoryNotFoundError",
    }
    for error, kind in zip(errors(hub, home, *kinds), kinds.values(), strict=True):
        assert error.startswith(f"{kind}: 404")


def test_a_repository_is_made_once_by_its_owner(hub: HubServer, home: Path):
    calls = ("api.create_repo('one')", "api.create_repo(one, exist_ok=True)", "api.whoami()['name']")
    assert ask(hub, home, *calls) == [f"{hub.endpoint}/tester/one"] * 2 + ["tester"]
    twice, foreign = errors(hub, home, "api.create_repo('one')", "api.create_repo('someone/one')")
    assert "409" in twice
    assert "You already created this model repo" in twice
    assert "403" in foreign
    assert "You don't have the rights to create a model under the namespace" in foreign


def test_a_card_whose_metadata_is_wrong_is_refused(hub: HubServer, repository: Repository, home: Path):
    messages = {
        "- a list": '"value" must be of type object',
        "a: [": "bad YAML",
        "model-index: none": '"model-index" must be an array',
        "model-index: [{name: a}]": '"model-index[0].results" is required',
        "model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d}, metrics: [{type: m}]}]}]": (
            '"model-index[0].results[0].dataset.name" is required\n'
            '- "model-index[0].results[0].metrics[0].value" is required'
        ),
    }
    cards = [f"---\n{metadata}\n---\n# A model\n" for metadata in messages]
    calls = [f"commit('Card', [CommitOperationAdd('README.md', {card.encode()!r})])" for card in cards]
    for error, message in zip(errors(hub, home, *calls), messages.values(), strict=True):
        assert error.startswith("ValueError: Invalid metadata in README.md.")
        assert message in error
    assert len(repository.commits) == 1


def test_a_card_is_read_back(hub: HubServer, repository: Repository, home: Path):
    result = {"task": {"type": "t"}, "dataset": {"type": "d", "name": "D"}, "metrics": [{"type": "m", "value": 1}]}
    metadata = {"library_name": "ours", "tags": ["small"], "model-index": [{"name": "a", "results": [result]}]}
    card = f"---\n{json.dumps(metadata)}\n---\n# A model\n".encode()
    looks = ("info.tags", "info.library_name", "info.card_data.eval_results[0].metric_value", "info.sha",
             "[file.rfilename for file in info.siblings]")  # fmt: skip
    commit_id, _, *found = ask(
        hub,
        home,
        f"commit('Card', [CommitOperationAdd('README.md', {card!r})])",
        "bool(info := api.model_info(one))",
        *looks,
    )
    assert found == [["small", "ours"], "ours", 1, commit_id, [*FILES, "README.md"]]


def test_the_tree_knows_folders_and_the_commit_that_changed_them(hub: HubServer, repository: Repository, home: Path):
    top, notes, second, changed, third = ask(
        hub,
        home,
        "[entry.path for entry in tree()]",
        "[entry.path for entry in tree('notes')]",
        "commit('Less', [CommitOperationDelete('raw'), CommitOperationAdd('notes/c', b'c')])",
        "{entry.path: entry.last_commit.oid for entry in tree(recursive=True, expand=True)}",
        "commit('None', [CommitOperationDelete('notes/')])",
    )
    first = repository.commits[0].id
    assert [commit.id for commit in repository.commits] == [first, second, third]
    assert top == ["model.safetensors", "notes", "picture.png", "raw"]
    assert notes == ["notes/a b.txt"]
    unchanged = dict.fromkeys(("model.safetensors", "notes/a b.txt", "picture.png"), first)
    assert changed == unchanged | {"notes": second, "notes/c": second}
    assert set(repository.commits[-1].files) == {"model.safetensors", "picture.png"}


def test_a_file_is_known_by_its_hash(hub: HubServer, repository: Repository, home: Path):
    hashes = {  # of `sha256sum`, and of `git hash-object`
        "model.safetensors": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
        "notes/a b.txt": "4105080053fe24019c319ff72416497c0742fe44",
    }
    look = "(lambda file: [file.size, file.etag, file.commit_hash])(get_hf_file_metadata(hf_hub_url(one, '{}')))"
    expected = [[len(FILES[path]), digest, repository.commits[0].id] for path, digest in hashes.items()]
    assert ask(hub, home, *map(look.format, hashes)) == expected


def test_a_model_of_the_hub_is_the_model_of_the_folder(hub: HubServer, text_dir: str, home: Path, tmp_path: Path):
    ask(hub, home, "push()", folder=text_dir)
    load = """
import sys, torch
from transformers import AutoModel, AutoTokenizer
torch.save(AutoModel.from_pretrained("tester/one").state_dict(), sys.argv[1])
print(AutoTokenizer.from_pretrained("tester/one")("a red dot").input_ids)
"""
    done = hub.run("-c", load, tmp_path / "weights.pt", home=tmp_path / "elsewhere", token="")
    assert json.loads(done.stdout) == AutoTokenizer.from_pretrained(text_dir)("a red dot").input_ids
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    torch.testing.assert_close(loaded, AutoModel.from_pretrained(text_dir).state_dict(), rtol=0, atol=0)


DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def fetch(url: str, method: str = "GET", data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    try:
        with DIRECTLY.open(urllib.request.Request(url, data, headers, method=method)) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_part_of_a_file_can_be_asked_for(hub: HubServer, repository: Repository):
    for name in ("model.safetensors", "notes/a b.txt"):
        url, content = f"{hub.endpoint}/tester/one/resolve/main/{quote(name)}", FILES[name]
        assert fetch(url) == (200, content)
        assert fetch(url, Range="bytes=2-4") == (206, content[2:5])
        assert fetch(url, Range="bytes=3-") == (206, content[3:])
        assert fetch(url, Range=f"bytes={len(content)}-")[0] == 416
    assert fetch(url, "HEAD") == (200, b"")  # of the note: urllib follows the other's redirection with a GET


def test_the_storage_takes_what_has_the_hash_and_no_token(hub: HubServer, repository: Repository):
    before = dict(repository.objects)
    url = f"{hub.storage}/tester/one/{'0' * 64}"
    assert fetch(url, "PUT", b"other") == (400, b'{"error": "The content does not have this SHA-256"}')
    refused = fetch(url, "PUT", b"other", Authorization=f"Bearer {hub.token}")
    assert refused == (400, b'{"error": "Only one auth mechanism allowed"}')
    assert repository.objects == before


def test_what_is_not_spoken_is_said_to_be(hub: HubServer):
    assert fetch(f"{hub.endpoint}/api/datasets/tester/one")[0] == 501
    assert hub.requests == [("GET", "/api/datasets/tester/one")]


def test_nothing_is_left_when_the_block_ends():
    threads = set(threading.enumerate())
    with HubServer() as hub:
        assert fetch(f"{hub.endpoint}/api/whoami-v2", Authorization="Bearer hf_test")[0] == 200
    assert set(threading.enumerate()) == threads
    with pytest.raises(urllib.error.URLError):
        fetch(f"{hub.endpoint}/api/whoami-v2")
