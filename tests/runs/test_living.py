"""What a living model promises: nothing lost, nothing half-done, all taken back, and a reason for every refusal."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from everedit.edit import Edit
from everedit.errors import EditConflict, EditRefused, EvereditError, LedgerError, LedgerLocked, NotApplicable
from everedit.gates import Gates, GatesConfig
from everedit.ledger import replay
from everedit.ledger.steps import keys_of, patch_of
from everedit.living import LivingModel
from everedit.living.retention import survival
from everedit.models import LanguageModel
from everedit.models.layout import oriented
from everedit.outcome import Commit
from everedit.patch import LowRank, Patch
from tests.support.editing import METHOD_SETTINGS, home_town
from tests.support.living import LENIENT, fingerprint, make_living, stream
from tests.support.loading import bits, fresh, same_bits

pytestmark = pytest.mark.usefixtures("own_cache")
A, B, C, D = (home_town(person) for person in (0, 10, 20, 30))
Make = Callable[..., LivingModel]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return fresh("gpt2")


@pytest.fixture
def make(lm: LanguageModel, corpus_path: Path, tmp_path: Path) -> Iterator[Make]:
    """Make living models of one loaded model, which has its own bits again at the end."""
    made, original = list[LivingModel](), bits(lm)

    def one(method: str = "memit", policy: str = "accumulate", **options: Any) -> LivingModel:
        for living in made:
            living.close()
        made[:] = [
            make_living(tmp_path / f"{len(list(tmp_path.iterdir()))}", corpus_path, method, policy, lm=lm, **options)
        ]
        return made[0]

    yield one
    for living in made:
        living.close()
    assert same_bits(lm, original)


def shift(living: LivingModel, name: str) -> torch.Tensor:
    return living.editor.shift(name)


# --------------------------------------------------------------------------- forgetting by algebra


@pytest.mark.parametrize("extra", [{}, {"solver": "woodbury"}])
def test_downdating_simie_from_the_base_is_never_having_made_the_edit(make: Make, extra: dict[str, Any]) -> None:
    options = {"policy_settings": {"lam": 1e-2, "start": "base", **extra}}
    living = make("memit", "simie", **options)
    for edit in (A, B, C, D):
        living.edit(edit)
    done = living.forget(B.id)
    assert done.draft.info["how"] == "downdate"
    assert [item.edit.id for item in living.ledger.held] == [A.id, C.id, D.id]
    assert living.verify() == 5
    names = list(living.editor.state().weights.masters)
    found = {name: shift(living, name) for name in names}
    state = living.editor.state().policy
    living.undo()
    kept = {name: shift(living, name) for name in names}
    other = make("memit", "simie", **options)
    for edit in (A, C, D):
        other.edit(edit)
    for name in names:
        never = shift(other, name)
        # Weights are kept in float32: its rounding, once an edit, is the largest error there is.
        rounding = 8 * torch.finfo(torch.float32).eps * oriented(other.lm.layout.module_of(name)).abs().max()
        assert float((found[name] - never).abs().max()) < rounding
        assert float((kept[name] - never).abs().max()) > 1000 * rounding
        assert torch.allclose(state.tensors[f"P|{name}"], other.editor.state().policy.tensors[f"P|{name}"], atol=1e-9)
    assert state.values == other.editor.state().policy.values


@pytest.mark.parametrize("method", ["rlsedit", "alphaedit"])
def test_downdating_an_rls_editor_solves_the_problem_without_the_edit(make: Make, method: str) -> None:
    """Oracle: the normal equations over the other edits' keys and values, written down and solved anew."""
    settings = {**METHOD_SETTINGS[method], "layers": (1,)}
    living = make(method, method_settings=settings)
    for edit in (A, B, C):
        living.edit(edit)
    name = living.lm.layout.mlp_out_weight(1)
    steps = [living.blobs.get(commit.draft.blob) for commit in reversed(living.log())]
    keys = [keys_of(tensors)["inverse|1"].double() for tensors, _ in steps]
    deltas = [patch_of(*step).deltas[name].to(torch.float64) for step in steps]
    inverse = steps[0][0]["method|inverse|1|whole"].double()
    shift_1, shift_2 = deltas[0].dense(), deltas[0].dense() + deltas[1].dense()
    assert isinstance(deltas[2], LowRank)
    wanted = deltas[2].left + shift_2 @ keys[2]
    # In the null space P^-1 has no inverse, so the sum over edits is written with what it makes of keys alone.
    gain = torch.linalg.solve(torch.eye(1).double() + keys[2].T @ inverse @ keys[2], (inverse @ keys[2]).T).T
    expected = shift_1 + (wanted - shift_1 @ keys[2]) @ gain.T
    done = living.forget(B.id)
    assert done.draft.info["how"] == "downdate"
    found = shift(living, name)
    assert float((found - expected).norm()) < 1e-5 * float(expected.norm())
    assert float((shift_2 + deltas[2].dense() - expected).norm()) > 1e-2 * float(expected.norm())
    assert living.verify() == 4


