"""Seconds an edit on models of full size with random weights, which timing does not mind: on a GPU, or tiny on a CPU.

    python -m benchmarks.gpu --shape llama-7b --device cuda --out gpu.jsonl

Weights are bfloat16, the edited matrices have float32 masters. Each method makes batches of 1, 10 and 100 edits; the
plain version (whole rows through the whole model at every step, one edit at a time) runs the same steps. Targets stay
improbable, so that no edit stops early and all steps are run. The share of the limit is the floating-point work of the
value optimisation's matrix products over what the device gives in a plain product of large matrices.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from everedit.data import load_edits
from everedit.edit import Edit
from everedit.editor import Editor
from everedit.engine.moments import Corpus
from everedit.models import LanguageModel
from tests.oracles import plain_target

VOCABULARY = 2_000
SHAPES: dict[str, Any] = {
    "llama-7b": lambda size: LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32
    ),
    "gpt2-xl": lambda size: GPT2Config(vocab_size=50_257, n_embd=1600, n_layer=48, n_head=25),
    "tiny": lambda size: LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2,
    ),
}  # fmt: skip
METHODS = ("rome", "memit", "alphaedit", "ultraedit")
BATCHES = (1, 10, 100)


def build(shape: str, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """A model of ``shape`` with random weights, and a tokenizer trained on the built-in edits."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [text for edit in load_edits("worldfacts").edits for text in (edit.prompt, *edit.rephrase)]
    tokenizer.train_from_iterator(lines, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    config = SHAPES[shape](VOCABULARY)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return LanguageModel(shape, model, wrapped)


def measure(lm: LanguageModel, method: str, edits: list[Edit], tokens: int, steps: int) -> Iterator[dict[str, Any]]:
    """One row for each batch size, and for the methods that optimise values one for the plain version."""
    settings = _settings(lm, method, steps)
    editor = Editor(lm, method, method_settings=settings, corpus=Corpus(None, tokens))
    _timed(lm, editor.prepare)
    for batch in BATCHES:
        if batch > 1 and not editor.method.traits.solves_batches:
            continue
        chosen = edits[:batch]
        seconds, peak = _timed(lm, lambda part=chosen: editor.edit(part, score=False))
        editor.reset()
        yield {"method": method, "batch": batch, "seconds_per_edit": seconds / batch, "peak_gib": peak}
    if editor.method.traits.solves_values:
        site = {"rome": "mlp"}.get(method, "block")
        prefixes = editor.method.prefixes(editor.bench)
        layer, config = editor.method.layers()[-1], editor.method.config.target  # type: ignore[attr-defined]
        seconds, peak = _timed(lm, lambda: plain_target(lm, edits[0], prefixes, layer, config, site))
        yield {
            "method": f"{method}, plain value optimisation",
            "batch": 1,
            "seconds_per_edit": seconds,
            "peak_gib": peak,
        }


def _settings(lm: LanguageModel, method: str, steps: int) -> dict[str, Any]:
    if method == "ultraedit":
        return {}
    # A random model's text has second moments of its own size: the threshold is put where a null space is left.
    return {"target": {"steps": steps, "stop_loss": 0.0}, **({"threshold": 1e9} if method == "alphaedit" else {})}


def _timed(lm: LanguageModel, work: Any) -> tuple[float, float]:
    """Seconds, and the most memory that the device held, in GiB (0 where it does not say)."""
    accelerator = lm.on_accelerator
    if accelerator:
        torch.cuda.reset_peak_memory_stats(lm.device)
        torch.cuda.synchronize(lm.device)
    start = time.perf_counter()
    work()
    if accelerator:
        torch.cuda.synchronize(lm.device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(lm.device) / 2**30 if accelerator else 0.0


def arithmetic_limit(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a product of two square matrices."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    left @ right
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(10):
        product = left @ right
    float(product[0, 0])
    return 10 * 2 * size**3 / (time.perf_counter() - start)


def value_work(lm: LanguageModel, method: str, edits: list[Edit], steps: int) -> float:
    """Operations an edit of the value optimisation's products: forward and backward of the tails above the layer."""
    editor = Editor(lm, method, method_settings=_settings(lm, method, steps))
    prefixes = editor.method.prefixes(editor.bench)
    layer = editor.method.layers()[-1]
    above = sum(
        weight.numel()
        for index in range(layer + 1, lm.layout.n_layers)
        for weight in lm.layout.block(index).parameters()
        if weight.dim() == 2
    )
    vocabulary = lm.model.get_output_embeddings().weight.numel()  # type: ignore[union-attr,operator]
    total = 0
    for edit in edits:
        text = lm.encode(edit.prompt, edit.target_new, subject=edit.subject)
        tail = len(text.ids) - 1 - text.subject_last
        total += len(prefixes) * (tail * above + len(text.target_ids) * vocabulary) + above + vocabulary
    return 4.0 * steps * total / len(edits)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-7b")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of the second moments")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    device = torch.device(options.device) if options.device else torch.accelerator.current_accelerator()
    dtype = getattr(torch, options.dtype)
    lm = build(options.shape, device or torch.get_default_device(), dtype)
    edits = load_edits("worldfacts").edits[: max(BATCHES)]
    limit = arithmetic_limit(lm.device, dtype, 4096 if lm.on_accelerator else 256)
    name = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else "cpu"
    rows = []
    for method in options.methods:
        work = value_work(lm, method, edits, options.steps) if method in ("rome", "memit", "alphaedit") else None
        for row in measure(lm, method, edits, options.tokens, options.steps):
            share = None if work is None else work / row["seconds_per_edit"] / limit
            row |= {"shape": options.shape, "device": name, "dtype": options.dtype, "share_of_limit": share}
            rows.append(row)
            line = json.dumps(row)
            print(line, flush=True)
            if options.out:
                with options.out.open("a") as stream:
                    stream.write(line + "\n")
    return rows


if __name__ == "__main__":
    main()
