"""Generated pages are those that the code would write now."""

import importlib.util
from pathlib import Path

import pytest
from parity import ROWS

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_page_of_invariances_is_current(generate):
    assert (DOCS / "invariances.md").read_text(encoding="utf-8") == generate.invariances()


def test_page_of_architectures_is_current(generate):
    assert (DOCS / "architectures.md").read_text(encoding="utf-8") == generate.architectures()


def test_page_of_parity_is_current():
    """Same rows in the same order, same values; the last digits may differ between machines."""
    lines = (DOCS / "parity.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
    assert [row[0] for row in cells] == [row.quantity for row in ROWS]
    for row, (_, own, _, other, difference) in zip(ROWS, cells, strict=True):
        assert float(own) == pytest.approx(row.ours(), rel=1e-7)
        assert float(own) == pytest.approx(float(other), rel=1e-6)
        assert float(difference) < 1e-6
