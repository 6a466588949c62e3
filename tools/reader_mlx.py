"""What mlx-lm makes of a model and an adapter: ``python reader_mlx.py ASKED.json ANSWERED.json``.

Runs where `mlx-lm` is installed, and knows nothing of Veneer.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm import load


def main() -> None:
    """Answer what is asked."""
    asked = json.loads(Path(sys.argv[1]).read_text())
    model, _ = load(asked["model"], adapter_path=asked["adapter"])
    tokens = mx.array(asked["tokens"])
    chosen, greedy = [], []
    for prompt in asked["prompts"]:
        logits = model(mx.array([prompt]))[0, -1].astype(mx.float32)
        chosen.append((logits - mx.logsumexp(logits))[tokens].tolist())
        written: list[int] = []
        while len(written) < asked["steps"]:
            written.append(mx.argmax(model(mx.array([prompt + written]))[0, -1]).item())
        greedy.append(written)
    Path(sys.argv[2]).write_text(json.dumps({"logprobs": chosen, "greedy": greedy}))


if __name__ == "__main__":
    main()
