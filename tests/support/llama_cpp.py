"""llama.cpp's runtime, from the wheel xllamacpp, in a process of its own: what it reads, says and gives to tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_PROGRAM = """
import json, sys, urllib.request
import xllamacpp

asked = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.cpuparams.n_threads = asked["path"], asked["context"], 1
params.warmup, params.verbosity = False, 0
# Keys and values as they are computed: half precision, the default, would show in the probabilities.
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(params)

def ask(what, **body):
    url, raw = f"{server.listening_address}/{what}", json.dumps(body).encode()
    return json.load(urllib.request.urlopen(urllib.request.Request(url, raw, {"Content-Type": "application/json"})))

def tokens(text):
    return ask("tokenize", content=text, add_special=True)["tokens"]

def continuation(prompt):
    options = {"n_predict": asked["new"], "n_probs": asked["top"], "temperature": 0, "cache_prompt": False}
    answer = ask("completion", prompt=prompt, **options)
    steps = answer.get("completion_probabilities", [])
    return {
        "text": answer["content"],
        "ids": [step["id"] for step in steps],
        "top": [{other["id"]: other["logprob"] for other in step["top_logprobs"]} for step in steps],
    }

found = {"tokens": [tokens(text) for text in asked["texts"]], "said": [continuation(text) for text in asked["texts"]]}
sys.stdout.write("\\nRESULT" + json.dumps(found))
"""


def run(path: Path, texts: list[str], *, new: int = 8, top: int = 5, context: int = 128) -> dict[str, Any]:
    """Return ``tokens`` of each text, and what was ``said`` greedily behind it: ``text``, ``ids`` and, for each, the
    log-probabilities of the ``top`` tokens.
    """
    asked = {"path": str(path), "texts": texts, "new": new, "top": top, "context": context}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], input=json.dumps(asked), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.rpartition("RESULT")[2])
    return found
