"""All benchmarks in one table of ratios.

    python -m benchmarks [--full] [--only NAME ...] [--out FILE]

Small sizes take less than five minutes on two cores; --full takes the large ones and writes benchmarks/RESULTS.md. Each
topic runs in a process of its own, so that growth of memory is its own; `python -m benchmarks.NAME` runs one alone.
The exit status is 1 if a topic failed.
"""

import argparse
import ast
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from benchmarks import machine
from benchmarks.rows import HEAD, Row, line, read

RESULTS = Path(__file__).with_name("RESULTS.md")
_ALL = ("knn", "scaling", "modularity", "similarity", "births", "complexity", "partitions", "chip", "memory", "capture")
TOPICS = tuple(name for name in _ALL if find_spec(f"benchmarks.{name}"))


def run(topic: str, full: bool) -> list[Row]:
    """The rows of a topic; the last tells the error where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        command = [sys.executable, "-m", f"benchmarks.{topic}", "--json", str(path), *(["--full"] if full else [])]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        rows = list(read(path)) if path.exists() else []
    if done.returncode == 0:
        return rows
    print(done.stderr, file=sys.stderr)
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return [*rows, Row(work="failed", error=said[-1])]


def page(found: dict[str, list[Row]], seconds: float, full: bool) -> str:
    """The markdown page."""
    command = f"python -m benchmarks{' --full' if full else ''}"
    parts = [
        "# Benchmarks\n",
        f"Written by `{command}` in {seconds / 60:.0f} minutes. {judged(found)}\n",
        *(f"- {text}" for text in machine.describe()),
        "\nSeconds are medians of interleaved runs on the same data, with the lower bound among them. Growth is the "
        "peak of the resident memory over the start of our work, in a run that is watched.",
    ]
    for topic, rows in found.items():
        parts += [f"\n## {topic}\n", *_about(topic), HEAD, *map(line, rows)]
    return "\n".join(parts) + "\n"


def judged(found: dict[str, list[Row]]) -> str:
    """How many rows keep their target."""
    rows = [row for rows in found.values() for row in rows]
    verdicts = [row.holds for row in rows if str(row.target)]
    failed = sum(bool(row.error) for row in rows)
    return (
        f"Of {len(verdicts)} targets {verdicts.count(True)} hold, {verdicts.count(False)} do not, "
        f"{verdicts.count(None)} were not measured whole; {failed or 'no'} topic{'s' * (failed > 1)} failed."
    )


def _about(topic: str) -> list[str]:
    """The paragraphs of a topic's docstring behind its title, without the commands."""
    source = Path(find_spec(f"benchmarks.{topic}").origin).read_text(encoding="utf-8")
    said = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[1:]
    return [f"{' '.join(text.split())}\n" for text in said if not text.startswith("    ")]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--full", action="store_true", help=f"the large sizes; written to {RESULTS.name}")
    parser.add_argument("--only", nargs="+", choices=TOPICS, help="some topics; written only where --out says")
    parser.add_argument("--out", type=Path, help="write the page there")
    args = parser.parse_args(arguments)
    out = args.out or (RESULTS if args.full and not args.only else None)
    found: dict[str, list[Row]] = {}
    start = time.perf_counter()
    print("\n".join(machine.describe()), flush=True)
    for topic in args.only or TOPICS:
        print(f"\n{topic}: ", end="", flush=True)
        found[topic] = run(topic, args.full)
        seconds = time.perf_counter() - start
        if out:
            out.write_text(page(found, seconds, args.full), encoding="utf-8")
    print(f"\n{judged(found)} {seconds:.0f} s")
    everything = [row for rows in found.values() for row in rows]
    if missed := [line(row) for row in everything if row.error or row.holds is False]:
        print("\n".join(["Failed, or short of the target:", HEAD, *missed]))
    return int(any(row.error for row in everything))


if __name__ == "__main__":
    sys.exit(main())
