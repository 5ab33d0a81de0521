"""The demo grammar: its labels, its English, its splits."""

from __future__ import annotations

import gzip
import hashlib
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from demo_data import generate
from demo_data.__main__ import demo_files
from demo_data.events import Entity, Event, conflicts, entails, similarity
from demo_data.generate import demo_pairs, demo_triplets
from demo_data.grammar import grammar, plural, with_article
from demo_data.sentences import Style, realise
from demo_data.words import SHARED_NOUNS
from scipy.stats import spearmanr

from promcse_pl.data import demo

SPLITS = ("train", "dev", "test")
PLAIN = Style("active", 0, 0, True, True, False, False, False)


def words(sentence: str) -> set[str]:
    return set(re.findall(r"[a-z']+", sentence.lower()))


def overlap(a: str, b: str) -> float:
    return len(words(a) & words(b)) / len(words(a) | words(b))


def find(split: str, verb: str, agent: str, patient: str | None, place: str | None = None) -> Event:
    """The event of these words, e.g. find("train", "slice", "nurse", "onion")."""
    g = grammar(split)
    nouns = {n.chain[0][0]: n for n in g.nouns}
    action = next(a for s in g.scenes for a in s.actions if a.verbs[0].forms[0] == verb)
    where = next((p for p in g.places if p.words[0] == place), None)
    return Event(action, Entity(nouns[agent]), Entity(nouns[patient]) if patient else None, where, "now")


@pytest.fixture(scope="module")
def triplets():
    return demo_triplets()


@pytest.fixture(scope="module")
def sentences(triplets):
    out = {split: {s for a, b, _ in demo_pairs(split) for s in (a, b)} for split in ("dev", "test")}
    return {"train": {s for t in triplets for s in t}} | out


def test_the_generator_writes_the_files_of_the_package():
    for name, content in demo_files().items():
        committed = (demo.FOLDER / name).read_bytes()
        # The compressed bytes depend on the zlib version, the rows do not.
        assert gzip.decompress(committed) == gzip.decompress(content)
        assert committed[:10] == content[:10] == b"\x1f\x8b\x08\0\0\0\0\0\x02\xff", "no time and no file name"


def test_the_package_reads_the_generated_rows(triplets):
    assert demo.demo_triplets() == triplets
    assert [demo.demo_pairs(split) for split in ("dev", "test")] == [demo_pairs(split) for split in ("dev", "test")]


def test_the_rows_are_those_of_every_earlier_version(triplets):
    digests = [
        hashlib.sha256(repr(rows).encode()).hexdigest() for rows in (triplets, demo_pairs("dev"), demo_pairs("test"))
    ]
    assert digests == [
        "154911d88d2f5f1757e96e6fb599cec3ec596619f67ede75d79832c1e82db56d",
        "99cc92c7ba082d5bf8a948fd361a11e4f3dac42cd8bb45e5d759da40bcde1d24",
        "7f63ca9b0ae33bb1256b125b80241f8bf392da4ea641aed9c06daea4d25cd5c3",
    ]


def test_counts_are_as_asked(triplets):
    assert len(triplets) == 4000
    assert len(demo_triplets(7)) == 7
    assert (len(demo_pairs("dev")), len(demo_pairs("test"))) == (500, 1000)


def test_triplets_are_distinct_and_their_sentences_differ(triplets):
    assert len(set(triplets)) == len(triplets)
    assert all(len(set(t)) == 3 for t in triplets)
    assert len({a for a, _, _ in triplets}) > 3500


def test_pairs_have_no_duplicates_in_either_order():
    for split in ("dev", "test"):
        keys = {frozenset((a, b)) for a, b, _ in demo_pairs(split)}
        assert len(keys) == len(demo_pairs(split))
        assert all(len(key) == 2 for key in keys)


