"""The table of ratios: what is counted, what a target means, and that a failed topic stops nothing."""

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import benchmarks.__main__ as suite
from benchmarks import rows
from benchmarks.rows import HEAD, Row, Target, line, measure
from benchmarks.scaling import exponent

ROW = Row(work="product", ours=3.0, peers={"slow": 12.0, "fast": 4.0}, floor=2.0, floor_name="X X'", growth=90)


def test_ratios_are_to_the_best_peer_and_to_the_floor():
    assert (ROW.best, ROW.against_peer, ROW.against_floor) == ("fast", 0.75, 1.5)
    assert (Row(work="alone", ours=3.0).best, Row(work="alone").against_peer) == ("", None)


@pytest.mark.parametrize(
    ("target", "holds"),
    [
        (Target(), None),
        (Target(peer=0.75), True),
        (Target(peer=0.74), False),
        (Target(peer=0.25, of="slow"), True),
        (Target(floor=1.5, growth=90), True),
        (Target(floor=1.5, growth=89), False),
        (Target(difference=0), None),
        (Target(difference=0, floor=1.0), False),
        (Target(peer=0.5, of="absent"), None),
    ],
)
def test_a_target_holds_where_every_limit_was_measured_and_kept(target, holds):
    assert replace(ROW, target=target).holds is holds


def test_work_is_interleaved_and_watched_once():
    calls = []

    def work(name, value):
        return lambda: calls.append(name) or time.sleep(0.001) or value

    row = measure(
        "sums",
        "n = 3",
        work("ours", 5),
        floor=("floor", work("floor", 0)),
        peers={"peer": work("peer", 3), "gone": "not installed"},
        difference=lambda found, others: found - others["peer"],
        note="told",
    )
    assert calls[:7] == ["ours", "ours", "floor", "peer", "ours", "floor", "peer"]
    assert min(calls.count(name) for name in ("floor", "peer")) >= 3
    assert set(row.peers) == {"peer"}
    assert (row.floor_name, row.difference, row.runs, row.note) == ("floor", 2.0, "≥ 3", "told; gone: not installed")
    assert min(row.ours, row.floor, row.peers["peer"]) > 0


def test_long_work_is_not_repeated(monkeypatch):
    monkeypatch.setattr(rows, "LONG", 0.0)
    monkeypatch.setattr(rows, "SHORT", 0.0)
    calls = []
    row = measure("long", "", lambda: calls.append("ours"), peers={"peer": lambda: calls.append("peer")})
    assert calls == ["ours", "peer"]
    assert row.runs == "ours 1, peer 1"


def test_growth_is_that_of_our_work():
    def work():
        held = np.ones(10_000_000)
        time.sleep(0.05)
        return held.sum()

    assert 75 < measure("80 MB", "", work, runs=1).growth < 120


def test_a_row_of_the_table_has_a_cell_for_each_heading():
    text = line(replace(ROW, target=Target(peer=0.5, growth=512), note="a | b"))
    assert text.replace("\\|", "").count("|") == HEAD.splitlines()[0].count("|")
    cells = [cell.strip() for cell in text.split(" | ")]
    assert cells[2:10] == ["3", "fast 4", "0.75", "X X' 2", "1.5", "90", "", "≤ 0.5 of the best peer, ≤ 512 MB"]
    assert cells[10] == "NO"
    assert cells[12] == "slow 12 s; a \\| b |"


def test_small_ratios_are_fractions():
    assert str(Target(peer=1 / 22, of="loop", difference=0)) == "≤ 1/22 of loop, ≤ 0 of difference"
    assert "| 1/40 |" in line(Row(work="fast", ours=1.0, peers={"peer": 40.0}))


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_exponent_of_a_power(p):
    sizes = (1000, 2000, 5000, 50_000)
    assert exponent(sizes, [3e-6 * n**p for n in sizes]) == pytest.approx(p, abs=1e-12)


def test_exponent_by_hand():
    """Through (1, 1), (2, 2), (4, 8): in log2 0, 1, 3 over 0, 1, 2, whose slope is 3/2."""
    assert exponent((1, 2, 4), (1, 2, 8)) == pytest.approx(1.5)


TOPIC = '''"""A title.

    python -m benchmarks.{name}

What it is about.
"""
from benchmarks.rows import Row, Target, main

def rows(full):
    yield Row(work="half" if full else "whole", ours=2.0, peers={{"peer": 1.0}}, target=Target(peer=1.0))
    {last}

if __name__ == "__main__":
    main(rows)
'''


@pytest.fixture
def topics(tmp_path: Path, monkeypatch):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "broken.py").write_text(TOPIC.format(name="broken", last="raise ValueError('no such layer')"))
    (folder / "fine.py").write_text(TOPIC.format(name="fine", last=""))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[1]}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(suite, "TOPICS", ("broken", "fine"))


@pytest.mark.usefixtures("topics")
def test_a_failed_topic_is_told_and_the_rest_goes_on(tmp_path, capfd):
    out = tmp_path / "page.md"
    assert suite.main(["--out", str(out)]) == 1
    text = out.read_text()
    assert "Of 2 targets 0 hold, 2 do not, 0 were not measured whole; 1 topic failed." in text
    broken, fine = text.split("## broken")[1].split("## fine")
    assert "ValueError: no such layer" in broken
    assert broken.count("| whole |") == fine.count("| whole |") == 1
    assert "What it is about." in fine
    assert "python -m benchmarks.fine" not in fine
    assert sys.version.split()[0] in text
    assert "ValueError: no such layer" in capfd.readouterr().out


@pytest.mark.usefixtures("topics")
def test_a_missed_target_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "RESULTS", tmp_path / "RESULTS.md")
    assert suite.main(["--full", "--only", "fine"]) == 0
    assert not suite.RESULTS.exists()
    monkeypatch.setattr(suite, "TOPICS", ("fine",))
    assert suite.main(["--full"]) == 0
    assert "| half |" in suite.RESULTS.read_text()


def test_the_topics_of_the_suite_are_there():
    assert {
        "knn",
        "modularity",
        "scaling",
        "similarity",
        "births",
        "complexity",
        "partitions",
        "chip",
        "memory",
    } <= set(suite.TOPICS)
