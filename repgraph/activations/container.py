"""Activations: what the layers gave for the same samples, wherever it is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from repgraph.activations.files import CODES, Files, Writer, read_index
from repgraph.activations.spec import Spec, readable
from repgraph.labels import Labels, as_labels


class Activations(Mapping[str, Tensor]):
    """Outputs of the layers of a model for the same n samples: a read-only mapping, layer name -> tensor (n, ...).

    The layers stand in execution order. They live in memory, in a folder, or are made when they are read, in several
    passes over the data; a reader takes one layer at a time and does not notice. Treat the tensors as read-only.

    Parameters
    ----------
    layers
        Layer name -> tensor (n, ...), at least one, all with the same n.
    labels
        One per sample, or None.
    sample_ids
        What identifies the samples; their positions by default.

    Attributes
    ----------
    n : int
        Number of samples.
    labels : Tensor or ndarray of str or None
        One entry per sample.
    sample_ids : ndarray
        One entry per sample; two captures over the same samples have the same.
    input_hashes : Tensor or None
        One 64-bit content hash of the model's input per sample; None where `sample_ids` were given explicitly.
    specs : dict
        Layer name -> `Spec` (shape of one sample's entry, dtype), without reading the layer.
    settings : dict
        What made the activations: model class, selection, reduction.

    Raises
    ------
    ValueError
        If there are no layers, or layers, labels or ids differ in length.

    Examples
    --------
    >>> acts = Activations({"stem": torch.zeros(4, 8), "head": torch.ones(4, 2)}, labels=[0, 0, 1, 1])
    >>> acts
    Activations(n=4, layers=2, 160 B in memory)
      stem  8  float32
      head  2  float32
    >>> acts["head"].shape
    torch.Size([4, 2])
    """

    def __init__(
        self,
        layers: Mapping[str, Tensor],
        labels: Labels | None = None,
        sample_ids: Sequence[object] | np.ndarray | Tensor | None = None,
        *,
        specs: Mapping[str, Spec] | None = None,
        input_hashes: Tensor | None = None,
        settings: Mapping[str, object] | None = None,
        place: str = "in memory",
        n: int | None = None,
    ) -> None:
        if not layers:
            raise ValueError("layers is empty: give at least one layer")
        self._layers = layers
        if specs is None:
            specs = {name: Spec(tuple(x.shape[1:]), x.dtype) for name, x in layers.items()}
            lengths = {name: len(x) for name, x in layers.items()}
            n = next(iter(lengths.values()))
            odd = next((name for name in lengths if lengths[name] != n), None)
            if odd is not None:
                raise ValueError(
                    f"layers must have the same number of samples: {next(iter(layers))!r} has shape "
                    f"{tuple(next(iter(layers.values())).shape)}, {odd!r} has {tuple(layers[odd].shape)}"
                )
        assert n is not None
        self.n = n
        self.specs = dict(specs)
        self.labels = None if labels is None else as_labels(labels)
        ids = np.arange(n) if sample_ids is None else np.asarray(sample_ids)
        self.sample_ids = ids if ids.dtype.kind in "iu" else ids.astype(str)
        self.input_hashes = input_hashes
        self.settings = dict(settings or {})
        self._place = place
        for name, values in (("labels", self.labels), ("sample_ids", self.sample_ids)):
            if values is not None and len(values) != n:
                raise ValueError(f"{name} must have one entry per sample: expected {n}, got {len(values)}")
        if len(np.unique(self.sample_ids)) != n:
            raise ValueError("sample_ids must be distinct, got some twice")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.specs:
            raise KeyError(f"no layer {name!r}; the layers are {', '.join(self.specs)}")
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def __contains__(self, name: object) -> bool:
        return name in self.specs  # Mapping would read the layer

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    @property
    def nbytes(self) -> int:
        """Bytes of all layers together, wherever they are."""
        return self.n * sum(spec.nbytes for spec in self.specs.values())

    @property
    def in_files(self) -> bool:
        """Whether all layers are in files, which other processes can read for themselves."""
        return getattr(self._layers, "in_files", False)

    def subset(
        self,
        samples: Sequence[int] | np.ndarray | Tensor | slice | None = None,
        layers: Sequence[str] | None = None,
    ) -> Activations:
        """The same activations for some samples (positions, a bool mask or a slice) and some layers; still unread.

        Raises
        ------
        ValueError
            If a layer or position does not exist, or nothing is left.
        """
        names = list(self.specs) if layers is None else list(layers)
        missing = [name for name in names if name not in self.specs]
        if missing:
            raise ValueError(f"layers: no layer {missing[0]!r}; the layers are {', '.join(self.specs)}")
        if samples is None:
            samples = slice(None)
        positions = np.arange(self.n)
        try:
            taken = np.array(positions[samples if isinstance(samples, slice) else np.asarray(samples)])
        except IndexError as error:
            raise ValueError(f"samples must select from {self.n} samples: {error}") from error
        if taken.size == 0:
            raise ValueError("samples selects no sample")
        if taken.ndim != 1:
            raise ValueError(f"samples must be positions, a mask or a slice of {self.n} samples, got {samples!r}")
        rows = torch.from_numpy(taken)
        forward = isinstance(samples, slice) and (samples.step or 1) > 0  # torch has no slices that run backward
        labels = self.labels
        if labels is not None:
            labels = labels[rows] if isinstance(labels, Tensor) else labels[taken]
        return Activations(
            _Rows(self, samples if isinstance(samples, slice) and forward else rows, names),
            labels,
            self.sample_ids[taken],
            specs={name: self.specs[name] for name in names},
            input_hashes=None if self.input_hashes is None else self.input_hashes[rows],
            settings=self.settings,
            place=self._place,
            n=len(taken),
        )

    def save(self, folder: str | Path) -> None:
        """Write one safetensors file per layer and an index into a new or empty folder.

        The files get their names when all are written. What a killed process left there unfinished is replaced.

        Raises
        ------
        ValueError
            If the folder has other files in it or another process writes to it, or the disk has no room.
        OSError
            If writing fails; the message names layer and file, and nothing of these activations is left there.
        """
        with Writer(folder, self.specs, self.n) as writer:
            for name in self:
                writer.append(name, self[name])
            writer.finish(self.labels, self.sample_ids, self.input_hashes, self.settings)

    @classmethod
    def load(cls, folder: str | Path, *, verify: bool = True) -> Activations:
        """Activations that `save` or `capture(folder=...)` wrote; a layer is mapped into memory when it is read.

        Parameters
        ----------
        folder
            Where they are.
        verify
            Compare each layer's file with its checksum before it is first read, which takes one pass over its bytes;
            False where a few samples of large files are wanted. Folders of earlier versions have no checksums.

        Raises
        ------
        ValueError
            If the folder holds none, or, when a layer is read, if its file is missing or damaged. The message names
            layer and file; the other layers can be read all the same.
        """
        path = Path(folder)
        dtypes = {code: dtype for dtype, code in CODES.items()}
        try:
            index = read_index(path)
            n, labels, hashes, ids = (index[key] for key in ("n", "labels", "input_hashes", "sample_ids"))
            specs = {
                item["name"]: Spec(tuple(item["shape"]), dtypes[item["dtype"]], item.get("gates"))
                for item in index["layers"]
            }
            files = {item["name"]: path / item["file"] for item in index["layers"]}
            checksums = {item["name"]: item["crc32"] for item in index["layers"] if verify and "crc32" in item}
            if labels is not None:
                values, kind = labels["values"], labels["dtype"]
                labels = np.array(values) if kind == "str" else torch.tensor(values, dtype=dtypes[kind], device="cpu")
            return cls(
                Files(files, specs, n, checksums),
                labels,
                np.array(ids),
                specs=specs,
                input_hashes=None if hashes is None else torch.tensor(hashes, dtype=torch.int64, device="cpu"),
                settings=index["settings"],
                place=f"in {path}",
                n=n,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} holds no complete activations: {type(error).__name__}: {error}") from error

    def __repr__(self) -> str:
        head = f"Activations(n={self.n}, layers={len(self)}, {readable(self.nbytes)} {self._place})"
        wide = max(map(len, self.specs))
        rows = [f"  {name:{wide}}  {spec.text}  {_dtype(spec)}" for name, spec in self.specs.items()]
        if len(rows) > 40:
            rows[20:-20] = [f"  ... {len(rows) - 40} more ..."]
        return "\n".join([head, *rows])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{spec.text}</td><td>{_dtype(spec)}</td>"
            f"<td>{readable(spec.nbytes * self.n)}</td></tr>"
            for name, spec in self.specs.items()
        )
        head = f"Activations of {self.n} samples, {readable(self.nbytes)} {escape(self._place)}"
        return (
            f"<table><caption>{head}</caption><tr><th>layer</th><th>shape of a sample</th><th>dtype</th>"
            f"<th>size</th></tr>{rows}</table>"
        )


class _Rows(Mapping[str, Tensor]):
    """Some rows of some layers, cut when a layer is read."""

    def __init__(self, parent: Activations, rows: Tensor | slice, names: list[str]) -> None:
        self.parent, self.rows, self.names, self.in_files = parent, rows, names, parent.in_files

    def __getitem__(self, name: str) -> Tensor:
        return self.parent[name][self.rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _dtype(spec: Spec) -> str:
    return str(spec.dtype).removeprefix("torch.")
