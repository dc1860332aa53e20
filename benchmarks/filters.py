"""Which filters to cut: every score under one budget, every budget under one score, against Torch-Pruning and random.

    python -m benchmarks.filters [--parts scores,budgets,tunes] [--networks resnet20-jpeg,resnet56-jpeg]

Accuracy on 2,000 test images after cuts to a share of the MACs (convolutions and linear layers, counted on the smaller
network): as cut, after the criterion's own compensation where it has one, after a least-squares refit of the next
layers, and after one short fixed fine-tune (100 steps of batch 128) of the best two and random. Scores and refits see
1,000 other test images. About 40 minutes on two cores; everything that was computed is kept in benchmarks/filters.json,
and a run that was stopped goes on where it was. The tables are printed and written to docs/filter_scores.md;
figures/filter_pruning.py draws them. Needs the shared data; without them the demo network alone is measured.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks import tasks
from benchmarks.kept import Kept
from repgraph.prune import (
    Plan,
    layer_sensitivity,
    plan_filters,
    prunable_filters,
    prune_filters,
    rates_from_sensitivity,
    repair,
    search_widths,
)
from repgraph.prune.compensation import absorb_filters, shift_batch_norms
from repgraph.scores.agreement import score_agreement
from repgraph.scores.by_name import FilterScore, filter_scores
from repgraph.scores.central_filter import central_filters, map_similarity
from repgraph.scores.maps import stream_maps
from repgraph.surgery.coupling import channel_groups
from repgraph.surgery.slots import with_slots

HERE = Path(__file__).parent
KEPT = HERE / "filters.json"
PAGE = HERE.parent / "docs/filter_scores.md"
RATIOS = {"resnet20-jpeg": (0.2, 0.35, 0.5), "resnet56-jpeg": (0.5,), "demo": (0.35, 0.5)}
SEEDS = (0, 1, 2)
OURS = tuple(name for name in get_args(FilterScore) if name != "random")
PEERS = {
    "tp magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "tp bn_scale": lambda: tp.importance.BNScaleImportance(),
    "tp taylor": lambda: tp.importance.GroupTaylorImportance(),
}
RANDOM = tuple(f"random {seed}" for seed in SEEDS)
CHOSEN = ("l2", "taylor", "chip", "hrank", "fsm")  # on the larger network
BUDGETS = ("uniform", "global", "global_mean", "sensitivity", "search")
BUDGET_SCORE = "l2"
TUNED = {"resnet20-jpeg": 0.5, "resnet56-jpeg": 0.5}


def scores_of(task: tasks.Task, by: str) -> dict[str, Tensor]:
    """One of ours, one of Torch-Pruning's, or random."""
    if by in PEERS:
        return peer_scores(task, by)
    name, _, seed = by.partition(" ")
    samples = 256 if by not in ("feature_entropy",) else 1000
    return filter_scores(task.model, task.data, name, samples=samples, seed=int(seed or 0), progress=False)  # type: ignore[arg-type]


def peer_scores(task: tasks.Task, by: str) -> dict[str, Tensor]:
    """Torch-Pruning's importance of every group that it can follow, credited to the group's first layer.

    The zero-padded shortcuts, which it does not know, are held in slots as in `prune_filters`.
    """
    model = with_slots(task.model, task.example)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    x, y = task.data  # type: ignore[misc]
    for i in range(0, 256, 64):
        torch.nn.functional.cross_entropy(model(x[i : i + 64]), y[i : i + 64], reduction="sum").backward()
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, Tensor] = {}
    importance = PEERS[by]()
    for group in channel_groups(model, task.example):
        root = model.get_submodule(group.layers[0])
        if group.blocked or not isinstance(root, nn.Conv2d):
            continue
        graph = _graph(model, task.example)
        whole = graph.get_pruning_group(root, tp.prune_conv_out_channels, list(range(root.out_channels)))
        value = importance(whole)
        if value is not None:
            found[names[root]] = value.detach().double()
    return found


_GRAPHS: dict[int, Any] = {}


def _graph(model: nn.Module, example: object) -> Any:
    from repgraph.surgery.coupling import _dependency_graph  # the same graph that the cuts follow

    if id(model) not in _GRAPHS:
        _GRAPHS.clear()
        _GRAPHS[id(model)] = _dependency_graph(model, example)
    return _GRAPHS[id(model)]


def measured(task: tasks.Task, plan: Plan, by: str) -> dict[str, Any]:
    """What is left after a cut, its own compensation and a refit."""
    cut = prune_filters(task.model, task.example, plan)
    refit = repair(task.model, cut, task.data, samples=256, progress=False)
    found = {"macs": cut.after.macs / cut.before.macs, "parameters": cut.after.parameters / cut.before.parameters}
    found |= {"cut": task.judge(cut.model), "refit": task.judge(refit.model)}
    if by == "fsm":
        ready = shift_batch_norms(task.model, task.example, plan)
        found["own"] = task.judge(prune_filters(ready, task.example, plan).model)
    if by == "central_filter":
        found["own"], found["own macs"] = absorbed(task, plan)
    return found


