"""Demo data made by code: triplets and scored pairs whose labels follow from meaning, not from shared words.

An ``Event`` says who does what to whom, where and when, and whether it happens at all. One event has many surface
forms (synonyms, active or passive, a place in front, "there is", "it is ... who"; converses such as "beat" and "lose
to"), and all labels are computed from relations between events:

* ``entails``: a positive has the same action, people, things, time and number, or says less of them (hypernyms, a
  place or a size left out). Under negation the direction turns around.
* ``conflicts``: a hard negative is about the same event and cannot be true with the anchor: negation, exchanged
  roles, the opposite action, another place, another member of the same group, another number, the other size.
* ``similarity``: the score, see there.

What this data can show: that the whole pipeline trains and evaluates, and that a model learns, within this grammar,
to tell negation, roles, opposites and number apart and to accept paraphrases and hypernyms for nouns that it was not
trained on (the three splits share no noun of a person, an animal, a thing or a place, apart from "person" and the
like). What it cannot show: quality on natural text. The sentences are short, literal, drawn from a few dozen scenes
and sometimes odd in content (a monk thaws no pie in a barn); the scores are a rule's and no human judgement. The rule
also ranks contradictions far below what human raters of similarity do, so a gain here may be a loss on an STS
benchmark. Compare methods on real data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from promcse_pl.data.demo_words import Action, Noun, Place, Scene, Verb, grammar, plural, with_article
from promcse_pl.utils.errors import DataError

MAX_TRIPLETS = 50_000
PAIR_COUNTS = {"dev": 500, "test": 1000}
SCORES = tuple(half / 2 for half in range(11))

_Size = Literal["", "small", "large"]
_SIZE_DRAW: tuple[_Size, ...] = ("", "", "small", "large")
_TIMES = ("now", "now", "past", "past", "was", "future")
_NUMBERS = {2: ("two", "a pair of", "a couple of"), 3: ("three", "a group of three", "a trio of")}
_SIZES = {"small": ("small", "little"), "large": ("large", "big")}
_TOP = 2


@dataclass(frozen=True, slots=True)
class Entity:
    """One or more of a noun, named at a level of its hypernym chain (0: itself, 2: "person", "animal", "thing")."""

    noun: Noun
    level: int = 0
    number: int = 1
    size: _Size = ""

    def is_a(self, other: Entity) -> bool:
        """True if whatever is called ``self`` can be called ``other``, number and size aside."""
        return other.level >= self.level and self.noun.chain[other.level] == other.noun.chain[other.level]


@dataclass(frozen=True, slots=True)
class Event:
    """The meaning of one sentence.

    ``time`` is now, past (finished), was (past, going on) or future; ``vague_place`` says "inside" or "outside" only.
    """

    action: Action
    agent: Entity
    patient: Entity | None
    place: Place | None
    time: str
    broad: bool = False
    vague_place: bool = False
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Style:
    """How an event is said: the construction and the choice among words of the same meaning.

    ``only`` says "only two" of the agents, where the sentence is to exclude more.
    """

    form: str
    verb: int
    word: int
    definite_agent: bool
    definite_patient: bool
    fronted: bool
    short_not: bool
    long_tense: bool
    only: bool = False


# --- relations between events: the labels ---------------------------------------------------------------------------


def _placed_within(a: Event, b: Event) -> bool:
    """True if the place of ``a`` implies the place of ``b``."""
    if a.place is None or b.place is None:
        return b.place is None
    return a.place.outside == b.place.outside if b.vague_place else a.place == b.place and not a.vague_place


def _entity_entails(a: Entity | None, b: Entity | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.is_a(b) and a.number == b.number and b.size in ("", a.size)


def entails(a: Event, b: Event) -> bool:
    """True if ``b`` must be true whenever ``a`` is.

    Two affirmative events: ``b`` says the same or less. Two negated ones: the reverse ("nobody cuts a vegetable"
    entails "the chef does not slice an onion"). Of opposite polarity: never.
    """
    if a.negated or b.negated:
        return a.negated and b.negated and entails(replace(b, negated=False), replace(a, negated=False))
    return (
        a.action == b.action
        and (b.broad or not a.broad)
        and (a.time, b.time) in {(b.time, b.time), ("past", "was")}
        and _placed_within(a, b)
        and _entity_entails(a.agent, b.agent)
        and _entity_entails(a.patient, b.patient)
    )


def _swapped(a: Event, b: Event) -> bool:
    """True if ``b`` is the same action with agent and patient exchanged."""
    if a.patient is None or b.patient is None or a.action != b.action:
        return False
    return _related(a.agent, b.patient) and _related(a.patient, b.agent) and not _related(a.agent, b.agent)


def _related(a: Entity, b: Entity) -> bool:
    return a.is_a(b) or b.is_a(a)


def _clash(a: Entity | None, b: Entity | None) -> bool | None:
    """True if two names of one participant exclude each other, None if they have nothing to do with each other."""
    if a is None or b is None:
        return None if a is not b else False
    if _related(a, b):
        return a.number != b.number or (a.size != b.size and bool(a.size and b.size))
    same_group = a.noun.chain[1] == b.noun.chain[1] and a.level == b.level == 0
    return True if same_group and a.number == b.number and a.size == b.size else None


def conflicts(a: Event, b: Event) -> bool:
    """True if ``a`` and ``b``, read as being about the same event, cannot both be true.

    Opposite polarity: the affirmative one entails what the other denies. Both affirmative: roles exchanged, or the
    opposite action, an excluding place, number, size or member of the same group, with the remainder compatible.
    """
    if a.negated != b.negated:
        yes, no = (b, a) if a.negated else (a, b)
        return entails(yes, replace(no, negated=False))
    if a.negated or a.time != b.time:
        return False
    opposite = a.action.opposite == b.action.name and not a.broad and not b.broad
    if a.action != b.action and not opposite:
        return False
    placed = _placed_within(a, b) or _placed_within(b, a)
    if _swapped(a, b):
        return placed and a.action == b.action and a.agent.number == b.agent.number
    clashes = (_clash(a.agent, b.agent), _clash(a.patient, b.patient))
    return None not in clashes and (opposite or not placed or any(clashes))


def _entity_loss(a: Entity | None, b: Entity | None) -> float:
    if a is None or b is None:
        return 0.0 if a is b else 2.0
    kind = 0.5 * abs(a.level - b.level) if _related(a, b) else 1.5 if a.noun.chain[1] == b.noun.chain[1] else 2.0
    size = 0.0 if a.size == b.size else 1.0 if a.size and b.size else 0.5
    return kind + size + (1.0 if a.number != b.number else 0.0)


def similarity(a: Event, b: Event) -> float:
    """Score of two events, 0 (unrelated) to 5 (the same meaning) in steps of 0.5.

    From 5 are taken away:
        action: 0.5 if one is the broader action of the other, 2 for another one of the same scene, 3 for another scene;
        agent and patient, each: 0.5 per level of hypernymy, 1.5 for another member of the group, 2 for anything else,
            1 for another number, 0.5 for a size on one side only, 1 for the other size;
        place: 0.5 if one side leaves it out or says it vaguely, 1.5 if the places exclude each other;
        time: 0.5 between "was doing" and "did", 1 between past, present and future.
    What is left (at least 0) is then multiplied by 0.2 if only one event is negated and by 0.3 if roles are exchanged
    (participants compared crosswise) or the actions are opposites, and rounded to the nearest half. So a denial of
    the same event scores 1, exchanged roles 1.5, whatever words they share.
    """
    crossed = _swapped(a, b)
    opposite = a.action.opposite == b.action.name and not a.broad and not b.broad
    loss = 0.0
    if a.action == b.action:
        loss += 0.5 if a.broad != b.broad else 0.0
    elif not opposite:
        loss += 2.0 if a.action.name.split(":")[0] == b.action.name.split(":")[0] else 3.0
    if crossed:
        loss += _entity_loss(a.agent, b.patient) + _entity_loss(a.patient, b.agent)
    else:
        loss += _entity_loss(a.agent, b.agent) + _entity_loss(a.patient, b.patient)
    within = (_placed_within(a, b), _placed_within(b, a))
    loss += 0.0 if all(within) else 0.5 if any(within) else 1.5
    if a.time != b.time:
        loss += 0.5 if {a.time, b.time} == {"past", "was"} else 1.0
    score = max(0.0, 5.0 - loss) * (0.2 if a.negated != b.negated else 1.0) * (0.3 if crossed or opposite else 1.0)
    return math.floor(score * 2 + 0.5) / 2


# --- from events to sentences ---------------------------------------------------------------------------------------


def _noun_phrase(entity: Entity, style: Style, definite: bool, plain: bool, only: bool) -> str:
    words = entity.noun.chain[entity.level]
    word = words[style.word % len(words)]
    if only:
        return f"only one {word}" if entity.number == 1 else f"only {_NUMBERS[entity.number][0]} {plural(word)}"
    if entity.level == _TOP and entity.number == 1 and not definite and not entity.size:
        return "someone" if word == "person" else "something" if word in ("object", "thing") else with_article(word)
    size = _SIZES[entity.size][style.word % 2] + " " if entity.size else ""
    if entity.number == 1:
        return f"the {size}{word}" if definite else with_article(size + word)
    counts = _NUMBERS[entity.number]
    count = counts[0] if definite or plain else counts[style.word % len(counts)]
    return f"{'the ' if definite else ''}{count} {size}{plural(word)}"


def _predicate(event: Event, verb: Verb, style: Style, passive: bool, many: bool) -> tuple[str, str]:
    """The first auxiliary ("" where the simple past has none) and the remaining verb group."""
    base, _, past, participle, ing = verb.forms
    are, were = ("are", "were") if many else ("is", "was")
    if event.time in ("now", "was"):
        return are if event.time == "now" else were, f"being {participle}" if passive else ing
    if event.time == "future":
        core = f"be {participle}" if passive else base
        return (are, f"going to {core}") if style.long_tense else ("will", core)
    if style.long_tense:
        return "have" if many else "has", f"been {participle}" if passive else participle
    if passive:
        return were, participle
    return ("did", base) if event.negated else ("", past)


def _negate(auxiliary: str, short: bool) -> str:
    if not short:
        return f"{auxiliary} not"
    return "won't" if auxiliary == "will" else f"{auxiliary}n't"


def realise(event: Event, style: Style) -> str:
    """The sentence of an event in a style; where grammar rules a style's form out, the nearest form is taken."""
    verbs = event.action.broad if event.broad else event.action.verbs
    verb = verbs[style.verb % len(verbs)]
    agent, patient = event.agent, event.patient
    passive = style.form in ("passive", "there passive") and patient is not None and verb.passive
    subject, other = (patient, agent) if patient is not None and passive != verb.converse else (agent, patient)
    if subject is None:
        raise AssertionError("a passive needs a patient")
    many = subject.number > 1
    there = style.form.startswith("there") and event.time in ("now", "was") and not event.negated
    none = style.form == "none" and event.negated and not many and agent is subject and agent.level < _TOP
    cleft = style.form == "cleft" and not event.negated and not style.only
    definite = {id(agent): style.definite_agent, id(patient): style.definite_patient}
    subject_definite = cleft or (not there and (definite[id(subject)] or (event.negated and subject.level > 0)))
    # "is not being done by something" and "two of them" in the scope of "not" would be ambiguous: say "the" there.
    subject_definite = subject_definite or (event.negated and (passive or many))
    other_definite = other is not None and (definite[id(other)] or (event.negated and other.level == _TOP))
    # "It was the boy who has ..." mixes tenses.
    tense = replace(style, long_tense=False) if cleft else style
    auxiliary, rest = _predicate(event, verb, tense, passive, many)
    # "There are a pair of ..." does not agree.
    name = _noun_phrase(subject, style, subject_definite, there, style.only and subject is agent)
    middle = ""
    if other is not None:
        middle = _noun_phrase(other, style, other_definite, False, style.only and other is agent)
    if passive:
        hidden = agent.level == _TOP and middle == "someone"
        tail = [verb.before, verb.after, "" if hidden else f"by {middle}"]
    else:
        tail = [verb.before, middle, verb.after]
    where = _where(event, style)
    if there:
        start = [f"there {auxiliary}", name, rest]
    elif cleft:
        pronoun = "who" if subject.noun.chain[_TOP] == ("person",) else "that"
        start = ["it was" if event.time in ("past", "was") else "it is", name, pronoun, auxiliary, rest]
    elif none:
        start = [name.replace("the ", "no ", 1) if subject_definite else "no " + name.split(" ", 1)[1], auxiliary, rest]
        if auxiliary == "did":
            start[1:] = [verb.forms[2]]
    else:
        start = [name, _negate(auxiliary, style.short_not) if event.negated else auxiliary, rest]
    words = [*start, *tail]
    if where and style.fronted:
        words = [f"{where},", *words]
    elif where:
        words.append(where)
    text = " ".join(word for word in words if word)
    return text[0].upper() + text[1:] + "."


