"""Push a finished run to the Hub: a repository that loads in five ways and tells its own story.

    python -m training.push outputs/demo user/name --dry_run
    python -m training.push outputs/demo user/name --license apache-2.0

One commit holds the model with its code, a model card, figures, metrics.json and the settings of the run. No file
tells a token or a place on this machine. The repository is private unless --public is given. Cut off, the same command
sends what is missing.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import ConfigError, UserError

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

# What we write, besides our code: of an earlier push it must not stay beside what is sent now.
_OURS = re.compile(
    r"(onnx|plots|alignment_tokenizer)/.*|[^/]*\.safetensors(\.index\.json)?|tokenizer[^/]*|modules\.json"
    r"|(sentence_bert_config|config_sentence_transformers|generation_config|processor_config)\.json"
)


def main() -> None:
    options = parse_options()
    try:
        if options.dry_run:
            print(listing(options))
            return
        print(push(options.output_dir, options.repo_id, private=not options.public, **naming(options)))
    except UserError as error:
        sys.exit(f"error: {error}")


def push(output_dir: Path, repo_id: str, *, private: bool = True, **naming: Any) -> str:
    """Make the repository where there is none, and send a finished run in one commit.

    Args:
        output_dir: The run's.
        repo_id: `user/name`, or a name under one's own.
        private: Of a new repository; one that everybody sees is refused unless this is False.
        **naming: `licence`, `alignment` and `language_model`, as `repository_files` takes them.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: The run is not finished, the Hub cannot be reached, or it refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    import modeling_edgeglass
    from training.repository import repository_files

    api = HfApi()
    repo_id = whole_repo_id(repo_id, api)
    files = repository_files(output_dir, repo_id, ask_hub=True, **naming)
    open_repository(repo_id, private, api)
    with clear_hub_errors(repo_id):
        there = set(api.list_repo_files(repo_id)) - set(files)
        code = {path.name for path in Path(modeling_edgeglass.__file__).parent.glob("*.py")}
        stale = sorted(name for name in there if _OURS.fullmatch(name) or name in code)
        operations: list[Any] = [
            *map(CommitOperationDelete, stale),
            *(CommitOperationAdd(name, content) for name, content in sorted(files.items())),
        ]
        commit = api.create_commit(repo_id, operations, commit_message=f"EdgeGlass: {output_dir.resolve().name}")
    return str(commit.commit_url)


def repository_of(trainer: Mapping[str, Any]) -> tuple[str | None, bool]:
    """Where a run is to be pushed to, None where it is not; and whether a new repository is private.

    Args:
        trainer: That section of the run's config.
    """
    repo_id = trainer.get("hub_model_id") or Path(trainer["output_dir"]).resolve().name
    private = trainer.get("hub_private_repo")
    return repo_id if trainer.get("push_to_hub") else None, True if private is None else private


def check_hub(repo_id: str, private: bool) -> None:
    """Find out before training whether a push could work behind it: makes the repository.

    Raises:
        ConfigError: The Hub cannot be reached, or it refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    open_repository(whole_repo_id(repo_id, api), private, api)


def open_repository(repo_id: str, private: bool, api: Any) -> None:
    """Make a repository, unless it is there.

    Raises:
        ConfigError: The Hub refuses, or everybody sees what is there, and nobody said that this is meant.
    """
    with clear_hub_errors(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        is_public = not api.model_info(repo_id).private
    if private and is_public:
        raise ConfigError(
            f"{repo_id} is there, and everybody sees it: make it private on the Hub, or say that this is meant, with "
            "--public or trainer.hub_private_repo=false"
        )


def check_repo_id(repo_id: str) -> None:
    """Raise a ConfigError unless this can be the id of a repository."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} is no id of a repository: it reads user/name") from error


def whole_repo_id(repo_id: str, api: Any) -> str:
    """`user/name`, also of a name alone, which means one's own."""
    check_repo_id(repo_id)
    if "/" in repo_id:
        return repo_id
    with clear_hub_errors(repo_id):
        return f"{api.whoami()['name']}/{repo_id}"


@contextmanager
def clear_hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what goes wrong with the Hub into one line.

    Raises:
        ConfigError: In the place of what huggingface_hub raises.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ConfigError(f"{repo_id}: HF_HUB_OFFLINE is set, and nothing can be sent; unset it") from error
    except LocalTokenNotFoundError as error:
        raise ConfigError(f"{repo_id}: you are not logged in; run `hf auth login`") from error
    except HfHubHTTPError as error:
        raise ConfigError(f"{repo_id}: {refusal(error)}") from error
    except HTTPError as error:
        raise ConfigError(f"{repo_id}: {constants.ENDPOINT} cannot be reached ({error}); push again later") from error
    except ValueError as error:
        if "Invalid metadata" not in str(error):
            raise
        raise ConfigError(f"{repo_id}: the Hub refuses the model card: {' '.join(str(error).split())}") from error
    except RuntimeError as error:  # of a file that could not be sent, by huggingface_hub or hf_xet
        reason = f"{error} {error.__cause__ or ''}".strip().split("\n")[0]
        raise ConfigError(f"{repo_id}: {reason}; the same command sends what is missing") from error


def refusal(error: "HfHubHTTPError") -> str:
    """Why the Hub refused, and what to do."""
    if error.response.status_code == 401:
        return "the Hub knows no such login; run `hf auth login` with a token that may write"
    if error.response.status_code == 403:
        return "your token may not write there; it wants the role `write`, and the user or organisation to be yours"
    return str(error).strip().splitlines()[0]


def listing(options: argparse.Namespace) -> str:
    """What a push would send, one line per file."""
    from training.repository import repository_files

    check_repo_id(options.repo_id)
    files = repository_files(options.output_dir, options.repo_id, ask_hub=False, **naming(options))
    sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in sorted(files.items())}
    lines = [f"{size / 1e6:10.3f} MB  {name}" for name, size in sizes.items()]
    visibility = "public" if options.public else "private, if it is new"
    total = f"{sum(sizes.values()) / 1e6:10.3f} MB in {len(files)} files would go to {options.repo_id} ({visibility})"
    return "\n".join([*lines, total])


def naming(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("licence", "alignment", "language_model")}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="output directory of a finished run")
    parser.add_argument("repo_id", help="repository on the Hub: user/name")
    parser.add_argument("--public", action="store_true", help="make a new repository that everybody sees")
    parser.add_argument(
        "--license", dest="licence", help="of the model, as the Hub names it, such as apache-2.0 (default: none said)"
    )
    parser.add_argument("--alignment", help="of a bridge: id on the Hub of its alignment, where its config has a path")
    parser.add_argument("--language_model", "--language-model", help="likewise of its language model")
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="list what would be sent, and send nothing"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
