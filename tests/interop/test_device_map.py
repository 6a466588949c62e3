"""Models that transformers and accelerate spread or offload by a device map."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import run_python

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PLACES = {
    "one device": "{'': 'cpu'}",
    "auto": "'auto'",
    "partly on disk": (
        "{'model.embed_tokens': 'cpu', 'model.rotary_emb': 'cpu', 'model.layers.0': 'cpu', "
        "'model.layers.1': 'disk', 'model.norm': 'cpu', 'lm_head': 'cpu'}"
    ),
}


@pytest.mark.parametrize("place", PLACES)
def test_forward_merge_save_and_load(place: str, nopeft_python: Path, tmp_path: Path) -> None:
    run_python(
        f"device_map = {PLACES[place]}"
        + """
import sys
sys.path[:0] = sys.argv[1:3]
from veneer.as_peft import register_as_peft
register_as_peft()
from pathlib import Path
import transformers
from tests.tolerances import assert_close
from tiny import *
from veneer import LoraConfig, PeftModel, get_peft_model
transformers.logging.disable_progress_bar()
torch.set_grad_enabled(False)
place = Path(sys.argv[3])

llama().save_pretrained(place / "base")
base = llama()(X).logits
config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"])
trained = get_peft_model(llama(), config)
shake(trained)
wanted = trained.eval()(X).logits
trained.save_pretrained(place / "adapter")

def spread():
    model = transformers.AutoModelForCausalLM.from_pretrained(
        place / "base", device_map=device_map, offload_folder=str(place / "offload")
    )
    on_meta = any(p.is_meta for p in model.parameters())
    assert on_meta == ("disk" in getattr(model, "hf_device_map", {}).values())
    return model.eval()

assert torch.equal(spread()(X).logits, base)
assert torch.equal(get_peft_model(spread(), config).eval()(X).logits, base)
files = {p: p.read_bytes() for p in (place / "offload").rglob("*") if p.is_file()}

model = PeftModel.from_pretrained(spread(), place / "adapter").eval()
assert torch.equal(model(X).logits, wanted)
model.save_pretrained(place / "again")
assert torch.equal(PeftModel.from_pretrained(llama(), place / "again").eval()(X).logits, wanted)
model.merge_adapter()
assert_close(model(X).logits, wanted)
with model.disable_adapter():
    assert torch.equal(model(X).logits, base)
model.unmerge_adapter()
assert torch.equal(model(X).logits, wanted)
merged = model.merge_and_unload()
assert_close(merged(X).logits, wanted)
assert files == {p: p.read_bytes() for p in files}, "the offload folder is the user's"

plain = spread()
before = dict(getattr(plain, "hf_device_map", {}))
plain.load_adapter(str(place / "adapter"))
assert torch.equal(plain(X).logits, wanted)
assert dict(getattr(plain, "hf_device_map", {})) == before
""",
        HERE,
        ROOT,
        tmp_path,
        python=nopeft_python,
    )