def test_forgetting_by_algebra_is_refused_where_there_is_none(make: Make) -> None:
    living = make("memit", "simie", policy_settings={"lam": 1e-2})
    living.edit(A)
    living.edit(B)
    before = fingerprint(living)
    with pytest.raises(NotApplicable, match="cannot take this edit out by algebra"):
        living.forget(A.id, how="downdate")
    assert fingerprint(living) == before
    assert len(living.log()) == 2


def test_forgetting_one_edit_of_a_batch_makes_the_others_again(make: Make) -> None:
    living = make("rlsedit")
    [together] = living.edit([A, B, C])
    assert len(together.edits) == 3
    living.edit(D)
    done = living.forget(B.id)
    assert (done.draft.info["how"], done.draft.info["remade"]) == ("replay", 3)
    found = fingerprint(living)
    other = make("rlsedit")
    other.edit([A, C])
    other.edit(D)
    assert fingerprint(other) == found


# --------------------------------------------------------------------------- gates


def refused_by(living: LivingModel, edit: Edit, gate: str, **options: Any) -> EditRefused:
    before, head = fingerprint(living), living.head
    with pytest.raises(EditRefused, match=f"gate '{gate}'") as caught:
        living.edit(edit, **options)
    assert fingerprint(living) == before
    assert living.head == head
    [event, *_] = living.ledger.events()
    assert event.action == "refused"
    assert event.info["figures"] == caught.value.figures
    assert event.info["reason"] == caught.value.what
    return caught.value


def test_an_edit_that_does_not_take_is_refused_and_recorded(make: Make) -> None:
    settings = {"layers": (1,), "lr": 1e-6, "steps": 1}
    living = make("ft", method_settings=settings, gates={**LENIENT, "took": 0.9})
    assert refused_by(living, A, "took").figures["took"] == 0
    assert not living.log()


def test_an_edit_that_ruins_ordinary_text_is_refused(make: Make) -> None:
    settings = {"layers": (0, 1, 2), "lr": 0.5}
    living = make("ft", method_settings=settings, gates={**LENIENT, "perplexity": 3.0})
    assert refused_by(living, A, "perplexity").figures["perplexity"] > 3


def test_an_edit_many_times_as_large_as_the_others_is_refused_and_smaller_steps_pass(make: Make) -> None:
    living = make("ultraedit", gates={**LENIENT, "norm": 1.02, "norm_after": 2})
    living.edit(A)
    living.edit(B)
    sizes = {}
    for edit in (C, D):
        with living.trial(edit, score=False) as result:
            sizes[edit.id] = result.norm
    largest = max((C, D), key=lambda edit: sizes[edit.id])
    refused_by(living, largest, "norm")
    [commit] = living.edit(largest, on_refusal="retry")
    assert commit.draft.info["scale"] in (0.5, 0.25, 0.125)
    assert living.verify() == 3


