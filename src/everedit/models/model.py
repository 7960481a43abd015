"""A loaded model with its tokenizer and layout: the one object that the rest of the package works on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from everedit.errors import ModelError, TokenError
from everedit.models.hooks import capture, stopping_at
from everedit.models.layout import Layout
from everedit.models.packed import direct
from everedit.models.sampling import Sampler, cut
from everedit.models.tokens import Batch, Encoded, encode, pad

__all__ = ["LanguageModel", "Redirect", "Speaker"]

_DEFAULT_CONTEXT = 1024


Redirect = Callable[[Sequence[str], Sequence[int]], "list[Speaker]"]


@dataclass(eq=False)
class LanguageModel:
    """A transformers model in evaluation mode with frozen weights, its tokenizer and its :class:`Layout`.

    ``redirect(prompts, room)`` tells what answers each prompt instead of the model itself behind the prompt as it is,
    where ``room`` tokens must fit behind it; it holds for :meth:`generate` and for all scoring.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    redirect: Redirect | None = None

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        self.layout = Layout.of(self.model)
        self._refuse_broken_weights()

    def _refuse_broken_weights(self) -> None:
        for name, weight in self.model.named_parameters():
            if not bool(torch.isfinite(weight).all()):
                raise ModelError(
                    what=f"the weight '{name}' holds values that are not finite",
                    where=self.name,
                    fix="the model is damaged; load an intact copy",
                )

    @property
    def device(self) -> torch.device:
        """The device of the embedding, where inputs go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def on_accelerator(self) -> bool:
        """Whether the model computes on a device made for it, which wants larger batches than a CPU."""
        return self.device.type != "cpu"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.model.dtype

    @property
    def context_tokens(self) -> int:
        """The longest input, in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or _DEFAULT_CONTEXT)

    @property
    def pad_id(self) -> int:
        """The id used for padding; any will do, since every input carries its mask."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(pad if pad is not None else eos if eos is not None else 0)

    @property
    def parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(weight.numel() for weight in self.model.parameters())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, shapes, dtypes and bytes of all weights as they were when first asked for."""
        hasher = hashlib.sha256()
        for name, weight in sorted(self.model.named_parameters()):
            hasher.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
            raw = weight.detach().contiguous().cpu().view(torch.uint8)
            hasher.update(memoryview(raw.numpy()).cast("B"))
        return hasher.hexdigest()

    @cached_property
    def blocks_return_tuples(self) -> bool:
        """Whether a block returns a tuple; differs by family and by version of transformers."""
        kinds: list[bool] = []
        block = self.layout.block(0)
        handle = block.register_forward_hook(lambda _m, _a, output: kinds.append(isinstance(output, tuple)))
        try:
            with torch.no_grad(), stopping_at(block):
                ids = torch.tensor([[self.pad_id]], device=self.device)
                self.model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        finally:
            handle.remove()
        return kinds[0]

    def encode(self, prompt: str, target: str = "", **options: Any) -> Encoded:
        """Tokenise with this model's tokenizer and context; see :func:`everedit.models.tokens.encode`."""
        return encode(self.tokenizer, prompt, target, max_tokens=self.context_tokens, **options)

    def pad(self, rows: Sequence[Sequence[int]], **options: Any) -> Batch:
        """Pad rows of ids on this model's device; see :func:`everedit.models.tokens.pad`."""
        return pad(rows, self.pad_id, device=self.device, **options)

    def states(self, **inputs: Any) -> Tensor:
        """Return the hidden states after the final norm, (rows, length, H); no logits are computed.

        Of an encoder-decoder they are the decoder's; it takes ``decoder_input_ids`` and the encoder's inputs or its
        ``encoder_states``.
        """
        if not self.layout.is_decoder_only:
            return self._decoder_states(**inputs)
        inputs.setdefault("use_cache", False)
        with direct([self.model.base_model]):
            return self.model.base_model(**inputs).last_hidden_state

    def _decoder_states(
        self,
        decoder_input_ids: Tensor,
        attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_states: Tensor | None = None,
    ) -> Tensor:
        with direct([self.model]):
            if encoder_states is None:
                encoder_states = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)[0]
            return self.model.get_decoder()(
                input_ids=decoder_input_ids,
                attention_mask=decoder_attention_mask,
                encoder_hidden_states=encoder_states,
                encoder_attention_mask=attention_mask,
                use_cache=False,
            ).last_hidden_state

    def logits(self, states: Tensor) -> Tensor:
        """Return float32 logits (..., vocabulary) of final states (..., H), as the model itself makes them."""
        head = self.model.get_output_embeddings()
        with direct([head]):
            logits = head(states).float()
        config = self.model.config
        if not self.layout.is_decoder_only and getattr(config, "scale_decoder_outputs", config.tie_word_embeddings):
            # T5 with tied embeddings.
            logits = logits * config.d_model**-0.5
        if scale := getattr(config, "logits_scaling", None):
            logits = logits / scale
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        top_k: int | None = None,
        seed: int | Sequence[int] | None = None,
        min_new_tokens: int = 0,
    ) -> list[str]:
        """Continue each prompt and return the new text alone, special tokens left out.

        Greedy without ``top_k``; with it, sampled from the ``top_k`` most probable tokens (0: from all) with
        ``seed`` (0 if None), or with a seed for each row; the process's own random state is not used. Rows end at the
        tokenizer's EOS or at any of ``stop_ids``.
        """
        speakers = self.speakers(prompts, [max_new_tokens] * len(prompts))
        texts = [""] * len(prompts)
        for index, speaker in enumerate(speakers):
            if speaker.second is not None:
                texts[index] = self._generate_mixed(speaker, max_new_tokens, stop_ids)
        for lm in dict.fromkeys(speaker.lm for speaker in speakers if speaker.second is None):
            own = [index for index, speaker in enumerate(speakers) if speaker.lm is lm and speaker.second is None]
            new = lm.generate_ids(
                [encode(lm.tokenizer, speakers[index].prompt).ids or (lm._start_id(),) for index in own],
                max_new_tokens=max_new_tokens,
                stop_ids=stop_ids,
                top_k=top_k,
                seed=[seed[index] for index in own] if isinstance(seed, Sequence) else seed,
                min_new_tokens=min_new_tokens,
            )
            for index, row in zip(own, new, strict=True):
                texts[index] = str(lm.tokenizer.decode(row, skip_special_tokens=True))
        return texts

    def _generate_mixed(self, speaker: Speaker, room: int, stop_ids: Sequence[int]) -> str:
        """Return what two models write together, greedily."""
        from everedit.models.mixture import MixedPrompts
        from everedit.models.prefill import prefilled

        assert speaker.second is not None
        first, second = (prefilled(by.lm, [by.lm.encode(by.prompt).ids]) for by in (speaker, speaker.second))
        mixed = MixedPrompts(first, second, torch.tensor([speaker.share], device=self.device))
        stops = torch.zeros(1, self.model.config.vocab_size, dtype=torch.bool, device=self.device)
        ends = [token for token in (self.tokenizer.eos_token_id, *stop_ids) if token is not None]
        stops[:, ends] = True
        one = torch.zeros(1, dtype=torch.long, device=self.device)
        [new] = mixed.continuations(one, one + room, stops)
        return str(self.tokenizer.decode(new, skip_special_tokens=True))

    def speakers(self, prompts: Sequence[str], room: Sequence[int]) -> list[Speaker]:
        """Return what answers each prompt, with ``room`` tokens to come behind it."""
        if self.redirect is None:
            return [Speaker(self, prompt) for prompt in prompts]
        return self.redirect(prompts, room)

    def _start_id(self) -> int:
        start = self.tokenizer.bos_token_id
        return int(start if start is not None else self.pad_id)

    @torch.no_grad()
    def generate_ids(
        self,
        rows: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        stop_ids: Sequence[int] = (),
        top_k: int | None = None,
        seed: int | Sequence[int] | None = None,
        min_new_tokens: int = 0,
    ) -> list[list[int]]:
        """As :meth:`generate`, from ids to the new ids of each row, cut at the first stop token (included).

        Raises :class:`TokenError` if the longest row and what it may grow by do not fit the model's context.
        """
        longest = max(len(row) for row in rows)
        if longest + max_new_tokens > self.context_tokens:
            raise TokenError(
                what=f"a prompt of {longest} tokens and {max_new_tokens} new ones do not fit the model's context, "
                f"which holds {self.context_tokens}",
                fix="shorten the prompt or generate fewer tokens",
            )
        if not self.layout.is_decoder_only and self.tokenizer.eos_token_id is not None:
            # An encoder reads the end of its text; what is written starts behind the decoder's start token.
            rows = [[*row, self.tokenizer.eos_token_id] for row in rows]
        batch = self.pad(rows, side="left")
        ends = [token for token in (self.tokenizer.eos_token_id, *stop_ids) if token is not None]
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=self.pad_id,
        )
        sampler = LogitsProcessorList([] if top_k is None else [Sampler(top_k, seed or 0)])
        out = self.model.generate(
            input_ids=batch.ids, attention_mask=batch.mask, generation_config=config, logits_processor=sampler
        )
        fresh = out[:, batch.ids.shape[1] if self.layout.is_decoder_only else 1 :].tolist()
        return [cut(row, set(ends)) for row in fresh]

    def check_logits(self) -> None:
        """Raise :class:`ModelError` unless states and head, put together here, give the model's own logits."""
        ids = torch.arange(1, 6, device=self.device)[None] % self.model.config.vocab_size
        inputs = {"input_ids": ids} | ({} if self.layout.is_decoder_only else {"decoder_input_ids": ids})
        with torch.no_grad():
            expected = self.model(**inputs, use_cache=False).logits.float()
            found = self.logits(self.states(**inputs))
        # A model makes its scaling and capping in the dtype of its weights, this in float32.
        slack = max(1e-3, 4 * torch.finfo(self.dtype).eps)
        if not bool((expected - found).abs().max() <= slack * expected.abs().max()):
            raise ModelError(
                what="the model changes its logits in a way that is not known here",
                where=f"model_type {self.model.config.model_type}",
                fix="teach LanguageModel.logits the scaling that this family applies after its head",
            )

    def inputs_of(self, modules: dict[Any, torch.nn.Module], batch: Batch) -> dict[Any, Tensor]:
        """Return the inputs of ``modules`` on a batch, (rows, length, d_in) each, running no further than needed."""
        wanted = set(modules.values())
        last = next(module for module in reversed(list(self.model.modules())) if module in wanted)
        with torch.no_grad(), capture(inputs=modules, rows=len(batch)) as seen, stopping_at(last, before=True):
            self.states(**batch.inputs())
        return seen


@dataclass(frozen=True)
class Speaker:
    """What answers a prompt: a model, behind a prompt that may have been rewritten.

    ``shared`` is how the prompt begins, where others begin like it and that part had better run once for all of them.
    With a ``second`` speaker the two answer together, p = (1 - share) p_first + share p_second.
    """

    lm: LanguageModel
    prompt: str
    shared: str = ""
    second: Speaker | None = None
    share: float = 0.0
