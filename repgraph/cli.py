"""The command line: `repgraph demo`, `layers`, `profile`, `compare` and `prune`. Thin over the functions."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar, cast, get_args

import click
import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from torch import nn

from repgraph import __version__, plot
from repgraph.activations import capture, layer_names
from repgraph.activations.batches import Source
from repgraph.activations.layers import choose
from repgraph.activations.reduce import Reduce
from repgraph.between import compare_layers
from repgraph.layerwise import profile, profile_activations, set_order
from repgraph.loading import load_data, load_model
from repgraph.metrics.similarity import cknna, gbs, linear_cka, mutual_knn, procrustes, rbf_cka, rsa, rtd, svcca
from repgraph.prune import (
    Plan,
    compare_models,
    drop_and_evaluate,
    drop_layers,
    droppable_layers,
    evaluate_classifier,
    layer_scores,
    plan_filters,
    plan_layers,
    prune_filters,
    redundant_blocks,
    repair,
    search_widths,
)
from repgraph.prune.scores import Score
from repgraph.report import write_comparison, write_pruned, write_report
from repgraph.scores.by_name import FilterScore, filter_scores

_DRAWN = 300  # samples in a drawing
_PANELS = 4
_DROPPED = 5  # blocks that the demo leaves out
_CUT = 0.4  # of the MACs, by filters

_MEASURES: dict[str, Callable[..., float]] = {
    "gbs": gbs,
    "cka": partial(linear_cka, unbiased=True),
    "biased_cka": linear_cka,
    "rbf_cka": rbf_cka,
    "mutual_knn": mutual_knn,
    "cknna": cknna,
    "procrustes": procrustes,
    "rsa": rsa,
    "svcca": svcca,
    "rtd": rtd,
}

Command = TypeVar("Command", bound=Callable[..., None])


def _with(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options at once, in the order in which they are listed."""

    def attach(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return attach


_of_data = _with(
    click.option("--reduce", type=click.Choice(["mean", "cls", "last"]), help="Pool positions or tokens."),
    click.option("--memory", metavar="SIZE", help='Budget for activations, as "2 GB".'),
    click.option("--batch-size", default=64, show_default=True, help="Samples per forward pass."),
    click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True),
    click.option("--size", type=int, help="Resize images to this side and crop the centre square."),
    click.option("--mean", metavar="NUMBERS", help="Mean per channel to subtract, as 0.485,0.456,0.406."),
    click.option("--std", metavar="NUMBERS", help="Deviation per channel to divide by."),
)

_of_model = _with(
    click.argument("model"),
    click.option("--weights", metavar="FILE", help="Weights: safetensors, or a state dict saved by torch."),
    click.option("--arg", "arguments", multiple=True, metavar="NAME=VALUE", help="Argument of MODEL; repeatable."),
    click.option("--layers", "select", default="blocks", show_default=True, help="blocks, leaves, names, wildcards."),
)


def main() -> None:
    """Run the command line: an error is one line on stderr and exit code 2."""
    mpl.use("Agg")
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if "--traceback" in sys.argv:
            raise
        notes = "; ".join(getattr(error, "__notes__", []))
        click.echo(f"Error: {' '.join(str(error).split())}{f' ({notes})' if notes else ''}", err=True)
        sys.exit(2)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="repgraph")
@click.option("--traceback", is_flag=True, help="Show the whole traceback of an error.")
def cli(traceback: bool) -> None:
    """See what every layer of a trained network does to a set of samples."""


