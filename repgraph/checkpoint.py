"""Finished rows of a table in a folder, so that a run that was killed goes on where it was."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from repgraph.activations.hashes import digest_of
from repgraph.messages import tell

_RUN, _ROW = "run.json", ".row.json"

Row = dict[str, float | bool]


class Checkpoint:
    """One small file for each finished layer, and one that says of which run they are.

    A file is written beside its place and moved there in one step, so that it is whole or absent; a checksum tells
    where it was changed afterwards.

    Parameters
    ----------
    folder
        New, empty, or of an earlier call for the same run.
    run
        What decides the rows, as plain JSON data.

    Raises
    ------
    ValueError
        If the folder is of another run, holds other files, or cannot be written.

    Warns
    -----
    UserWarning
        If a file is damaged: its layer is computed again.
    """

    def __init__(self, folder: str | Path, run: Mapping[str, object]) -> None:
        self.folder = Path(folder)
        run = json.loads(json.dumps(run))
        self.run = digest_of(json.dumps(run, sort_keys=True).encode())
        self.rows: dict[str, tuple[str, Row]] = {}  # layer -> what its row was made from, and the row
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            there = sorted(path for path in self.folder.iterdir() if path.suffix != ".part")
            foreign = [path.name for path in there if path.name != _RUN and not path.name.endswith(_ROW)]
            if foreign or (there and self.folder / _RUN not in there):
                raise ValueError(
                    f"folder {self.folder} must be new, empty or of an earlier call, got one with "
                    f"{(foreign or [there[0].name])[0]!r}"
                )
            before = _read(self.folder / _RUN) if there else None
            if before is not None and before != run:
                other = [key for key in {**run, **before} if run.get(key) != before.get(key)]
                differ = "; ".join(f"{key} was {before.get(key)!r}, is {run.get(key)!r}" for key in other)
                raise ValueError(f"folder {self.folder} is of another run ({differ}): give another folder")
            if before is None:
                _write(self.folder / _RUN, run)
        except OSError as error:
            raise ValueError(f"folder {self.folder} cannot be used: {error}") from error
        for path in there:
            if path.name != _RUN and (found := _read(path)) is not None and found["run"] == self.run:
                self.rows[found["layer"]] = found["key"], found["row"]

    def put(self, layer: str, key: str, row: Row) -> None:
        """Keep a row and what it was made from; where the disk refuses it, say so and go on."""
        if layer in self.rows and self.rows[layer][0] == key:
            return
        name = f"{re.sub(r'[^A-Za-z0-9._-]', '_', layer)[:80]}-{digest_of(layer.encode())[:8]}{_ROW}"
        try:
            _write(self.folder / name, {"run": self.run, "layer": layer, "key": key, "row": row})
        except OSError as error:
            tell(
                f"layer {layer!r} is finished but could not be kept in {self.folder / name}: {error}; what was kept "
                "before is whole, and this run goes on without"
            )


def _write(path: Path, content: object) -> None:
    """In one step, and on the disk before it counts as there."""
    body = json.dumps(content)
    draft = path.with_suffix(".part")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(f'{{"checksum": "{digest_of(body.encode())}", "content": {body}}}')
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def _read(path: Path) -> dict | None:  # type: ignore[type-arg]
    """What was written, or None with a warning where it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        content = found["content"]
        if digest_of(json.dumps(content).encode()) != found["checksum"]:
            raise ValueError("its checksum does not fit")
    except (ValueError, KeyError, TypeError) as error:
        tell(f"{path} is damaged ({error}): what it held is computed again")
        return None
    return content  # type: ignore[no-any-return]
