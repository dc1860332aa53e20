"""Results of a long benchmark, kept on disk one by one, so that a run that was stopped goes on where it was."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Kept:
    """Results by key, on disk after each one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """The result, computed now if it is not there."""
        if key not in self.values:
            start = time.perf_counter()
            self.values[key] = compute()
            self.path.write_text(json.dumps(self.values, indent=0, sort_keys=True) + "\n")
            print(f"{key}: {time.perf_counter() - start:.0f} s", flush=True)
        return self.values[key]
