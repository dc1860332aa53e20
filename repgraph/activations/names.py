"""layer_names: what capture would take, in execution order, with shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from html import escape

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from repgraph.activations.batches import model_device, model_dtype, to_device
from repgraph.activations.forward import first_tensor, kept_random_state, listen
from repgraph.activations.gates import GATES, Kinks, Watch, choose_with_gates, matches, watched
from repgraph.activations.layers import INPUTS, Select, call_key, unwrap
from repgraph.activations.recording import Recording, check_found, gate_spec
from repgraph.activations.spec import Spec


class LayerNames(list[str]):
    """Names of layers, shown with what they give."""

    def __init__(self, names: Sequence[str], kinds: Mapping[str, str], specs: Mapping[str, Spec], given: str) -> None:
        super().__init__(names)
        self.kinds = dict(kinds)
        """Layer name -> class of the module."""
        self.specs = dict(specs)
        """Layer name -> shape of one sample's output and dtype; empty if no input could be told."""
        self.given = given
        """The input for which shapes and order hold."""

    def _rows(self) -> list[tuple[str, str, str]]:
        return [
            (
                name,
                self.kinds[name],
                self.specs[name].text if name in self.specs else "?",
            )
            for name in self
        ]

    def __repr__(self) -> str:
        wide = max((len(name) for name in self), default=0)
        kind = max((len(name) for name in self.kinds.values()), default=0)
        rows = [f"  {name:{wide}}  {what:{kind}}  {shape}" for name, what, shape in self._rows()]
        return "\n".join([f"{len(self)} layers, {self.given}", *rows])

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self._rows())
        head = f"<caption>{len(self)} layers, {escape(self.given)}</caption>"
        return f"<table>{head}<tr><th>layer</th><th>class</th><th>output of a sample</th></tr>{rows}</table>"


@kept_random_state()
def layer_names(model: nn.Module, select: Select = "blocks", data: object = None) -> LayerNames:
    """Names of the layers that `capture` would take, in execution order, shown with their output shapes.

    Without data the order and the shapes are those for an assumed input, which the result's `given` names: the model's
    own `default_cfg` (timm) or `dummy_inputs` (Hugging Face), else the first layer's number of channels at 224, 64, 32
    or 28 pixels, its features, or eight token ids. A copy of the model runs on fake tensors,
    which compute nothing. Where no assumed input fits, the names stand in order of registration, without shapes.

    Parameters
    ----------
    model
        Any nn.Module.
    select
        As `layers` in `capture`.
    data
        As in `capture`; its first batch is run through the model.

    Returns
    -------
    LayerNames
        A list of str that prints as a table.

    Raises
    ------
    ValueError
        As `capture`.

    Examples
    --------
    >>> layer_names(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3)))
    2 layers, for an assumed input of 3 x 224 x 224
      0  Conv2d  4 x 222 x 222
      2  Conv2d  8 x 220 x 220
    """
    model = unwrap(model)
    modules, _, patterns = choose_with_gates(model, select)
    if data is not None:
        found = Recording(model, data, select, None, None, None, 2, 2, progress=False)
        names, specs, given = list(found.specs), found.specs, "for the given data"
    else:
        names, specs, given = list(modules), {}, "in order of registration"
        lazy = any(nn.parameter.is_lazy(p) for p in model.parameters())
        for example in () if lazy else _assumed_inputs(model):
            found_by_example = _fake_shapes(model, modules, example, patterns)
            if found_by_example is not None:
                with_shapes, all_gates = found_by_example
                check_found(patterns, all_gates)
                names, specs = list(with_shapes), with_shapes
                given = f"for an assumed input of {_text(example)}"
                break
        else:
            if patterns:
                raise ValueError("gates are known once the model runs, and no assumed input fits: pass data=")
    kinds = {
        name: "gates"
        if name in specs and specs[name].gates is not None
        else type(modules[name.split("#")[0]] if name.split("#")[0] in modules else modules[name]).__name__
        for name in names
    }
    return LayerNames(names, kinds, specs, given)


def _assumed_inputs(model: nn.Module) -> Iterator[object]:
    size = (getattr(model, "default_cfg", None) or {}).get("input_size")
    if size:
        yield torch.zeros(2, *size)
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping):
        yield dict(dummy)
    for m in model.modules():
        if isinstance(m, nn.modules.conv._ConvNd):
            axes = len(m.kernel_size)
            for side in (224, 64, 32, 28) if axes == 2 else (32, 128):
                yield torch.zeros(2, m.in_channels, *[side] * axes)
            return
        if isinstance(m, nn.Linear):
            yield torch.zeros(2, m.in_features)
            yield torch.zeros(2, 8, m.in_features)
            return
        if isinstance(m, nn.Embedding):
            yield torch.zeros(2, 8, dtype=torch.int64)
            return


def _fake_shapes(
    model: nn.Module, names: Iterable[str], example: object, patterns: Sequence[str]
) -> tuple[dict[str, Spec], list[str]] | None:
    """What the layers give for an example input, and all gates, from a copy of the model on fake tensors.

    None if it does not run, or no layer does.
    """
    all_gates: list[str] = []
    specs: dict[str, Spec] = {}
    calls: Counter[str] = Counter()

    def hook(name: str, _: nn.Module, value: object) -> None:
        key = call_key(name, calls)
        x = first_tensor(value, key)
        specs[key] = Spec(tuple(x.shape[1:]), x.dtype)

    def see(key: str, z: Tensor, kinks: Kinks) -> None:
        for name in kinks.keys(GATES + key):
            all_gates.append(name)
            if matches(name, patterns):
                specs[name] = gate_spec(z)

    try:
        example = to_device(example, model_device(model), model_dtype(model))
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with FakeCopyMode(fake):
            copied = deepcopy(model).eval()
        for name in names:
            listen(name, copied.get_submodule(name.removeprefix(INPUTS)), hook)
        with fake, torch.no_grad(), watched(copied, see, Watch) if patterns else nullcontext():
            copied(**example) if isinstance(example, Mapping) else copied(example)
    except Exception:  # any model may refuse any guess, for any reason
        return None
    return (specs, all_gates) if specs or patterns else None


def _text(example: object) -> str:
    if isinstance(example, Mapping):
        return "dummy_inputs"
    assert isinstance(example, Tensor)
    return " x ".join(map(str, example.shape[1:])) + ("" if example.is_floating_point() else " token ids")
