"""Veneer in the place of peft, for libraries that import peft themselves.

`register_as_peft()` does it for this process; `python -m veneer.as_peft script.py` for a script that is not
to be changed; `python -m veneer.as_peft install` lets the environment variable `VENEER_AS_PEFT=1` do it,
which also reaches child processes (`accelerate launch`, `torchrun`, spawned data loaders).
"""

from __future__ import annotations

import sys

from veneer_as_peft import install, main, register_as_peft, uninstall

__all__ = ["install", "register_as_peft", "uninstall"]

if __name__ == "__main__":
    sys.exit(main())
