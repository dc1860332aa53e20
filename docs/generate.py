"""Writes the tables of docs/ from the runs that the tests repeat: ``python docs/generate.py``."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests"), str(HERE.parent / "tests" / "prune")]

import invariances as table  # noqa: E402
from architectures import ARCHITECTURES, examine  # noqa: E402
from filter_architectures import CASES, examine_filters  # noqa: E402
from parity import ROWS  # noqa: E402

_PROJECTS = {"bct": "bctpy", "cka": "pytorch-cka", "sklearn": "scikit-learn"}


def parity() -> str:
    """The table of our values beside those of independent packages."""
    lines = [
        "# Parity",
        "",
        "Values of repgraph beside those of independent packages, on the same data in float64: 60 samples, two layers",
        "of 8 and 12 features (`tests/parity.py`, whose rows are also tests). Written by `python docs/generate.py`; a",
        "test fails when this page is stale. Where a package has no such function, its parts make the reference.",
        "",
        "| quantity | repgraph | reference | its value | relative difference |",
        "|---|---:|---|---:|---:|",
    ]
    for row in ROWS:
        own, other = row.ours(), row.reference()
        packages = ", ".join(_PROJECTS.get(name, name) for name in row.packages)
        difference = abs(own - other) / abs(other)
        shown = "0" if difference == 0 else f"{difference:.0e}"
        lines.append(f"| {row.quantity} | {own:.9g} | {packages} | {other:.9g} | {shown} |")
    lines += ["", "ripser computes in float32."]
    return "\n".join(lines) + "\n"


def invariances() -> str:
    """The table of metrics and what they are invariant to."""
    lines = [
        "# What is invariant to what",
        "",
        "Every cell is a test (`tests/test_invariances.py`), also the empty ones: there the value changes.",
        "Written by `python docs/generate.py`; a test fails when this page is stale.",
    ]
    explained: list[dict] = []
    for title, (changes, metrics) in table.GROUPS.items():
        if changes not in explained:
            lines += ["", *(f"- **{key}**: {text}" for key, (text, _) in changes.items())]
            explained.append(changes)
        lines += ["", f"| {title} | " + " | ".join(changes) + " |", "|---|" + ":-:|" * len(changes)]
        for name in metrics:
            cells = ["yes" if table.invariant(name, change) else "" for change in changes]
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def architectures() -> str:
    """The table of architectures and what can be dropped from them."""
    lines = [
        "# What can be dropped from which architecture",
        "",
        "Layer dropping on networks with random weights (`tests/prune/architectures.py`, whose rows are also tests).",
        "Written by `python docs/generate.py`; a test fails when this page is stale. Blocks: those of",
        "those that can go, of all that `choose` finds. Halves: attention and MLP of a block on their own. List:",
        "whether the blocks behind a dropped one move up, or something that gives its input back stands in its place.",
        "Verified: cuts whose result equals, to 1e-6, that of a copy in which the forward of the same modules was",
        "exchanged by hand, without repgraph; for each, the predicted cost was the measured one.",
        "",
        "| architecture | blocks | halves | list | verified |",
        "|---|---:|---:|---|---:|",
    ]
    for name in ARCHITECTURES:
        row = examine(name)
        equal = [cut for cut, difference in row.largest.items() if difference < 1e-6 and row.predicted[cut]]
        verified = f"{len(equal)} of {len(row.largest)}" if row.largest else ""
        cells = (f"{len(row.droppable)} of {row.blocks}", len(row.halves) or "", ", ".join(row.listed), verified)
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    lines += ["", "What is refused, for example, and the sentence:", ""]
    for name, architecture in ARCHITECTURES.items():
        lines.append(f"- **{name}**, {f'`{architecture.refused[0]}`' if architecture.refused else 'all blocks'}:")
        lines.append(f"  {examine(name).refusal}")
    lines += [
        "",
        "# Which filters can be cut from which architecture",
        "",
        "Half of the filters of every group, by random scores, in small networks of these kinds with random weights",
        "(`tests/prune/filter_architectures.py`, whose rows are also tests). Layers: convolutions and linear ones that",
        "lost filters. Difference: from a copy whose filters were set to zero by hand, without repgraph, in float64,",
        "relative to the largest output. MACs: the share that is left, as foretold in every case. Left alone:",
        "how many layers, and why.",
        "",
        "| architecture | layers | difference | MACs | left alone |",
        "|---|---:|---:|---:|---|",
    ]
    for name in CASES:
        cut = examine_filters(name)
        small = f"{cut.from_zeros:.0e}" if cut.from_zeros > 1e-12 else "< 1e-12"
        own = [small, f"{100 * cut.macs:.0f} %"] if cut.layers else ["", ""]
        lines.append(f"| {name} | {cut.layers} of {cut.total} | {' | '.join(own)} | {cut.left} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    pages = {"parity.md": parity, "invariances.md": invariances, "architectures.md": architectures}
    for name, page in pages.items():
        (HERE / name).write_text(page(), encoding="utf-8")
        print(f"wrote {HERE / name}")
