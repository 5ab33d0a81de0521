"""Events and the relations between them, from which all labels follow.

An ``Event`` says who does what to whom, where and when, and whether it happens at all. One event has many surface
forms (see ``sentences``); all labels are computed from relations between events:

* ``entails``: a positive has the same action, people, things, time and number, or says less of them (hypernyms, a
  place or a size left out). Under negation the direction turns around.
* ``conflicts``: a hard negative is about the same event and cannot be true with the anchor: negation, exchanged
  roles, the opposite action, another place, another member of the same group, another number, the other size.
* ``similarity``: the score of a pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from demo_data.grammar import Action, Noun, Place

Size = Literal["", "small", "large"]
TOP = 2
"""Level of the most general nouns in a hypernym chain: "person", "animal", "thing"."""


@dataclass(frozen=True, slots=True)
class Entity:
    """One or more of a noun, named at a level of its hypernym chain (0: itself, 2: "person", "animal", "thing")."""

    noun: Noun
    level: int = 0
    number: int = 1
    size: Size = ""

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


def swapped_roles(a: Event, b: Event) -> bool:
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
    if swapped_roles(a, b):
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
    crossed = swapped_roles(a, b)
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
