"""Sentences of an event: synonyms, active or passive, "there is", "it is ... who", converses such as "beat" and "lose to"."""

from __future__ import annotations

from dataclasses import dataclass, replace

from demo_data.events import TOP, Entity, Event
from demo_data.grammar import Verb, plural, with_article

_NUMBERS = {2: ("two", "a pair of", "a couple of"), 3: ("three", "a group of three", "a trio of")}
_SIZES = {"small": ("small", "little"), "large": ("large", "big")}


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


def _noun_phrase(entity: Entity, style: Style, definite: bool, plain: bool, only: bool) -> str:
    words = entity.noun.chain[entity.level]
    word = words[style.word % len(words)]
    if only:
        return f"only one {word}" if entity.number == 1 else f"only {_NUMBERS[entity.number][0]} {plural(word)}"
    if entity.level == TOP and entity.number == 1 and not definite and not entity.size:
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
    none = style.form == "none" and event.negated and not many and agent is subject and agent.level < TOP
    cleft = style.form == "cleft" and not event.negated and not style.only
    definite = {id(agent): style.definite_agent, id(patient): style.definite_patient}
    subject_definite = cleft or (not there and (definite[id(subject)] or (event.negated and subject.level > 0)))
    # "is not being done by something" and "two of them" in the scope of "not" would be ambiguous: say "the" there.
    subject_definite = subject_definite or (event.negated and (passive or many))
    other_definite = other is not None and (definite[id(other)] or (event.negated and other.level == TOP))
    # "It was the boy who has ..." mixes tenses.
    tense = replace(style, long_tense=False) if cleft else style
    auxiliary, rest = _predicate(event, verb, tense, passive, many)
    # "There are a pair of ..." does not agree.
    name = _noun_phrase(subject, style, subject_definite, there, style.only and subject is agent)
    middle = ""
    if other is not None:
        middle = _noun_phrase(other, style, other_definite, False, style.only and other is agent)
    if passive:
        hidden = agent.level == TOP and middle == "someone"
        tail = [verb.before, verb.after, "" if hidden else f"by {middle}"]
    else:
        tail = [verb.before, middle, verb.after]
    where = _where(event, style)
    if there:
        start = [f"there {auxiliary}", name, rest]
    elif cleft:
        pronoun = "who" if subject.noun.chain[TOP] == ("person",) else "that"
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
