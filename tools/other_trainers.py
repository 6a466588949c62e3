"""Use Veneer with axolotl, ms-swift and lm-evaluation-harness: ``make other-trainers``.

None is in the environment of the tests: they ask for other versions of what is pinned there. Here each is
installed without its dependencies into a directory, with the few packages that its code imports; everything
else comes from the environment without PEFT. The trainers train a tiny Llama with Veneer in the place of
peft, save it and load it again; the harness evaluates several adapters together, as it does each by itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "other-trainers"

PACKAGES = {
    "axolotl": "axolotl==0.19.0 addict==2.4.0 distro==1.9.0 llvmlite==0.50.0 numba==0.68.1 posthog==7.91.1",
    "ms-swift": "ms-swift==4.6.0 aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 attrs==26.1.0 "
    "cffi==2.1.1 cryptography==50.0.2 frozenlist==1.8.0 json-repair==0.64.6 modelscope==1.40.2 "
    "modelscope-hub==0.5.1 multidict==7.2.1 propcache==0.5.4 yarl==1.25.1",
    "lm-eval": "lm_eval==0.4.13 DataProperty==1.1.1 absl-py==2.5.1 chardet==6.0.0.post1 evaluate==0.4.6 "
    "lxml==6.1.3 mbstrdecoder==1.1.5 more_itertools==11.2.1 nltk==3.10.4 pathvalidate==3.3.1 "
    "portalocker==4.4.2 pytablewriter==1.2.1 pytz==2026.6 rouge-score==0.1.2 sacrebleu==2.6.0 six==1.17.0 "
    "sqlitedict==2.1.0 tabledata==1.3.5 tabulate==0.10.0 tcolorpy==0.1.7 typepy==1.3.5 word2number==1.1",
}

COMMON = """
import sys
from veneer.as_peft import register_as_peft

register_as_peft("0.20.0")  # both ask for a version before 0.21

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import veneer


def llama():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()


def trained(model):
    assert isinstance(model, veneer.PeftModel), type(model)
    rows = [{"input_ids": list(range(1, 9)), "labels": list(range(1, 9))}] * 8
    quiet = dict(report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no")
    arguments = TrainingArguments(place, max_steps=4, learning_rate=1e-2, use_cpu=True, **quiet)
    Trainer(model, arguments, train_dataset=rows).train()
    model.save_pretrained(place)
    return model.eval()


def check(model, again):
    x = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(model(x).logits, again.eval()(x).logits)
        assert not torch.allclose(model(x).logits, llama()(x).logits)


place = sys.argv[1]
"""

PROGRAMS = {
    "axolotl": COMMON
    + """
from axolotl.loaders.adapter import load_adapter
from axolotl.utils.dict import DictDefault

options = dict(adapter="lora", lora_r=4, lora_alpha=8, lora_dropout=0.05, lora_target_linear=True)
model = trained(load_adapter(llama(), DictDefault(options), "lora")[0])
saved = DictDefault({**options, "lora_model_dir": place})
check(model, load_adapter(llama(), saved, "lora", inference=True)[0])
""",
    "ms-swift": COMMON
    + """
from swift.tuners import LoraConfig, Swift

config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
check(trained(Swift.prepare_model(llama(), config)), Swift.from_pretrained(llama(), place))
""",
    "lm-eval": (ROOT / "tests" / "interop" / "harness_adapters.py").read_text(),
}


def main() -> int:
    """Install and try each; 1 if one of them fails."""
    made = subprocess.run(
        [sys.executable, ROOT / "tools" / "make_nopeft_env.py"], capture_output=True, text=True, check=True
    )
    failed = []
    for name, program in PROGRAMS.items():
        site = PLACE / name
        if not site.exists():
            print(f"{name}: installing into {site}", flush=True)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site)]
            subprocess.run([*pip, *PACKAGES[name].split()], check=True)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), str(site)]),
            "HF_HUB_OFFLINE": "1",
            "AXOLOTL_DO_NOT_TRACK": "1",
        }
        run = [made.stdout.strip(), "-W", "ignore", "-c", program, str(PLACE / f"{name}-adapter")]
        done = subprocess.run(run, env=environment, capture_output=True, text=True)
        print(f"{name}: {'works' if not done.returncode else done.stderr[-2000:]}", flush=True)
        failed += [name] * bool(done.returncode)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
