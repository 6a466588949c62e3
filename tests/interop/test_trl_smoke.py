"""TRL's SFTTrainer with a Veneer adapter, through every door: two steps, saved and loaded again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.processes import run_python

HERE = Path(__file__).resolve().parent
DOORS = {
    "as_peft, peft absent": ("without", "from veneer.as_peft import register_as_peft\nregister_as_peft()"),
    "peft absent": ("without", "import veneer"),
    "peft and TRL first": ("with", "import peft\nfrom trl import SFTTrainer\nimport veneer"),
}
SFT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tiny import *
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from veneer import LoraConfig, PeftModel, get_peft_model
transformers.logging.disable_progress_bar()
place = Path(sys.argv[2])

words = {f"w{i}": i for i in range(48)} | {"<eos>": 48, "<pad>": 49}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
data = Dataset.from_list([{"text": " ".join(f"w{(i + j) % 48}" for j in range(6))} for i in range(8)])
config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"])

def make(name, model, **more):
    options = SFTConfig(
        str(place / name), max_steps=2, save_steps=2, per_device_train_batch_size=2, learning_rate=0.05,
        report_to=[], use_cpu=True, bf16=False, max_length=16, logging_steps=1, dataset_num_proc=None,
    )
    return SFTTrainer(model=model, args=options, train_dataset=data, processing_class=tokenizer, **more)

def finish(trainer):
    assert type(trainer.model).__module__ == "veneer.model.tasks", type(trainer.model)
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if "lora_" not in n}
    assert all(not p.requires_grad for n, p in trainer.model.named_parameters() if "lora_" not in n)
    trainer.train()
    folder = Path(trainer.args.output_dir) / "checkpoint-2"
    assert not list(folder.glob("model*"))
    held = load_file(folder / "adapter_model.safetensors")
    assert len(held) == 8 and all(".lora_" in key for key in held)
    assert any(tensor.any() for key, tensor in held.items() if "lora_B" in key), "nothing was learnt"
    for name, parameter in trainer.model.named_parameters():
        assert name not in base or torch.equal(parameter, base[name]), name
    again = PeftModel.from_pretrained(llama(), folder).eval()
    wanted = trainer.model.eval()(X).logits
    assert torch.equal(again(X).logits, wanted)
    assert not torch.equal(llama()(X).logits, wanted)
"""


@pytest.mark.parametrize("door", DOORS)
def test_sft_trains_and_saves_the_adapter(door: str, nopeft_python: Path, tmp_path: Path) -> None:
    kind, first = DOORS[door]
    run_python(
        f"{first}\n{SFT}"
        + """
finish(make("config", llama(), peft_config=config))
finish(make("model", get_peft_model(llama(), config)))
if "peft" in sys.modules and sys.modules["peft"].LoraConfig is not LoraConfig:
    import peft
    theirs = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    assert isinstance(make("theirs", llama(), peft_config=theirs).model, peft.PeftModel)
    # What is widened is what TRL's module asks, not the library.
    from peft.tuners.tuners_utils import BaseTunerLayer
    from veneer.layers import LoraLayer
    import trl.trainer.sft_trainer as module
    assert issubclass(LoraLayer, module.BaseTunerLayer) and not issubclass(LoraLayer, BaseTunerLayer)
""",
        HERE,
        tmp_path,
        python=sys.executable if kind == "with" else nopeft_python,
    )
