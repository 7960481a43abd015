"""The ledger's parts by themselves: steps of state, files named by their hash, records, and damage to each."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from everedit.edit import Edit
from everedit.engine.state import Growing, State
from everedit.engine.weights import Snapshot, moved
from everedit.errors import LedgerError
from everedit.ledger import schema
from everedit.ledger.blobs import Blobs
from everedit.ledger.records import Draft, EditRecord, Event
from everedit.ledger.steps import hashes_of, step_between, taken, tensor_hash
from everedit.ledger.store import Ledger
from everedit.outcome import StreamState
from everedit.patch import Dense, LowRank, Patch, plus_outer

F64 = torch.float64


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def state(method: dict[str, Tensor], grown: Any = None, **masters: Tensor) -> StreamState:
    return StreamState(Snapshot(masters), State(method, {"n": 1}, grown or {}), State(), {})


def round_trip(before: StreamState, after: StreamState, patch: Patch, folder: Path) -> tuple[StreamState, int]:
    """Write a step to a file, read it back, take it from ``before``; return where it leads, and the file's size."""
    tensors, info, hashes = step_between(before, after, patch)
    blobs = Blobs(folder)
    name, size = blobs.put(tensors, info)
    found = taken(before, *blobs.get(name), lambda name: torch.zeros(6, 8))
    assert {name: value for name, value in hashes.items() if value} == hashes_of(
        found, [n for n in hashes if hashes[n]]
    )
    return found, size


# --------------------------------------------------------------------------- steps

BASE = normal(0, 100, 80)
ROW = BASE.clone()
ROW[3] = 7
SPECIAL = BASE.clone()
SPECIAL[0, 0], SPECIAL[1, 1], SPECIAL[2, 2] = float("nan"), -0.0, float("inf")


@pytest.mark.parametrize(
    ("old", "new", "small"),
    [
        (None, BASE, False),
        (BASE, BASE, True),
        (BASE, BASE.clone(), True),
        (BASE, ROW, True),
        (BASE, torch.cat([ROW, normal(1, 2, 80)]), True),
        (BASE, SPECIAL, True),
        (BASE, normal(2, 100, 80), False),
        (BASE, BASE[:50].clone(), False),
        (BASE, BASE.double(), False),
        (BASE, normal(2, 100, 81), False),
        (torch.zeros(0, 4), normal(3, 2, 4), True),
        (torch.arange(5000), torch.arange(5001), True),
        (torch.zeros(900, 9).bool(), torch.eye(900, 9).bool(), True),
        (torch.tensor(1.0), torch.tensor(2.0), True),
        (BASE.bfloat16(), ROW.bfloat16(), True),
    ],
)
def test_a_tensor_of_the_state_comes_back_as_it_was(
    old: Tensor | None, new: Tensor, small: bool, tmp_path: Path
) -> None:
    before = state({} if old is None else {"t": old})
    found, size = round_trip(before, state({"t": new}), Patch({}), tmp_path)
    assert tensor_hash(found.method.tensors["t"]) == tensor_hash(new)
    assert found.method.values == {"n": 1}
    # What changed little takes little room.
    assert (size < 4000) == small or new.numel() < 100


def test_a_tensor_that_is_gone_is_gone(tmp_path: Path) -> None:
    found, _ = round_trip(state({"a": BASE, "b": ROW}), state({"b": ROW}), Patch({}), tmp_path)
    assert found.method.tensors.keys() == {"b"}


