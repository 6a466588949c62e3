"""What vLLM's loader makes of experts in stacks: ``python reader_vllm_experts.py ASKED.json ANSWERED.json``.

Runs where vLLM for the CPU is installed, and knows nothing of Veneer. The CPU build has no kernel for
adapters of experts, so gpt-oss is not run: its adapter goes through vLLM's own loading, to where a layer
takes what it made.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from vllm.lora.layers import FusedMoE3DWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM


class Layer(FusedMoE3DWithLoRA):
    """What the loader asks of a layer, on one machine."""

    global_num_experts, ep_rank = 0, 0

    def __init__(self, experts: int) -> None:
        nn.Module.__init__(self)
        self.global_num_experts = experts
        self.w13_lora_a_stacked = [torch.empty(1, experts, 1, 1)]


def main() -> None:
    """Answer what is asked."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    adapter = LoRAModel.from_local_checkpoint(
        asked["adapter"],
        {"experts", *asked["modules"]},
        PEFTHelper.from_local_dir(asked["adapter"], None),
        lora_model_id=1,
        device="cpu",
        weights_mapper=GptOssForCausalLM.hf_to_vllm_mapper.get_rename_mapper(),
    )
    manager = LoRAModelManager.__new__(LoRAModelManager)
    manager.packed_modules, manager.is_pooling_model = {}, False
    manager._is_3d_moe_model = GptOssForCausalLM.is_3d_moe_weight
    manager.modules = {path: Layer(asked["experts"]) for path in asked["paths"]}
    manager._create_merged_loras_inplace(adapter)
    found = {}
    for path in asked["paths"]:
        made = adapter.get_lora(path)
        updates = [b.double() @ a.double() for a, b in zip(made.lora_a, made.lora_b, strict=True)]
        found[path] = dict(zip(("gate_up_proj", "down_proj"), (u.tolist() for u in updates), strict=True))
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