def _where(event: Event, style: Style) -> str:
    if event.place is None:
        return ""
    if event.vague_place:
        words: tuple[str, ...] = ("outside", "outdoors") if event.place.outside else ("inside", "indoors")
    else:
        words = event.place.words
    return words[style.word % len(words)]


# --- sampling -------------------------------------------------------------------------------------------------------

_FORMS = ("active", "active", "active", "passive", "passive", "there", "there passive", "cleft", "none")


def _style(rng: Random) -> Style:
    return Style(
        form=rng.choice(_FORMS),
        verb=rng.randrange(12),
        word=rng.randrange(12),
        definite_agent=rng.random() < 0.4,
        definite_patient=rng.random() < 0.5,
        fronted=rng.random() < 0.3,
        short_not=rng.random() < 0.5,
        long_tense=rng.random() < 0.5,
    )


def _event(rng: Random, scenes: tuple[Scene, ...]) -> Event:
    scene = rng.choice(scenes)
    agent = Entity(rng.choice(scene.agents), number=rng.choice((1, 1, 1, 2, 3)))
    patient = None
    if scene.patients:
        noun = rng.choice([n for n in scene.patients if n.chain[1] != agent.noun.chain[1]])
        size: _Size = "" if noun.animate else rng.choice(_SIZE_DRAW)
        patient = Entity(noun, number=rng.choice((1, 1, 1, 2)), size=size)
    place = rng.choice(scene.places) if rng.random() < 0.75 else None
    return Event(rng.choice(scene.actions), agent, patient, place, rng.choice(_TIMES))


