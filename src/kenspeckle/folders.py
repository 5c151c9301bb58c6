"""Folders, listed without opening a file.

Links to folders are not followed: through one ``loop -> ..`` a walk that does met one picture 41
times. Links to files count when their target lies under the same root.
"""

import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from kenspeckle.core import DataError, printable
from kenspeckle.names import hidden_notice, is_hidden, listed

__all__ = ["Tree", "scan"]


@dataclass(frozen=True)
class Tree:
    """What lies under a folder; names are relative to it, ``/`` between folders.

    Attributes:
        files: ordinary files, and links to such that stay under the folder.
        folders: not those that links lead to.
        hidden: how often each hidden name was met.
        links: that were not followed.
        special: pipes, sockets and devices.
    """

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    hidden: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)

    def notices(self) -> list[str]:
        """Return what was ignored, one line a kind."""
        notices = hidden_notice(self.hidden)
        if self.links:
            notices.append(
                f"did not follow {len(self.links):,} links that lead to folders, out of the data "
                f"or nowhere: {listed(sorted(self.links))}; a manifest can name files anywhere"
            )
        if self.special:
            found = listed(sorted(self.special))
            notices.append(f"ignored {len(self.special):,} pipes, sockets or devices: {found}")
        return notices

    def ignored(self) -> list[tuple[str, str]]:
        """Return the links and special files, each with the reason."""
        links = [
            (name, "a link that leads to a folder, out of the data or nowhere")
            for name in sorted(self.links)
        ]
        return links + [(name, "a pipe, socket or device") for name in sorted(self.special)]


def scan(root: Path) -> Tree:
    """List what lies under `root` without opening anything or following links to folders.

    Raises:
        DataError: a folder cannot be listed.
    """
    tree = Tree()
    inside = root.resolve()
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            with os.scandir(root / prefix) as entries:
                found = [(entry.name, _entry_kind(entry, inside)) for entry in entries]
        except OSError as error:
            place = printable(str(root / prefix))
            raise DataError(f"{place}: cannot be listed: {error.strerror or error}") from error
        for name, kind in found:
            if kind == "hidden":
                tree.hidden[name] += 1
                continue
            if kind == "folders":
                waiting.append(f"{prefix}{name}/")
            getattr(tree, kind).append(prefix + name)
    return tree


def _entry_kind(entry: os.DirEntry[str], root: Path) -> str:
    """Return the field of `Tree` that an entry belongs to."""
    if is_hidden(entry.name):
        return "hidden"
    if entry.is_symlink():
        return "files" if _links_inside(entry, root) else "links"
    if entry.is_dir(follow_symlinks=False):
        return "folders"
    return "files" if entry.is_file(follow_symlinks=False) else "special"


def _links_inside(entry: os.DirEntry[str], root: Path) -> bool:
    try:
        is_file = stat.S_ISREG(entry.stat().st_mode)
    except OSError:  # leads nowhere, or in a circle
        return False
    return is_file and Path(entry.path).resolve().is_relative_to(root)
