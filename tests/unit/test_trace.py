"""Causal tracing against a naive one: whole forwards of plain rows, one cell after the other, noise drawn again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from everedit.cli.main import app
from everedit.engine.trace import KINDS, Trace, TraceConfig, trace
from everedit.errors import NotApplicable, RunFolderError, TokenError
from everedit.report.trace_figure import write_trace_figure
from tests.support import facts, tiny
from tests.support.loading import bits, hooks_left, same_bits, shared

pytestmark = pytest.mark.usefixtures("own_cache")

FAMILIES = ["gpt2", "llama", "gptj", "opt", "gemma2"]
FACT = facts.facts()[40]
PROMPT, SUBJECT = FACT.rephrase, FACT.subject  # "The home town of ... is" and the like: text on both sides
QUICK = TraceConfig(samples=3, window=3, noise=0.5)
LAYERS = 4


def strong(family: str, config: TraceConfig = QUICK) -> TraceConfig:
    """Noise that a family feels: Gemma's embeddings are eight times as large as they are stored."""
    return config.model_copy(update={"noise": 8 * config.noise}) if family == "gemma2" and config.noise else config


def traced(family: str, config: TraceConfig = QUICK, prompt: str = PROMPT, subject: str = SUBJECT) -> Trace:
    return trace(shared(family), prompt, subject, strong(family, config))


# --------------------------------------------------------------------------- the naive one


