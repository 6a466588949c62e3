"""Python runs this file as it starts, wherever this directory is on PYTHONPATH: it notes what is refused.

It waits for `veneer.errors`, then for each `VeneerError` that is made. For the line that makes one, and for
the lines of Veneer that led there, an empty file is made at once below the directory that VENEER_REFUSALS
names: nothing is lost of a process that is killed, and no full disk stands in the way. `tests/refusals.py`
reads their names.
"""

from __future__ import annotations

import os
import sys

DIRECTORY = os.environ.get("VENEER_REFUSALS")


def watch(errors):
    """Let every error note where it is made."""
    source = os.path.dirname(os.path.dirname(os.path.abspath(errors.__file__))) + os.sep
    base = errors.VeneerError
    noted = set()

    def made(cls, *args, **kwargs):
        frame, kind = sys._getframe(1), "made"
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(source) and (kind, file, frame.f_lineno) not in noted:
                noted.add((kind, file, frame.f_lineno))
                note(file, f"{kind}-{frame.f_lineno}")
            frame, kind = frame.f_back, "led"
        return super(base, cls).__new__(cls, *args, **kwargs)

    made._torchdynamo_disable = True  # compiled code does not know frames
    base.__new__ = staticmethod(made)


def note(file, name):
    """Make an empty file in a directory that is called as a source is."""
    place = DIRECTORY + os.path.abspath(file)
    os.makedirs(place, exist_ok=True)
    os.close(os.open(os.path.join(place, name), os.O_WRONLY | os.O_CREAT))


class Watcher:
    """A finder that finds nothing itself, and watches what another one finds."""

    searching = False

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """What the other finders find."""
        if name != "veneer.errors" or cls.searching:
            return None
        cls.searching = True
        try:
            found = (finder.find_spec(name, path, target) for finder in sys.meta_path)
            spec = next(filter(None, found), None)
        finally:
            cls.searching = False
        if spec is not None:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (load(module), watch(module))
        return spec


if DIRECTORY:
    if "veneer.errors" in sys.modules:
        watch(sys.modules["veneer.errors"])
    else:
        sys.meta_path.insert(0, Watcher)
