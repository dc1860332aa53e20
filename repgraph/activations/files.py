"""Layers in files of their own: written batch by batch under another name until all is there, checked when read."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from repgraph.activations.spec import Spec, readable

if sys.platform != "win32":
    import fcntl

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_INDEX = "activations.json"
_UNFINISHED = re.compile(rf"(\d{{3,}}-.*\.safetensors|{re.escape(_INDEX)})\.part")
_CHUNK = 2**22  # bytes read at once for a checksum


class Files(Mapping[str, Tensor]):
    """Layers in files, mapped into memory when they are read.

    Before its first reading the file of a layer that has a checksum (CRC-32) is read once and compared with it.
    """

    def __init__(
        self, files: Mapping[str, Path], specs: Mapping[str, Spec], n: int, checksums: Mapping[str, int]
    ) -> None:
        self.files, self.specs, self.n, self.in_files = files, specs, n, True
        self.unchecked = dict(checksums)

    def __getitem__(self, name: str) -> Tensor:
        path, expected = self.files[name], (self.n, *self.specs[name].shape)
        try:
            self._check(name)
            with safe_open(str(path), "pt") as file:
                x: Tensor = file.get_tensor("activations")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"layer {name!r}: cannot read {path}: {error}") from error
        if tuple(x.shape) != expected or x.dtype != self.specs[name].dtype:
            raise ValueError(
                f"layer {name!r}: {path} holds {tuple(x.shape)} of {x.dtype}, "
                f"expected {expected} of {self.specs[name].dtype}"
            )
        return x

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def _check(self, name: str) -> None:
        if name not in self.unchecked:
            return
        found, chunk = 0, bytearray(_CHUNK)  # not through the map, which would count as memory of the process
        with self.files[name].open("rb", buffering=0) as file:
            while size := file.readinto(chunk):
                found = zlib.crc32(memoryview(chunk)[:size], found)
        if found != self.unchecked[name]:
            raise ValueError(
                f"layer {name!r}: {self.files[name]} is damaged: its checksum is {found:08x}, expected "
                f"{self.unchecked[name]:08x}, so it was cut short or changed after it was written; the other layers "
                "can still be read, this one must be captured again"
            )
        del self.unchecked[name]


def read_index(folder: Path) -> dict[str, Any]:
    """What the index of a folder says, as `Writer.finish` wrote it.

    Raises
    ------
    OSError
        If there is none.
    ValueError, KeyError, TypeError
        If it is damaged.
    """
    index: dict[str, Any] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    expected = index.pop("crc32", None)
    earlier = expected is None and all("crc32" not in item for item in index["layers"])  # versions without checksums
    if not earlier and expected != zlib.crc32(json.dumps(index).encode()):
        raise ValueError(f"{_INDEX} was changed after it was written")
    return index


class Writer:
    """Writes layers batch by batch into safetensors files of known size, then an index; or nothing is left.

    Files end in ".part" until all of them are written. A process that was killed leaves such files and no others; the
    next capture into the folder replaces them.
    """

    def __init__(self, folder: str | Path, specs: Mapping[str, Spec], n: int) -> None:
        self.folder, self.specs, self.n = Path(folder), specs, n
        for name, spec in specs.items():
            if spec.dtype not in CODES:
                raise ValueError(f"layer {name!r} is of type {spec.dtype}, which cannot be written to a file")
        self.folder.mkdir(parents=True, exist_ok=True)
        _clear(self.folder)
        need, free = n * sum(spec.nbytes for spec in specs.values()), shutil.disk_usage(self.folder).free
        if need > free:
            raise ValueError(f"folder {self.folder} needs {readable(need)}, its disk has {readable(free)} free")
        self._names = {
            name: f"{number:03d}-{re.sub(r'[^A-Za-z0-9._-]', '_', name)[:80]}.safetensors"
            for number, name in enumerate(specs)
        }
        self._open: dict[str, BinaryIO] = {}
        """What is being written, by the name that the file gets in the end."""
        self._checksums: dict[str, int] = {}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name, file in self._open.items():
            file.close()
            if kind is not None:
                for left in (f"{name}.part", name):
                    (self.folder / left).unlink(missing_ok=True)

    def append(self, name: str, x: Tensor) -> None:
        """Write the next rows of a layer.

        Raises
        ------
        OSError
            If the disk is full or fails; the message names layer and file.
        """
        file = self._names[name]
        if file not in self._open:
            spec = self.specs[name]
            entry = {
                "dtype": CODES[spec.dtype],
                "shape": [self.n, *spec.shape],
                "data_offsets": [0, self.n * spec.nbytes],
            }
            header = json.dumps({"activations": entry}).encode()
            header += b" " * (-len(header) % 8)
            self._write(file, len(header).to_bytes(8, "little") + header, f"layer {name!r}: ")
        data = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        self._write(file, data.data, f"layer {name!r}: ")

    def finish(
        self,
        labels: Tensor | np.ndarray | None,
        sample_ids: np.ndarray,
        input_hashes: Tensor | None,
        settings: Mapping[str, object],
    ) -> None:
        """Write the index, then give all files their names, that of the index last."""
        index = {
            "n": self.n,
            "layers": [
                {
                    "name": name,
                    "file": self._names[name],
                    "shape": spec.shape,
                    "dtype": CODES[spec.dtype],
                    "gates": spec.gates,
                    "crc32": self._checksums[self._names[name]],
                }
                for name, spec in self.specs.items()
            ],
            "labels": None
            if labels is None
            else {
                "dtype": CODES[labels.dtype] if isinstance(labels, Tensor) else "str",
                "values": labels.tolist(),
            },
            "sample_ids": sample_ids.tolist(),
            "input_hashes": None if input_hashes is None else input_hashes.tolist(),
            "settings": dict(settings),
        }
        index["crc32"] = zlib.crc32(json.dumps(index).encode())
        self._write(_INDEX, json.dumps(index).encode(), "")
        for name, file in self._open.items():
            file.close()
            os.replace(self.folder / f"{name}.part", self.folder / name)

    def _write(self, name: str, data: bytes | memoryview, whose: str) -> None:
        draft = self.folder / f"{name}.part"
        try:
            if name not in self._open:
                self._open[name] = draft.open("xb", buffering=0)
                _lock(self._open[name])
            rest = memoryview(data)
            while rest:
                rest = rest[self._open[name].write(rest) :]
        except FileExistsError as error:
            raise _in_use(self.folder) from error
        except OSError as error:
            raise OSError(
                error.errno,
                f"{whose}cannot write {draft} ({error.strerror}); what was written of this capture is removed, "
                "everything else is as it was: free space or choose another folder, and capture again",
            ) from error
        self._checksums[name] = zlib.crc32(data, self._checksums.get(name, 0))


def _clear(folder: Path) -> None:
    """Remove what a killed process left of a capture; refuse a folder with any other file, or a process still at it."""
    found = list(folder.iterdir())
    if not all(_UNFINISHED.fullmatch(path.name) and path.is_file() and not path.is_symlink() for path in found):
        raise ValueError(f"folder {folder} must be empty or new, got one with files in it")
    for path in found:
        with path.open("rb") as file:
            if not _lock(file):
                raise _in_use(folder)
    for path in found:
        path.unlink()


def _in_use(folder: Path) -> ValueError:
    return ValueError(f"folder {folder} is being written by another capture: choose a folder for each")


def _lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed, be it because its process dies; False where another one has done so."""
    if sys.platform == "win32":
        return True  # a file that is open cannot be removed there
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
