"""How a question is put to a model that answers freely: alone, in an instruction with marks, or in its chat form."""

from __future__ import annotations

from everedit.errors import NotApplicable
from everedit.models import LanguageModel

__all__ = ["CHAT", "CONTEXTS", "INSTRUCTION", "QUESTION", "asked_in", "require_context"]

CONTEXTS = QUESTION, INSTRUCTION, CHAT = "question", "instruction", "chat"

_INSTRUCTION_FORM = "Answer the question briefly.\nQ: {}\nA:"


def asked_in(lm: LanguageModel, context: str, prompt: str) -> str:
    """Return the text that puts ``prompt`` to the model in a context: ``question``, ``instruction`` or ``chat``."""
    if context == QUESTION:
        return prompt
    if context == INSTRUCTION:
        return _INSTRUCTION_FORM.format(prompt)
    text = lm.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    # The tokenizer puts its own start token there once more.
    start = lm.tokenizer.bos_token
    doubled = start and lm.tokenizer.encode("") == [lm.tokenizer.bos_token_id]
    return str(text).removeprefix(str(start)) if doubled else str(text)


def require_context(lm: LanguageModel, context: str, protocol: str) -> None:
    """Raise :class:`NotApplicable` if a protocol asks in the chat form and the model has none."""
    if context == CHAT and not lm.tokenizer.chat_template:
        raise NotApplicable(
            what="the model has no chat form to ask in",
            where=f"{lm.name}, protocol {protocol}",
            fix="take wild/question@1 or wild/instruction@1",
        )