def test_edits_that_break_earlier_ones_are_refused(make: Make) -> None:
    living = make("memit", gates={**LENIENT, "lost": 0.3, "sample": 5})
    living.edit([home_town(person) for person in (0, 5, 10, 15, 20)])
    assert living.retention().share == 1.0
    others = [home_town(person, "Kyoto" if home_town(person).target_new != "Kyoto" else "Oslo") for person in (0, 5)]
    before = fingerprint(living)
    with pytest.raises(EditRefused, match="gate 'lost'") as caught:
        living.edit(others, on_conflict="keep")
    assert caught.value.figures["lost"] == pytest.approx(0.4)
    assert fingerprint(living) == before
    living.edit(others[:1], on_conflict="keep")


def test_weights_and_losses_that_are_not_finite_are_found(lm: LanguageModel) -> None:
    name = lm.layout.mlp_out_weight(1)
    weight = oriented(lm.layout.module_of(name))
    before = weight.clone()
    gates = Gates.measured_on(lm, GatesConfig(took=None, lost=None, norm=None, perplexity=None))
    commit = Commit((A,), Patch({name: LowRank(torch.zeros(64, 1), torch.zeros(256, 1))}), 0.0, None, {})
    assert gates.check(commit, [], [])["finite"] == 0
    try:
        weight[0, 0] = float("nan")
        with pytest.raises(EditRefused, match="finite"):
            gates.check(commit, [], [])
    finally:
        weight.copy_(before)


def test_a_stream_stops_at_a_refusal_if_asked_to(make: Make) -> None:
    settings = {"layers": (1,), "lr": 1e-6, "steps": 1}
    living = make("ft", method_settings=settings, gates={**LENIENT, "took": 0.9})
    done = living.add([A, B, C], on_refusal="stop")
    assert (len(done.commits), len(done.set_aside), done.stopped) == (0, 1, True)
    done = living.add([A, B, C])
    assert [item.why for item in done.set_aside] == ["refused"] * 3
    assert not done.stopped
    assert all(item.edit for item in done.set_aside)
    # What was set aside is left out where a file is gone on with.
    assert [item.why for item in living.add([A, B], resume=True).set_aside] == ["held already"] * 2


def test_a_change_that_is_not_finite_is_set_aside(make: Make) -> None:
    living = make("ft", method_settings={"layers": (1,), "lr": 1e30})
    before = fingerprint(living)
    done = living.add([A])
    assert [item.why for item in done.set_aside] == ["cannot be made"]
    assert fingerprint(living) == before


def test_an_edit_that_a_policy_holds_back_is_made_again_on_top_as_one_commit(make: Make) -> None:
    gates = {**LENIENT, "took": 1.0, "passes": 4}
    living = make("memit", "simie", policy_settings={"lam": 300.0}, gates=gates)
    for edit in (A, B):
        living.edit(edit)
    passes = [commit.draft.info.get("passes", 1) for commit in living.log()]
    assert max(passes) > 1
    assert living.retention().share == 1.0
    assert len(living.log()) == living.verify() == 2
    found = fingerprint(living)
    living.close()
    with LivingModel.open(living.path, lm=living.lm) as again:
        assert fingerprint(again) == found


# --------------------------------------------------------------------------- conflicts


def test_a_contradiction_is_found_before_anything_is_written(make: Make) -> None:
    living = make("memit")
    living.edit(A)
    other = home_town(0, "Kyoto" if A.target_new != "Kyoto" else "Oslo")
    before, files = fingerprint(living), sorted(living.blobs.names())
    with pytest.raises(EditConflict, match="it contradicts 'The home town of Mira Lanner'"):
        living.edit(other)
    assert [item.why for item in living.add([other]).set_aside] == ["conflict"]
    assert (fingerprint(living), sorted(living.blobs.names())) == (before, files)
    [commit] = living.add([other], on_conflict="keep").commits
    assert commit.draft.info["conflicts"][0]["kind"] == "same fact"
    assert [conflict.kind for conflict in living.conflicts()] == ["same fact"]
    assert living.conflicts()[0].edit.id == other.id


