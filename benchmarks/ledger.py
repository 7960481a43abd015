"""A ledger of ten thousand edits of a tiny model: what opening, reading and adding to it costs, early and late."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.table import Row
from everedit.edit import Edit
from everedit.living import LivingModel
from everedit.models import LanguageModel
from everedit.models.memory import resident_mb

EDITS = 10_000
EARLY = 1_000
MOST_SECONDS = 2.0
INSTANT = 1.0
_WORDS = ("the", "town", "number", "lies", "in", "north", "south", "east", "west", *"0123456789")


def tiny_model() -> LanguageModel:
    """A model with random weights: what is measured here is the ledger."""
    vocabulary = {word: index for index, word in enumerate(["<end>", *_WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>", pad_token="<end>")
    config = GPT2Config(
        vocab_size=len(vocabulary), n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        model = GPT2LMHeadModel(config)
    return LanguageModel("tiny", model.float(), fast)


def edits(count: int) -> list[Edit]:
    """Edits of as many different prompts, in number words that the tiny tokenizer knows."""
    targets = ("north", "south", "east", "west")
    return [
        Edit(prompt=f"the town number {' '.join(str(number))} lies in", target_new=targets[number % 4])
        for number in range(count)
    ]


def ten_thousand_edits(_: LanguageModel) -> Iterator[Row]:
    """Opening, log, show, memory and disk at 10,000 edits, each against its bound."""
    stream = edits(EDITS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        settings: dict[str, Any] = {"modules": {"mlp_out": (1,)}, "eta": 1e-6}
        gates = {"finite": False, "perplexity": None, "norm": None, "lost": 0.9, "sample": 4, "took": None}
        living = LivingModel.create(
            folder, method="ultraedit", lm=tiny_model(), method_settings=settings, gates=gates,
            conflicts={"near_key": None},
        )  # fmt: skip
        seconds, memory = {}, {}
        for start in range(0, EDITS, EARLY):
            begun = time.perf_counter()
            done = living.add(stream[start : start + EARLY], again=True)
            assert len(done.commits) == EARLY, done.set_aside[:1]
            del done
            seconds[start + EARLY] = (time.perf_counter() - begun) / EARLY
            memory[start + EARLY] = resident_mb()
        lm = tiny_model()
        living.close()
        begun = time.perf_counter()
        with LivingModel.open(folder, lm=lm) as again:
            opening = time.perf_counter() - begun
            factors = again.log(1)[0].draft.size
            show = _timed(lambda: again.ledger.commit(again.ledger.resolve(again.head[:12])))
        log = min(_command(folder, "log") for _ in range(3))
        disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / EDITS
    yield Row(
        "ledger of 10,000: opening", MOST_SECONDS, opening, "s", MOST_SECONDS / opening, 1.0, "model loaded before"
    )
    yield Row("ledger of 10,000: everedit log", INSTANT, log, "s", INSTANT / log, 1.0, "the whole command")
    yield Row("ledger of 10,000: show", 0.1, show, "s", 0.1 / show, 1.0, "one commit of 10,000")
    yield Row("add at edit 1,000, at edit 10,000", seconds[EARLY], seconds[EDITS], "s", seconds[EARLY] / seconds[EDITS],
              0.5, "gates on, fsync at each")  # fmt: skip
    growth = memory[EDITS] - memory[2 * EARLY]
    yield Row("memory at edit 2,000, at edit 10,000", memory[2 * EARLY], memory[EDITS], "MiB", 32 / max(growth, 1e-9),
              1.0, f"growth {growth:.1f} MiB, at most 32")  # fmt: skip
    yield Row("disk for an edit: factors, all", factors / 1024, disk / 1024, "KiB", factors / disk, 0.5,
              "tensors alone, and with records and snapshots")  # fmt: skip


def _timed(work: Any) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _command(folder: Path, name: str) -> float:
    environment = {**os.environ, "COLUMNS": "120"}
    command = [sys.executable, "-m", "everedit", name, str(folder)]
    return _timed(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment))