def test_the_same_seed_gives_the_same_data_in_another_process():
    code = (
        "import hashlib; from demo_data.generate import *;"
        "print(hashlib.sha256(repr((demo_triplets(200, 3), demo_pairs('dev'))).encode()).hexdigest())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(runs) == 1


def test_another_seed_gives_other_triplets():
    assert demo_triplets(50, seed=1) == demo_triplets(50, seed=1)
    assert set(demo_triplets(50, seed=1)).isdisjoint(demo_triplets(50, seed=2))


def test_more_triplets_start_with_the_same_triplets():
    assert demo_triplets(60)[:20] == demo_triplets(20)


def test_the_triplets_take_less_than_a_second_of_processor_time():
    start = time.process_time()
    demo_triplets(4000)
    assert time.process_time() - start < 1.0


def noun_words(split: str) -> set[str]:
    g = grammar(split)
    phrases = [w for n in g.nouns for level in n.chain for w in level] + [w for p in g.places for w in p.words]
    functions = {"the", "in", "on", "by", "of", "member"}
    return {token for phrase in phrases for token in phrase.split()} - SHARED_NOUNS - functions


@pytest.mark.parametrize(("one", "other"), [("train", "dev"), ("train", "test"), ("dev", "test")])
def test_splits_share_no_noun_and_no_sentence(one, other, sentences):
    assert not noun_words(one) & noun_words(other)
    assert not sentences[one] & sentences[other]


@pytest.mark.parametrize("split", SPLITS)
def test_every_sentence_names_something_of_its_split(split, sentences):
    nouns = noun_words(split) | {token for w in noun_words(split) for token in plural(w).split()}
    assert [s for s in sentences[split] if not words(s) & nouns] == []


@pytest.mark.parametrize("split", ["dev", "test"])
def test_scores_are_halves_spread_over_the_whole_range(split):
    scores = [score for _, _, score in demo_pairs(split)]
    counts = {value: scores.count(value) for value in generate.SCORES}
    assert sum(counts.values()) == len(scores)
    assert min(counts.values()) >= len(scores) // 11


@pytest.mark.parametrize("split", ["dev", "test"])
def test_word_overlap_does_not_explain_the_scores(split):
    pairs = demo_pairs(split)
    rank = spearmanr([overlap(a, b) for a, b, _ in pairs], [score for _, _, score in pairs]).statistic
    assert rank < 0.4


def test_overlap_and_score_disagree_in_both_directions():
    pairs = demo_pairs("test")
    assert sum(overlap(a, b) > 0.6 and score <= 1.5 for a, b, score in pairs) > 50
    assert sum(overlap(a, b) < 0.4 and score >= 4 for a, b, score in pairs) > 50


def test_hard_negatives_share_more_words_with_the_anchor_than_positives(triplets):
    closer = sum(overlap(a, n) > overlap(a, p) for a, p, n in triplets)
    assert closer > 0.6 * len(triplets)


def test_not_alone_does_not_mark_the_hard_negative(triplets):
    def denies(sentence: str) -> bool:
        return bool(words(sentence) & {"not", "no"}) or "n't" in sentence

    assert 0.2 < sum(denies(n) for _, _, n in triplets) / len(triplets) < 0.7
    assert sum(denies(p) and not denies(n) for _, p, n in triplets) > 100


def test_a_denial_scores_low_though_it_has_the_same_words():
    event = find("train", "slice", "nurse", "onion", "in the kitchen")
    denial = replace(event, negated=True)
    assert realise(event, PLAIN) == "The nurse is slicing the onion in the kitchen."
    assert realise(denial, PLAIN) == "The nurse is not slicing the onion in the kitchen."
    assert overlap(realise(event, PLAIN), realise(denial, PLAIN)) > 0.85
    assert similarity(event, denial) == 1.0
    assert conflicts(event, denial)
    assert not entails(event, denial)


def test_exchanged_roles_score_low_though_they_have_the_same_words():
    event = find("train", "chase", "poodle", "boy")
    swap = replace(event, agent=event.patient, patient=event.agent)
    assert (realise(event, PLAIN), realise(swap, PLAIN)) == (
        "The poodle is chasing the boy.",
        "The boy is chasing the poodle.",
    )
    assert similarity(event, swap) == 1.5
    assert conflicts(event, swap)


def test_a_converse_verb_says_the_same_with_exchanged_places():
    event = find("train", "beat", "boy", "nurse")
    assert realise(event, replace(PLAIN, verb=3)) == "The nurse is losing to the boy."
    assert realise(event, replace(PLAIN, verb=1, form="passive")) == "The nurse is being defeated by the boy."


def test_a_hypernym_follows_and_its_reverse_does_not():
    event = find("train", "slice", "nurse", "onion")
    general = replace(event, agent=replace(event.agent, level=1), patient=replace(event.patient, level=1), broad=True)
    assert realise(general, PLAIN) == "The medical professional is cutting the vegetable."
    assert entails(event, general)
    assert not entails(general, event)
    assert entails(event, replace(event, broad=True))
    assert not entails(replace(event, broad=True), event)
    assert similarity(event, general) == similarity(general, event) == 3.5


def test_under_negation_the_general_entails_the_specific():
    event = find("train", "slice", "nurse", "onion")
    general = replace(event, patient=replace(event.patient, level=1))
    no_event, no_general = replace(event, negated=True), replace(general, negated=True)
    assert entails(no_general, no_event)
    assert not entails(no_event, no_general)
    assert not conflicts(event, replace(general, negated=False))


def test_opposite_actions_other_places_and_other_numbers_conflict():
    event = find("train", "open", "nurse", "crate", "in the office")
    other = {
        "action": replace(event, action=find("train", "close", "nurse", "crate").action),
        "place": replace(event, place=find("train", "open", "nurse", "crate", "in the park").place),
        "number": replace(event, agent=replace(event.agent, number=2)),
        "sibling": replace(event, patient=find("train", "open", "nurse", "suitcase").patient),
    }
    assert all(conflicts(event, changed) for changed in other.values())
    assert [similarity(event, other[k]) for k in ("action", "place", "number", "sibling")] == [1.5, 3.5, 4.0, 3.5]


def test_unrelated_events_score_zero_and_do_not_conflict():
    a = find("train", "slice", "nurse", "onion", "in the kitchen")
    b = find("train", "drive", "boy", "van", "in the park")
    assert similarity(a, b) == 0.0
    assert not conflicts(a, b)
    assert not entails(a, b)


def test_similarity_is_symmetric_and_five_for_the_same_event():
    rng = generate.Random("symmetry")
    scenes = grammar("dev").scenes
    for _ in range(300):
        a = generate._event(rng, scenes)
        b = generate._opposed(rng, generate._altered(rng, a, scenes), scenes)
        assert similarity(a, b) == similarity(b, a)
        assert similarity(a, a) == 5.0
        assert conflicts(a, b) == conflicts(b, a)
        assert not (entails(a, b) and conflicts(a, b))


@pytest.mark.parametrize("split", SPLITS)
def test_sentences_are_well_formed(split, sentences):
    bad = re.compile(
        r"\ban [^aeiou]|\ba [aeiou]|\b(a|an|one) (two|three|the|a|an)\b|\b(the|a) (the|a)\b|[{}|*~>:;]|  | \.|,,"
        r"|\b(two|three) (?!small|little|large|big)(people|children)s\b|\bthere (is|was) (two|three)\b"
        r"|\bthere (are|were) (a|an|only one)\b|\bdid(n't| not) (?!feed|shed)\w+ed\b|\b(\w+) \6\b"
    )
    for s in sentences[split]:
        assert re.fullmatch(r"[A-Z][A-Za-z',-]*( [A-Za-z',-]+)+\.", s), s
        assert not bad.search(s.lower()), s


@pytest.mark.parametrize("split", SPLITS)
def test_subject_and_auxiliary_agree(split, sentences):
    for s in sentences[split]:
        number = re.match(r"(the |only )?(two|three|a pair of|a couple of|a trio of|a group of three)\b", s.lower())
        verb = re.search(r"\b(is|are|was|were|has|have|isn't|aren't|wasn't|weren't|hasn't|haven't)\b", s)
        if verb and not s.startswith(("It ", "There ")) and "," not in s:
            many = verb[1].removesuffix("n't") in ("are", "were", "have")
            assert many == bool(number), s


@pytest.mark.parametrize(
    ("noun", "many"),
    [
        ("dish", "dishes"),
        ("daisy", "daisies"),
        ("boy", "boys"),
        ("goose", "geese"),
        ("piece of furniture", "pieces of furniture"),
        ("box", "boxes"),
        ("person", "people"),
    ],
)
def test_plurals(noun, many):
    assert plural(noun) == many


def test_articles_follow_the_first_letter():
    assert (with_article("onion"), with_article("large onion")) == ("an onion", "a large onion")


@pytest.mark.parametrize("count", [0, -3, generate.MAX_TRIPLETS + 1, 2.5, True, "10"])
def test_a_wrong_count_is_refused_with_the_range(count):
    with pytest.raises(ValueError, match=rf"count .*\[1, {generate.MAX_TRIPLETS}\], got .*Try"):
        demo_triplets(count)


@pytest.mark.parametrize("split", ["train", "", "Test"])
def test_a_wrong_split_is_refused(split):
    with pytest.raises(ValueError, match="split must be dev or test, got"):
        demo_pairs(split)