@cli.command()
@click.option("--out", default="repgraph-demo", show_default=True, help="Folder for the results.")
def demo(out: str) -> None:
    """Profile a small trained network that comes along, then drop blocks of it: tables, figures, pages in a folder."""
    from repgraph.demo import digits, digits_resnet
    from repgraph.demo.train import fine_tuned

    start = time.perf_counter()
    model, data = digits_resnet(), digits()
    table = profile(model, data, n=200)
    text = (
        "A residual network of 14 blocks, trained on 797 of scikit-learn's handwritten digits, looks at 1000 others in "
        "5 sets of 200. At each layer an image is linked to the 3 images whose outputs are most similar to its own. "
        "Modularity says how far these links have sorted the images by class: 0 is chance, 0.9 is perfect."
    )
    _finish(out, model, data, table, "repgraph demo: handwritten digits through a network", text)
    train = digits("train")
    scores = layer_scores(model, train, by=["redundancy"])
    plan = plan_layers(scores["redundancy"], _DROPPED)
    pruned = drop_layers(model, plan, data)
    repaired = repair(model, pruned, train)
    models = {
        f"whole, {len(table) - 1} blocks": model,
        f"{_DROPPED} blocks dropped": pruned.model,
        "cuts repaired": repaired.model,
        "and fine-tuned": fine_tuned(repaired.model),
    }
    results = compare_models(models, data)
    text = (
        f"The {_DROPPED} blocks that matter least for what the network ends up treating alike are left out. A linear "
        "map fitted in closed form on the training images closes each cut; a second of fine-tuning does the rest. "
        "Accuracy is that on the 1000 digits that neither the training nor the choice has seen. The files hold the "
        "repaired network."
    )
    files = write_pruned(out, repaired, results, title="repgraph demo: a smaller network", text=text)
    click.echo(f"\n{repaired.plan!r}\n\n{results.round(4).to_string()}\n\nwrote " + ", ".join(map(str, files)))
    independence = filter_scores(model, train, "chip", samples=128)
    one = data[0][:1]
    cut = prune_filters(model, one, plan_filters(model, one, independence, _CUT, of="macs", by="chip"))
    refitted = repair(model, cut, train)
    models = {
        "whole": model,
        f"filters cut, {100 * _CUT:.0f} % of the MACs": cut.model,
        "readers refitted": refitted.model,
        "and fine-tuned": fine_tuned(refitted.model),
    }
    results = compare_models(models, data)
    text = (
        f"Filters that CHIP finds least independent are cut, from every layer at one pace, until {100 * _CUT:.0f} % of "
        "the multiply-accumulates are gone. The layers that read them are refitted by least squares on the training "
        "images; a second of fine-tuning does the rest. The files hold the refitted network."
    )
    files = write_pruned(f"{out}/filters", refitted, results, title="repgraph demo: a thinner network", text=text)
    click.echo(f"\n{results.round(4).to_string()}\n\nwrote " + ", ".join(map(str, files)))
    click.echo(f"done in {time.perf_counter() - start:.0f} s")


@cli.command()
@_of_model
@click.option("--input", "shape", metavar="SHAPE", help="Shape of one input, as 3,224,224; assumed if not given.")
def layers(model: str, weights: str | None, arguments: tuple[str, ...], select: str, shape: str | None) -> None:
    """List the layers of MODEL that would be taken, in execution order, with their output shapes.

    MODEL is "package.module:callable" or "file.py:callable".
    """
    net = load_model(model, weights, arguments)
    data = None
    if shape is not None:
        try:
            data = torch.zeros(2, *(int(side) for side in shape.replace("x", ",").split(",")))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"--input must be a shape like 3,224,224, got {shape!r}") from error
    click.echo(repr(layer_names(net, _split(select), data)))


@cli.command("profile")
@_of_model
@click.argument("data")
@click.option("--k", default=3, show_default=True, help="Neighbours per sample.")
@click.option("--n", default=500, show_default=True, help="Samples per set.")
@click.option("--repeats", default=5, show_default=True, help="Number of sets.")
@click.option("--seed", type=int, help="Draw the sets at random with this seed.")
@click.option(
    "--metrics",
    default="modularity",
    show_default=True,
    help="Families, side by side: modularity, gbs, cka (both: similarity to the previous layer), feature_entropy, "
    "complexity, spline.",
)
@click.option("--lam", default=0.01, show_default=True, help="Kernel width of complexity; 0.04 for convolutions.")
@click.option("--radius", type=float, help="Of the local complexity in spline; a hundredth of the spread of the data.")
@click.option("--folder", help="Keep each finished layer there; a run that was killed goes on.")
@_of_data
@click.option("--out", default="repgraph-profile", show_default=True, help="Folder for the results.")
def profile_command(
    model: str,
    data: str,
    weights: str | None,
    arguments: tuple[str, ...],
    select: str,
    k: int,
    n: int,
    repeats: int,
    seed: int | None,
    metrics: str,
    lam: float,
    radius: float | None,
    folder: str | None,
    reduce: Reduce,
    memory: str | None,
    batch_size: int,
    device: str,
    size: int | None,
    mean: str | None,
    std: str | None,
    out: str,
) -> None:
    """What the layers of MODEL do with DATA: table, figures and a page in a folder.

    MODEL is "package.module:callable" or "file.py:callable". DATA is an .npz file (arrays x and y), a folder with one
    folder of images per class, or "package.module:callable" giving anything that repgraph.capture takes. Images of
    8 bits become numbers in [0, 1], channels first; --mean and --std then normalise them.
    """
    net = load_model(model, weights, arguments).to(device)
    items = _items(data, size, mean, std)
    table = profile(
        net,
        items,
        layers=_split(select),
        k=k,
        n=n,
        repeats=repeats,
        seed=seed,
        metrics=[name.strip() for name in metrics.split(",")],  # type: ignore[misc]
        lam=lam,
        radius=radius,
        folder=folder,
        reduce=reduce,
        memory=memory,
        batch_size=batch_size,
    )
    _finish(out, net, items, table, f"{model} on {data}", "", seed=seed, reduce=reduce, batch_size=batch_size)


