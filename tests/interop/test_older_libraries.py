"""Files go both ways with an older diffusers and an older sentence-transformers, and real PEFT.

They run in a process of their own. Veneer stands in the place of PEFT, beside the installed release.
diffusers writes the whole of PEFT's configuration into a file, and an older PEFT takes no option that it does
not know: so PEFT is older for sentence-transformers alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.interop.older import ROOT, WITHOUT_TORCHAO, variables
from tests.processes import run_python
from tests.tolerances import assert_close

REGISTER = """
from veneer.as_peft import register_as_peft
register_as_peft()
"""
CHECK = """
from importlib.metadata import version
assert version({name!r}) == {release!r}, version({name!r})
"""

#: What both sides run after `write` and `read` are defined: one writes, or all that was written is read.
RUN = """
verb, *places = sys.argv[1:]
for place in map(Path, places):
    if verb == "write":
        write(place)
    else:
        save_file(read(place), place / f"{verb}.safetensors")
"""

DIFFUSERS = """
import json
import sys
from pathlib import Path
from safetensors.torch import save_file
from tests.interop import diffusion_life

def write(place):
    diffusion_life.live(place, False, ["writing", "transformer"])
    told = json.loads((place / "told.json").read_text())
    assert not any("error" in chapter for chapter in told.values()), told

read = diffusion_life.read_files
"""

SENTENCES = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
try:
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
except ImportError:
    from sentence_transformers.models import Pooling, Transformer
from transformers import BertConfig, BertModel
from peft import LoraConfig
sys.path.insert(0, "tests/interop")
from tiny import shake
from tiny_trl import counting, tokenizer

def make(place):
    base = place.parent / "base"
    if not base.is_dir():
        torch.manual_seed(0)
        sizes = dict(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, initializer_range=0.3, pad_token_id=49,
        )
        BertModel(BertConfig(**sizes)).save_pretrained(base)
        tokenizer().save_pretrained(base)
    return SentenceTransformer(modules=[Transformer(str(base)), Pooling(16)], device="cpu")

def encode(model):
    return torch.tensor(model.encode([counting(i, 1 + i % 3) for i in range(6)]))

def write(place):
    model = make(place)
    lora = dict(r=4, lora_alpha=32, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")
    model.add_adapter(LoraConfig(**lora))
    shake(model)
    model.save_pretrained(str(place))

def read(place):
    model = make(place)
    plain = encode(model)
    model.load_adapter(str(place))
    return {"plain": plain, "adapted": encode(model)}
"""

#: Package -> its older release, the folders with it, what both sides run, and two answers that are to differ.
OLDER = {
    "diffusers": ("0.36.0", ["diffusers-0.36.0"], DIFFUSERS, ("one", "two")),
    "sentence-transformers": (
        "5.2.3",
        ["sentence-transformers-5.2.3", "peft-0.20.0"],
        SENTENCES,
        ("plain", "adapted"),
    ),
}


@pytest.mark.parametrize("name", OLDER)
def test_files_both_ways(name: str, tmp_path: Path) -> None:
    release, folders, program, differing = OLDER[name]
    program += RUN
    older = WITHOUT_TORCHAO + CHECK.format(name=name, release=release) + program
    # With the hub off, the older diffusers wants the name of a file, in a directory too.
    online = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    sides = {
        "theirs": (older, {**variables(*folders), **online}),
        "ours": (REGISTER + program, variables()),
    }
    places = [tmp_path / side for side in sides]
    for place, (code, env) in zip(places, sides.values(), strict=True):
        place.mkdir()
        run_python(code, "write", place, env=env, cwd=ROOT, timeout=900)
    for side, (code, env) in sides.items():
        run_python(code, side, *places, env=env, cwd=ROOT, timeout=900)
    for place in places:
        wanted, found = (load_file(place / f"{side}.safetensors") for side in sides)
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert_close(found[key] / value.std(), value / value.std())
        first, second = (found[key] for key in differing)
        assert (first - second).abs().max() > 0.01
