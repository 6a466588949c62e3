"""Run the programs that Veneer exports for, and compare what they compute with what Veneer computes.

``make readers`` runs llama.cpp and mlx-lm, ``make readers-vllm`` vLLM: ``python tools/readers.py [vllm]``.

The base is the first layers of SmolLM2, with their real weights. Adapters of each kind are exported, every
printed command is run as it stands, and the reader's log-probabilities are compared with those of Veneer:
their difference, the slope of the adapter's effect there on its effect here (1.00; 0 is an ignored adapter),
and those of the tokens written greedily that the base does not write. Experts in stacks go through vLLM's
loader. Then every line of docs/serving.md is run, and what the servers write is compared. The tables go to
docs/exporting.md. Exits with 1 if something differs.
"""

from __future__ import annotations

import functools
import json
import logging
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import examples_data
import readers_setup
import setup
import smollm2
import torch
import transformers
from readers_servers import PAGE as SERVING
from readers_servers import Answer, Shell, answers
from readers_setup import BUILD, CONVERTERS, ROOT
from safetensors.torch import load_file, save_file

from veneer import LoraConfig, PeftModel, export_adapter, get_peft_model
from veneer.errors import ExportError
from veneer.files.rope import write_older_names
from veneer.integrations.export import ExportReport
from veneer.training.adapters import load_adapted, save_merged
from veneer.training.loading import Loading

