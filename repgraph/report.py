"""The result of a profile or a comparison in a folder: tables, figures and one page that shows them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from repgraph import plot
from repgraph.activations import Activations
from repgraph.graph import knn_graph
from repgraph.prune import Pruned

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem } img { max-width: 100% }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4 }
tbody th { font-family: monospace }
.scroll { overflow-x: auto } .note { color: #555 }
"""
_COLUMNS = {
    "modularity": "how far the layer has sorted the samples by class (mean over the sample sets)",
    "null": "the same with permuted labels: what chance gives",
    "ceiling": "the value if every edge stayed inside a class",
    "class_separation": "share of the cosine distance between samples that lies between classes",
    "community_modularity": "modularity of the communities that Leiden finds without labels",
    "communities": "their number",
    "features": "numbers per sample",
    "isolated": "samples without any edge",
    "negative_share": "share of edges of negative weight",
    "gbs_previous": "graph-based similarity to the previous layer",
    "gbs_previous_null": "the same with the samples of one layer shuffled",
    "feature_entropy": "entropy of the moments at which a unit's maps get their first hole, in nats: low = consistent",
    "feature_entropy_floor": "the same for noise on maps of this size",
    "feature_entropy_ceiling": "the largest possible, ln of the samples per class",
    "birth_rate": "share of the maps that have a hole at all",
    "gates": "ReLU-like units of the layer",
    "complexity": "entropy of the layer's gates over the samples, in bits: 0 = one linear map for all",
    "complexity_ceiling": "the largest possible, log2 of the samples",
    "label_information": "what of the complexity tells the class, in bits",
    "label_information_ceiling": "the largest possible, the entropy of the labels",
    "regions": "distinct region codes among the samples of a set",
    "local_complexity": "units whose sign changes in a small neighbourhood of a sample",
    "cka_previous": "unbiased linear CKA to the previous layer",
    "cka_previous_null": "the same with the samples of one layer shuffled",
}


def write_report(
    folder: str | Path, table: pd.DataFrame, drawn: Activations, *, title: str, text: str = ""
) -> list[Path]:
    """Write profile.csv, curve.png, graphs.png and index.html into a folder, which is made if need be.

    Parameters
    ----------
    folder
        Where to write; files of these names are replaced.
    table
        A table of `profile`.
    drawn
        The layers whose graphs are drawn, for a few hundred samples.
    title, text
        Heading and first paragraph of the page.

    Returns
    -------
    list of Path
        The files, the page last.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    csv, curve, drawings, page = (path / name for name in ("profile.csv", "curve.png", "graphs.png", "index.html"))
    a = table.attrs
    first = plot.main_columns(table)[0]
    table.to_csv(csv)
    _save(plot.curves(table)[0], curve)
    graphs = {name: knn_graph(drawn[name], a["k"], metric=a["metric"], symmetrize=a["symmetrize"]) for name in drawn}
    titles = {name: f"{name}: {table[first][name]:.2f}" for name in graphs}
    _save(plot.graphs(graphs, drawn.labels, titles=titles)[0], drawings)
    settings = ", ".join(f"{key} = {value}" for key, value in a.items() if value is not None)
    explained = "".join(f"<li><b>{name}</b>: {_COLUMNS[name]}</li>" for name in table if name in _COLUMNS)
    colours = "" if drawn.labels is None else "Colours are classes, orange lines join different classes. "
    _write_page(
        page,
        title,
        f"""<p>{escape(text)}</p>