def test_a_matrix_that_grew_is_kept_as_what_it_grew_by(tmp_path: Path) -> None:
    tensors = Growing({"m": normal(1, 200, 200, dtype=F64)})
    tensors["m"] = (tensors["m"] + tensors["m"].T) / 2
    before = state(dict(tensors))
    for step, (sign, start) in enumerate([(1, None), (-1, None), (1, 2.0)]):
        tensors = Growing(before.method.tensors)
        tensors.grow(
            "m" if start is None else f"new{step}", normal(step, 200, 2), sign, start=start, keys=normal(9, 200, 2)
        )
        after = state(dict(tensors), tensors.grown)
        found, size = round_trip(before, after, Patch({}), tmp_path)
        assert hashes_of(found) == hashes_of(after)
        assert size < 200 * 200
        before = after
    expected = 2.0 * torch.eye(200, dtype=F64) + normal(2, 200, 2).double() @ normal(2, 200, 2).double().T
    assert torch.allclose(before.method.tensors["new2"], expected, atol=1e-12)


@pytest.mark.parametrize(
    "delta",
    [
        LowRank(normal(1, 6, 2), normal(2, 8, 2)),
        LowRank(normal(1, 6, 0, dtype=F64), normal(2, 8, 0, dtype=F64)),
        Dense(normal(3, 6, 8)),
        Dense(torch.eye(6, 8)),
    ],
)
def test_a_change_of_a_weight_comes_back(delta: LowRank | Dense, tmp_path: Path) -> None:
    before = state({})
    after = state({}, w=moved(torch.zeros(6, 8), delta))
    found, _ = round_trip(before, after, Patch({"w": delta}), tmp_path)
    assert hashes_of(found) == hashes_of(after)
    again, _ = round_trip(found, state({}, w=moved(found.weights.masters["w"], delta)), Patch({"w": delta}), tmp_path)
    assert torch.equal(again.weights.masters["w"], moved(after.weights.masters["w"], delta))


def test_sums_have_one_order_whatever_is_at_hand() -> None:
    matrix, left, right = normal(0, 300, 500), normal(1, 300, 5), normal(2, 500, 5)
    plain = matrix.double()
    for column in range(5):
        plain = plain + left[:, column, None].double() * right[:, column].double()
    # Rows and columns by themselves, strided inputs, several steps: the same bits.
    assert torch.equal(plus_outer(matrix, left, right), plain)
    assert torch.equal(plus_outer(matrix.T.contiguous().T, left.T.contiguous().T, right), plain)
    assert torch.equal(plus_outer(plus_outer(matrix, left[:, :2], right[:, :2]), left[:, 2:], right[:, 2:]), plain)
    assert torch.equal(
        torch.cat([plus_outer(matrix[:7], left[:7], right), plus_outer(matrix[7:], left[7:], right)]), plain
    )


FACTORS = {"how": "factors"}


