"""sentence-transformers with a Veneer adapter: its own adapter methods, and an encoder wrapped by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.processes import run_python

HERE = Path(__file__).resolve().parent
AS_PEFT = "from veneer.as_peft import register_as_peft\nregister_as_peft()"

START = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tiny import *
from tiny_trl import *
from sentence_transformers import (
    CrossEncoder, SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertConfig, BertModel
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.layers import LoraLayer

place = Path(sys.argv[2])
sizes = dict(
    vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=32, initializer_range=0.3, pad_token_id=49,
)
torch.manual_seed(0)
BertModel(BertConfig(**sizes)).save_pretrained(place / "base")
tokenizer().save_pretrained(place / "base")
SENTENCES = [counting(i, 1 + i % 3) for i in range(6)]
LORA = dict(r=4, lora_alpha=32, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION")

def make():
    transformer = Transformer(str(place / "base"))
    return SentenceTransformer(modules=[transformer, Pooling(16)], device="cpu")

def encode(model):
    return torch.tensor(model.encode(SENTENCES, show_progress_bar=False))

def train(name, model, resume=None):
    data = Dataset.from_list([{"anchor": counting(i), "positive": counting(i + 20)} for i in range(16)])
    options = SentenceTransformerTrainingArguments(
        str(place / name), per_device_train_batch_size=4, max_steps=4, save_steps=2, logging_steps=1,
        learning_rate=0.05, report_to=[], use_cpu=True, disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(
        model=model, args=options, train_dataset=data, loss=MultipleNegativesRankingLoss(model)
    )
    trainer.train(resume_from_checkpoint=resume)
    return history(trainer)

def check_adapter_alone(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "modules.json"} <= names, names
    assert not [n for n in names if n.startswith(("model", "pytorch_model"))], names

plain = encode(make())
"""


def run(first: str, code: str, place: Path, python: str | Path) -> None:
    run_python(f"{first}\n{START}{code}", HERE, place, python=python)


def test_its_own_adapter_methods(nopeft_python: Path, tmp_path: Path) -> None:
    """Added, trained, resumed, saved, loaded by the directory, switched, disabled, deleted."""
    run(
        AS_PEFT,
        """
model = make()
model.add_adapter(LoraConfig(**LORA))
assert torch.equal(encode(model), plain)
trained = {n for n, p in model.named_parameters() if p.requires_grad}
assert len(trained) == 8 and all("lora_" in name for name in trained), trained
before = {n: p.clone() for n, p in model.named_parameters() if n not in trained}
losses = train("whole", model)
assert losses[-1] < losses[0], losses
assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
check_adapter_alone(place / "whole" / "checkpoint-4")
learnt = encode(model)
assert not torch.allclose(learnt, plain, atol=1e-2)

again = make()
again.add_adapter(LoraConfig(**LORA))
assert train("resumed", again, str(place / "whole" / "checkpoint-2")) == losses
assert torch.equal(encode(again), learnt)

model.save_pretrained(str(place / "saved"))
check_adapter_alone(place / "saved")
assert torch.equal(encode(SentenceTransformer(str(place / "saved"), device="cpu")), learnt)

loaded = make()
loaded.load_adapter(str(place / "saved"))
assert torch.equal(encode(loaded), learnt)
loaded.disable_adapters()
assert torch.equal(encode(loaded), plain)
loaded.enable_adapters()
assert torch.equal(encode(loaded), learnt)
loaded.add_adapter(LoraConfig(**LORA), "other")
assert loaded.active_adapters() == ["other"] and torch.equal(encode(loaded), plain)
loaded.set_adapter("default")
assert loaded.active_adapters() == ["default"] and torch.equal(encode(loaded), learnt)
held = loaded.get_adapter_state_dict("default")
assert len(held) == 8 and all("lora_" in key and "default" not in key for key in held), sorted(held)
loaded.delete_adapter("other")
assert list(loaded.transformers_model.peft_config) == ["default"]
assert torch.equal(encode(loaded), learnt)

layers = [module for module in loaded.modules() if isinstance(module, LoraLayer)]
for layer in layers:
    layer.merge()
assert_close(encode(loaded), learnt)
for layer in layers:
    layer.unmerge()
assert torch.equal(encode(loaded), learnt)
loaded.delete_adapter("default")
assert torch.equal(encode(loaded), plain)
""",
        tmp_path,
        nopeft_python,
    )


def test_a_cross_encoder_with_its_head_trained(nopeft_python: Path, tmp_path: Path) -> None:
    run(
        AS_PEFT,
        """
pairs = list(zip(SENTENCES, reversed(SENTENCES)))
def cross():
    torch.manual_seed(0)  # of the head, which is new
    return CrossEncoder(str(place / "base"), num_labels=1, device="cpu")
def scores(model):
    return torch.tensor(model.predict(pairs, show_progress_bar=False))
model = cross()
start = scores(model)
model.add_adapter(LoraConfig(**{**LORA, "task_type": "SEQ_CLS"}, modules_to_save=["classifier"]))
assert torch.equal(scores(model), start)
shake(model)
learnt = scores(model)
assert not torch.allclose(learnt, start)
model.save_pretrained(str(place / "cross"))
again = cross()
again.load_adapter(str(place / "cross"))
assert torch.equal(scores(again), learnt)
again.disable_adapters()
assert torch.equal(scores(again), start)
""",
        tmp_path,
        nopeft_python,
    )


@pytest.mark.parametrize("kind", ["peft imported first", "peft absent"])
def test_an_encoder_that_was_wrapped(kind: str, nopeft_python: Path, tmp_path: Path) -> None:
    """Without as_peft: get_peft_model on the transformer. The real libraries read it, and are read."""
    absent = kind == "peft absent"
    run(
        "import veneer" if absent else "import peft, sentence_transformers\nimport veneer",
        """
model = make()
model[0].model = get_peft_model(model[0].model, LoraConfig(**LORA))
assert torch.equal(encode(model), plain)
losses = train("wrapped", model)
assert losses[-1] < losses[0], losses
check_adapter_alone(place / "wrapped" / "checkpoint-4")
learnt = encode(model)
model.save_pretrained(str(place / "saved"))
check_adapter_alone(place / "saved")

again = make()
again[0].model = PeftModel.from_pretrained(again[0].model, place / "saved")
assert torch.equal(encode(again), learnt) and not torch.equal(learnt, plain)
if "peft" in sys.modules:
    theirs = SentenceTransformer(str(place / "saved"), device="cpu")
    assert any(type(module).__module__.startswith("peft.") for module in theirs.modules())
    assert_close(encode(theirs), learnt)

    import peft
    theirs = make()
    theirs.add_adapter(peft.LoraConfig(**LORA))
    shake(theirs)
    theirs.save_pretrained(str(place / "theirs"))
    mine = make()
    mine[0].model = PeftModel.from_pretrained(mine[0].model, place / "theirs")
    assert_close(encode(mine), encode(theirs))
    assert not torch.allclose(encode(mine), plain, atol=1e-2)

again[0].model = again[0].model.merge_and_unload()
assert_close(encode(again), learnt)
again.save_pretrained(str(place / "merged"))
merged = SentenceTransformer(str(place / "merged"), device="cpu")
assert torch.equal(encode(merged), encode(again))
""",
        tmp_path,
        nopeft_python if absent else sys.executable,
    )