def test_replacing_forgets_the_older_edit_in_the_same_transaction(make: Make) -> None:
    living = make("rlsedit")
    living.edit(A)
    living.edit(B)
    head, before = living.head, fingerprint(living)
    other = home_town(0, "Kyoto" if A.target_new != "Kyoto" else "Oslo")
    commits = living.edit(other, on_conflict="replace")
    assert [commit.draft.kind for commit in commits] == ["forget", "edit"]
    assert commits[0].draft.info["why"] == "replaced"
    assert {item.edit.id for item in living.ledger.held} == {B.id, other.id}
    living.undo(2)
    assert (living.head, fingerprint(living)) == (head, before)


def test_several_edits_replace_what_they_contradict_or_contradict_each_other(make: Make) -> None:
    living = make("rome")
    living.add([A, B, C])
    others = [home_town(person, "Kyoto" if home_town(person).target_new != "Kyoto" else "Oslo") for person in (0, 10)]
    head, before = living.head, fingerprint(living)
    with pytest.raises(EditConflict, match="two of the edits contradict each other"):
        living.edit([D, home_town(30, "Kyoto" if D.target_new != "Kyoto" else "Oslo")])
    commits = living.edit([D, *others], on_conflict="replace")
    assert {item.edit.id for item in living.ledger.held} == {C.id, D.id, *(edit.id for edit in others)}
    assert [commit.draft.kind for commit in commits] == ["edit", "forget", "edit", "edit", "edit"]
    assert living.verify() == 5
    living.undo(4)
    assert (living.head, fingerprint(living)) == (head, before)


def test_reverse_facts_and_near_keys_are_found(make: Make) -> None:
    living = make("memit", conflicts={"near_key": 0.98})
    first = Edit(prompt="Mira Lanner is the teacher of", subject="Mira Lanner", target_new="Odell Ostrey")
    living.edit(first, on_conflict="keep")
    back = Edit(prompt="Odell Ostrey is the teacher of", subject="Odell Ostrey", target_new="Mira Lanner")
    with pytest.raises(EditConflict, match="is the reverse of"):
        living.edit(back)
    # Everything up to the subject's last token is the same, and so is the place where it would be written.
    near = Edit(prompt="Mira Lanner plays music on the", subject="Mira Lanner", target_new="flute")
    with pytest.raises(EditConflict, match=r"cosine of 1\.000"):
        living.edit(near)
    living.edit(near, on_conflict="keep")
    living.edit(back, on_conflict="keep")
    assert sorted(conflict.kind for conflict in living.conflicts()) == ["near key", "reverse fact"]
    far = Edit(prompt="Well, it rained all day. Bexley Dunmore is", subject="Bexley Dunmore", target_new="a baker")
    living.edit(far)


# --------------------------------------------------------------------------- history


def test_the_log_says_who_when_and_whence(make: Make) -> None:
    living = make("ultraedit")
    living.edit(A, by="dana", source="https://example.org", until="2027-06-30")
    [commit] = living.log()
    record = commit.edits[0].record
    assert (record.by, record.source, record.until) == ("dana", "https://example.org", "2027-06-30")
    assert commit.as_dict()["edits"][0]["edit"]["prompt"] == A.prompt
    with pytest.raises(EvereditError, match="is no date"):
        living.edit(B, until="next summer")
    with pytest.raises(EvereditError, match="known settings"):
        living.edit(B, bye="dana")
    assert living.expired("2027-06-30") == []
    assert [item.edit.id for item in living.expired("2027-07-01")] == [A.id]
    living.edit(B)
    [done] = living.expire("2027-07-01", by="erin")
    assert (done.draft.info["why"], done.draft.info["by"]) == ("expired", "erin")
    assert [item.edit.id for item in living.ledger.held] == [B.id]


def test_undo_and_checkout_lead_anywhere_and_back(make: Make) -> None:
    living = make("ultraedit")
    states, heads = [fingerprint(living)], [""]
    for edit in (A, B, C):
        living.edit(edit)
        states.append(fingerprint(living))
        heads.append(living.head)
    with pytest.raises(LedgerError, match="only 3 commits to undo, and 4 are asked for"):
        living.undo(4)
    assert fingerprint(living) == states[3]
    assert living.undo(2) == heads[1]
    living.edit(D)
    fork = living.head
    assert fingerprint(living) != states[2]
    for place in (3, 0, 2, 1):
        living.checkout(heads[place] or "base")
        assert fingerprint(living) == states[place]
    living.checkout(fork[:10])
    assert [item.edit.id for item in living.ledger.held] == [A.id, D.id]
    assert len(living.log(everything=True)) == 4
    assert [event.action for event in living.ledger.events()].count("checkout") == 5
    with pytest.raises(LedgerError, match="names no commit"):
        living.checkout("ffffffff")
    # Every fork is sound.
    assert living.verify() == 2