@pytest.mark.parametrize(
    ("tensors", "info"),
    [
        ({"weights|w|left": normal(0, 6, 2), "weights|w|right": normal(0, 8, 3)}, {"weights": {"w": FACTORS}}),
        ({"weights|w|left": normal(0, 9, 2), "weights|w|right": normal(0, 8, 2)}, {"weights": {"w": FACTORS}}),
        ({"weights|w|matrix": normal(0, 8, 6)}, {"weights": {"w": {"how": "whole"}}}),
        ({"weights|w|matrix": normal(0, 6, 8)}, {"weights": {}}),
        ({"weights|w|places": torch.tensor([99]), "weights|w|values": torch.ones(1)},
         {"weights": {"w": {"how": "places", "shape": [6, 8]}}}),
        ({"method|t|factor": normal(0, 5, 2)}, {"method": {"t": {"how": "grown", "sign": 1, "start": None}}}),
        ({"method|t|rows": normal(0, 5, 2)}, {"method": {"t": {"how": "edited"}}}),
        ({"other|t|whole": normal(0, 5, 2)}, {}),
        ({"nonsense": normal(0, 5, 2)}, {}),
    ],
)  # fmt: skip
def test_a_step_that_does_not_fit_is_an_error(tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    whole = {"weights": {}, "method": {}, "policy": {}, "method_gone": [], "policy_gone": [], "method_values": {},
             "policy_values": {}, **info}  # fmt: skip
    with pytest.raises(LedgerError, match="does not fit"):
        taken(state({}), tensors, whole, lambda name: torch.zeros(6, 8))


# --------------------------------------------------------------------------- files


def test_a_file_is_right_or_it_is_an_error(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    name, size = blobs.put({"t": BASE}, {"a": 1})
    assert blobs.put({"t": BASE}, {"a": 1}) == (name, size)
    tensors, info = blobs.get(name)
    assert torch.equal(tensors["t"], BASE)
    assert info == {"a": 1}
    [file] = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert file.stat().st_size == size
    raw = file.read_bytes()
    for damaged in (raw[:-1], raw[:10], b"", raw[:99] + b"?" + raw[100:], raw + b"x"):
        file.write_bytes(damaged)
        with pytest.raises(LedgerError, match="its hash is another"):
            blobs.get(name)
    file.unlink()
    with pytest.raises(LedgerError, match="cannot be read"):
        blobs.get(name)


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", "", "a" * 63, "A" * 64, "/" + "a" * 63, "a" * 64 + "\n"])
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    for use in (Blobs(tmp_path).get, Blobs(tmp_path).drop, Blobs(tmp_path).has):
        with pytest.raises(LedgerError, match="is no name of a file"):
            use(name)


# --------------------------------------------------------------------------- records


def draft(number: int, **more: Any) -> Draft:
    edit = Edit(prompt=f"Town number {number} lies in", target_new=f"Land {number}", subject=f"Town number {number}")
    record = EditRecord(edit, "dana", "2026-01-01T00:00:00+00:00", "", more.pop("until", ""))
    return Draft("edit", (record,), f"{number:064x}", 10, {"method_values": f"{number:032x}"}, 1.0, "now", {}, **more)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger.create(tmp_path, {"model": "m", "pending": ""})
    made.append([draft(number) for number in range(1, 6)], "")
    return made


def test_a_line_is_read_back_in_order_and_checked(ledger: Ledger) -> None:
    line = [commit for commit, _ in ledger.line(ledger.head)]
    assert len(line) == 5
    assert [commit for commit, _ in ledger.line(ledger.head, after=line[2])] == line[3:]
    assert ledger.hashes(ledger.head) == {"method_values": f"{5:032x}"}
    assert [commit.number for commit in ledger.log()] == [5, 4, 3, 2, 1]
    assert [item.edit.target_new for item in ledger.held] == [f"Land {number}" for number in range(1, 6)]
    other = Ledger.open(ledger.folder)
    assert other.head == ledger.head
    with pytest.raises(LedgerError, match="is broken"):
        list(ledger.line("f" * 64))


def whole_line(folder: Path) -> None:
    """Open a ledger and check the line that the model stands on."""
    opened = Ledger.open(folder)
    try:
        opened.hashes(opened.head)
    finally:
        opened.close()


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE commits SET record = replace(record, '\"norm\":1.0', '\"norm\":2.0') WHERE number = 3",
        "UPDATE edits SET record = replace(record, 'dana', 'eve') WHERE seq = 3",
        "UPDATE commits SET parent = (SELECT id FROM commits WHERE number = 1) WHERE number = 4",
        "UPDATE commits SET parent = (SELECT id FROM commits WHERE number = 5) WHERE number = 4",
        "UPDATE commits SET record = '[' WHERE number = 3",
        "DELETE FROM edits WHERE seq = 2",
        "DELETE FROM commits WHERE number = 2",
        "UPDATE about SET value = '\"' || (SELECT id FROM commits WHERE number = 4) || '\"' WHERE key = 'head'",
        "UPDATE about SET value = '0' WHERE key = 'generation'",
        "DELETE FROM about WHERE key = 'head'",
        "CREATE TRIGGER t AFTER INSERT ON commits BEGIN DELETE FROM edits; END",
        "CREATE VIEW v AS SELECT 1",
        "DROP TABLE snapshots",
        "PRAGMA user_version = 99",
    ],
)
def test_records_that_were_tampered_with_are_found(ledger: Ledger, damage: str) -> None:
    ledger.connection.execute("PRAGMA foreign_keys = OFF")
    ledger.connection.execute(damage)
    ledger.close()
    with pytest.raises(LedgerError) as caught:
        whole_line(ledger.folder)
    assert caught.value.fix