def _weaker(rng: Random, event: Event, steps: int) -> Event:
    """An event that ``event`` entails: ``steps`` times one thing said less exactly (or nothing, if it can't be)."""
    for _ in range(steps):
        step = rng.choice(("agent", "patient", "action", "place", "vague place", "size", "time"))
        patient = event.patient
        if step == "agent":
            event = replace(event, agent=replace(event.agent, level=min(event.agent.level + 1, _TOP)))
        elif step == "patient" and patient is not None:
            event = replace(event, patient=replace(patient, level=min(patient.level + 1, _TOP), size=""))
        elif step == "action" and event.action.broad:
            event = replace(event, broad=True)
        elif step == "place":
            event = replace(event, place=None, vague_place=False)
        elif step == "vague place" and event.place is not None:
            event = replace(event, vague_place=True)
        elif step == "size" and patient is not None:
            event = replace(event, patient=replace(patient, size=""))
        elif step == "time" and event.time == "past":
            event = replace(event, time="was")
    return event


def _other_number(rng: Random, entity: Entity) -> Entity:
    return replace(entity, number=rng.choice([n for n in (1, 2, 3) if n != entity.number]))


def _opposed(rng: Random, event: Event, scenes: tuple[Scene, ...]) -> Event:
    """The event with one thing turned into its contrary; unchanged where that can't be (the caller tests it)."""
    scene = next(s for s in scenes if event.action in s.actions)
    patient = event.patient
    step = rng.choice(
        ("not", "not", "not", "swap", "swap", "opposite", "opposite", "place", "agent", "patient", "number", "size")
    )
    if step == "not":
        return replace(event, negated=not event.negated)
    if step == "swap" and patient is not None and patient.noun.animate:
        return replace(event, agent=patient, patient=event.agent)
    if step == "opposite" and event.action.opposite:
        return replace(event, action=next(a for a in scene.actions if a.name == event.action.opposite), broad=False)
    if step == "place" and event.place is not None:
        return replace(event, place=rng.choice(scene.places))
    if step == "agent":
        return replace(event, agent=replace(event.agent, noun=_sibling(rng, event.agent.noun, scene.agents)))
    if step == "patient" and patient is not None:
        return replace(event, patient=replace(patient, noun=_sibling(rng, patient.noun, scene.patients)))
    if step == "number":
        return replace(event, agent=_other_number(rng, event.agent))
    if step == "size" and patient is not None and patient.size:
        return replace(event, patient=replace(patient, size="large" if patient.size == "small" else "small"))
    return event


