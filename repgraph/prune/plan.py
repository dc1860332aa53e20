"""Plan: what to remove from a model and why, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from html import escape
from pathlib import Path

_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to remove from a model and why. Plain data: it prints as a table and goes through JSON without loss.

    Equal plans applied to equal models give equal models (`drop_layers`).

    Raises
    ------
    ValueError
        If a layer is named twice or is no name, a score is not finite, or the settings cannot be written as JSON.

    Examples
    --------
    >>> plan = Plan(layers=("layer1.2",), by="block_influence", scores={"layer1.1": 0.3, "layer1.2": 0.02})
    >>> plan
    Plan: drop 1 of 2 layers, by block_influence
                  score
      layer1.1      0.3
      layer1.2     0.02  drop
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    layers: tuple[str, ...] = ()
    """Modules to drop, by the names that they have in the whole model."""
    filters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Convolution or linear layer -> its output channels to cut, numbered as before the cut; after the layers went."""
    by: str = "choice"
    """The score that chose them."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Score of every layer that could have been dropped, low = dropped first."""
    threshold: float | None = None
    """Largest score that was dropped for its size, where a threshold decided."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """What else moved the choice: samples, neighbours, seed."""
    model: str = ""
    """Class of the model that the plan was applied to; empty before."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Name in the whole model -> name in the smaller one, of the layers that moved up in their list."""
    repairs: Mapping[str, int] = field(default_factory=dict)
    """Those of the layers in whose place a linear map stands, fitted by `repair`, and the channel axis of each."""

    def __post_init__(self) -> None:
        if isinstance(self.layers, str) or not isinstance(self.layers, Iterable):
            raise ValueError(f"layers must be names of layers, got {self.layers!r}")
        names = tuple(self.layers)
        if not all(isinstance(item, str) and item for item in names):
            raise ValueError(f"layers must be names of layers, got {names!r}")
        if twice := [item for item in names if names.count(item) > 1]:
            raise ValueError(f"layers name {twice[0]!r} twice")
        object.__setattr__(self, "layers", names)
        for text in ("by", "model"):
            if not isinstance(getattr(self, text), str):
                raise ValueError(f"{text} must be text, got {getattr(self, text)!r}")
        for name in ("filters", "scores", "settings", "renamed", "repairs"):
            value = getattr(self, name)
            if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
                raise ValueError(f"{name} must be a mapping from names, got {value!r}")
            object.__setattr__(self, name, dict(value))
        for layer, channels in self.filters.items():
            if not all(type(channel) is int and channel >= 0 for channel in channels):
                raise ValueError(f"filters of {layer!r} must be numbers of channels, got {channels!r}")
            if len(set(channels)) < len(channels):
                raise ValueError(f"filters of {layer!r} name a channel twice")
        object.__setattr__(self, "filters", {layer: tuple(sorted(own)) for layer, own in self.filters.items()})
        for layer, value in self.scores.items():
            if not _is_number(value):
                raise ValueError(f"the score of {layer!r} must be a finite number, got {value!r}")
        if self.threshold is not None and not _is_number(self.threshold):
            raise ValueError(f"threshold must be a finite number, got {self.threshold!r}")
        for layer, moved in self.renamed.items():
            if not isinstance(moved, str):
                raise ValueError(f"renamed must be a mapping from names to names, got {moved!r} for {layer!r}")
        for layer, axis in self.repairs.items():
            if layer not in self.layers:
                raise ValueError(f"repairs name {layer!r}, which is not dropped")
            if isinstance(axis, bool) or not isinstance(axis, int) or axis < 1:
                raise ValueError(f"repairs must be a mapping from names to channel axes, got {axis!r} for {layer!r}")
        try:
            object.__setattr__(self, "settings", json.loads(json.dumps(self.settings, allow_nan=False)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings must be plain data that JSON can hold: {error}") from error

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps({"repgraph_plan": _FORMAT, **asdict(self)}, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises
        ------
        ValueError
            If the text is no JSON, or not that of a plan.
        """
        try:
            data = json.loads(text)
        except (TypeError, ValueError) as error:
            raise ValueError(f"a plan must be JSON text: {error}") from error
        if not isinstance(data, dict) or data.pop("repgraph_plan", None) != _FORMAT:
            raise ValueError(f"the JSON text is not that of a plan: expected an object with repgraph_plan = {_FORMAT}")
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"the plan has an unknown entry {unknown[0]!r}; known are {', '.join(sorted(known))}")
        if "layers" not in data:
            raise ValueError("the plan has no entry 'layers'")
        if not isinstance(data["layers"], list):
            raise ValueError(f"layers of a plan must be a list of names, got {data['layers']!r}")
        return cls(**data)

    def save(self, path: str | Path) -> None:
        """Write the plan to a JSON file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises
        ------
        ValueError
            If the file holds no plan.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def _rows(self) -> list[tuple[str, str, str]]:
        names = [*self.scores, *(name for name in self.layers if name not in self.scores)]
        rows = [
            (
                name,
                f"{self.scores[name]:.3g}" if name in self.scores else "",
                ("repair" if name in self.repairs else "drop") if name in self.layers else "",
            )
            for name in names
        ]
        return rows + [(name, "", f"cut {_shortened(channels)}") for name, channels in self.filters.items() if channels]

    def _title(self) -> str:
        total = len({*self.scores, *self.layers})
        count = f"{len(self.layers)} of {total} layers" if self.scores else f"{len(self.layers)} layers"
        parts = [f"drop {count}"] if self.layers or not self.filters else []
        if self.filters:
            parts.append(f"cut {sum(map(len, self.filters.values()))} filters of {len(self.filters)} layers")
        parts.append(f"by {self.by}")
        if self.threshold is not None:
            parts.append(f"threshold {self.threshold:.3g}")
        parts += [f"{name} = {_shortened(value)}" for name, value in self.settings.items() if value not in ({}, [])]
        return "Plan: " + ", ".join(parts)

    def __repr__(self) -> str:
        rows = self._rows()
        wide = max((len(row[0]) for row in rows), default=0)
        head = [f"  {'':{wide}}  {'score':>7}"] if self.scores else []
        lines = [f"  {name:{wide}}  {score:>7}  {what}".rstrip() for name, score, what in rows]
        return "\n".join([self._title(), *head, *lines])

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self._rows())
        head = "<tr><th>layer</th><th>score</th><th></th></tr>"
        return f"<p>{escape(self._title())}</p><table>{head}{rows}</table>"


def _shortened(value: object) -> str:
    """Of long lists the first few entries and how many there are."""
    if isinstance(value, Mapping):
        return (
            f"{len(value)} entries" if len(value) > 4 else ", ".join(f"{k} {_shortened(v)}" for k, v in value.items())
        )
    if isinstance(value, list | tuple):
        some = ", ".join(map(str, value[:8]))
        return f"{some}, ... ({len(value)})" if len(value) > 8 else some
    return str(value)


def _is_number(value: object) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False