def test_a_newer_ledger_says_so(ledger: Ledger) -> None:
    ledger.connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    ledger.close()
    with pytest.raises(LedgerError, match=f"is of version {schema.VERSION + 1}") as caught:
        Ledger.open(ledger.folder)
    assert "update" in caught.value.fix


def test_an_older_ledger_is_brought_up_to_date(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.close()
    more = (*schema.MIGRATIONS, ("ALTER TABLE events ADD COLUMN host TEXT NOT NULL DEFAULT ''",))
    monkeypatch.setattr(schema, "MIGRATIONS", more)
    monkeypatch.setattr(schema, "VERSION", len(more))
    opened = Ledger.open(ledger.folder)
    assert opened.connection.execute("PRAGMA user_version").fetchone() == (len(more),)
    assert len(list(opened.log())) == 5
    opened.close()


def test_a_ledger_without_its_log_file_is_missed(ledger: Ledger, tmp_path: Path) -> None:
    """What SQLite has not yet moved into the main file is lost by whoever copies that file alone."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("ledger.db", "head"):
        (copy / name).write_bytes((tmp_path / name).read_bytes())
    assert (tmp_path / "ledger.db-wal").stat().st_size > 0
    with pytest.raises(LedgerError):
        Ledger.open(copy)
    (copy / "ledger.db-wal").write_bytes((tmp_path / "ledger.db-wal").read_bytes())
    assert Ledger.open(copy).head == ledger.head


def test_a_failed_transaction_leaves_nothing(ledger: Ledger) -> None:
    head, count = ledger.head, len(list(ledger.log(everything=True)))
    with pytest.raises(LedgerError):
        ledger.append([draft(6), draft(7, forgets=(12345,))], head)
    assert (ledger.head, len(list(ledger.log(everything=True)))) == (head, count)
    with pytest.raises(LedgerError, match="there is no commit"):
        ledger.append([draft(6)], "f" * 64)
    assert (ledger.head, len(list(ledger.log(everything=True)))) == (head, count)


def test_forgetting_holds_on_its_own_line_alone(ledger: Ledger) -> None:
    head = ledger.head
    rows = [item.row for item in ledger.held]
    ledger.append([Draft("forget", (), "0" * 64, 1, {}, 0.0, "now", {}, forgets=(rows[1], rows[3]))], head)
    assert [item.row for item in ledger.held] == [rows[0], rows[2], rows[4]]
    assert len(ledger.held) == 3
    assert rows[1] not in ledger.held
    assert {item.row for item in ledger.held.sample(2, "seed")} <= {rows[0], rows[2], rows[4]}
    ledger.move(head, Event("now", "dana", "undo"))
    assert [item.row for item in ledger.held] == rows


def test_samples_are_of_what_is_held_and_always_the_same(ledger: Ledger) -> None:
    ledger.append([draft(number) for number in range(6, 60)], ledger.head)
    one, other = ledger.held.sample(8, "a"), ledger.held.sample(8, "a")
    assert [item.row for item in one] == [item.row for item in other]
    assert len({item.row for item in one}) == 8
    assert [item.row for item in ledger.held.sample(8, "b")] != [item.row for item in one]
    assert len(ledger.held.sample(100, "a")) == 59


def test_what_is_no_database_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="there is no living model here"):
        Ledger.open(tmp_path)
    (tmp_path / "ledger.db").write_bytes(b"nothing like it" * 100)
    with pytest.raises(LedgerError):
        Ledger.open(tmp_path)
    (tmp_path / "ledger.db").unlink()
    other = sqlite3.connect(tmp_path / "ledger.db")
    other.execute("CREATE TABLE notes (text)")
    other.close()
    with pytest.raises(LedgerError):
        Ledger.open(tmp_path)