<h2>By layer</h2><img alt="{first} against the layers" src="{_embedded(curve)}">
<h2>The graph through the layers</h2>
<p class="note">{drawn.n} samples, each linked to its {a["k"]} nearest at that layer; above each panel the
{first.replace("_", " ")} from the table. {colours}A sample starts from the place that it has in the next panel, so that
what moves is what the links moved.</p>
<img alt="graph drawings of {len(graphs)} layers" src="{_embedded(drawings)}">
<h2>Numbers</h2><div class="scroll">{table.to_html(float_format="{:.4f}".format, border=0)}</div><ul>{explained}</ul>
<p class="note">Settings: {escape(settings)}.</p>""",
    )
    return [csv, curve, drawings, page]


def write_comparison(folder: str | Path, tables: Mapping[str, pd.DataFrame], *, title: str) -> list[Path]:
    """Write <measure>.csv, heatmaps.png, matches.csv and index.html into a folder, which is made if need be.

    Parameters
    ----------
    folder
        Where to write; files of these names are replaced.
    tables
        Measure -> table of `between_layers`, all of the same layers.
    title
        Heading of the page.

    Returns
    -------
    list of Path
        The files, the page last.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    files = []
    for name, table in tables.items():
        files.append(path / f"{name}.csv")
        table.to_csv(files[-1])
    picture, matches, page = (path / name for name in ("heatmaps.png", "matches.csv", "index.html"))
    similar = {name: table for name, table in tables.items() if not table.attrs["distance"]}
    distances = {name: table for name, table in tables.items() if table.attrs["distance"]}
    embedded = []
    for group, file in ((similar, picture), (distances, path / "distances.png")):
        if group:
            _save(plot.heatmaps(group, best=True)[0], file)
            files.append(file)
            embedded.append(f'<img alt="heat maps of {", ".join(group)}" src="{_embedded(file)}">')
    best = pd.DataFrame({name: _best_matches(table) for name, table in tables.items()})
    best.to_csv(matches)
    settings = "".join(f"<li><b>{name}</b>: {escape(plot.caption(table))}</li>" for name, table in tables.items())
    numbers = "".join(
        f'<h2>{name}</h2><div class="scroll">{table.to_html(float_format="{:.3f}".format, border=0)}</div>'
        for name, table in tables.items()
    )
    _write_page(
        page,
        title,
        f"""<ul>{settings}</ul>
{"".join(embedded)}<p class="note">A dot marks the best match of each row. Chance is the value with the samples of one
layer shuffled.</p>
<h2>Best match of each layer</h2><div class="scroll">{best.to_html(border=0)}</div>{numbers}""",
    )
    return [*files, matches, page]


def write_pruned(
    folder: str | Path, pruned: Pruned, results: pd.DataFrame, *, title: str, text: str = ""
) -> list[Path]:
    """Write plan.json, weights.safetensors, results.csv, plan.png and pruning.html into a folder, made if need be.

    Parameters
    ----------
    folder
        Where to write; files of these names are replaced.
    pruned
        The smaller model and its plan, which has scores or filters.
    results
        One row per stage (before, after, ...), in columns what it costs and how well it does.
    title, text
        Heading and first paragraph of the page.

    Returns
    -------
    list of Path
        The files, the page last.
    """
    path = Path(folder)
    files = pruned.save(path)
    csv, picture, page = (path / name for name in ("results.csv", "plan.png", "pruning.html"))
    results.to_csv(csv)
    filters = bool(pruned.plan.filters)
    _save(plot.widths(pruned.plan) if filters else plot.plan(pruned.plan), picture)
    seen = "filters of every layer, cut ones in orange" if filters else "score of every layer, dropped ones in orange"
    _write_page(
        page,
        title,
        f"""<p>{escape(text)}</p>
<h2>Before and after</h2><div class="scroll">{results.to_html(float_format="{:.4g}".format, border=0)}</div>
<h2>Which {"filters" if filters else "layers"}</h2><img alt="{seen}" src="{_embedded(picture)}">
<div class="scroll">{pruned.plan._repr_html_()}</div>
<p class="note">plan.json and weights.safetensors hold the smaller model: repgraph.prune.load_pruned reads them into a
fresh model of the original kind.</p>""",
    )
    return [*files, csv, picture, page]


def _write_page(page: Path, title: str, body: str) -> None:
    page.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style></head>
<body><h1>{escape(title)}</h1>{body}</body></html>
""",
        encoding="utf-8",
    )


def _best_matches(table: pd.DataFrame) -> pd.Series:
    """The column of the largest similarity, or the smallest distance, of each row; empty where all are undefined."""
    known = table.dropna(how="all")
    return (known.idxmin(axis=1) if table.attrs["distance"] else known.idxmax(axis=1)).reindex(table.index)


def _save(ax: Axes, path: Path) -> None:
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _embedded(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
