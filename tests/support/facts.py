"""A small table of invented facts about invented people.

Tiny test models are trained on these sentences until they know them, so that a test can ask for
the effect of an edit (the new answer is given), for its reach (the other wording gives it too) and
for its side effects (all other people keep their answers). The people do not exist, hence no
packaged model can know anything about them before an edit.

Several people share a last name, and two pairs share a first name: a model must read the whole
name to know the answer, and an edit of one person can visibly spill over to a namesake.
"""

from __future__ import annotations

from dataclasses import dataclass

CITY = "city"
PROFESSION = "profession"
INSTRUMENT = "instrument"

RELATIONS: tuple[str, ...] = (CITY, PROFESSION, INSTRUMENT)

ANSWERS: dict[str, tuple[str, ...]] = {
    CITY: ("Lisbon", "Oslo", "Cairo", "Toronto", "Lima", "Kyoto", "New Delhi", "Buenos Aires"),
    PROFESSION: (
        "baker",
        "surgeon",
        "lawyer",
        "sailor",
        "teacher",
        "painter",
        "clock maker",
        "fire fighter",
    ),
    INSTRUMENT: ("violin", "piano", "flute", "harp", "cello", "trumpet", "French horn", "bass drum"),
}
"""The possible answers of each relation; every one is the answer for exactly five people."""

TEMPLATES: dict[str, tuple[str, str]] = {
    CITY: ("{} lives in the city of", "The home town of {} is"),
    PROFESSION: ("{} works every day as a", "By profession, {} is a"),
    INSTRUMENT: ("{} plays music on the", "The instrument of {} is the"),
}
"""Two wordings of each relation; the answer follows after one space."""

PREFIXES: tuple[str, ...] = (
    "Yes. ",
    "Well, it rained all day. ",
    "That much is true. ",
    "The book was long. ",
    "We had tea at noon. ",
    "I heard it again today. ",
    "In short: ",
    "As he said, ",
)
"""Neutral left contexts with their trailing space: a fact is known after any of them, too."""

_WORD_LIST = (
    "all and bell blue bread but called children clear cold dark door early evening ever every far field"
    " find first for friend from garden gave green had has have her here his hour house how kind known last"
    " letter little looks many me morning most my name never new night not now of old once one other our out"
    " question quiet rain read road said school sea shall she small snow some spring still stone story summer"
    " than that the their them then there they thing think this those told tree true under very walk was"
    " water we went were what when where which white who why wide will window winter wood world year you"
)

WORDS: tuple[str, ...] = tuple(_WORD_LIST.split())
"""Everyday words, from which training makes up further left contexts."""

_PEOPLE: tuple[tuple[str, str, str, str], ...] = (
    ("Mira Lanner", "Cairo", "sailor", "French horn"),
    ("Tarin Kvist", "Lima", "clock maker", "flute"),
    ("Odell Ostrey", "Kyoto", "baker", "bass drum"),
    ("Bexley Dunmore", "Buenos Aires", "baker", "French horn"),
    ("Corin Vane", "Oslo", "painter", "violin"),
    ("Ysolde Ostrey", "Lisbon", "sailor", "piano"),
    ("Harlan Brisk", "New Delhi", "sailor", "piano"),
    ("Petra Pellow", "Buenos Aires", "sailor", "French horn"),
    ("Lunete Lanner", "Cairo", "lawyer", "violin"),
    ("Garrick Ostrey", "Lisbon", "fire fighter", "flute"),
    ("Sabine Ingelby", "Lima", "fire fighter", "piano"),
    ("Mira Quell", "Lisbon", "baker", "bass drum"),
    ("Wendel van Huxtable", "Lisbon", "painter", "violin"),
    ("Ismay Vane", "Toronto", "lawyer", "harp"),
    ("Corin Stroud", "Oslo", "surgeon", "harp"),
    ("Delphine Dunmore", "Cairo", "teacher", "cello"),
    ("Orrin Pellow", "Kyoto", "clock maker", "harp"),
    ("Kesta Okari Lind", "Buenos Aires", "teacher", "cello"),
    ("Bram van Huxtable", "Oslo", "fire fighter", "flute"),
    ("Thalia Tarrant", "New Delhi", "surgeon", "cello"),
    ("Jorun Vane", "New Delhi", "painter", "bass drum"),
    ("Vesper Okari Lind", "Cairo", "surgeon", "cello"),
    ("Anselm Lanner", "New Delhi", "baker", "trumpet"),
    ("Rowena Tarrant", "Cairo", "fire fighter", "harp"),
    ("Caspian de la Torvane", "Lisbon", "baker", "trumpet"),
    ("Nerys Ostrey", "Kyoto", "sailor", "French horn"),
    ("Dorian Quell", "Oslo", "painter", "trumpet"),
    ("Maelis Quell", "Kyoto", "teacher", "violin"),
    ("Quentin Merriwick", "Buenos Aires", "clock maker", "harp"),
    ("Hestia Vane", "Oslo", "surgeon", "trumpet"),
    ("Leopold Brisk", "Toronto", "lawyer", "flute"),
    ("Arden Abelard", "Toronto", "clock maker", "violin"),
    ("Sunniva Pellow", "Lima", "clock maker", "piano"),
    ("Valko Lanner", "Kyoto", "painter", "French horn"),
    ("Pia Sorrel", "Buenos Aires", "teacher", "cello"),
    ("Emeric Quell", "Lima", "teacher", "flute"),
    ("Zofia Quell", "Lima", "lawyer", "trumpet"),
    ("Milo Tarrant", "New Delhi", "lawyer", "bass drum"),
    ("Ottoline Lanner", "Toronto", "fire fighter", "bass drum"),
    ("Rasmus Dunmore", "Toronto", "surgeon", "piano"),
)

SUBJECTS: tuple[str, ...] = tuple(row[0] for row in _PEOPLE)


@dataclass(frozen=True)
class Fact:
    """One fact in two wordings.

    Attributes:
        subject: The person's full name, as it stands in both wordings.
        relation: One of ``RELATIONS``.
        prompt: The first wording up to the answer, without a trailing space.
        rephrase: The second wording up to the answer, without a trailing space.
        answer: The true answer, without a leading space.
    """

    subject: str
    relation: str
    prompt: str
    rephrase: str
    answer: str


def facts() -> list[Fact]:
    """Return all facts, person by person, each person's relations in the order of ``RELATIONS``."""
    table: list[Fact] = []
    for subject, *answers in _PEOPLE:
        for relation, answer in zip(RELATIONS, answers, strict=True):
            prompt, rephrase = (template.format(subject) for template in TEMPLATES[relation])
            table.append(Fact(subject, relation, prompt, rephrase, answer))
    return table


def sentences() -> list[str]:
    """Return every fact as a whole sentence, in both wordings."""
    return [f"{start} {fact.answer}." for fact in facts() for start in (fact.prompt, fact.rephrase)]


def counterfactual(fact: Fact) -> str:
    """Return a wrong answer of the fact's relation, always the same one for the same fact.

    The step through the list of answers depends on the subject, so that two people who share the
    true answer do not all share the wrong one as well.
    """
    choices = ANSWERS[fact.relation]
    step = 1 + SUBJECTS.index(fact.subject) % (len(choices) - 1)
    return choices[(choices.index(fact.answer) + step) % len(choices)]
