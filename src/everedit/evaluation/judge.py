"""Judges of free answers: something that reads a question, a right answer and what was said, and says yes or no."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from everedit.errors import EvereditError

__all__ = ["EndpointJudge", "Judge", "JudgeConfig"]

_TASK = (
    "You grade answers. Reply with the one word CORRECT or INCORRECT. An answer is incorrect if it contradicts the "
    "reference, leaves out a required part of it, adds wrong items, or repeats itself over and over. Other wording and "
    "further context are fine."
)


@runtime_checkable
class Judge(Protocol):
    """What ``wild/judged@1`` asks: anything that can be called like this."""

    def __call__(self, question: str, answer: str, text: str) -> bool:
        """Return whether ``text`` answers the question as ``answer`` does."""
        ...


class JudgeConfig(BaseModel):
    """A model behind an endpoint that speaks OpenAI's chat completions, hosted or local (vLLM, llama.cpp, Ollama)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str = Field(description="the address up to /v1")
    model: str = Field(description="the model's name there")
    key_variable: str = Field("OPENAI_API_KEY", description="environment variable that holds the key, if there is one")
    seconds: float = Field(60.0, gt=0, description="how long to wait for one verdict")


class EndpointJudge:
    """Asks a model behind an endpoint, at temperature 0, one question at a time."""

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config

    def __call__(self, question: str, answer: str, text: str) -> bool:
        """Return the verdict. Raises :class:`EvereditError` if the endpoint does not answer or gives no verdict."""
        asked = f"Question: {question}\nReference answer: {answer}\nAnswer to grade: {text.strip() or '(none)'}"
        messages = [{"role": "system", "content": _TASK}, {"role": "user", "content": asked}]
        body = {"model": self.config.model, "messages": messages, "temperature": 0, "max_tokens": 8}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.config.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        address = f"{self.config.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.config.seconds) as response:
                said = str(json.load(response)["choices"][0]["message"]["content"]).strip().upper()
        except (OSError, urllib.error.URLError, ValueError, LookupError, TypeError) as error:
            raise EvereditError(
                what=f"the judge does not answer: {error}", where=address, fix="check judge.url and judge.model"
            ) from error
        if not said.startswith(("CORRECT", "INCORRECT")):
            raise EvereditError(
                what=f"the judge gives no verdict: {said[:60]!r}",
                where=f"{self.config.model} at {address}",
                fix="take a model that follows instructions",
            )
        return said.startswith("CORRECT")