@cli.command("compare")
@click.argument("model_a")
@click.argument("model_b")
@click.argument("data")
@click.option("--measure", default="gbs,cka", show_default=True, help=f"One or several of {', '.join(_MEASURES)}.")
@click.option("--weights-a", metavar="FILE", help="Weights of MODEL_A: safetensors, or a state dict saved by torch.")
@click.option("--weights-b", metavar="FILE", help="Weights of MODEL_B.")
@click.option("--arg-a", "arguments_a", multiple=True, metavar="NAME=VALUE", help="Argument of MODEL_A; repeatable.")
@click.option("--arg-b", "arguments_b", multiple=True, metavar="NAME=VALUE", help="Argument of MODEL_B; repeatable.")
@click.option("--layers", "select", default="blocks", show_default=True, help="blocks, leaves, names, wildcards.")
@click.option("--layers-b", "select_b", help="Layers of MODEL_B, where they have other names.")
@click.option("--name-a", help="What to call MODEL_A on the axes.")
@click.option("--name-b", help="What to call MODEL_B.")
@click.option("--n", default=500, show_default=True, help="Samples.")
@click.option("--seed", type=int, help="Draw the samples at random with this seed; the first ones otherwise.")
@_of_data
@click.option("--out", default="repgraph-compare", show_default=True, help="Folder for the results.")
def compare_command(
    model_a: str,
    model_b: str,
    data: str,
    measure: str,
    weights_a: str | None,
    weights_b: str | None,
    arguments_a: tuple[str, ...],
    arguments_b: tuple[str, ...],
    select: str,
    select_b: str | None,
    name_a: str | None,
    name_b: str | None,
    n: int,
    seed: int | None,
    reduce: Reduce,
    memory: str | None,
    batch_size: int,
    device: str,
    size: int | None,
    mean: str | None,
    std: str | None,
    out: str,
) -> None:
    """Similarity of every layer of MODEL_A to every layer of MODEL_B on DATA: tables, heat maps and a page in a folder.

    Models and data as for `repgraph profile`. gbs links each sample to its 5 nearest, cka is unbiased.
    """
    chosen = [name.strip() for name in measure.split(",")]
    if unknown := [name for name in chosen if name not in _MEASURES]:
        raise ValueError(f"--measure must be of {', '.join(_MEASURES)}, got {unknown[0]!r}")
    items = _items(data, size, mean, std)
    samples = n if seed is None else set_order(items, batch_size, seed)[:n]
    captured = [
        capture(
            load_model(model, weights, arguments).to(device),
            items,
            _split(layers),
            samples=samples,
            reduce=reduce,
            memory=memory,
            batch_size=batch_size,
        )
        for model, weights, arguments, layers in (
            (model_a, weights_a, arguments_a, select),
            (model_b, weights_b, arguments_b, select_b or select),
        )
    ]
    names = (name_a or f"a: {model_a}", name_b or f"b: {model_b}")
    tables = compare_layers({name: _MEASURES[name] for name in chosen}, *captured, names=names, device=device)
    files = write_comparison(out, tables, title=f"{names[0]} against {names[1]} on {data}")
    for name, table in tables.items():
        click.echo(f"{name}: {plot.caption(table)}\n{table.round(2).to_string()}\n")
    click.echo("wrote " + ", ".join(str(file) for file in files))


