"""What vLLM makes of a model and its adapters: ``python reader_vllm.py MODEL``.

Runs where vLLM for the CPU is installed, and knows nothing of Veneer. An engine takes long to start, so it
answers many questions: each line that it reads names two files, ASKED.json and ANSWERED.json, and it writes a
line when the second is there. It computes in 32 bits.
"""

import json
import os
import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

#: vLLM for the CPU gives rows without an adapter that of the last place, so one stays empty.
PLACES = 2


def answer(program: LLM, asked: dict, number: int) -> dict:
    """Log-probabilities of the tokens that are asked for, and what is written greedily."""
    request = None
    if asked["adapter"] is not None:
        request = LoRARequest(f"adapter-{number}", number, asked["adapter"])
        # One that is refused inside `generate` would keep it waiting forever.
        if not program.llm_engine.add_lora(request):
            raise SystemExit(f"vLLM does not take {asked['adapter']}")
    prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]

    def generated(count: int, logprobs: int | None) -> list:
        options = SamplingParams(
            temperature=0, max_tokens=count, ignore_eos=True, logprobs=logprobs, detokenize=False
        )
        found = program.generate(prompts, options, lora_request=request, use_tqdm=False)
        return [out.outputs[0] for out in found]

    places = [found.logprobs[0] for found in generated(1, -1)]
    return {
        "logprobs": [[place[token].logprob for token in asked["tokens"]] for place in places],
        "greedy": [list(found.token_ids) for found in generated(asked["steps"], None)],
    }


def main() -> None:
    """Answer until there are no more lines."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes its log to the standard output
    program = LLM(
        sys.argv[1],
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_logprobs=-1,
        enable_lora=True,
        max_loras=PLACES,
        max_lora_rank=64,
    )
    for number, line in enumerate(sys.stdin, 1):
        asked, answered = map(Path, json.loads(line))
        answered.write_text(json.dumps(answer(program, json.loads(asked.read_text()), number)))
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
