"""A policy in a file: read, checked, and read again when it changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from factory.recipe import GateSection, load

POLL_S = 1.0


class PolicyFile:
    """A recipe's YAML of which the section `gate` counts, whole: what it leaves out is the default's."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"--policy must be a YAML file with a section `gate`, got {path}; check the path.")

    def read(self) -> GateSection:
        """Raises RecipeError (a ValueError) with every mistake at once."""
        self._seen = self._stamp()
        return load(self.path).gate

    def _stamp(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:  # between an editor's removal and its new file
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    async def follow(
        self, apply: Callable[[GateSection], None], echo: Callable[[str], None], poll_s: float = POLL_S
    ) -> None:
        """Applies every later version, in a thread; one that is wrong is told, and the one before it stays."""
        from factory.gateway.model import policy_digest

        while True:
            await asyncio.sleep(poll_s)
            stamp = self._stamp()
            if stamp is None or stamp == self._seen:
                continue
            try:
                section = self.read()
                await asyncio.to_thread(apply, section)
                echo(f"policy      {policy_digest(section)} from now on")
            except (ValueError, OSError) as error:
                self._seen = stamp
                echo(f"policy      unchanged: {error}")
