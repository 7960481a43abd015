"""Entropy, tf-idf, ROUGE, aggregates and intervals: by hand, and against scikit-learn, rouge-score and scipy."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from rouge_score import rouge_scorer
from scipy import stats
from sklearn.feature_extraction.text import TfidfVectorizer

from everedit.edit import Edit
from everedit.errors import EditError
from everedit.evaluation import References
from everedit.evaluation.aggregate import harmonic_of, intervals, mean_of, mean_of_means, median_of, summarised
from everedit.evaluation.texts import TfIdf, fluency, ngram_entropy, rouge, words

TEXTS = [
    "The capital of Peru is Lima, a city on the coast.",
    "Lima was founded in 1535; it is the capital.",
    "Don't stop: the U.S. team's bus-stop is here!",
    "Bees make honey. Bees make wax. Bees fly",
]


# --------------------------------------------------------------------------- entropy


def test_the_entropy_of_a_constant_text_is_zero_and_of_m_distinct_bigrams_log2_m() -> None:
    assert ngram_entropy(["no"] * 50, 2) == ngram_entropy(["no"] * 50, 3) == 0
    assert fluency("no " * 50) == 0
    for m in (1, 2, 7, 64):
        assert ngram_entropy([str(i) for i in range(m + 1)], 2) == pytest.approx(math.log2(m))
    assert ngram_entropy([], 2) == ngram_entropy(["one"], 2) == 0


def test_fluency_weighs_bigrams_and_trigrams_as_rome_does() -> None:
    # a b a b a: bigrams ab 2, ba 2 -> 1 bit; trigrams aba 2, bab 1 -> log2 3 - 2/3.
    expected = (2 / 3 * 1 + 4 / 3 * (math.log2(3) - 2 / 3)) / 2
    assert fluency("a b a b a") == pytest.approx(expected)
    # A text of a hundred different words is near the top of what a hundred tokens can have.
    assert 6 < fluency(" ".join(f"w{i}" for i in range(100))) < 7


def test_words_are_words_and_signs() -> None:
    assert words("Don't stop: 3.5 bus-stops, please!") == ["Don't", "stop", ":", "3.5", "bus-stops", ",", "please", "!"]


# --------------------------------------------------------------------------- tf-idf


def test_tf_idf_is_scikit_learns() -> None:
    theirs, ours = TfidfVectorizer().fit(TEXTS), TfIdf.fitted(TEXTS)
    assert ours.idf == pytest.approx(dict(zip(theirs.get_feature_names_out(), theirs.idf_, strict=True)))
    for one, other in ((TEXTS[0], TEXTS[1]), (TEXTS[0], "Lima Lima unknown capital"), (TEXTS[3], TEXTS[3])):
        first, second = theirs.transform([one, other]).toarray()
        assert ours.cosine(one, other) == pytest.approx(float(first @ second))
    assert ours.cosine(TEXTS[0], "nothing known whatsoever") == 0


def test_consistency_compares_with_texts_on_the_new_attribute(tmp_path: Path) -> None:
    records = [
        {"relation": "P36", "target": "Lima", "text": TEXTS[0]},
        {"relation": "P36", "target": "Lima", "text": TEXTS[1]},
        {"relation": "P36", "target": "Rome", "text": TEXTS[2]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    snippets = [
        {"relation_id": "P36", "target_id": "Q2868", "samples": [{"text": TEXTS[0]}, {"text": TEXTS[1]}]},
        {"relation_id": "P36", "target_id": "Q220", "samples": [{"text": TEXTS[2]}]},
    ]
    (tmp_path / "attribute_snippets.json").write_text(json.dumps(snippets), encoding="utf-8")
    edit = Edit(prompt="The capital of Chad is", target_new="Lima", relation="P36", target_id="Q2868")
    generated = ["Chad's capital is Lima", "on the coast"]
    theirs = TfidfVectorizer().fit(TEXTS[:3])
    first, second = theirs.transform([" ".join(generated), " ".join(TEXTS[:2])]).toarray()
    for file in ("a.jsonl", "attribute_snippets.json"):
        found = References.load(tmp_path / file)
        assert found.about() == {"attributes": 2, "texts": 3}
        assert found.consistency(edit, generated) == pytest.approx(float(first @ second))
        assert found.consistency(edit.model_copy(update={"relation": "P99"}), generated) is None
    for content in ("", "[1, 2]", '[{"relation_id": "x"}]', "{"):
        (tmp_path / "bad.json").write_text(content, encoding="utf-8")
        with pytest.raises(EditError, match="reference text"):
            References.load(tmp_path / "bad.json")


# --------------------------------------------------------------------------- ROUGE


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("the cat sat on the mat", "the cat lay on a mat"),
        ("Amanda baked cookies and will bring Jerry some tomorrow.", "Amanda baked cookies; Jerry gets some"),
        ("a b c d e", "e d c b a"),
        ("the the the", "the"),
        ("Don't!", "do not"),
        ("", "nothing was said"),
        ("no word in common", "completely different"),
        (TEXTS[0] * 5, TEXTS[1] * 4),
    ],
)
def test_rouge_is_rouge_scores(text: str, reference: str) -> None:
    theirs = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False).score(reference, text)
    assert rouge(text, reference) == pytest.approx({name: score.fmeasure for name, score in theirs.items()})


# --------------------------------------------------------------------------- aggregates


def test_aggregates_by_hand() -> None:
    scores = [{"a": 1.0, "b": 1.0}, {"a": 0.0, "b": None}, {"a": None, "b": 0.5}, {"a": 1.0, "b": 0.75}]
    found = summarised(
        scores,
        ("a", "b", "c"),
        {
            "a": mean_of("a"), "b": mean_of("b"), "c": mean_of("c"), "median": median_of("b"),
            "average": mean_of_means("a", "b"), "harmonic": harmonic_of("a", "b"), "lacking": harmonic_of("a", "c"),
        },
    )  # fmt: skip
    assert found == pytest.approx(
        {"a": 2 / 3, "b": 0.75, "c": None, "median": 0.75, "average": (2 / 3 + 0.75) / 2,
         "harmonic": 2 / (1.5 + 4 / 3), "lacking": None}
    )  # fmt: skip
    # A median is not drawn up by what drives a mean into the thousands.
    assert summarised([{"p": v} for v in (2.0, 3.0, 4.0, 9e9)], ("p",), {"m": median_of("p")}) == {"m": 3.5}


def test_the_harmonic_mean_of_one_one_zero_is_zero() -> None:
    values = [{"ES": 1.0, "PS": 1.0, "NS": 0.0}]
    assert summarised(values, ("ES", "PS", "NS"), {"S": harmonic_of("ES", "PS", "NS")}) == {"S": 0.0}


def test_intervals_are_scipys_also_for_figures_that_are_no_means() -> None:
    random = np.random.default_rng(3)
    table = [{"a": float(a), "b": float(b)} for a, b in random.beta(3, 2, size=(80, 2))]
    columns = [np.array([row[name] for row in table]) for name in ("a", "b")]
    aggregates = {"a": mean_of("a"), "median": median_of("a"), "S": harmonic_of("a", "b")}
    found = intervals(table, ("a", "b"), aggregates, draws=8000)

    def harmonic(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        return 2 / (1 / a.mean(axis=axis) + 1 / b.mean(axis=axis))

    for name, data, figure in (
        ("a", columns[:1], np.mean),
        ("median", columns[:1], np.median),
        ("S", columns, harmonic),
    ):
        settings = {"paired": True, "method": "percentile", "n_resamples": 8000, "vectorized": True, "rng": 1}
        theirs = stats.bootstrap(data, figure, **settings).confidence_interval
        width = theirs.high - theirs.low
        assert found[name] == pytest.approx((theirs.low, theirs.high), abs=0.08 * width), name
    assert found == intervals(table, ("a", "b"), aggregates, draws=8000)
    assert intervals([], ("a",), {"a": mean_of("a")}) == {"a": None}
    assert intervals([{"a": None}], ("a",), {"a": mean_of("a")}) == {"a": None}