def _sibling(rng: Random, noun: Noun, nouns: tuple[Noun, ...]) -> Noun:
    return rng.choice([n for n in nouns if n.chain[1] == noun.chain[1]])


def _altered(rng: Random, event: Event, scenes: tuple[Scene, ...]) -> Event:
    """The event with one thing exchanged for anything else that fits the scene."""
    scene = next(s for s in scenes if event.action in s.actions)
    step = rng.choice(("agent", "patient", "action", "place", "time", "number"))
    if step == "agent":
        return replace(event, agent=replace(event.agent, noun=rng.choice(scene.agents)))
    if step == "patient" and event.patient is not None:
        size = "" if event.patient.level else event.patient.size
        return replace(event, patient=replace(event.patient, noun=rng.choice(scene.patients), size=size))
    if step == "action":
        return replace(event, action=rng.choice(scene.actions), broad=False)
    if step == "place":
        return replace(event, place=rng.choice(scene.places))
    if step == "time":
        return replace(event, time=rng.choice(_TIMES))
    return replace(event, agent=_other_number(rng, event.agent))


def _sayable(event: Event) -> bool:
    """True if a sentence of the event is specific to its split and not odd for its names alone."""
    agent, patient = event.agent, event.patient
    levels = [agent.level] + ([patient.level] if patient is not None else [])
    if min(levels) == _TOP or (event.negated and (max(levels) == _TOP or event.broad)):
        return False
    return patient is None or agent.noun.chain[1] != patient.noun.chain[1]


