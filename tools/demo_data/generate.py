"""Draws the demo data: training triplets, and scored pairs for dev and test, each split from a grammar of its own.

These data can show that the whole pipeline trains and evaluates, and that a model learns, within this grammar,
to distinguish negation, roles, opposites and number and to accept paraphrases and hypernyms for nouns that it was not
trained on (the three splits share no noun of a person, an animal, a thing or a place, apart from "person" and the
like). They cannot show quality on natural text. The sentences are short, literal, drawn from a few dozen scenes
and sometimes odd in content (a monk thaws no pie in a barn); the scores are a rule's and no human judgement. The rule
also ranks contradictions far below what human raters of similarity do, so a gain here may be a loss on an STS
benchmark. Compare methods on real data.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Literal

from demo_data.events import TOP, Entity, Event, Size, conflicts, entails, similarity, swapped_roles
from demo_data.grammar import Noun, Scene, grammar
from demo_data.sentences import Style, realise

MAX_TRIPLETS = 50_000
PAIR_COUNTS = {"dev": 500, "test": 1000}
SCORES = tuple(half / 2 for half in range(11))

_SIZE_DRAW: tuple[Size, ...] = ("", "", "small", "large")
_TIMES = ("now", "now", "past", "past", "was", "future")
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
        size: Size = "" if noun.animate else rng.choice(_SIZE_DRAW)
        patient = Entity(noun, number=rng.choice((1, 1, 1, 2)), size=size)
    place = rng.choice(scene.places) if rng.random() < 0.75 else None
    return Event(rng.choice(scene.actions), agent, patient, place, rng.choice(_TIMES))


def _weaker(rng: Random, event: Event, steps: int) -> Event:
    """An event that ``event`` entails: ``steps`` times one thing said less exactly (or nothing, if it can't be)."""
    for _ in range(steps):
        step = rng.choice(("agent", "patient", "action", "place", "vague place", "size", "time"))
        patient = event.patient
        if step == "agent":
            event = replace(event, agent=replace(event.agent, level=min(event.agent.level + 1, TOP)))
        elif step == "patient" and patient is not None:
            event = replace(event, patient=replace(patient, level=min(patient.level + 1, TOP), size=""))
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
    if min(levels) == TOP or (event.negated and (max(levels) == TOP or event.broad)):
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
        ValueError: ``count`` is out of range.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_TRIPLETS:
        raise ValueError(
            f"count must be a whole number in [1, {MAX_TRIPLETS}], got {count!r}. Try: demo_triplets(4000)"
        )
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
            opposing, only=negative.agent.number < anchor.agent.number and not swapped_roles(anchor, negative)
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
        ValueError: no such split.
    """
    if split not in PAIR_COUNTS:
        raise ValueError(f"split must be dev or test, got {split!r}. Try: demo_pairs('dev')")
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