def test_an_ambiguous_id_is_refused(make: Make) -> None:
    living = make("ultraedit")
    living.edit(A)
    record = living.log()[0]
    head = record.id
    twin = head[:8] + ("0" if head[8] != "0" else "1") + head[9:]
    columns = "(id, parent, number, active, kind, norm, size, record)"
    values = (twin, record.draft.text())
    living.ledger.connection.execute(f"INSERT INTO commits {columns} VALUES (?, '', 1, 0, 'edit', 0, 0, ?)", values)
    with pytest.raises(LedgerError, match="may mean any of"):
        living.ledger.resolve(head[:8])
    assert living.ledger.resolve(head[:9]) == head
    with pytest.raises(LedgerError, match="at least 4 digits"):
        living.ledger.resolve(head[:3])


def test_diff_tells_edits_and_weights_apart(make: Make) -> None:
    living = make("memit")
    living.edit(A)
    one = living.head
    living.edit(B)
    found = living.diff(one, "head")
    assert ([item.edit.id for item in found.added], found.removed) == ([B.id], ())
    assert found.weights.keys() == living.editor.norm_ratios().keys()
    living.undo()
    back = living.diff("base", one)
    name = next(iter(back.weights))
    assert back.weights[name][0] == pytest.approx(float(shift(living, name).norm()), rel=1e-9)
    assert living.diff(one, one).weights == {}


def test_a_trial_leaves_no_trace(make: Make) -> None:
    living = make("memit")
    living.edit(A)
    before, files = fingerprint(living), sorted(path for path in living.path.rglob("*") if path.is_file())
    with living.trial(B, score=False):
        assert fingerprint(living) != before
    assert fingerprint(living) == before
    assert sorted(path for path in living.path.rglob("*") if path.is_file()) == files


def test_all_or_none_of_several_edits_are_made(make: Make) -> None:
    living = make("rome")
    bad = Edit(prompt="The capital of Nowhere is", target_new="Oslo")
    before = fingerprint(living)
    with pytest.raises(EvereditError):
        living.edit([A, B, bad])
    assert fingerprint(living) == before
    assert not living.log()
    done = living.add([A, B, bad])
    assert (len(done.commits), [item.why for item in done.set_aside]) == (2, ["cannot be made"])
    assert [item.why for item in living.add([A]).set_aside] == ["held already"]
    with pytest.raises(NotApplicable, match="one edit at a time"):
        living.add([C], batch=2)


def test_a_batch_is_one_commit_and_a_bad_one_is_made_singly(make: Make) -> None:
    living = make("memit", gates={**LENIENT, "took": 1.0})
    done = living.add([A, B, C], batch=2)
    assert [len(commit.edits) for commit in done.commits] == [2, 1]
    assert living.verify() == 2


# --------------------------------------------------------------------------- retention


def test_retention_names_the_commit_that_broke_an_edit(make: Make) -> None:
    living = make("memit")
    living.edit(A)
    living.edit(B)
    other = home_town(0, "Kyoto" if A.target_new != "Kyoto" else "Oslo")
    [breaker] = living.edit(other, on_conflict="keep")
    living.edit(C)
    before = fingerprint(living)
    found = living.retention()
    fates = {fate.item.edit.id: fate for fate in found.fates}
    assert {name: fate.held for name, fate in fates.items()} == {A.id: False, B.id: True, other.id: True, C.id: True}
    assert (fates[A.id].broken_by, fates[A.id].lived) == (breaker.id, 2)
    assert found.share == 0.75
    # Of four edits one ends after two commits, when two of them have been watched so long.
    assert dict(found.curve)[2] == pytest.approx(0.5)
    assert fingerprint(living) == before