def demo_triplets(count: int = 4000, seed: int = 0) -> list[tuple[str, str, str]]:
    """Training triplets of the train grammar.

    Args:
        count: how many, 1 to ``MAX_TRIPLETS``.
        seed: another seed gives another draw; the same one gives the same triplets everywhere.

    Returns:
        Distinct ``(anchor, positive, hard_negative)``: the anchor entails the positive and conflicts with the negative.

    Raises:
        DataError: ``count`` is out of range.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_TRIPLETS:
        raise DataError(f"count must be a whole number in [1, {MAX_TRIPLETS}], got {count!r}. Try: demo_triplets(4000)")
    rng = Random(f"demo triplets {seed}")
    scenes = grammar("train").scenes
    made: dict[tuple[str, str, str], None] = {}
    while len(made) < count:
        anchor = _event(rng, scenes)
        positive = _weaker(rng, anchor, rng.choice((0, 1, 1, 2, 3)))
        if rng.random() < 0.1:  # so that "not" alone does not give a hard negative away
            anchor, positive = replace(positive, negated=True), replace(anchor, negated=True)
        negative = _opposed(rng, anchor, scenes)
        if rng.random() < 0.3:
            negative = _weaker(rng, negative, 1)
        if not (entails(anchor, positive) and conflicts(anchor, negative)):
            continue
        if not (_sayable(anchor) and _sayable(positive) and _sayable(negative)):
            continue
        style, other = _style(rng), _style(rng)
        if style.form != "none" and other.form == "none":  # "no chef does" says more than "the chef does not"
            other = replace(other, form="active")
        opposing = style if rng.random() < 0.7 else _style(rng)
        opposing = replace(
            opposing, only=negative.agent.number < anchor.agent.number and not _swapped(anchor, negative)
        )
        triplet = (realise(anchor, style), realise(positive, other), realise(negative, opposing))
        if len(set(triplet)) == 3:
            made[triplet] = None
    return list(made)


def demo_pairs(split: Literal["dev", "test"]) -> list[tuple[str, str, float]]:
    """Scored pairs of the dev or test grammar, always the same ones.

    Args:
        split: ``dev`` (500 pairs) or ``test`` (1,000).

    Returns:
        Distinct ``(sentence, sentence, score)`` with scores 0 to 5 in halves (see ``similarity``), about evenly
        filled and shuffled.

    Raises:
        DataError: no such split.
    """
    if split not in PAIR_COUNTS:
        raise DataError(f"split must be dev or test, got {split!r}. Try: demo_pairs('dev')")
    rng = Random(f"demo pairs {split}")
    scenes = grammar(split).scenes
    total = PAIR_COUNTS[split]
    wanted = {score: total // len(SCORES) + int(i < total % len(SCORES)) for i, score in enumerate(SCORES)}
    made: dict[frozenset[str], tuple[str, str, float]] = {}
    while any(wanted.values()):
        first = _event(rng, scenes)
        if rng.random() < 0.15:
            first = replace(first, negated=True)
        second = _event(rng, scenes) if rng.random() < 0.1 else _weaker(rng, first, rng.choice((0, 0, 1, 2)))
        for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
            second = _altered(rng, second, scenes)
        if rng.random() < 0.4:
            second = _opposed(rng, second, scenes)
        score = similarity(first, second)
        if not wanted[score] or not (_sayable(first) and _sayable(second)):
            continue
        # Close meanings mostly in other words, distant ones mostly in the same: shared words must not give it away.
        style = _style(rng)
        same_style = rng.random() < (0.25 if score >= 3 else 0.85)
        pair = (realise(first, style), realise(second, style if same_style else _style(rng)))
        key = frozenset(pair)
        if len(key) == 2 and key not in made:
            made[key] = (*pair, score)
            wanted[score] -= 1
    pairs = list(made.values())
    rng.shuffle(pairs)
    return pairs
