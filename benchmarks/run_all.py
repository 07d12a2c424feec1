"""All comparisons, one after the other: benchmarks/results.json, and the table in docs/performance.md.

    make bench

Some twenty-six minutes on two cores, which want to be idle otherwise. Names of benchmarks run those alone and print:

    python benchmarks/run_all.py loss decode
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from training.environment import describe_environment  # noqa: E402

BENCHMARKS = (
    "loss",
    "spectral",
    "cache",
    "big_batch",
    "decode",
    "loader",
    "memory",
    "evaluation",
    "generation",
    "search",
    "startup",
)
RESULTS, DOCUMENT = ROOT / "benchmarks" / "results.json", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"
PEERS = ("sentence-transformers", "faiss-cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmarks", nargs="*", metavar="name", help=", ".join(BENCHMARKS))
    options = parser.parse_args()
    if unknown := set(options.benchmarks) - set(BENCHMARKS):
        parser.error(f"there is no benchmark {unknown.pop()!r}; there are {', '.join(BENCHMARKS)}")
    started, start = datetime.now(UTC), time.monotonic()
    results, failed = [], []
    for name in options.benchmarks or BENCHMARKS:
        found, status = run(name)
        results += found
        failed += [name] if status else []
    missed = [result["name"] for result in results if not result["holds"]]
    print(f"{len(results)} results in {time.monotonic() - start:.0f} s; bounds missed: {', '.join(missed) or 'none'}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; nothing is written")
    if options.benchmarks:
        return
    environment = describe_environment(started, 1)
    environment["command"] = "make bench"
    environment["packages"] |= {name: importlib.metadata.version(name) for name in PEERS}
    seconds = round(time.monotonic() - start)
    RESULTS.write_text(json.dumps({**environment, "seconds": seconds, "results": results}, indent=2) + "\n")
    write_table(results, environment, seconds)


def run(name: str) -> tuple[list[dict[str, Any]], int]:
    """The results of a benchmark, which are also shown as they come, and its status."""
    command = ["python", f"benchmarks/{name}.py"]
    print(f"$ {' '.join(command)}", flush=True)
    results = []
    with subprocess.Popen([sys.executable, *command[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"name"'):
                print(line, end="", flush=True)
                results.append({**json.loads(line), "command": " ".join(command)})
    return results, process.returncode


def write_table(results: Sequence[Mapping[str, Any]], environment: Mapping[str, Any], seconds: int) -> None:
    """Put the table in its place in the document."""
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(results)}\n\n{conditions(environment, seconds)}\n{END}{after}")


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Results as a table in Markdown."""
    lines = [
        "| what | ours | peer | unit | peer is | ratio | bound | | command |",
        "|---|---:|---:|---|---|---:|---|---|---|",
    ]
    for result in results:
        cells = [result[key] for key in ("name", "ours", "peer", "unit", "peer_is", "ratio", "bound")]
        cells += ["holds" if result["holds"] else "**missed**", f"`{result['command']}`"]
        lines.append(
            "| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
        )
    return "\n".join(lines)


def conditions(environment: Mapping[str, Any], seconds: int) -> str:
    """Where the numbers are from."""
    versions = {"Python": environment["python"], **environment["packages"]}
    stated = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"*`{environment['command']}`, {environment['started'][:10]}, {seconds} s; {environment['cores']} cores of "
        f"{environment['cpu']}, accelerator: {', '.join(environment['accelerators'])}; {stated}. "
        "What else was fixed stands in `benchmarks/results.json`.*"
    )


if __name__ == "__main__":
    main()