PAGE = ROOT / "docs" / "exporting.md"
BEGIN, END = "<!-- readers: made by `make {}` -->", "<!-- end of readers -->"
WORK = BUILD / "work"
LAYERS, STEPS, SEED = 4, 8, 0
#: How far log-probabilities may be off, of sums in 32 bits in another order.
CLOSE = 2e-4
#: By so much a token leads clearly, where a server computes in 16 bits.
LEAD = 0.3
#: Standard deviations of factors with which an adapter writes another text than its base.
DRAWN, DRAWN_OF_EMBEDDINGS = 0.3, 0.1
#: So many tokens at least are written alike that the base does not write.
SOME = 4
#: So many times stronger, an adapter writes nothing of the base's text.
STRONG = 3
#: How far the update of an expert may be off, as a share of the largest element: of one product of 32 bits.
ROUNDED = 1e-6
#: How far the slope may be from 1.
STRAIGHT = 1e-3
#: So many tokens have their log-probabilities compared: the likeliest of the base after each prompt.
LIKELIEST = 200
TEXTS = ("The capital of France is", "def add(a, b):\n    return", "Once upon a time there was a")
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: Kind of adapter -> whether its base ties embedding and head, and its options.
KINDS: dict[str, tuple[bool, dict[str, Any]]] = {
    "plain": (True, {"r": 8, "lora_alpha": 16, "target_modules": EVERY}),
    "an odd rank": (True, {"r": 5, "lora_alpha": 7, "target_modules": EVERY}),
    "use_rslora": (True, {"r": 9, "lora_alpha": 4, "use_rslora": True, "target_modules": EVERY}),
    "patterns of ranks and strengths": (
        True,
        {
            "r": 6,
            "lora_alpha": 9,
            "target_modules": EVERY,
            "rank_pattern": {"down_proj": 3, "layers.1.self_attn.q_proj": 11},
            "alpha_pattern": {"v_proj": 5, "layers.2.mlp.up_proj": 20},
        },
    ),
    "DoRA": (True, {"r": 8, "lora_alpha": 16, "use_dora": True, "target_modules": EVERY}),
    "an embedding": (False, {"r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "embed_tokens"]}),
    "an output head": (False, {"r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "lm_head"]}),
    "a tied embedding": (True, {"r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "embed_tokens"]}),
    "a tied embedding, with its head (ensure_weight_tying)": (
        True,
        {
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["v_proj", "embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
}


@dataclass(frozen=True)
class Compared:
    """One adapter in one reader."""

    error: float
    slope: float
    written: int
    apart: int

    @property
    def good(self) -> bool:
        """Whether it does there what it does here, and another thing than its base."""
        return self.error <= CLOSE and abs(self.slope - 1) <= STRAIGHT and self.written >= SOME

    def __str__(self) -> str:
        return f"{self.slope:.4f}, {self.error:.0e}, {self.written} of {self.apart}"


@dataclass(frozen=True)
class Reader:
    """A program: how it is asked, and what it takes for a base and an adapter."""

    target: str
    title: str
    ask: Callable[[dict[str, Any], Path], dict[str, Any]]
    base: Callable[[Path], str]
    adapter: Callable[[ExportReport], str]


def base_of(tied: bool) -> Path:
    """The first layers of the model, saved; with a head of its own where it is not tied."""
    place = WORK / ("tied" if tied else "untied")
    if (place / "config.json").is_file():
        return place
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = smollm2.fetch()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, num_hidden_layers=LAYERS)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(source).save_pretrained(place)
    write_older_names(place)
    return place


def adapter_of(kind: str, place: Path) -> tuple[Path, Path]:
    """(the saved adapter, its base); factors of a size that changes the answers."""
    from transformers import AutoModelForCausalLM

    tied, options = KINDS[kind]
    base = base_of(tied)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(SEED)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=DRAWN)
        elif "lora_embedding_" in name:
            torch.nn.init.normal_(parameter, std=DRAWN_OF_EMBEDDINGS)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(place)
    return place, base


@torch.no_grad()
def after(model: Any, prompts: list[list[int]]) -> torch.Tensor:
    """Log-probabilities (prompts, vocabulary) of what follows."""
    return torch.stack([model(input_ids=torch.tensor([p])).logits[0, -1].log_softmax(-1) for p in prompts])


def written(model: Any, prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
    """(tokens written greedily after each prompt, how far each leads the second likeliest)."""
    tokens, leads = [], []
    for prompt in prompts:
        text, lead = list(prompt), []
        for _ in range(STEPS):
            (first, second), (token, _) = after(model, [text])[0].topk(2)
            lead.append(float(first - second))
            text.append(int(token))
        tokens.append(text[len(prompt) :])
        leads.append(lead)
    return tokens, leads


@functools.cache
def bare(base: Path) -> tuple[dict[str, Any], torch.Tensor, list[list[int]]]:
    """(what is asked, log-probabilities of the tokens asked for, what is written), without an adapter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    here = after(model, prompts)
    likely = here.topk(LIKELIEST).indices.unique()
    asked = {"prompts": prompts, "tokens": likely.tolist(), "steps": STEPS, "vocabulary": here.shape[1]}
    return asked, here[:, likely], written(model, prompts)[0]


@functools.cache
def bare_there(reader: Reader, base: Path) -> torch.Tensor:
    """The log-probabilities that the reader gives without an adapter."""
    found = reader.ask({**bare(base)[0], "model": reader.base(base), "adapter": None}, WORK)
    return torch.tensor(found["logprobs"])


def compared(reader: Reader, model: Any, base: Path, there: str, adapter: str | None) -> Compared:
    """What a reader computes from its model and adapter, beside what ours computes."""
    asked, without, plain = bare(base)
    within = after(model, asked["prompts"])[:, asked["tokens"]]
    found = reader.ask({**asked, "model": there, "adapter": adapter}, WORK)
    theirs = torch.tensor(found["logprobs"])
    here, effect = (within - without).flatten(), (theirs - bare_there(reader, base)).flatten()
    texts, leads = written(model, asked["prompts"])
    alike = map(_written_alike, found["greedy"], texts, leads)
    same = sum(_apart(text[:count], other) for count, text, other in zip(alike, texts, plain, strict=True))
    return Compared(
        float((theirs - within).abs().max()),
        float(effect @ here / (here @ here)),
        same,
        sum(map(_apart, texts, plain)),
    )


def _apart(text: list[int], plain: list[int]) -> int:
    """How many tokens are not those in the same places of the base's text."""
    return sum(one != other for one, other in zip(text, plain, strict=False))


def _written_alike(theirs: list[int], mine: list[int], leads: list[float]) -> int:
    """How many tokens are the same before the first that differs; one that leads by a hair ends it too."""
    for place, (one, other, lead) in enumerate(zip(theirs, mine, leads, strict=True)):
        if one != other:
            if lead > 10 * CLOSE:
                raise SystemExit(f"token {place} is {one} there and {other} here, which leads by {lead:.3f}")
            return place
    return len(mine)


def asking(
    python: Path, script: str, variables: dict[str, str] | None = None
) -> Callable[[dict[str, Any], Path], dict[str, Any]]:
    """A program in another environment, asked and answering by files."""

    def ask(asked: dict[str, Any], place: Path) -> dict[str, Any]:
        files = place / "asked.json", place / "answered.json"
        files[0].write_text(json.dumps(asked))
        command = [str(python), str(ROOT / "tools" / script), *map(str, files)]
        env = variables or readers_setup.environment()
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        if done.returncode:
            raise SystemExit(f"{script}: {done.stderr[-2000:]}")
        found: dict[str, Any] = json.loads(files[1].read_text())
        return found

    return ask


def asking_engines(python: Path, script: str) -> Callable[[dict[str, Any], Path], dict[str, Any]]:
    """A program that takes long to start, so that one process answers all that is asked of a model.

    It ends when its input does, with this program at the latest.
    """
    running: dict[str, subprocess.Popen[str]] = {}

    def ask(asked: dict[str, Any], place: Path) -> dict[str, Any]:
        files = place / "asked.json", place / "answered.json"
        files[0].write_text(json.dumps(asked))
        model = asked["model"]
        if model not in running:
            command = [str(python), str(ROOT / "tools" / script), model]
            with (place / "engine.log").open("a") as log:
                running[model] = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=readers_setup.vllm_environment(),
                )
        engine = running[model]
        assert engine.stdin is not None and engine.stdout is not None
        engine.stdin.write(json.dumps([str(file) for file in files]) + "\n")
        engine.stdin.flush()
        if engine.stdout.readline() != "done\n":
            raise SystemExit(f"{script}: {(place / 'engine.log').read_text()[-2000:]}")
        found: dict[str, Any] = json.loads(files[1].read_text())
        return found

    return ask


def _shell(target: str, where: Path) -> Shell:
    """Where the commands of a target run: beside its program, and Veneer's own."""
    if target == "vllm":
        return Shell(where, readers_setup.vllm_environment(), [readers_setup.VLLM_PYTHON.parent])
    first = [CONVERTERS, readers_setup.LLAMA_SERVER.parent]
    if target == "mlx":
        first = [readers_setup.MLX_PYTHON.parent]
    return Shell(where, readers_setup.environment(), [*first, Path(sys.executable).parent])


def gguf_of(model: Path) -> str:
    """A model's GGUF file in 32 bits, made by llama.cpp's own converter."""
    out = model.with_suffix(".gguf")
    if not out.is_file():
        command = f"python convert_hf_to_gguf.py {model} --outtype f32 --outfile {out}"
        _shell("llama.cpp", CONVERTERS).run(command)
    return str(out)


def converted(report: ExportReport) -> str:
    """The adapter's GGUF file, made by the printed command."""
    if "adapter.gguf" not in report.files:
        _shell("llama.cpp", CONVERTERS).run(report.usage)
    return str(report.directory / "adapter.gguf")


def generated(report: ExportReport) -> str:
    """The adapter's directory, after the printed command has generated something with it."""
    _shell("mlx", WORK).run(report.usage)
    return str(report.directory)


def all_readers(names: list[str]) -> list[Reader]:
    """Those of the targets that are named."""
    llama = asking(Path(sys.executable), "reader_llama_cpp.py")
    mlx = asking(readers_setup.MLX_PYTHON, "reader_mlx.py")
    vllm = asking_engines(readers_setup.VLLM_PYTHON, "reader_vllm.py")
    known = [
        Reader("llama.cpp", "llama.cpp in xllamacpp", llama, gguf_of, converted),
        Reader("mlx", "mlx-lm", mlx, str, generated),
        Reader("vllm", "vLLM", vllm, str, lambda report: str(report.directory)),
    ]
    return [reader for reader in known if reader.target in names]


def rows(readers: list[Reader]) -> Iterator[tuple[str, list[Compared | str]]]:
    """Each kind of adapter, and what every reader makes of it; and of a merged model."""
    for number, kind in enumerate(KINDS):
        place, base = adapter_of(kind, WORK / f"adapter-{number}")
        model = _loaded(base, place)
        yield kind, [_exported(reader, model, base, place) for reader in readers]
    place, base = WORK / "adapter-0", base_of(True)
    model, merged = _loaded(base, place), WORK / "merged"
    save_merged(*load_adapted(place, loading=Loading("float32")), merged)
    yield "a merged model", [compared(r, model, base, r.base(merged), None) for r in readers]


def _loaded(base: Path, place: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, place).eval()


def _exported(reader: Reader, model: Any, base: Path, place: Path) -> Compared | str:
    out = place.with_name(f"{place.name}-{reader.target}")
    try:
        report = export_adapter(place, out, reader.target)
    except ExportError:
        return "refused"
    return compared(reader, model, base, reader.base(base), reader.adapter(report))


def control(reader: Reader) -> Compared:
    """An adapter that llama.cpp reads wrongly where nothing folds it: what a comparison must find."""
    number = list(KINDS).index("use_rslora")
    place, base = WORK / f"adapter-{number}", base_of(True)
    out = WORK / "unfolded.gguf"
    command = f"python convert_lora_to_gguf.py --base {base} --outfile {out} {place}"
    _shell("llama.cpp", CONVERTERS).run(command)
    try:
        return compared(reader, _loaded(base, place), base, reader.base(base), str(out))
    except SystemExit:
        return Compared(float("inf"), 0.0, 0, 0)


def stacks() -> str:
    """A row for an adapter over stacks of experts, from vLLM's loader.

    Raises:
        SystemExit: An update of an expert there is not that of the merged model.
    """
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(SEED)
    sizes = dict(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_local_experts=4, head_dim=16)
    model = GptOssForCausalLM(GptOssConfig(vocab_size=64, num_attention_heads=2, **sizes))
    paths = [f"model.layers.{number}.mlp.experts" for number in range(sizes["num_hidden_layers"])]
    names = ("gate_up_proj", "down_proj")
    before = {path: {n: getattr(model.get_submodule(path), n).clone() for n in names} for path in paths}
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj"],
        target_parameters=[f"experts.{name}" for name in names],
        rank_pattern={".*down_proj": 4},
        base_model_name_or_path="gpt_oss",
        init_lora_weights=False,
    )
    adapted = get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = "gpt_oss"
    adapted.save_pretrained(WORK / "experts")
    report = export_adapter(WORK / "experts", WORK / "experts-vllm", "vllm")
    ask = asking(readers_setup.VLLM_PYTHON, "reader_vllm_experts.py", readers_setup.vllm_environment())
    asked = {"adapter": str(report.directory), "experts": 4, "modules": ["q_proj"], "paths": paths}
    found, merged = ask(asked, WORK), adapted.merge_and_unload()
    worst = 0.0
    for path, updates in before.items():
        for name, weight in updates.items():
            # gpt-oss stores (experts, in, out).
            change = (getattr(merged.get_submodule(path), name) - weight).detach().transpose(1, 2).double()
            theirs = torch.tensor(found[path][name], dtype=torch.float64)
            worst = max(worst, float((theirs - change).abs().max() / change.abs().max()))
    if worst > ROUNDED:
        raise SystemExit(
            f"vLLM's loader reads another update of an expert: {worst:.1e} of the largest element"
        )
    return (
        f"| experts in stacks (gpt-oss), through its loader | alike to {worst:.0e} of the largest element |"
    )


def served(reader: Reader) -> Iterator[str]:
    """A row for each answer of the reader's servers to the lines of docs/serving.md."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, base = WORK / f"serving-{reader.target}", base_of(True)
    (where / "runs").mkdir(parents=True)
    (where / "BASE").symlink_to(base)
    if reader.target == "llama.cpp":
        (where / "BASE.gguf").symlink_to(gguf_of(base))
    for name, kind in (("mails", "plain"), ("dora", "DoRA")):
        shutil.copytree(WORK / f"adapter-{list(KINDS).index(kind)}", where / "runs" / name)
    file = where / "runs" / "mails" / "adapter_model.safetensors"
    factors = load_file(file)
    save_file({name: t * STRONG if "lora_B" in name else t for name, t in factors.items()}, file)
    tokenizer = AutoTokenizer.from_pretrained(base)
    adapted = _loaded(base, where / "runs" / "mails")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    page = SERVING.read_text(encoding="utf-8")
    for answer in answers(reader.target, _shell(reader.target, where), page, base):
        found = _refused(answer) if answer.asked.get("model") == "dora" else None
        yield f"| `{answer.command}` | {found or _read(answer, adapted, plain, tokenizer)} |"


def _refused(answer: Answer) -> str:
    """That an adapter is refused with the reasons."""
    error = answer.answered.get("error", {})
    if error.get("code") != 400 or "the magnitudes of DoRA: model.layers" not in error["message"]:
        raise SystemExit(f"a DoRA is answered with {answer.answered}")
    return "a DoRA: refused with status 400 and the reasons"


def _read(answer: Answer, adapted: Any, plain: Any, tokenizer: Any) -> str:
    """That the text is what the adapter writes, as far as its tokens lead clearly, and not the base's."""
    prompt = tokenizer(answer.asked["prompt"])["input_ids"]
    text = answer.answered["choices"][0]["text"].lstrip()  # mlx-lm's server leaves out the first space
    (tokens,), (leads,) = written(adapted, [prompt])
    clear = next((i for i, lead in enumerate(leads) if lead < LEAD), len(leads))
    wanted, (bare,) = tokenizer.decode(tokens[:clear]), written(plain, [prompt])[0]
    wanted = wanted.lstrip()
    if tokenizer.decode(bare).lstrip().startswith(wanted):
        raise SystemExit(f"the base writes {wanted!r} too, so that nothing is compared")
    if not text.startswith(wanted):
        raise SystemExit(f"{answer.command} wrote {text!r} where Veneer writes {wanted!r}, then unclearly")
    if clear == len(leads):
        return f"{text!r}: Veneer's {clear} tokens"
    return f"{text!r}: Veneer's first {clear} tokens; the next has a rival too close to compare"


def page(table: list[str], made_by: str) -> str:
    """docs/exporting.md with a new table in it."""
    begin = BEGIN.format(made_by)
    between = re.compile(re.escape(begin) + ".*?" + re.escape(END), re.S)
    text = "\n".join([begin, *table, END])
    return between.sub(lambda _: text, PAGE.read_text(encoding="utf-8"))


def main() -> int:
    """Install, compare, write the table."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    names = sys.argv[1:] or ["llama.cpp", "mlx"]
    try:
        versions = readers_setup.install(names)
    except (setup.SetupError, examples_data.DataError) as error:
        print(f"The readers are not installed. {error}", file=sys.stderr)
        return 1
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    readers = all_readers(names)
    titles = [f"{reader.title} {versions[reader.target]}" for reader in readers]
    lines = [f"| an adapter with | {' | '.join(titles)} |", "|---|" + "---|" * len(readers)]
    bad = []
    for kind, found in rows(readers):
        lines.append(f"| {kind} | {' | '.join(map(str, found))} |")
        print(lines[-1], flush=True)
        bad += [kind for one in found if isinstance(one, Compared) and not one.good]
    if "llama.cpp" in names:
        unfolded = control(readers[0])
        print(f"use_rslora, not folded: {unfolded}", flush=True)
        bad += ["use_rslora, not folded"] * unfolded.good
    if "vllm" in names:
        lines.append(stacks())
        print(lines[-1], flush=True)
    servers = ["", "| a server's line in [Serving](serving.md) | its answer |", "|---|---|"]
    for reader in readers:
        for line in served(reader):
            servers.append(line)
            print(line, flush=True)
    note = (
        "Slope, largest difference of a log-probability, and, of the tokens that the base writes otherwise, "
        f"those written alike; {len(TEXTS)} texts of {STEPS} tokens, the first {LAYERS} layers of "
        f"SmolLM2-135M-Instruct in 32 bits, on {_machine()}."
    )
    if bad:
        print(f"these differ: {', '.join(bad)}", file=sys.stderr)
        return 1
    made_by = "-".join(["readers", *sys.argv[1:]])
    PAGE.write_text(page([note, "", *lines, *servers], made_by), encoding="utf-8")
    return 0


def _machine() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return f"{found[1].strip() if found else platform.processor()} ({platform.system()})"


if __name__ == "__main__":
    raise SystemExit(main())
