"""Ledgers that are old, damaged, a stranger's, or on a full disk: they open to the very model, or say what is wrong."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everedit.errors import EvereditError, LedgerError
from everedit.ledger.steps import hashes_of
from everedit.ledger.store import Ledger
from everedit.living import LivingModel
from everedit.models import LanguageModel
from tests.support.editing import home_town
from tests.support.living import fingerprint, make_living
from tests.support.loading import bits, fresh, same_bits, shared
from tests.support.steady import expected, steady_model

pytestmark = pytest.mark.usefixtures("own_cache")
OLD = sorted((Path(__file__).parents[1] / "ledgers").iterdir())


@pytest.fixture(scope="module")
def steady() -> LanguageModel:
    return steady_model()


# --------------------------------------------------------------------------- old ledgers


@pytest.mark.parametrize("folder", OLD, ids=lambda folder: folder.name)
def test_ledgers_of_every_version_keep_opening(folder: Path, steady: LanguageModel, tmp_path: Path) -> None:
    known, copy = expected(folder), tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = bits(steady)
    with LivingModel.open(copy, lm=steady) as living:
        assert fingerprint(living) == known[living.head]
        assert living.verify() == 4
        assert [commit.draft.kind for commit in living.log()] == ["forget", "edit", "edit", "edit"]
        record = living.log()[1].edits[0].record
        assert (record.by, record.source, record.until) == ("dana", "https://example.org/towns", "2030-12-31")
        assert {event.action for event in living.ledger.events()} == {"conflict", "undo"}
        for commit, state in known.items():
            living.checkout(commit)
            assert fingerprint(living) == state
        living.checkout("base")
        assert same_bits(steady, before)
        assert living.ledger.held_count() == 0


def test_a_ledger_needs_no_right_to_write_to_be_read(steady: LanguageModel, tmp_path: Path) -> None:
    shutil.copytree(OLD[0], tmp_path / "copy")
    with LivingModel.open(tmp_path / "copy", lm=steady) as living:
        assert living.log()


# --------------------------------------------------------------------------- damage

Made = TypeVar("Made")


def attempt(work: Callable[[], Made]) -> tuple[Made | None, EvereditError | None]:
    """Return what ``work`` gives, or the error that it raises on purpose; any other is a failure."""
    try:
        return work(), None
    except EvereditError as error:
        return None, error


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_ledger_is_an_error_and_never_another_model(data: st.DataObject, steady: LanguageModel) -> None:
    """Any byte of any file changed, any file cut short, lengthened, swapped with another, or gone."""
    known = expected(OLD[0])
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "copy"
        shutil.copytree(OLD[0], copy)
        files = sorted(path for path in copy.rglob("*") if path.is_file() and path.name != "expected.json")
        file = data.draw(st.sampled_from(files), label="file")
        raw = bytearray(file.read_bytes())
        kind = data.draw(st.sampled_from(["flip", "cut", "grow", "swap", "gone", "zero"]), label="kind")
        place = data.draw(st.integers(0, len(raw) - 1), label="place")
        if kind == "flip":
            raw[place] ^= data.draw(st.integers(1, 255), label="bits")
        elif kind == "cut":
            del raw[place:]
        elif kind == "grow":
            raw += data.draw(st.binary(min_size=1, max_size=50))
        elif kind == "zero":
            raw[place : place + 64] = bytes(len(raw[place : place + 64]))
        elif kind == "swap":
            raw = bytearray(data.draw(st.sampled_from(files), label="other").read_bytes())
        file.write_bytes(raw)
        if kind == "gone":
            file.unlink()
        living, error = attempt(lambda: LivingModel.open(copy, lm=steady))
        if living is None:
            assert error is not None
            assert error.what
            assert error.fix
        else:
            # Whatever was hit, it was nothing that the model is made of.
            with living:
                assert fingerprint(living) == known[living.head or "base"]
                assert living.head == (OLD[0] / "head").read_text().split()[1]
    assert same_bits(steady, bits(steady_model()))


def test_a_ledger_is_not_opened_on_another_base(tmp_path: Path) -> None:
    shutil.copytree(OLD[0], tmp_path / "copy")
    lm = shared("gpt2")
    before = bits(lm)
    with pytest.raises(LedgerError, match="is not the base model"):
        LivingModel.open(tmp_path / "copy", lm=lm)
    assert same_bits(lm, before)


@pytest.mark.parametrize(("key", "value"), [("method", "rome"), ("seed", 1), ("policy", "accumulate"), ("nonsense", 1)])
def test_a_config_that_was_changed_is_refused(key: str, value: object, steady: LanguageModel, tmp_path: Path) -> None:
    shutil.copytree(OLD[0], tmp_path / "copy")
    file = tmp_path / "copy" / "config.yaml"
    values = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**values, key: value}))
    with pytest.raises(LedgerError, match=r"config\.yaml|known settings|Extra inputs"):
        LivingModel.open(tmp_path / "copy", lm=steady)
    # Gates may be set anew.
    file.write_text(yaml.safe_dump({**values, "gates": {"lost": 0.5}}))
    with LivingModel.open(tmp_path / "copy", lm=steady) as living:
        assert living.config.gates.lost == 0.5


def test_a_strangers_paths_lead_nowhere(steady: LanguageModel, tmp_path: Path) -> None:
    shutil.copytree(OLD[0], tmp_path / "copy")
    (tmp_path / "outside.safetensors").write_bytes(b"secret")
    ledger = Ledger.open(tmp_path / "copy")
    ledger.connection.execute("INSERT INTO snapshots VALUES (?, 99, '../../outside', 1)", (ledger.head,))
    ledger.close()
    with pytest.raises(LedgerError, match="is no name of a file"):
        LivingModel.open(tmp_path / "copy", lm=steady)


def test_a_snapshot_that_is_sound_but_another_states_is_found(steady: LanguageModel, tmp_path: Path) -> None:
    shutil.copytree(OLD[0], tmp_path / "copy")
    with LivingModel.open(tmp_path / "copy", lm=steady) as living:
        head = living.head
        living.replay.keep_snapshot(head, living.replay.state(living.log()[2].id))
    with pytest.raises(LedgerError, match="not the one that was committed"):
        LivingModel.open(tmp_path / "copy", lm=steady)


def test_what_a_killed_writer_left_is_removed(steady: LanguageModel, tmp_path: Path) -> None:
    shutil.copytree(OLD[0], tmp_path / "copy")
    with LivingModel.open(tmp_path / "copy", lm=steady) as living:
        used = set(living.blobs.names())
        stray, _ = living.blobs.put({"t": torch.ones(3)}, {})
        half = tmp_path / "copy" / "blobs" / "incoming-1234"
        half.mkdir()
        (half / "blob").write_bytes(b"half")
        assert stray in set(living.blobs.names())
        living.verify()
        assert set(living.blobs.names()) == used
        living.undo()
        assert not half.exists()


# --------------------------------------------------------------------------- no room, no right


def in_a_process(work: Callable[[], None]) -> None:
    """Do ``work`` in a process of its own, which limits itself; fail if it does."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users may look into."""
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("TMPDIR", "/tmp")))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("room", [0, 100, 5_000, 20_000, 40_000, 80_000, 120_000, 200_000, 400_000])
def test_a_disk_that_is_full_costs_nothing_that_was_acknowledged(room: int, corpus_path: Path, tmp_path: Path) -> None:
    """No file may grow beyond so many bytes: every kind of file is met at its own size."""
    lm = fresh("gpt2")
    living = make_living(tmp_path / "model", corpus_path, "ultraedit", lm=lm)
    living.edit(home_town(0))
    living.edit(home_town(5))
    before, shown = fingerprint(living), bits(lm)
    ours, theirs = os.pipe()

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        for person in range(10, 34):
            head, state, edit = living.head, hashes_of(living.editor.state()), home_town(person)
            _, error = attempt(lambda edit=edit: living.edit(edit, on_conflict="keep"))  # type: ignore[misc]
            if error is not None:
                assert isinstance(error, LedgerError), error
                assert error.fix
                living.sync()
                assert living.head != head or fingerprint(living) == state
                break
            os.write(theirs, edit.id.encode() + b"\n")
        else:
            assert room >= 200_000

    in_a_process(work)
    os.close(theirs)
    made = os.read(ours, 1 << 16).decode().split()
    os.close(ours)
    assert fingerprint(living) == before
    assert same_bits(lm, shown)
    living.sync()
    held = [item.edit.id for item in living.ledger.held]
    assert held[2 : 2 + len(made)] == made
    assert len(held) <= 3 + len(made)
    assert living.verify() == len(held)
    # With room again it goes on.
    living.edit(home_town(39), on_conflict="keep")
    assert living.verify() == len(held) + 1
    living.close()


def test_without_the_right_to_write_nothing_changes(corpus_path: Path, open_folder: Path) -> None:
    lm = fresh("gpt2")
    folder = open_folder / "model"
    living = make_living(folder, corpus_path, "ultraedit", lm=lm)
    living.edit(home_town(0))
    before = fingerprint(living)
    living.close()
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def work() -> None:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        opened, error = attempt(lambda: LivingModel.open(folder, lm=lm))
        if opened is None:
            assert isinstance(error, LedgerError)
            assert error.fix
            return
        assert fingerprint(opened) == before
        _, error = attempt(lambda: opened.edit(home_town(5)))
        assert isinstance(error, LedgerError)
        assert "written" in error.what
        assert fingerprint(opened) == before

    in_a_process(work)
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    with LivingModel.open(folder, lm=lm) as living:
        assert fingerprint(living) == before
        living.edit(home_town(5))
