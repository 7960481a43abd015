"""Tiny models of many architectures which know the table of facts.

Every architecture that Everedit supports gets a model of a few hundred thousand parameters with
random weights, trained for some seconds on ``facts.py``. That gives a test real knowledge to edit
in architectures for which no small pretrained weights are packaged. ``trained`` keeps the result
in a cache folder, so the training is paid once per change of this file or of the table.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from . import facts as _facts
from .facts import PREFIXES, WORDS, Fact

MAX_POSITIONS = 128
WINDOW = 16
"""Size of local attention: short enough that a prompt after a prefix is longer than the window."""

MERGES = 300
"""Merges of a tokenizer: few enough that most names split into several tokens, as in real use."""

REQUIRED_ACCURACY = 0.95
"""Least share of the facts, in both wordings, that a trained model must know."""

_HIDDEN = 64
_INNER = 4 * _HIDDEN
_LAYERS = 4
_HEADS = 4
_KV_HEADS = 2
# Wider than hidden / heads, so that the input of the attention's output projection is not square.
_WIDE_HEAD = 24
# Weights of a narrow model start at about 1 / sqrt(hidden); the usual 0.02 learns far too slowly.
_INIT = 0.08

Ids = dict[str, int]


# --------------------------------------------------------------------------- configurations


def _gpt2(ids: Ids) -> PreTrainedConfig:
    return GPT2Config(
        n_positions=MAX_POSITIONS,
        n_embd=_HIDDEN,
        n_layer=_LAYERS,
        n_head=_HEADS,
        n_inner=_INNER,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=_INIT,
        **ids,
    )


def _gptj(ids: Ids) -> PreTrainedConfig:
    return GPTJConfig(
        n_positions=MAX_POSITIONS,
        n_embd=_HIDDEN,
        n_layer=_LAYERS,
        n_head=_HEADS,
        n_inner=_INNER,
        rotary_dim=8,
        initializer_range=_INIT,
        tie_word_embeddings=False,
        **ids,
    )


def _gpt_neo(ids: Ids) -> PreTrainedConfig:
    return GPTNeoConfig(
        max_position_embeddings=MAX_POSITIONS,
        hidden_size=_HIDDEN,
        num_layers=_LAYERS,
        attention_types=[[["global", "local"], _LAYERS // 2]],
        num_heads=_HEADS,
        intermediate_size=_INNER,
        window_size=WINDOW,
        initializer_range=_INIT / 2,  # its attention scores are not scaled down
        **ids,
    )


def _gpt_neox(ids: Ids) -> PreTrainedConfig:
    return GPTNeoXConfig(
        hidden_size=_HIDDEN,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        intermediate_size=_INNER,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=_INIT,
        use_parallel_residual=True,
        tie_word_embeddings=False,
        **ids,
    )


def _opt(ids: Ids) -> PreTrainedConfig:
    return OPTConfig(
        hidden_size=_HIDDEN,
        num_hidden_layers=_LAYERS,
        ffn_dim=_INNER,
        max_position_embeddings=MAX_POSITIONS,
        dropout=0.0,
        num_attention_heads=_HEADS,
        init_std=_INIT,
        word_embed_proj_dim=_HIDDEN,
        **ids,
    )


def _gated(ids: Ids, **special: Any) -> dict[str, Any]:
    """Return the settings shared by the families with Llama's layout, with a family's own on top."""
    return {
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "max_position_embeddings": MAX_POSITIONS,
        "initializer_range": _INIT,
        **ids,
        **special,
    }


def _llama(ids: Ids) -> PreTrainedConfig:
    return LlamaConfig(**_gated(ids, tie_word_embeddings=False))


def _mistral(ids: Ids) -> PreTrainedConfig:
    return MistralConfig(**_gated(ids, sliding_window=WINDOW, tie_word_embeddings=False))


def _qwen2(ids: Ids) -> PreTrainedConfig:
    return Qwen2Config(**_gated(ids, tie_word_embeddings=False))


def _qwen3(ids: Ids) -> PreTrainedConfig:
    return Qwen3Config(**_gated(ids, head_dim=_WIDE_HEAD, tie_word_embeddings=True))


def _gemma_settings(ids: Ids, **special: Any) -> dict[str, Any]:
    return _gated(
        ids,
        head_dim=_WIDE_HEAD,
        query_pre_attn_scalar=_WIDE_HEAD,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * (_LAYERS // 2),
        tie_word_embeddings=True,
        **special,
    )


def _gemma2(ids: Ids) -> PreTrainedConfig:
    return Gemma2Config(**_gemma_settings(ids, attn_logit_softcapping=50.0, final_logit_softcapping=30.0))


def _gemma3_text(ids: Ids) -> PreTrainedConfig:
    return Gemma3TextConfig(**_gemma_settings(ids))


def _phi3(ids: Ids) -> PreTrainedConfig:
    return Phi3Config(**_gated(ids, original_max_position_embeddings=MAX_POSITIONS, tie_word_embeddings=False))


def _t5(ids: Ids) -> PreTrainedConfig:
    return T5Config(
        d_model=_HIDDEN,
        d_kv=_HIDDEN // _HEADS,
        d_ff=_INNER,
        num_layers=3,
        num_heads=_HEADS,
        dropout_rate=0.0,
        decoder_start_token_id=ids["pad_token_id"],
        **ids,
    )


FAMILIES: dict[str, Callable[[Ids], PreTrainedConfig]] = {
    "gpt2": _gpt2,
    "gptj": _gptj,
    "gpt_neo": _gpt_neo,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "phi3": _phi3,
    "t5": _t5,
}
"""Maps a family (transformers' ``model_type``) to the builder of its tiny configuration.

A builder takes ``vocab_size``, ``bos_token_id``, ``eos_token_id`` and ``pad_token_id``.
"""

TIED: frozenset[str] = frozenset({"gpt2", "gpt_neo", "opt", "qwen3", "gemma2", "gemma3_text", "t5"})
"""Families whose output head shares the weight of the input embedding."""

_BOS_FAMILIES = frozenset({"gemma2", "gemma3_text"})


# --------------------------------------------------------------------------- tokenizers


def _corpus() -> list[str]:
    """Return the text on which the tokenizers are trained.

    Answers and prefixes are repeated, so that their words become whole tokens like the common words
    of a real vocabulary, while the merges are used up before most of the names are whole.
    """
    answers = [f"the {answer}" for group in _facts.ANSWERS.values() for answer in group]
    return [*_facts.sentences(), *PREFIXES * 10, *answers * 20]


def _wrap(tokenizer: Tokenizer, bos: str, eos: str, pad: str, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        **options,
    )


def _train_bpe(tokenizer: Tokenizer, specials: list[str], alphabet: list[str]) -> None:
    """Train a tokenizer's vocabulary of special tokens, single characters and ``MERGES`` merges."""
    trainer = trainers.BpeTrainer(
        vocab_size=len(specials) + len(alphabet) + MERGES,
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)


def _byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer in GPT-2's manner, which adds no special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train_bpe(tokenizer, ["<|pad|>", "<|bos|>", "<|eos|>"], alphabet)
    return _wrap(tokenizer, bos="<|bos|>", eos="<|eos|>", pad="<|pad|>", add_prefix_space=False)


def _piece_tokenizer(specials: list[str], prepend: str, template: str) -> Tokenizer:
    """Return a BPE tokenizer in SentencePiece's manner, in which a space is part of the next word.

    Args:
        specials: The special tokens, ``<unk>`` among them, in the order of their ids.
        prepend: Whether a text starts with a space of its own, ``"always"`` or ``"never"``.
        template: The special tokens put around a text ``$A``.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    # Real SentencePiece vocabularies keep letters and punctuation apart; Metaspace alone would
    # merge an answer with the full stop after it.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prepend),
            pre_tokenizers.Punctuation(behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=prepend)
    _train_bpe(tokenizer, specials, ["▁", *map(chr, range(ord("!"), ord("~") + 1))])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, specials.index(token)) for token in specials]
    )
    return tokenizer


def _bos_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer in Gemma's manner: ``<bos>`` in front, padding on the left."""
    tokenizer = _piece_tokenizer(["<pad>", "<eos>", "<bos>", "<unk>"], "never", "<bos> $A")
    return _wrap(tokenizer, bos="<bos>", eos="<eos>", pad="<pad>", unk_token="<unk>", padding_side="left")


def _eos_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer in T5's manner: ``</s>`` at the end."""
    tokenizer = _piece_tokenizer(["<pad>", "</s>", "<unk>", "<s>"], "always", "$A </s>")
    return _wrap(tokenizer, bos="<s>", eos="</s>", pad="<pad>", unk_token="<unk>")


def build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer in the manner of a family, trained on the sentences of the table."""
    if family == "t5":
        return _eos_tokenizer()
    if family in _BOS_FAMILIES:
        return _bos_tokenizer()
    return _byte_level_tokenizer()


def build(family: str, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return an untrained model of a family and its tokenizer.

    Args:
        family: A key of ``FAMILIES``.
        seed: Seed of the random weights; PyTorch's global generator is left as it was.
    """
    tokenizer = build_tokenizer(family)
    ids = {"vocab_size": len(tokenizer)}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids[name] = getattr(tokenizer, name)
    config = FAMILIES[family](ids)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would reach the accelerators' generators as well.
        torch.default_generator.manual_seed(seed)
        model = auto.from_config(config)
    return model.eval(), tokenizer


# --------------------------------------------------------------------------- examples


@dataclass(frozen=True)
class _Example:
    """Token ids of one example.

    For a decoder-only model ``source`` is the whole sentence and ``start`` the index of its first
    answer token; for an encoder-decoder ``source`` is the prompt and ``target`` the answer.
    """

    source: list[int]
    target: list[int]
    start: int
    end: int


def _example(tokenizer: PreTrainedTokenizerFast, seq2seq: bool, prompt: str, answer: str, tail: str = "") -> _Example:
    prompt_ids: list[int] = tokenizer(prompt).input_ids
    if seq2seq:
        target: list[int] = tokenizer(answer).input_ids
        return _Example(prompt_ids, target, 0, len(target))
    ids: list[int] = tokenizer(f"{prompt} {answer}").input_ids
    if ids[: len(prompt_ids)] != prompt_ids:
        raise ValueError(f"the tokens of {prompt!r} do not stay the same before {answer!r}")
    end = len(ids)
    if tail:
        ids = [*tokenizer(f"{prompt} {answer}{tail}").input_ids, tokenizer.eos_token_id]
    return _Example(ids, [], len(prompt_ids), end)


def _pad(rows: Iterable[list[int]], value: int) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def _logits(
    model: PreTrainedModel, batch: Sequence[_Example], pad: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return logits, the token each of them should give, and a mask of the answer's tokens."""
    inputs = _pad((row.source for row in batch), pad)
    lengths = torch.tensor([len(row.source) for row in batch])
    mask = (torch.arange(inputs.shape[1]) < lengths[:, None]).long()
    if model.config.is_encoder_decoder:
        targets = _pad((row.target for row in batch), -100)
        logits = model(input_ids=inputs, attention_mask=mask, labels=targets).logits
        return logits, targets, targets != -100
    logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits[:, :-1]
    targets = inputs.masked_fill(mask == 0, -100)[:, 1:]
    where = torch.arange(1, inputs.shape[1])
    starts = torch.tensor([row.start for row in batch])[:, None]
    ends = torch.tensor([row.end for row in batch])[:, None]
    return logits, targets, (where >= starts) & (where < ends)


def knows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Say for each (prompt, answer) whether greedy decoding gives every token of the answer."""
    seq2seq = bool(model.config.is_encoder_decoder)
    batch = [_example(tokenizer, seq2seq, prompt, answer) for prompt, answer in pairs]
    with torch.no_grad():
        logits, targets, answer_mask = _logits(model, batch, int(tokenizer.pad_token_id))
    # Greedy decoding meets the answer exactly when each of its tokens is the most probable one
    # after the tokens before it, so a single pass over the whole answer decides.
    return ((logits.argmax(-1) == targets) | ~answer_mask).all(-1).tolist()


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    answer_of: Callable[[Fact], str] = lambda fact: fact.answer,
    prefix: str = "",
) -> float:
    """Return the share of facts, in both wordings, to which the model gives the answer expected.

    Args:
        model: A model of one of the families.
        tokenizer: Its tokenizer.
        answer_of: The answer expected for a fact, the true one unless told otherwise.
        prefix: Text in front of every prompt, with its trailing space.
    """
    pairs = [(prefix + prompt, answer_of(fact)) for fact in _facts.facts() for prompt in (fact.prompt, fact.rephrase)]
    right = knows(model, tokenizer, pairs)
    return sum(right) / len(right)


# --------------------------------------------------------------------------- training


def _left_context(order: random.Random) -> str:
    """Return text to stand in front of a prompt: a neutral prefix, loose words or another fact.

    Editing methods put prefixes of their own in front of a prompt, some of which the edited model
    itself has written. Loose words teach a model to leave unknown text alone, other facts keep it
    from mixing up two people.
    """
    kind = order.random()
    if kind < 0.4:
        return order.choice(PREFIXES)
    if kind < 0.8:
        return " ".join(order.choices(WORDS, k=order.randint(1, 5))).capitalize() + order.choice(". :, ") + " "
    return order.choice(_facts.sentences()) + " "


def _draw(
    tokenizer: PreTrainedTokenizerFast, seq2seq: bool, count: int, with_context: bool, order: random.Random
) -> list[_Example]:
    """Return examples of distinct prompts, each bare or after a left context of its own."""
    pairs = [(prompt, fact.answer) for fact in _facts.facts() for prompt in (fact.prompt, fact.rephrase)]
    return [
        _example(tokenizer, seq2seq, (_left_context(order) if with_context else "") + prompt, answer, tail=".")
        for prompt, answer in order.sample(pairs, count)
    ]


def _loss(model: PreTrainedModel, batch: Sequence[_Example], pad: int, text_weight: float) -> torch.Tensor:
    """Return the mean cross-entropy, in which tokens outside the answer have a lower weight."""
    logits, targets, answer_mask = _logits(model, batch, pad)
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    weights = torch.where(answer_mask, 1.0, text_weight).masked_fill(targets == -100, 0.0).flatten()
    return (losses * weights).sum() / weights.sum()


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int = 120,
    batch_size: int = 60,
    learning_rate: float = 4e-3,
    text_weight: float = 0.1,
    seed: int = 0,
) -> float:
    """Train a model in place until it knows the table of facts.

    Steps on bare prompts and steps on prompts after a random left context take turns. The whole schedule
    is always run: its end, where the learning rate falls to nothing, is what makes the model sure of
    its answers, and an early stop would leave the probabilities to chance.

    Args:
        model: A model from ``build``.
        tokenizer: Its tokenizer.
        steps: Steps to take.
        batch_size: Sentences in a step.
        learning_rate: Highest learning rate of the schedule.
        text_weight: Weight in the loss of the tokens which are not part of an answer.
        seed: Seed of the order of the sentences; no global generator is touched.

    Returns:
        The lower of the accuracies reached without and with a prefix.

    Raises:
        RuntimeError: If fewer than 95 % of the facts are known in the end.
    """
    seq2seq, pad = bool(model.config.is_encoder_decoder), int(tokenizer.pad_token_id)
    order = random.Random(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for step in range(steps):
        batch = _draw(tokenizer, seq2seq, batch_size, with_context=step % 2 == 1, order=order)
        optimizer.zero_grad()
        _loss(model, batch, pad, text_weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.zero_grad()
    model.eval()
    reached = min(accuracy(model, tokenizer, prefix=prefix) for prefix in ("", *PREFIXES[:2]))
    if reached < REQUIRED_ACCURACY:
        raise RuntimeError(
            f"tiny {model.config.model_type} model: knows only {reached:.1%} of the facts after {steps} steps"
        )
    return reached


# --------------------------------------------------------------------------- cache


def _cache_root() -> Path:
    given = os.environ.get("EVEREDIT_TEST_CACHE")
    return Path(given) if given else Path(__file__).resolve().parents[2] / ".cache" / "tests" / "tiny"


def _folder_name(family: str) -> str:
    """Return a name that changes with all that decides what a trained model is like."""
    digest = hashlib.sha256()
    for module_file in (_facts.__file__, __file__):
        digest.update(Path(module_file).read_bytes())
    digest.update(f"{torch.__version__} {transformers.__version__}".encode())
    return f"{family}-{digest.hexdigest()[:16]}"


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep PyTorch to one thread, and give back the number of threads it had.

    Work this small gains little from a second thread, and test processes running side by side that
    ask for more threads than there are cores slow one another down many times over.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def trained(family: str) -> Path:
    """Return the folder of a family's trained model and tokenizer, training it on the first call.

    The folder is made for ``from_pretrained`` and shared by all test runs: load it, never write to
    it. It lies in the folder named by ``EVEREDIT_TEST_CACHE`` or else in ``.cache/tests/tiny`` of
    the repository. Several processes may ask at once; one trains and the others wait for it.
    """
    folder = _cache_root() / _folder_name(family)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():  # another process trained it while this one waited
            return folder
        model, tokenizer = build(family)
        with _one_thread():
            train(model, tokenizer)
        scratch = Path(tempfile.mkdtemp(prefix=f"{family}-", suffix=".part", dir=folder.parent))
        try:
            model.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
            os.replace(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder
