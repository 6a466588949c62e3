"""Write the golden adapters with PEFT: PYTHONHASHSEED=0 python -m tests.golden.make

Each case of models.py gives data/<case>/ with adapter_config.json and adapter_model.safetensors as PEFT
saves them (sets in the order of their hashes), and golden.safetensors: the base weights, an input, and the
outputs of the base alone and with the adapter. PEFT's merged output is left out, because it cannot merge a
1x1 Conv1d.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.golden.models import CASES, Case, output

DATA = Path(__file__).parent / "data"
REFERENCE = "0.21.2"


def write(name: str, case: Case, place: Path) -> None:
    """Make one case: base and adapter from the seed of its name, every trained parameter away from zero."""
    import peft

    torch.manual_seed(sum(name.encode()))
    base = case.build().eval()
    weights = {k: t.clone() for k, t in base.state_dict().items()}
    inputs = case.inputs()
    tensors = {"input": inputs, "output.base": output(base, inputs)}
    model = peft.get_peft_model(base, peft.LoraConfig(**case.config)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    tensors["output.adapter"] = output(model, inputs)
    model.save_pretrained(place)
    tensors |= {f"base.{k}": t for k, t in weights.items()}
    save_file({k: t.detach().clone().contiguous() for k, t in tensors.items()}, place / "golden.safetensors")
    (place / "README.md").unlink()


@torch.no_grad()
def main() -> None:
    """Write all cases anew."""
    import peft

    if peft.__version__ != REFERENCE:
        raise SystemExit(f"the golden files are those of peft {REFERENCE}, this is {peft.__version__}")
    torch.set_num_threads(1)
    shutil.rmtree(DATA, ignore_errors=True)
    for name, case in CASES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write(name, case, DATA / name)
    size = sum(f.stat().st_size for f in DATA.rglob("*") if f.is_file())
    print(f"{len(CASES)} cases, {size / 1000:.0f} kB in {DATA}")


if __name__ == "__main__":
    main()