@cli.command("prune")
@click.argument("model")
@click.argument("data")
@click.option("--layers", "count", type=int, help="How many layers to drop.")
@click.option("--tol", type=float, help="Instead: blocks over which modularity rises by at most this in all.")
@click.option("--filters", "ratio", type=float, help="Instead: cut this share of the filters, or of the MACs.")
@click.option(
    "--score",
    type=click.Choice(get_args(FilterScore)),
    default="l2",
    show_default=True,
    help="Which filters of a layer go first.",
)
@click.option(
    "--budget",
    type=click.Choice(["uniform", "global", "macs", "search"]),
    default="uniform",
    show_default=True,
    help="--filters is the share of each layer's filters; of all filters, ranked over all layers; of the MACs, every "
    "layer at one pace; of the MACs, widths searched by the loss.",
)
@click.option(
    "--by",
    help=f"Score that chooses them: {', '.join(get_args(Score))}; or oracle, the cross-entropy without each layer. "
    "redundancy by default.",
)
@click.option(
    "--among",
    default="blocks",
    show_default=True,
    help="blocks, halves (of transformers), names, wildcards; of --filters, convolutions and linear layers by name "
    "(all convolutions by default).",
)
@click.option("--samples", default=500, show_default=True, help="Samples for scores and repair; the rest judges.")
@click.option("--seed", type=int, help="Draw them at random with this seed; the first ones otherwise.")
@click.option("--repair/--no-repair", "mend", default=True, show_default=True, help="Close the cuts by linear maps.")
@click.option("--weights", metavar="FILE", help="Weights: safetensors, or a state dict saved by torch.")
@click.option("--arg", "arguments", multiple=True, metavar="NAME=VALUE", help="Argument of MODEL; repeatable.")
@_of_data
@click.option("--out", default="repgraph-prune", show_default=True, help="Folder for the results.")
def prune_command(
    model: str,
    data: str,
    count: int | None,
    tol: float | None,
    ratio: float | None,
    score: FilterScore,
    budget: str,
    by: str | None,
    among: str,
    samples: int,
    seed: int | None,
    mend: bool,
    weights: str | None,
    arguments: tuple[str, ...],
    reduce: Reduce,
    memory: str | None,
    batch_size: int,
    device: str,
    size: int | None,
    mean: str | None,
    std: str | None,
    out: str,
) -> None:
    """Drop whole layers or cut filters of MODEL: plan, weights, a before/after table and a figure in a folder.

    Model and data as for `repgraph profile`. Scores and repair see --samples of the data; accuracy is that on the rest.
    """
    if [count, tol, ratio].count(None) != 2:
        raise ValueError(
            "pass one of --layers, how many to drop, --tol, the rise of modularity that may go, and --filters, a share"
        )
    if tol is not None and by not in (None, "modularity"):
        raise ValueError(f"--tol goes by modularity, got --by {by}")
    if samples < 1:
        raise ValueError(f"--samples must be at least 1, got {samples}")
    by = by or "redundancy"
    if by not in (*get_args(Score), "oracle"):
        raise ValueError(f"--by must be one of {', '.join(get_args(Score))}, oracle, got {by!r}")
    net = load_model(model, weights, arguments).to(device).eval()
    items = _items(data, size, mean, std)
    total = Source(items, batch_size, None).n
    order = torch.arange(total) if seed is None else set_order(items, batch_size, seed)
    seen, rest = order[:samples], order[samples:]
    if not len(rest):
        raise ValueError(f"--samples {samples} leaves none of the {total} samples to judge on")
    example = next(iter(Source(items, batch_size, 2))).inputs
    if ratio is not None:
        some = None if among == "blocks" else [*choose(net, _split(among))]
        scores = filter_scores(net, items, score, some, samples=seen, batch_size=batch_size, seed=seed or 0)
        if budget == "search":
            loss = partial(_cross_entropy, data=items, samples=seen, batch_size=batch_size)
            plan = search_widths(net, example, scores, loss, ratio, by=score)
        else:
            plan = plan_filters(
                net,
                example,
                scores,
                ratio,
                budget="global" if budget == "global" else "uniform",
                of="macs" if budget == "macs" else "filters",
                by=score,
            )
        pruned = prune_filters(net, example, plan)
    else:
        how: dict[str, Any] = {"reduce": reduce, "memory": memory, "batch_size": batch_size}
        plan = _layer_plan(net, items, example, seen, seed, among, by, count, tol, how)
        pruned = drop_layers(net, plan, example)
    models = {"before": net, "dropped" if pruned.plan.layers or ratio is None else "cut": pruned.model}
    if mend and (pruned.plan.layers or pruned.plan.filters):
        pruned = repair(net, pruned, items, samples=seen, memory=memory, batch_size=batch_size)
        models["repaired"] = pruned.model
    results = compare_models(models, items, samples=rest, batch_size=batch_size)
    text = f"Results on {len(rest)} samples that the choice has not seen."
    filters = sum(map(len, plan.filters.values()))
    title = f"{model} without {f'{filters} filters' if filters else f'{len(plan.layers)} layers'}"
    files = write_pruned(out, pruned, results, title=title, text=text)
    click.echo(f"{pruned.plan!r}\n\n{results.round(4).to_string()}\n\n" + "wrote " + ", ".join(map(str, files)))


