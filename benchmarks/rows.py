"""One row of the table: a piece of our work beside its peers and a lower bound, measured in the same run."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.rss import measured

LONG = 100.0
"""Work that takes so many seconds is not repeated."""
SHORT, MOST = 0.3, 15
"""Shorter work is repeated until it has taken so many seconds, but so many times at most."""

Work = Callable[[], Any]


@dataclass(frozen=True, kw_only=True)
class Target:
    """Upper limits on a row; None promises nothing."""

    floor: float | None = None
    """Ours over the lower bound."""
    peer: float | None = None
    """Ours over the best peer, or over the one named in `of`."""
    of: str | None = None
    growth: float | None = None
    """MB."""
    difference: float | None = None
    value: float | None = None

    def __str__(self) -> str:
        texts = (
            (_share(self.floor), " of the bound"),
            (_share(self.peer), f" of {self.of or 'the best peer'}"),
            (_number(self.growth), " MB"),
            (_number(self.difference), " of difference"),
            (_number(self.value), ""),
        )
        return ", ".join(f"≤ {limit}{text}" for limit, text in texts if limit)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was found: medians in seconds, growth in MB."""

    work: str
    sizes: str = ""
    ours: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    floor: float | None = None
    floor_name: str = ""
    growth: float | None = None
    """Peak of the resident memory in one run of ours, over its start."""
    difference: float | None = None
    """The largest between our result and what it is compared with."""
    value: float | None = None
    """A number of another kind: an exponent, seconds per 1000 cells, with its `unit`."""
    unit: str = ""
    target: Target = Target()
    runs: str = ""
    note: str = ""
    error: str = ""

    @property
    def best(self) -> str:
        """The fastest peer, "" where there is none."""
        return min(self.peers, key=self.peers.__getitem__, default="")

    @property
    def against_peer(self) -> float | None:
        """Ours over the best peer."""
        return _ratio(self.ours, self.peers.get(self.best))

    @property
    def against_floor(self) -> float | None:
        """Ours over the lower bound."""
        return _ratio(self.ours, self.floor)

    @property
    def holds(self) -> bool | None:
        """Whether what was measured keeps the target; None where nothing is promised or a promised number is absent."""
        pairs = (
            (self.target.floor, self.against_floor),
            (self.target.peer, _ratio(self.ours, self.peers.get(self.target.of or self.best))),
            (self.target.growth, self.growth),
            (self.target.difference, self.difference),
            (self.target.value, self.value),
        )
        found = [None if reached is None else reached <= limit for limit, reached in pairs if limit is not None]
        return False if False in found else None if None in found or not found else True


def measure(
    work: str,
    sizes: str,
    ours: Work,
    *,
    peers: Mapping[str, Work | str] | None = None,
    floor: tuple[str, Work] | None = None,
    difference: Callable[[Any, dict[str, Any]], float] | None = None,
    target: Target = Target(),
    runs: int = 3,
    note: str = "",
) -> Row:
    """Ours, the peers and the floor one after the other, so many rounds, on the same data; medians of each.

    The first run of ours is watched for memory and is a timing only where it is long or the only one. A peer given as a
    text is left out, for that reason. `difference` is given our result and those of all others by name.
    """
    available = {name: f for name, f in (peers or {}).items() if not isinstance(f, str)}
    absent = [f"{name}: {reason}" for name, reason in (peers or {}).items() if isinstance(reason, str)]
    seconds, grown, result = measured(ours)
    everything = {"ours": ours} | ({floor[0]: floor[1]} if floor else {}) | available
    times, results = interleaved(everything, runs, {"ours": [seconds]} if seconds >= LONG or runs == 1 else {})
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    few = [f"{name} {len(spent)}" for name, spent in times.items() if len(spent) < runs]
    return Row(
        work=work,
        sizes=sizes,
        ours=medians["ours"],
        peers={name: medians[name] for name in available},
        floor=medians[floor[0]] if floor else None,
        floor_name=floor[0] if floor else "",
        growth=grown / 1e6,
        difference=float(difference(result, results)) if difference else None,
        target=target,
        runs=", ".join(few if len(few) == len(times) else [f"≥ {runs}", *few]),
        note="; ".join([note, *absent] if note else absent),
    )


def interleaved(
    works: Mapping[str, Work], runs: int, before: Mapping[str, list[float]] | None = None
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every run and the last results, by name; `before` holds runs that count already."""
    times: dict[str, list[float]] = {name: [] for name in works} | dict(before or {})
    results: dict[str, Any] = {}
    for turn in range(MOST):
        for name, f in works.items():
            spent = times[name]
            if not spent or (turn < runs and max(spent) < LONG) or sum(spent) < SHORT:
                start = time.perf_counter()
                results[name] = f()
                spent.append(time.perf_counter() - start)
    return times, results


def peer(module: str, work: Work) -> Work | str:
    """The work where this module is installed, else why it is left out."""
    return work if find_spec(module) else f"{module} is not installed"


HEAD = (
    "| work | sizes | ours, s | best peer, s | ours / peer | lower bound, s | ours / bound | growth, MB | difference "
    "| target | holds | runs | notes |\n" + "|---" * 13 + "|"
)


def line(row: Row) -> str:
    """The row in a markdown table."""
    value = "" if row.value is None else f"{_number(row.value)} {row.unit}"
    others = [f"{name} {_number(seconds)} s" for name, seconds in row.peers.items() if name != row.best]
    cells = (
        row.work,
        row.sizes,
        ", ".join(part for part in (_number(row.ours), value) if part),
        f"{row.best} {_number(row.peers.get(row.best))}",
        _share(row.against_peer),
        f"{row.floor_name} {_number(row.floor)}",
        _share(row.against_floor),
        "" if row.growth is None else f"{row.growth:.0f}",
        "" if row.difference is None else f"{row.difference:.1g}",
        str(row.target),
        {True: "yes", False: "NO", None: ""}[row.holds],
        row.runs,
        "; ".join([*others, *(text for text in (row.note, row.error) if text)]),
    )
    return "| " + " | ".join(cell.strip().replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def main(rows: Callable[[bool], Iterable[Row]]) -> None:
    """Measure and print the rows of one topic, the module that was started."""
    description = sys.modules[rows.__module__].__doc__ or ""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--full", action="store_true", help="the large sizes")
    parser.add_argument("--json", type=Path, help="append each row to this file")
    args = parser.parse_args()
    print(f"{description}\n{HEAD}", flush=True)
    for row in rows(args.full):
        print(line(row), flush=True)
        if args.json:
            with args.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")


def read(path: Path) -> Iterator[Row]:
    """The rows that `main` has written."""
    for text in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        yield Row(**row | {"target": Target(**row["target"])})


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def _share(ratio: float | None) -> str:
    return f"1/{1 / ratio:.3g}" if ratio is not None and 0 < ratio < 0.1 else _number(ratio)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