def absorbed(task: tasks.Task, plan: Plan) -> tuple[dict[str, float], float]:
    """Central Filter proper: of every inner layer as many as the plan cuts, chosen and absorbed by its graph."""
    groups = prunable_filters(task.model, task.example).groups
    alone = [name for group in groups for name in group.layers if len(group.layers) == 1 and plan.filters.get(name)]
    alike = stream_maps(task.model, task.data, map_similarity, alone, combine="mean", samples=128, progress=False)
    plans = {name: central_filters(alike[name], len(plan.filters[name])) for name in alone}
    ready, own = absorb_filters(task.model, task.example, plans)
    both = replace(plan, filters={**plan.filters, **own.filters})
    cut = prune_filters(ready, task.example, both)
    return task.judge(cut.model), cut.after.macs / cut.before.macs


def budgeted(task: tasks.Task, scores: Mapping[str, Tensor], budget: str, ratio: float) -> Plan:
    """A plan by one of the budgets, to a share of the MACs."""
    x, y = task.data  # type: ignore[misc]

    @torch.no_grad()
    def loss(model: nn.Module) -> float:
        return float(torch.nn.functional.cross_entropy(model(x[:256]), y[:256]))

    if budget == "search":
        return search_widths(task.model, task.example, scores, loss, ratio, step=0.04, progress=False)
    if budget == "sensitivity":
        layers = list(scores)
        table = layer_sensitivity(
            task.model, layers, lambda m: -loss(m), example=task.example, strength=0.5, repeats=3, progress=False
        )
        sizes = [len(scores[name]) for name in layers]
        found = rates_from_sensitivity(table.mean(axis=1).tolist(), sizes, sum(sizes) // 2)
        rates = dict(zip(layers, torch.as_tensor(found.rates).tolist(), strict=True))
        return plan_filters(task.model, task.example, scores, ratio, budget=rates, of="macs")
    return plan_filters(task.model, task.example, scores, ratio, budget=budget, of="macs")  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", help="names, comma-separated")
    parser.add_argument("--parts", default="scores,budgets,tunes")
    args = parser.parse_args()
    available = [name for name in RATIOS if name in tasks.names()]
    kept = Kept(KEPT)
    for name in args.networks.split(",") if args.networks else available:
        run(name, kept, args.parts.split(","))
    page = tables(kept)
    print(page)
    if "demo" not in available:
        PAGE.write_text(page, encoding="utf-8")


def run(name: str, kept: Kept, parts: Sequence[str]) -> None:
    """One network, as far as it is not there yet."""
    task = tasks.task(name)
    known: dict[str, dict[str, Tensor]] = {}

    def scores(by: str) -> dict[str, Tensor]:
        if by not in known:
            known[by] = scores_of(task, by)
        return known[by]

    def plan(by: str, ratio: float, budget: str = "uniform") -> Plan:
        return budgeted(task, scores(by), budget, ratio)

    kept.get(
        f"{name} whole", lambda: {**task.judge(task.model), "macs": prunable_filters(task.model, task.example).macs}
    )
    everything = (
        (*OURS, *PEERS, *RANDOM) if name != "resnet56-jpeg" else (*CHOSEN, "tp magnitude", "tp taylor", *RANDOM)
    )
    if "scores" in parts:
        for ratio in RATIOS[name]:
            for by in everything:
                kept.get(f"{name} uniform {ratio} {by}", lambda by=by, ratio=ratio: measured(task, plan(by, ratio), by))
        if name != "resnet56-jpeg":
            kept.get(
                f"{name} agreement",
                lambda: score_agreement({by: scores(by) for by in (*OURS, "random 0")}).round(4).to_dict(),
            )
    if "budgets" in parts and name != "resnet56-jpeg":
        for ratio in RATIOS[name]:
            for budget in BUDGETS:
                key = f"{name} {budget} {ratio} {BUDGET_SCORE}"
                kept.get(key, lambda b=budget, r=ratio: measured(task, plan(BUDGET_SCORE, r, b), BUDGET_SCORE))
    if "tunes" in parts and name in TUNED:
        ratio = TUNED[name]
        for by in (*best(kept, name, ratio), *RANDOM):
            seed = int(by.split()[1]) if " " in by else 0
            kept.get(f"{name} tune {ratio} {by}", lambda by=by, seed=seed: tuned(task, plan(by, ratio), seed))


def best(kept: Kept, name: str, ratio: float) -> list[str]:
    """The two of our scores that leave most after the refit."""
    found = {by: kept.values.get(f"{name} uniform {ratio} {by}") for by in OURS}
    return sorted((by for by in found if found[by]), key=lambda by: -found[by]["refit"]["accuracy"])[:2]  # type: ignore[index]


def tuned(task: tasks.Task, plan: Plan, seed: int) -> dict[str, float]:
    """Accuracy after a cut, a refit and a short fine-tune."""
    cut = prune_filters(task.model, task.example, plan)
    refit = repair(task.model, cut, task.data, samples=256, progress=False)
    assert task.images is not None
    return task.judge(tasks.fine_tuned(refit.model, task.images, seed))


def tables(kept: Kept) -> str:
    """The page."""
    lines = [INTRO]
    for name in RATIOS:
        whole = kept.values.get(f"{name} whole")
        if whole is not None:
            lines += ["", *network(kept, name, whole)]
    return "\n".join(lines) + "\n"


def network(kept: Kept, name: str, whole: Mapping[str, float]) -> list[str]:
    """Tables of one network."""
    title = f"## {name}: accuracy, %; whole {100 * whole['accuracy']:.1f} at {whole['macs'] / 2e6:.1f} M MACs an image"
    ratios = RATIOS[name]
    columns = [(ratio, state) for ratio in ratios for state in ("cut", "own", "refit")]
    states = {"cut": "as cut", "own": "own compensation", "refit": "refit"}
    head = [f"-{100 * ratio:.0f} % {states[state]}" for ratio, state in columns]
    lines = [title, "", "### Every score, uniform budget", "", f"| score | {' | '.join(head)} |"]
    lines.append("|---|" + "---:|" * len(columns))
    for by in (*OURS, *PEERS, "random"):
        cells = [cell(kept, f"{name} uniform {ratio}", by, state) for ratio, state in columns]
        if any(cells):
            lines.append(f"| {by} | {' | '.join(cells)} |")
    columns = [(ratio, state) for ratio in ratios for state in ("cut", "refit")]
    rows = []
    for budget in BUDGETS:
        cells = [cell(kept, f"{name} {budget} {ratio}", BUDGET_SCORE, state) for ratio, state in columns]
        if any(cells) and name != "resnet56-jpeg":
            rows.append(f"| {budget} | {' | '.join(cells)} |")
    if rows:
        head = [f"-{100 * ratio:.0f} % {states[state]}" for ratio, state in columns]
        lines += ["", f"### Every budget, score {BUDGET_SCORE}", "", f"| budget | {' | '.join(head)} |"]
        lines += ["|---|" + "---:|" * len(columns), *rows]
    if name in TUNED:
        ratio, tunes = TUNED[name], []
        for by in (*best(kept, name, ratio), "random"):
            found = cell(kept, f"{name} tune {ratio}", by, "")
            tunes += [f"{by} {found}"] if found else []
        if tunes:
            lines += ["", f"After the refit and 100 steps of fine-tuning at -{100 * ratio:.0f} %: {', '.join(tunes)}."]
    if (agreement := kept.values.get(f"{name} agreement")) is not None:
        lines += ["", "### How the criteria agree", "", "Mean Spearman correlation over the layers of both.", ""]
        names = list(agreement)
        lines += [f"| | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
        lines += [f"| {a} | {' | '.join(_number(agreement[b].get(a)) for b in names)} |" for a in names]
    return lines


def cell(kept: Kept, prefix: str, by: str, state: str) -> str:
    """Accuracy in percent; of random the mean and standard deviation."""
    keys = [f"{prefix} {one}" for one in (RANDOM if by == "random" else (by,))]
    found = [kept.values[key] for key in keys if key in kept.values]
    values = [100 * (one[state] if state else one)["accuracy"] for one in found if not state or state in one]
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def _number(value: float | None) -> str:
    return "" if value is None or np.isnan(value) else f"{value:.2f}"


INTRO = """# Which filters to cut

Written by `python -m benchmarks.filters`, from the results that it keeps in `benchmarks/filters.json`.

Accuracy on 2,000 JPEG test images of CIFAR-10 of ResNets that were fine-tuned on such images, after cuts to a share of
the MACs (convolutions and linear layers, counted on the smaller network). All convolutions can be cut, the residual
stream too. Scores and the refit see 1,000 other test images, 256 of them unless said otherwise; no labels enter but in
Taylor and feature entropy (1,000 images).

- **as cut**: nothing but the cut. **own compensation**: Central Filter's columns absorbed and its own choice within the
  inner layers, FSM's shifted means. **refit**: the layers that read the cut filters fitted by least squares
  (`repair`). Every method's selection gets the same refit.
- **uniform**: every layer loses filters at one pace until the MACs are reached. `fsm` has scores for inner layers alone
  and leaves the stream whole: to the same MACs it cuts these further.
- **tp ...**: Torch-Pruning's own importances (GroupMagnitude p = 2, BNScale, GroupTaylor), which judge a group by all
  its layers, readers included, under the same budget; the zero-padded shortcuts, which it cuts wrongly, are
  held in slots for it.
- **random**: mean and standard deviation of three seeds.
- Budgets: `global` ranks filters over all layers by their rank within a layer, `global_mean` by score over the layer's
  mean; `sensitivity` takes rates from the loss under half of a layer's filters dropped, three times; `search` is the
  width search with the cross-entropy on 256 of the images as damage, in steps of 4 %.

One network, one data set, one seed of training: differences of a point in the refit columns are noise (the standard
error of an accuracy of 75 % on 2,000 images is one point).
"""


if __name__ == "__main__":
    main()