def _layer_plan(
    net: nn.Module,
    items: object,
    example: object,
    seen: torch.Tensor,
    seed: int | None,
    among: str,
    by: str,
    count: int | None,
    tol: float | None,
    how: Mapping[str, Any],
) -> Plan:
    """The layers to drop: by the rise of modularity, or so many by a score or the oracle."""
    names = droppable_layers(net, example, _split(among))
    if not names:
        raise ValueError(f"--among {among} holds no layer that can be dropped")
    if tol is not None:
        acts = capture(net, items, "blocks" if among == "halves" else _split(among), samples=seen, **how)
        if acts.labels is None:
            raise ValueError("--tol needs labels: modularity is that of classes")
        curve = profile_activations(acts, n=len(seen), repeats=1)
        return redundant_blocks(curve, [name for name in names if name in curve.index], tol=tol)
    assert count is not None
    if by == "oracle":
        loss = partial(_cross_entropy, data=items, samples=seen, batch_size=how["batch_size"])
        return plan_layers(drop_and_evaluate(net, names, loss, example), count)
    table = layer_scores(net, items, layers=_split(among), by=[cast(Score, by)], samples=len(seen), seed=seed, **how)
    scores = table[by]
    scores.attrs = table.attrs
    return plan_layers(scores, count)


def _cross_entropy(model: nn.Module, *, data: object, samples: torch.Tensor, batch_size: int) -> float:
    found = evaluate_classifier(model, data, samples=samples, batch_size=batch_size, progress=False)
    return float(found["cross_entropy"])


def _finish(
    out: str,
    model: nn.Module,
    data: object,
    table: pd.DataFrame,
    title: str,
    text: str,
    *,
    seed: int | None = None,
    reduce: Reduce = None,
    batch_size: int = 64,
) -> None:
    """Draw a few layers, write the report and print the table."""
    places = np.unique(np.linspace(0, len(table) - 1, _PANELS).round().astype(int))
    samples = _DRAWN if seed is None else set_order(data, batch_size, seed)[:_DRAWN]
    names = [str(name) for name in table.index[places]]
    drawn = capture(model, data, names, samples=samples, reduce=reduce, batch_size=batch_size)
    files = write_report(out, table, drawn, title=title, text=text)
    click.echo(table.round(4).to_string())
    click.echo("\nwrote " + ", ".join(str(file) for file in files))


def _items(data: str, size: int | None, mean: str | None, std: str | None) -> object:
    """The data, which are read more than once."""
    items = load_data(data, size=size, mean=_numbers(mean, "--mean"), std=_numbers(std, "--std"))
    return list(items) if isinstance(items, Iterator) else items


def _split(select: str) -> str | list[str]:
    parts = [part.strip() for part in select.split(",") if part.strip()]
    return parts[0] if len(parts) == 1 else parts


def _numbers(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} must be numbers like 0.485,0.456,0.406, got {text!r}") from error
