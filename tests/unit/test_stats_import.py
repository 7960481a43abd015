"""Second moments in ROME's npz form: imported they are what gathering gives, and anything else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from everedit.cli.main import app
from everedit.editor import Editor
from everedit.engine.moments import Corpus, MomentStore, describe_cached
from everedit.engine.npz import import_moments, layer_of
from everedit.errors import EditError
from everedit.experiments import RunConfig
from everedit.experiments.run import make_editor
from tests.support import tiny
from tests.support.editing import METHOD_SETTINGS, home_town
from tests.support.loading import bits, fresh, shared

pytestmark = pytest.mark.usefixtures("own_cache")

WIDTH = 256


@pytest.fixture
def gathered(corpus_path: Path) -> Any:
    """The second moment of a layer of the tiny GPT-2, gathered here."""
    return MomentStore(shared("gpt2"), Corpus(corpus_path, 4096, 64)).get([1])[1]


def write_npz(folder: Path, moment: Any, name: str = "transformer.h.1.mlp.c_proj_float32_mom2_100000.npz") -> Path:
    """A file as ``layer_stats`` writes it: its constructor, the count, the sum, and the sample size."""
    arrays = {
        "mom2.constructor": "util.runningstats.SecondMoment()",
        "mom2.count": moment.tokens,
        "mom2.mom2": (moment.matrix * moment.tokens).numpy(),
        "sample_size": 100_000,
    }
    np.savez(folder / name, **arrays)
    return folder / name


def test_an_imported_moment_is_the_mean_that_was_gathered(gathered: Any, tmp_path: Path) -> None:
    file = write_npz(tmp_path, gathered)
    lm = shared("gpt2")
    assert layer_of(file, lm.layout) == 1
    store = MomentStore(lm, Corpus(imported="wikipedia"), root=tmp_path / "moments")
    assert import_moments(store, {1: file})[1].exists()
    found = MomentStore(lm, Corpus(imported="wikipedia"), root=tmp_path / "moments").get([1])[1]
    assert found.tokens == gathered.tokens
    assert torch.allclose(found.matrix, gathered.matrix, rtol=1e-12)
    [listed] = describe_cached(tmp_path / "moments", safe_open)
    assert (listed["layers"], listed["text"]) == ([1], "imported: wikipedia")


def test_edits_with_imported_moments_are_those_with_gathered_ones(
    gathered: Any, corpus_path: Path, tmp_path: Path
) -> None:
    file = write_npz(tmp_path, gathered)
    words = ["stats", "import", file, "--model", tiny.trained("gpt2"), "--name", "wiki", "--json"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "wiki"
    weights = []
    for stats in ({"imported": "wiki"}, {"corpus": corpus_path, "tokens": 4096, "window_tokens": 64}):
        config = RunConfig.model_validate(
            {"method": "rome", "method_settings": METHOD_SETTINGS["rome"], "stats": stats, "model": "tiny"}
        )
        editor = make_editor(fresh("gpt2"), config)
        editor.edit(home_town(0), score=False)
        weights.append(bits(editor.lm)["transformer.h.1.mlp.c_proj.weight"])
    base = bits(shared("gpt2"))["transformer.h.1.mlp.c_proj.weight"]
    assert float((weights[0] - base).norm()) > 1e-3
    assert float((weights[0] - weights[1]).norm()) < 1e-5 * float((weights[0] - base).norm())


def test_a_layer_that_was_not_imported_is_an_error_and_not_gathered(gathered: Any, tmp_path: Path) -> None:
    lm = fresh("gpt2")
    store = MomentStore(lm, Corpus(imported="wikipedia"), root=tmp_path)
    import_moments(store, {1: write_npz(tmp_path, gathered)})
    with pytest.raises(EditError, match="layer 0 of this model were imported"):
        store.get([0, 1])
    editor = Editor(lm, "memit", method_settings=METHOD_SETTINGS["memit"], corpus=Corpus(imported="nothing"))
    before = bits(lm)
    with pytest.raises(EditError, match=r"stats\.imported=nothing"):
        editor.edit(home_town(0))
    assert all(torch.equal(now, before[name]) for name, now in bits(lm).items())


BAD = {
    "no zip": b"this is no archive",
    "empty": b"",
    "pickle": None,
    "no count": {"mom2.mom2": np.eye(WIDTH)},
    "other size": {"mom2.mom2": np.eye(7), "mom2.count": 3},
    "no keys": {"mom2.mom2": np.eye(WIDTH), "mom2.count": 0},
    "not finite": {"mom2.mom2": np.full((WIDTH, WIDTH), np.nan), "mom2.count": 3},
    "not symmetric": {"mom2.mom2": np.triu(np.ones((WIDTH, WIDTH))), "mom2.count": 3},
    "negative": {"mom2.mom2": -np.eye(WIDTH), "mom2.count": 3},
    "a name": {"mom2.mom2": np.array("mom2"), "mom2.count": 3},
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_holds_no_second_moments(kind: str, gathered: Any, tmp_path: Path) -> None:
    file, content = tmp_path / "transformer.h.0.mlp.c_proj.npz", BAD[kind]
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is None:
        np.savez(file, **{"mom2.mom2": np.array([{"an": "object"}], dtype=object), "mom2.count": 3})
    else:
        np.savez(file, **content)
    store = MomentStore(shared("gpt2"), Corpus(imported="bad"), root=tmp_path / "moments")
    with pytest.raises(EditError, match="holds no second moments") as error:
        import_moments(store, {1: write_npz(tmp_path, gathered), 0: file})
    assert str(file) in str(error.value)
    assert not (tmp_path / "moments").exists()


def test_names_that_tell_no_layer(tmp_path: Path) -> None:
    layout = shared("gpt2").layout
    assert layer_of(Path("transformer.h.3.mlp.c_proj_float64_mom2_t4096_100000.npz"), layout) == 3
    for name in ("transformer.h.31.mlp.c_proj_float32.npz", "transformer.h.1.mlp.c_fc_float32.npz", "stats.npz"):
        with pytest.raises(EditError, match="tells no layer"):
            layer_of(Path(name), layout)
    words = ["stats", "import", "a.npz", "b.npz", "--layer", "1", "--model", str(tiny.trained("gpt2"))]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "--layer" in done.stderr
    words = ["stats", "import", str(tmp_path / "no.npz"), "--layer", "9", "--model", str(tiny.trained("gpt2"))]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "no layer 9" in done.stderr