def test_the_survival_curve_counts_those_at_risk() -> None:
    # The textbook's example: ends at 6 (three times), 7, 10, 13, 16, 22, 23; others are watched for so long.
    ends = [6, 6, 6, 7, 10, 13, 16, 22, 23]
    watched = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    curve = dict(survival([(at, True) for at in ends] + [(at, False) for at in watched]))
    expected = {6: 0.857, 7: 0.807, 10: 0.753, 13: 0.690, 16: 0.627, 22: 0.538, 23: 0.448}
    assert {at: round(curve[at], 3) for at in expected} == expected
    assert survival([]) == ((0, 1.0),)


# --------------------------------------------------------------------------- several processes

HOLDER = """
import sys, time
from pathlib import Path
from everedit.ledger.lock import WriterLock
with WriterLock(Path(sys.argv[1]) / "lock").held():
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def test_one_writer_at_a_time_and_readers_always(make: Make, lm: LanguageModel) -> None:
    living = make("ultraedit")
    living.edit(A)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(living.path), "2.5"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LedgerLocked, match=f"process {holder.pid}"):
            living.edit(B)
        assert living.ask(A.prompt).edited
        assert len(living.log()) == 1
        begun = time.monotonic()
        living.edit(B, wait=30)
        assert time.monotonic() - begun < 29
    finally:
        holder.wait()
    holder.stdout.close()
    # A lock goes with its process, however that ends.
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(living.path), "60"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait()
    holder.stdout.close()
    living.edit(C)


def test_who_has_it_open_sees_what_another_commits(make: Make, corpus_path: Path) -> None:
    living = make("ultraedit")
    other = LivingModel.open(living.path, lm=fresh("gpt2"))
    living.edit(A)
    other.edit(B)
    living.sync()
    assert fingerprint(living) == fingerprint(other)
    assert [item.edit.id for item in living.ledger.held] == [A.id, B.id]
    living.undo()
    assert other.ask(B.prompt).edited == living.ask(B.prompt).edited
    assert fingerprint(living) == fingerprint(other)
    other.close()


# --------------------------------------------------------------------------- snapshots


def test_snapshots_are_few_and_everything_is_reached_without_them(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_STEPS_APART", 3)
    living = make("ultraedit")
    edits, states = stream(30), [fingerprint(living)]
    for edit in edits:
        living.add([edit], again=True)
        states.append(fingerprint(living))
    kept = [number for _, number, _, _ in living.ledger.snapshots()]
    assert kept[-1] == 30
    assert 3 <= len(kept) <= 6
    files = set(living.blobs.names())
    assert files == {name for name in living.ledger.blobs_in_use() if name}
    head = living.head
    for steps in (1, 7, 15, 29):
        living.undo(steps)
        assert fingerprint(living) == states[30 - steps]
        living.checkout(head)
        assert fingerprint(living) == states[30]
    for _, _, blob, _ in living.ledger.snapshots():
        living.blobs.drop(blob)
    living.close()
    with LivingModel.open(living.path, lm=living.lm) as again:
        assert fingerprint(again) == states[30]


# --------------------------------------------------------------------------- a peer's model


def test_a_peers_model_becomes_the_first_commit(make: Make, tmp_path: Path) -> None:
    living = make("memit")
    for edit in (A, B):
        living.edit(edit)
    living.export("merged", tmp_path / "merged", measure=False)
    shown = {name: living.editor.lm.model.state_dict()[name].clone() for name in living.editor.norm_ratios()}
    other = make("ultraedit")
    commit = other.adopt(tmp_path / "merged", source="a peer", by="dana")
    assert commit.draft.kind == "import"
    assert all(torch.allclose(other.lm.model.state_dict()[name], weight, atol=1e-6) for name, weight in shown.items())
    other.edit(C)
    other.edit(D)
    with_both = fingerprint(other)
    assert other.verify() == 3
    with pytest.raises(LedgerError, match="has edits already"):
        other.adopt(tmp_path / "merged")
    other.forget(C.id)
    other.undo()
    assert fingerprint(other) == with_both
    other.undo(3)
    assert other.head == ""
