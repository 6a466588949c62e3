"""What llama.cpp makes of a model and an adapter: ``python reader_llama_cpp.py ASKED.json ANSWERED.json``.

Runs where `xllamacpp` is installed, and knows nothing of Veneer. Its server is asked, in 32 bits. With
``--model FILE --lora FILE`` it answers on its usual port until it is stopped, as `llama-server` does.
"""

import argparse
import json
import sys
import threading
from pathlib import Path

import xllamacpp


def server(model: str, adapter: str | None, port: int = 0) -> xllamacpp.Server:
    """The server with one model and at most one adapter."""
    params = xllamacpp.CommonParams()
    params.port = port
    params.model.path = model
    params.n_ctx, params.n_parallel, params.verbosity = 512, 1, 0
    params.warmup = params.fit_params = False
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    return xllamacpp.Server(params)


def answer(program: xllamacpp.Server, prompt: list[int], count: int, top: int) -> list[dict]:
    """For each token that it writes, greedily, its id and the likeliest with their log-probabilities."""
    asked = {
        "prompt": prompt,
        "max_tokens": count,
        "logprobs": top,
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    found = program.handle_completions(asked)
    found = json.loads(found) if isinstance(found, str) else found
    return found["choices"][0]["logprobs"]["content"]


def serve() -> None:
    """Answer on llama.cpp's usual port."""
    parser = argparse.ArgumentParser(prog="llama-server")
    parser.add_argument("--model", required=True)
    parser.add_argument("--lora")
    given = parser.parse_args()
    program = server(given.model, given.lora, 8080)
    print(program.listening_address, flush=True)
    threading.Event().wait()


def main() -> None:
    """Answer what is asked."""
    if sys.argv[1].startswith("--"):
        return serve()
    asked = json.loads(Path(sys.argv[1]).read_text())
    program = server(asked["model"], asked["adapter"])
    chosen, greedy = [], []
    for prompt in asked["prompts"]:
        (place,) = answer(program, prompt, 1, asked["vocabulary"])
        every = {entry["id"]: entry["logprob"] for entry in place["top_logprobs"]}
        chosen.append([every[token] for token in asked["tokens"]])
        greedy.append([place["id"] for place in answer(program, prompt, asked["steps"], 1)])
    Path(sys.argv[2]).write_text(json.dumps({"logprobs": chosen, "greedy": greedy}))


if __name__ == "__main__":
    main()
