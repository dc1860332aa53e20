"""Pruned: a smaller model with the plan that made it and what it costs, before and after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from safetensors.torch import save_model
from torch import nn

from repgraph.cost import Cost
from repgraph.prune.plan import Plan

_KINDS = ("macs", "flops", "parameters", "activation_bytes")


@dataclass(frozen=True, slots=True, eq=False)
class Pruned:
    """A smaller copy of a model, the plan that made it, and what both cost."""

    model: nn.Module
    """The smaller model, in the modes of the one that went in."""
    plan: Plan
    """What was removed; replays on a fresh model."""
    before: Cost
    """Cost of the model that went in."""
    after: Cost
    """Cost of the smaller one, measured on the same example."""

    def table(self) -> pd.DataFrame:
        """Before, after and change in percent, one row per kind of cost."""
        rows = {name: [getattr(self.before, name), getattr(self.after, name)] for name in _KINDS}
        table = pd.DataFrame.from_dict(rows, orient="index", columns=["before", "after"]).rename_axis("cost")
        return table.assign(change_percent=100 * (table["after"] / table["before"] - 1))

    def save(self, folder: str | Path) -> list[Path]:
        """Write plan.json and weights.safetensors into a folder, which is made if need be.

        `load_pruned` reads them; no code is pickled.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        plan, weights = path / "plan.json", path / "weights.safetensors"
        self.plan.save(plan)
        save_model(self.model, str(weights))
        return [plan, weights]

    def __repr__(self) -> str:
        lines = [f"{type(self.model).__name__} without {self._what()}"]
        for name, row in self.table().iterrows():
            before, after, change = row
            lines.append(f"  {name!s:16} {before:>16,.0f} -> {after:>16,.0f}  {change:+.1f} %")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        table: str = self.table().to_html(float_format="{:,.1f}".format, border=0)
        return f"<p>{type(self.model).__name__} without {', '.join(self.plan.layers) or self._what()}</p>{table}"

    def _what(self) -> str:
        filters = f"{sum(map(len, self.plan.filters.values()))} filters of {len(self.plan.filters)} layers"
        layers = f"{len(self.plan.layers)} layers"
        return " and ".join(
            [layers] * bool(self.plan.layers or not self.plan.filters) + [filters] * bool(self.plan.filters)
        )


def new_name(old: str, renamed: Mapping[str, str]) -> str:
    """The name in the smaller model of a module of the whole one."""
    inside = (key for key in renamed if old == key or old.startswith(f"{key}."))
    longest = max(inside, key=len, default=None)
    return old if longest is None else renamed[longest] + old[len(longest) :]
