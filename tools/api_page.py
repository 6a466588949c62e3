"""Write docs/api.md from the code itself; with ``--check`` only say whether it is current."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import combinations
import made_page
from made_page import ROOT

PAGE = ROOT / "docs" / "api.md"
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TQDM_DISABLE", "1")

HEAD = """\
<!-- Made by `python tools/api_page.py` from the code itself; edits here are lost. -->

# API

The names are those of PEFT {version}.

## Options of `LoraConfig`

An option marked "refused" may be in a configuration with its default value; any other value raises an error
that says what is not supported. Nothing is silently ignored.

| option | default | |
|---|---|---|
{options}

## Combinations

The registries contain {product} combinations of a layer, an initialisation, a variant and a storage of the
base. In {total} of them the layer exists in that storage. {served} of these are supported, and all others
are refused before anything changes. `make test-all` tries each of the {total}, by
[the laws](extending.md#checking-the-laws).

There is one table per variant; a line covers each of its layers in each of its storages. "merge" means
merging into the storage itself, by `merge_adapter`, quantised again where necessary. A number refers to the
reason below, where "…" stands for the name of the layer or the storage.

{combinations}

{reasons}

The libraries of these storages do not have this layer, or cannot compute with it:

{absent}

## Names of PEFT

{works} of PEFT's public names work in Veneer:

{names}

{refused} belong to methods or options that Veneer does not have. With `veneer.as_peft` they can be imported,
for code that only checks for them, and raise an error when used. `from veneer import …` raises an error
at once:

{others}
"""

#: A real value of options that are off by default, to ask whether they are supported.
ASKED: dict[str, dict[str, Any]] = {
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "arrow_config": {"arrow_config": {}},
    "ensure_weight_tying": {"ensure_weight_tying": True},
    "kasa_config": {"kasa_config": {}},
    "layer_replication": {"layer_replication": [(0, 1)]},
    "megatron_config": {"megatron_config": {"a": 1}},
    "monteclora_config": {"monteclora_config": {}},
    "target_parameters": {"target_parameters": ["a.weight"]},
    "trainable_token_indices": {"trainable_token_indices": [1]},
    "use_bdlora": {"use_bdlora": {}},
    "use_dora": {"use_dora": True},
    "use_qalora": {"use_qalora": True},
    "velora_config": {"velora_config": {}},
}
#: Options that are accepted, and what else is to be said of them.
ACCEPTED = {
    "megatron_core": "accepted; used by `megatron_config` only",
    "qalora_group_size": "accepted; used by `use_qalora` only",
    "runtime_config": "accepted, without effect",
}


def page() -> str:
    """The whole page."""
    import peft

    from veneer.integrations.as_peft.layout import LAYOUT, OTHER_METHODS

    public = sorted(name for name in peft.__all__ if isinstance(name, str))
    refused = [name for name in public if name in OTHER_METHODS]
    works = [name for name in public if name in LAYOUT["peft"]]
    if unsaid := sorted(set(public) - set(refused) - set(works)):
        raise SystemExit(f"neither here nor refused by name: {', '.join(unsaid)}")
    for name in works:
        getattr(importlib.import_module("veneer.integrations.as_peft.objects"), name)
    return HEAD.format(
        version=peft.__version__,
        options="\n".join(_options()),
        **combinations.tables(),
        works=len(works),
        names=", ".join(f"`{name}`" for name in works) + ".",
        refused=len(refused),
        others=", ".join(f"`{name}`" for name in refused) + ".",
    )


def _options() -> Iterator[str]:
    from veneer import LoraConfig
    from veneer.errors import ConfigError
    from veneer.layers.making import check_config

    own = {field.name for field in dataclasses.fields(LoraConfig)}
    for field in sorted(dataclasses.fields(LoraConfig), key=lambda field: field.name):
        default = field.default
        empty = default is dataclasses.MISSING or default is None
        shown = "" if empty else f"`{default!r}`"
        answer = ACCEPTED.get(field.name, "supported")
        if field.name in ASKED:
            try:
                check_config(LoraConfig(target_modules=["a"], **ASKED[field.name]))
            except ConfigError as error:
                reason = str(error).splitlines()[-1].strip().removeprefix("- ")
                answer = f"refused: {reason}".replace("|", "\\|")
        yield f"| `{field.name}` | {shown} | {answer} |"
    if unknown := sorted(set(ASKED) - own):
        raise SystemExit(f"no options any more: {', '.join(unknown)}")


if __name__ == "__main__":
    sys.exit(made_page.main(__doc__, page, PAGE))