class Naive:
    """A clean run and a corrupted one, kept whole, and a forward of all rows for every cell."""

    def __init__(self, family: str, config: TraceConfig, prompt: str = PROMPT, subject: str = SUBJECT) -> None:
        self.lm, self.config = shared(family), strong(family, config)
        self.ids = self.lm.tokenizer(prompt)["input_ids"]
        # The subject's tokens, from what the tokenizer says of its characters.
        offsets = self.lm.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
        start = prompt.rindex(subject)
        inside = [i for i, (a, b) in enumerate(offsets) if b > max(start, a) and a < start + len(subject)]
        self.first, self.end = inside[0], inside[-1] + 1
        layout = self.lm.layout
        self.modules = {
            (kind, layer): module
            for layer in range(LAYERS)
            for kind, module in zip(
                KINDS, (layout.block(layer), layout.mlp_out(layer), layout.attention_out(layer)), strict=True
            )
        }
        self.kept: dict[Any, Tensor] = {}
        chances = self.run(1, corrupted=False, keep="clean")
        self.answer = int(chances[0].argmax())
        self.clean = float(chances[0, self.answer])
        self.corrupted = float(self.run(config.samples, keep="noisy")[:, self.answer].mean())

    def noise(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.config.seed)
        shape = (self.config.samples, self.end - self.first, self.lm.layout.hidden_size)
        if self.config.shape == "uniform":
            return (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5) * 2
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def run(self, rows: int, *, corrupted: bool = True, keep: str = "", put: dict[Any, Any] | None = None) -> Tensor:
        """Next-token distributions; ``put`` gives, by module, changes of its output as (rows, tokens, H)."""

        def corrupt(whole: Tensor) -> None:
            moved = self.config.noise * self.noise()
            part = whole[:, self.first : self.end]
            part.copy_(moved if self.config.replace else part.double() + moved)

        def hooked(key: Any, change: Callable[[Tensor], None] | None) -> Callable[..., Any]:
            def hook(_: nn.Module, __: Any, output: Any) -> Any:
                given = output[0] if isinstance(output, tuple) else output
                whole = given.reshape(rows, len(self.ids), -1).clone()
                if change:
                    change(whole)
                if keep:
                    self.kept[keep, key] = whole.clone()
                whole = whole.view_as(given)
                return (whole, *output[1:]) if isinstance(output, tuple) else whole

            return hook

        changes = dict(put or {})
        with ExitStack() as stack:
            for key, module in self.modules.items():
                if key in changes or keep:
                    stack.callback(module.register_forward_hook(hooked(key, changes.get(key))).remove)
            if corrupted:
                embed = self.lm.model.get_input_embeddings()
                stack.callback(embed.register_forward_hook(hooked("embedding", corrupt)).remove)
            with torch.no_grad():
                logits = self.lm.model(torch.tensor([self.ids] * rows), use_cache=False).logits
        return logits[:, -1].float().softmax(-1)

    def cell(self, keys: Sequence[tuple[str, int]], token: int, held: Sequence[tuple[str, int]] = ()) -> float:
        """The effect of restoring some modules' outputs at a token, with others held as they were when corrupted."""

        def putting(source: str, key: tuple[str, int]) -> Callable[[Tensor], None]:
            def change(whole: Tensor) -> None:
                whole[:, token] = self.kept[source, key][:, token]

            return change

        put = {key: putting("clean", key) for key in keys} | {key: putting("noisy", key) for key in held}
        return float(self.run(self.config.samples, put=put)[:, self.answer].mean()) - self.corrupted

    def map(self, kind: str) -> Tensor:
        found = torch.zeros(len(self.ids), LAYERS)
        for token in range(len(self.ids)):
            for layer in range(LAYERS):
                width = self.config.window
                window = [at for at in range(layer - width // 2, layer - width // 2 + width) if 0 <= at < LAYERS]
                keys = [(kind, layer)] if kind == "state" else [(kind, at) for at in window]
                cut = self.config.severed if kind == "state" else None
                held = [(cut, at) for at in range(layer + 1, LAYERS)] if cut else []
                found[token, layer] = self.cell(keys, token, held)
        return found


CONFIGS = {
    "usual": QUICK,
    "uniform": QUICK.model_copy(update={"shape": "uniform", "seed": 5}),
    "replace": QUICK.model_copy(update={"replace": True, "window": 2}),
    "severed mlp": QUICK.model_copy(update={"severed": "mlp", "kinds": ("state",)}),
    "severed attention": QUICK.model_copy(update={"severed": "attention", "kinds": ("state",)}),
}


@pytest.mark.parametrize(
    ("family", "name"), [*((family, "usual") for family in FAMILIES), *(("gpt2", n) for n in CONFIGS if n != "usual")]
)
def test_every_map_is_that_of_whole_forwards_with_plain_hooks(family: str, name: str) -> None:
    config, lm = CONFIGS[name], shared(family)
    before, generator = bits(lm), torch.get_rng_state()
    found, naive = traced(family, config), Naive(family, config)
    assert found.subject == (naive.first, naive.end)
    assert "".join(found.tokens[naive.first : naive.end]).replace("▁", " ").strip().replace(" ", "") in (
        SUBJECT.replace(" ", "")
    )
    assert found.answer == lm.tokenizer.decode([naive.answer])
    assert found.clean == pytest.approx(naive.clean, rel=1e-4)
    assert found.corrupted == pytest.approx(naive.corrupted, rel=1e-3)
    assert naive.clean - naive.corrupted > 0.05  # there is something to be found
    assert set(found.effects) == set(config.kinds)
    for kind in config.kinds:
        expected = naive.map(kind)
        assert float(expected.abs().max()) > 1e-3
        torch.testing.assert_close(found.effects[kind], expected, rtol=1e-3, atol=1e-5)
    assert same_bits(lm, before)
    assert hooks_left(lm) == []
    assert torch.equal(torch.get_rng_state(), generator)


# --------------------------------------------------------------------------- what must hold in any causal model


@pytest.mark.parametrize("family", FAMILIES)
def test_without_noise_nothing_is_lost_and_nothing_restored(family: str) -> None:
    found = traced(family, QUICK.model_copy(update={"noise": 0.0}))
    assert found.corrupted == pytest.approx(found.clean, abs=1e-6)
    assert all(float(effects.abs().max()) < 1e-6 for effects in found.effects.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_last_block_holds_decides_at_the_last_token_and_nowhere_else(family: str) -> None:
    found = traced(family)
    total, states = found.clean - found.corrupted, found.effects["state"]
    assert total > 0.05
    # The last token's final state is all that the answer is read from, and in the last block no other token is.
    assert float(states[-1, -1]) == pytest.approx(total, abs=1e-5)
    assert float(states[:-1, -1].abs().max()) < 1e-6
    assert float(states[:-1, 0].abs().max()) > 1e-3
    single = traced(family, QUICK.model_copy(update={"window": 1}))
    assert all(float(single.effects[kind][:-1, -1].abs().max()) < 1e-6 for kind in ("mlp", "attention"))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_what_stands_before_the_subject_has_no_effect(family: str) -> None:
    found = traced(family)
    first = found.subject[0]
    assert first > 1
    assert all(bool((effects[:first] == 0).all()) for effects in found.effects.values())
    # Not by decree alone: the naive one measures nothing there either.
    naive = Naive(family, QUICK)
    assert abs(naive.cell([("state", 1)], first - 1)) < 1e-6
    assert abs(naive.cell([("mlp", 1)], first - 1)) < 1e-6


def test_a_subject_that_is_the_last_token_is_restored_by_any_one_of_its_states() -> None:
    prompt = "The home town of Mira Lanner is the"
    found = traced("gpt2", prompt=prompt, subject="the")
    assert found.subject == (len(found.tokens) - 1, len(found.tokens))
    total = found.clean - found.corrupted
    assert abs(total) > 1e-3
    assert found.effects["state"][-1].tolist() == pytest.approx([total] * LAYERS, abs=1e-5)
    # Where other tokens have attended to the noise, one state is not enough.
    early = traced("gpt2", prompt="The home town of Mira Lanner is", subject="The")
    assert early.subject == (0, 1)
    assert abs(float(early.effects["state"][0, 0]) - (early.clean - early.corrupted)) > 1e-4


def test_a_window_of_one_is_a_single_module_and_a_wide_one_is_all_of_them() -> None:
    single, wide = (traced("llama", QUICK.model_copy(update={"window": width})) for width in (1, 2 * LAYERS))
    naive = Naive("llama", QUICK)
    last = single.subject[1] - 1
    for kind in ("mlp", "attention"):
        for layer in range(LAYERS):
            assert float(single.effects[kind][last, layer]) == pytest.approx(
                naive.cell([(kind, layer)], last), rel=1e-3, abs=1e-6
            )
        everywhere = naive.cell([(kind, layer) for layer in range(LAYERS)], last)
        assert abs(everywhere) > 1e-4
        assert wide.effects[kind][last].tolist() == pytest.approx([everywhere] * LAYERS, rel=1e-3)
    # States are restored one at a time, however wide the window.
    assert torch.equal(single.effects["state"], wide.effects["state"])


def test_severing_leaves_the_last_blocks_column_and_moves_others() -> None:
    plain, severed = (traced("gpt2", QUICK.model_copy(update={"severed": what})) for what in (None, "mlp"))
    assert torch.equal(plain.effects["state"][:, -1], severed.effects["state"][:, -1])
    assert float((plain.effects["state"] - severed.effects["state"])[:, :-1].abs().max()) > 1e-3
    assert torch.equal(plain.effects["mlp"], severed.effects["mlp"])


def test_a_seed_decides_the_maps_whatever_was_drawn_before() -> None:
    one, again, other = ((torch.rand(2), traced("gpt2", QUICK.model_copy(update={"seed": s})))[1] for s in (1, 1, 2))
    assert one.as_dict() == again.as_dict()
    assert all(torch.equal(one.effects[kind], again.effects[kind]) for kind in KINDS)
    assert one.corrupted != other.corrupted


def test_the_noise_is_three_deviations_of_the_subjects_embeddings() -> None:
    lm, names = shared("gpt2"), facts.SUBJECTS[:5]
    table = lm.model.get_input_embeddings().weight
    for given, used in (((), [SUBJECT]), (names, names)):
        tokens = [token for name in used for token in lm.tokenizer(name)["input_ids"]]
        found = trace(lm, PROMPT, SUBJECT, TraceConfig(samples=1, kinds=("state",)), subjects=given)
        assert found.noise == pytest.approx(3 * float(table[tokens].std()), rel=1e-5)


def test_cells_in_small_batches_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = traced("llama")
    monkeypatch.setattr("everedit.engine.trace._TOKENS_A_BATCH", 1)
    parts = traced("llama")
    for kind in KINDS:
        torch.testing.assert_close(parts.effects[kind], whole.effects[kind], rtol=1e-4, atol=1e-6)


def test_progress_counts_the_columns() -> None:
    steps: list[tuple[int, int]] = []
    trace(shared("gpt2"), PROMPT, SUBJECT, QUICK, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(done, 3 * LAYERS) for done in range(1, 3 * LAYERS + 1)]


def test_what_cannot_be_traced() -> None:
    with pytest.raises(TokenError, match="does not occur in the prompt"):
        traced("gpt2", subject="Ada Lovelace")
    with pytest.raises(NotApplicable, match="causal tracing"):
        trace(shared("t5"), PROMPT, SUBJECT, QUICK)


# --------------------------------------------------------------------------- the command


def run(*words: object, code: int = 0) -> Any:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["trace", *(str(word) for word in words)])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture
def words(tmp_path: Path) -> list[object]:
    flags = ["--model", tiny.trained("gpt2"), "--device", "cpu", "--prompt", PROMPT, "--out", tmp_path / "out"]
    return [*flags, "--samples", 2, "--window", 3, "--noise", 0.5]


def test_the_command_writes_the_numbers_and_a_figure(words: list[object], tmp_path: Path) -> None:
    shown = json.loads(run(*words, "--subject", SUBJECT, "--seed", 3, "--json").stdout)
    written = json.loads((tmp_path / "out" / "trace.json").read_text(encoding="utf-8"))
    expected = traced("gpt2", TraceConfig(samples=2, window=3, noise=0.5, seed=3)).as_dict()
    assert {name: written[name] for name in expected} == expected
    assert {name: shown[name] for name in written} == written
    assert (written["prompt"], written["settings"]["seed"]) == (PROMPT, 3)
    assert Path(shown["figure"]) == tmp_path / "out" / "trace.svg"
    texts = said_in(tmp_path / "out" / "trace.svg")
    for title in (
        "restoring one hidden state",
        "restoring MLP outputs, 3 blocks",
        "restoring attention outputs, 3 blocks",
    ):
        assert title in texts
    first, last = written["subject"]
    assert texts.count("layer") == 3
    for place, word in enumerate(written["tokens"]):
        # A star marks the subject's tokens, in each of the three panels.
        assert texts.count(word.strip() + ("*" if first <= place < last else "")) >= 3
    said = " ".join(run(*words, "--subject", SUBJECT).stdout.split())
    assert repr(written["answer"]) in said
    assert all(kind in said for kind in KINDS)


def said_in(figure: Path) -> list[str]:
    """What an SVG says, as text or, where letters are drawn as outlines, in the comments beside them."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.parse(figure, parser).getroot()
    assert root.tag.endswith("svg")
    assert sum(element.tag == "{http://www.w3.org/2000/svg}image" for element in root.iter()) >= 3
    return [(element.text or "").strip() for element in root.iter()]


def test_a_subject_that_is_not_in_the_prompt_is_one_clear_error(words: list[object], tmp_path: Path) -> None:
    for more, message in (
        (["--subject", "Ada Lovelace"], "does not occur in the prompt"),
        (["--subject", SUBJECT, "--severed", "embedding"], "severed"),
        (["--subject", SUBJECT, "--samples", "0"], "samples"),
    ):
        result = run(*words, *more, code=1)
        assert result.stdout == ""
        assert message in " ".join(result.stderr.split())
        assert "what to do:" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["the folder is a file", "above it is a file", "a file is a folder"])
def test_a_folder_that_cannot_be_written_is_met_before_the_model(place: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if place == "a file is a folder":
        (out / "trace.svg").mkdir(parents=True)
    else:
        out.write_text("not a folder")
        out = out / "below" if place == "above it is a file" else out
    result = run("--model", "/no/such/model", "--prompt", "a", "--subject", "a", "--out", out, code=1)
    said = " ".join(result.stderr.split())
    assert "the output folder cannot be written" in said
    assert "choose another --out" in said


def test_effects_that_are_all_negative_are_drawn_too(tmp_path: Path) -> None:
    """Noise may raise an answer's probability, and a subject that begins the prompt leaves no row of zeros."""
    found = {**traced("gpt2").as_dict(), "settings": {"window": 3}}
    found["effects"] = {kind: [[-0.2] * LAYERS for _ in found["tokens"]] for kind in KINDS}
    (tmp_path / "trace.json").write_text(json.dumps(found), encoding="utf-8")
    assert "layer" in said_in(write_trace_figure(tmp_path))


def test_a_trace_that_cannot_be_read_is_one_clear_error(tmp_path: Path) -> None:
    for content in (None, "{", '{"effects": 1', "[]", "{}"):
        if content is not None:
            (tmp_path / "trace.json").write_text(content, encoding="utf-8")
        with pytest.raises(RunFolderError, match="cannot read the trace"):
            write_trace_figure(tmp_path)
