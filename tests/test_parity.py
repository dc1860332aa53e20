"""Our values beside those of independent packages; docs/parity.md is printed from the same rows."""

import pytest
from parity import ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.quantity} ({row.name})")
def test_value_equals_the_reference(row):
    for package in row.packages:
        pytest.importorskip(package)
    # 1e-6 where a reference computes in float32 (ripser), 1e-9 elsewhere
    assert row.ours() == pytest.approx(row.reference(), rel=1e-6 if "ripser" in row.packages else 1e-9)
