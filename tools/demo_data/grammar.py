"""Reads the word tables into nouns, verbs, places and scenes, and inflects them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from demo_data.words import (
    ANIMALS,
    DOUBLED,
    ENCOUNTERS,
    IRREGULAR,
    PEOPLE,
    PLACES,
    PLURALS,
    SCENES,
    STATES,
    TOP_WORDS,
)


@dataclass(frozen=True, slots=True)
class Noun:
    """A concept with its hypernyms: words of its own in ``chain[0]``, of the group in [1], the most general in [2]."""

    chain: tuple[tuple[str, ...], ...]

    @property
    def animate(self) -> bool:
        """True for persons and animals."""
        return self.chain[2] != TOP_WORDS["thing"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where an event happens; ``words`` are phrases of the same meaning, places of one grammar exclude each other."""

    words: tuple[str, ...]
    outside: bool


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb phrase: the head's five forms and what stands before and after the object."""

    forms: tuple[str, str, str, str, str]
    before: str
    after: str
    passive: bool
    converse: bool


@dataclass(frozen=True, slots=True)
class Action:
    """What is done: ``verbs`` mean the same, ``broad`` ones follow from them, ``opposite`` names the contrary."""

    name: str
    verbs: tuple[Verb, ...]
    broad: tuple[Verb, ...]
    opposite: str


@dataclass(frozen=True, slots=True)
class Scene:
    """Actions with the agents, patients (none: intransitive) and places that they take."""

    actions: tuple[Action, ...]
    agents: tuple[Noun, ...]
    patients: tuple[Noun, ...]
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class Grammar:
    """All of one split."""

    scenes: tuple[Scene, ...]
    nouns: tuple[Noun, ...]
    places: tuple[Place, ...]


def plural(noun: str) -> str:
    """Plural of a noun or noun phrase whose head is its last word."""
    if noun in PLURALS:
        return PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def with_article(phrase: str) -> str:
    """The phrase after ``a`` or ``an`` (no word of the tables sounds other than its first letter)."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _verb(text: str) -> Verb:
    """Parse a verb of the tables; irregular and doubling heads are listed, all others are regular."""
    converse, text = text.startswith("~"), text.removeprefix("~")
    passive, text = not (converse or text.startswith("*")), text.removeprefix("*")
    head, _, rest = text.partition(" ")
    before, _, after = rest.partition("{}") if "{}" in rest else (rest, "", "")
    if head in IRREGULAR:
        forms = (head, *IRREGULAR[head])
    else:
        y_stem = head.endswith("y") and head[-2] not in "aeiou"
        third = (
            head[:-1] + "ies" if y_stem else head + ("es" if head.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")
        )
        stem = head + head[-1] if head in DOUBLED else head
        past = head + "d" if head.endswith("e") else (head[:-1] + "ied" if y_stem else stem + "ed")
        forms = (head, third, past, past, (head[:-1] if head.endswith("e") else stem) + "ing")
    return Verb(forms, before.strip(), after.strip(), passive, converse)


def _actions(lines: list[str], kind: str) -> tuple[Action, ...]:
    actions: list[Action] = []
    for line in lines:
        sides = [side.strip() for side in line.split("<>")]
        names = [f"{kind}:{side}" for side in sides]
        for i, side in enumerate(sides):
            own, _, broad = (part.strip() for part in side.partition(">"))
            verbs = tuple(_verb(text) for text in own.split("|"))
            broader = tuple(_verb(text) for text in broad.split("|") if text)
            actions.append(Action(names[i], verbs, broader, names[1 - i] if len(sides) == 2 else ""))
    return tuple(actions)


def _group(line: str, top: str) -> list[Noun]:
    group, _, members = line.partition(":")
    hypernyms = tuple(group.strip().split("|"))
    return [Noun((tuple(m.strip().split("|")), hypernyms, TOP_WORDS[top])) for m in members.split(",")]


@cache
def grammar(split: str) -> Grammar:
    """The grammar of ``train``, ``dev`` or ``test``."""
    people = tuple(n for line in PEOPLE[split].splitlines() for n in _group(line, "person"))
    animals = tuple(n for line in ANIMALS[split].splitlines() for n in _group(line, "animal"))
    venues: dict[str, tuple[Place, ...]] = {}
    inside, _, outside = PLACES[split].partition("out:")
    for venue, text in (("in", inside.partition(":")[2]), ("out", outside)):
        venues[venue] = tuple(Place(tuple(p.strip().split("|")), venue == "out") for p in text.split(";"))
    venues["any"] = venues["in"] + venues["out"]
    scenes = []
    things: tuple[Noun, ...] = ()
    for block in SCENES[split]:
        header, *lines = block.splitlines()
        venue, _, group = header.partition(";")
        members = tuple(_group(group, "thing"))
        things += members
        scenes.append(Scene(_actions(lines, group), people, members, venues[venue]))
    anyone, humans = ENCOUNTERS[split]
    beings = people + animals
    scenes.append(Scene(_actions(anyone.splitlines(), "beings"), beings, beings, venues["any"]))
    scenes.append(Scene(_actions(humans.splitlines(), "humans"), people, people, venues["any"]))
    scenes.append(Scene(_actions(STATES[split].splitlines(), "states"), people, (), venues["any"]))
    return Grammar(tuple(scenes), people + animals + things, venues["any"])
