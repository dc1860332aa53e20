"""Models and data as the command line names them."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_INPUTS = ("x", "inputs", "input", "images", "data", "x_test", "features")
_LABELS = ("y", "labels", "label", "targets", "target", "y_test")


def load_model(spec: str, weights: str | None = None, arguments: Iterable[str] = ()) -> nn.Module:
    """The model that a callable makes, in eval mode.

    Parameters
    ----------
    spec
        "package.module:callable" or "file.py:callable".
    weights
        A safetensors file, or a state dict that torch saved; the latter is read with weights_only.
    arguments
        "name=value" each, passed to the callable; values are Python literals, else text.

    Raises
    ------
    ValueError
        If any part cannot be found, read or used; the message says which.
    """
    keywords: dict[str, object] = {}
    for item in arguments:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--arg must be NAME=VALUE, got {item!r}")
        try:
            keywords[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            keywords[name] = value
    model = _call(spec, "MODEL", keywords)
    if not isinstance(model, nn.Module):
        raise ValueError(f"MODEL {spec} must give a torch.nn.Module, got {type(model).__name__}")
    if weights is not None:
        try:
            model.load_state_dict(_load_weights(Path(weights)))
        except RuntimeError as error:
            raise ValueError(f"--weights {weights} do not fit {spec}: {_line(error)}") from error
    return model.eval()


def load_data(
    spec: str, *, size: int | None = None, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> object:
    """Data for `repgraph.capture`: from an .npz file, a folder of image folders, or a callable.

    Parameters
    ----------
    spec
        "file.npz", a folder with one folder of images per class, or "package.module:callable".
    size
        Resize the images' shorter side to this and crop the centre square (image folders).
    mean, std
        Normalisation per channel, after 8-bit images have become numbers in [0, 1].

    Raises
    ------
    ValueError
        If the data cannot be found or read; the message says what was expected.
    """
    path = Path(spec)
    if path.suffix == ".npz":
        return _load_npz(path, mean, std)
    if path.is_dir():
        return ImageFolder(path, size=size, mean=mean, std=std)
    if ":" not in spec:
        raise ValueError(f"DATA {spec}: no such .npz file or folder, and not of the form package.module:callable")
    return _call(spec, "DATA", {})


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """Images of a folder with one folder per class, in a fixed random order, as (3, h, w) in [0, 1] or normalised.

    Parameters
    ----------
    folder
        Its folders are the classes, in alphabetical order.
    size
        Resize the shorter side to this and crop the centre square; without it all images must have one size.
    mean, std
        Normalisation per channel.
    seed
        Seed of the order.

    Raises
    ------
    ValueError
        If there are no images.
    """

    def __init__(
        self,
        folder: Path,
        *,
        size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        seed: int = 0,
    ) -> None:
        self.classes = sorted(item.name for item in folder.iterdir() if item.is_dir())
        found = [
            (file, number)
            for number, name in enumerate(self.classes)
            for file in sorted((folder / name).rglob("*"))
            if file.suffix.lower() in _IMAGES
        ]
        if not found:
            raise ValueError(f"DATA {folder}: no images; expected one folder of images per class")
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
        self.items = [found[i] for i in order.tolist()]
        self.size, self.mean, self.std = size, mean, std
        self._shape: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.items[index]
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
                if self.size is not None:
                    scale = self.size / min(image.size)
                    wide, high = (max(self.size, round(side * scale)) for side in image.size)
                    left, top = (wide - self.size) // 2, (high - self.size) // 2
                    image = image.resize((wide, high), Image.Resampling.BILINEAR)
                    image = image.crop((left, top, left + self.size, top + self.size))
                pixels = torch.from_numpy(np.array(image))
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"DATA: cannot read image {file}: {_line(error)}") from error
        self._shape = self._shape or tuple(pixels.shape)
        if tuple(pixels.shape) != self._shape:
            raise ValueError(
                f"DATA: image {file} is {pixels.shape[1]} x {pixels.shape[0]}, others are {self._shape[1]} x "
                f"{self._shape[0]}: pass --size to bring all to one size"
            )
        return _as_images(pixels[None], self.mean, self.std)[0], label


def _call(spec: str, role: str, keywords: dict[str, object]) -> object:
    """What "package.module:callable" or "file.py:callable" gives when it is called."""
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(f"{role} must be package.module:callable or file.py:callable, got {spec!r}")
    try:
        if place.endswith(".py"):
            path = Path(place)
            if not path.is_file():
                raise ValueError(f"{role} {spec}: no such file {place}")
            found = importlib.util.spec_from_file_location(path.stem, path)
            assert found is not None
            assert found.loader is not None
            module = importlib.util.module_from_spec(found)
            sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
            found.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except ImportError as error:
        raise ValueError(f"{role} {spec}: cannot import {place}: {_line(error)}") from error
    made: Callable[..., object] | None = getattr(module, name, None)
    if made is None or not callable(made):
        near = difflib.get_close_matches(name, [item for item in vars(module) if not item.startswith("_")], 5)
        hint = f"; it has {', '.join(near)}" if near else ""
        raise ValueError(f"{role} {spec}: {place} has no callable {name!r}{hint}")
    try:
        return made(**keywords)
    except TypeError as error:
        raise ValueError(f"{role} {spec}: {_line(error)} (pass arguments with --arg name=value)") from error


def _load_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"--weights {path}: no such file")
    try:
        state: object
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many kinds for a damaged file
        raise ValueError(f"--weights {path} cannot be read: {_line(error)}") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"--weights {path} must hold a state dict of tensors")
    return {str(name).removeprefix("module.").removeprefix("_orig_mod."): value for name, value in state.items()}


def _load_npz(path: Path, mean: Sequence[float] | None, std: Sequence[float] | None) -> tuple[Tensor, ...]:
    if not path.is_file():
        raise ValueError(f"DATA {path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError) as error:
        raise ValueError(f"DATA {path} cannot be read: {_line(error)}") from error
    inputs = next((arrays[name] for name in _INPUTS if name in arrays), None)
    if inputs is None:
        inputs = next((array for array in arrays.values() if array.ndim > 1 and array.dtype.kind in "biuf"), None)
    if inputs is None:
        raise ValueError(f"DATA {path}: no array of inputs among {', '.join(arrays)}; name it x")
    labels = next((arrays[name] for name in _LABELS if name in arrays), None)
    x = torch.from_numpy(inputs)
    x = _as_images(x, mean, std) if x.ndim == 4 else x
    return (x,) if labels is None else (x, torch.from_numpy(labels) if labels.dtype.kind in "biuf" else labels)


def _as_images(x: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """Channels first; 8 bits to [0, 1]; normalised."""
    if x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.permute(0, 3, 1, 2).contiguous()
    if x.dtype == torch.uint8:
        x = x.float() / 255
    for name, values in (("--mean", mean), ("--std", std)):
        if values is not None and len(values) not in (1, x.shape[1]):
            raise ValueError(f"{name} must have one number per channel, expected {x.shape[1]}, got {len(values)}")
    if mean is not None:
        x = x - torch.tensor(mean).view(1, -1, 1, 1)
    return x if std is None else x / torch.tensor(std).view(1, -1, 1, 1)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
