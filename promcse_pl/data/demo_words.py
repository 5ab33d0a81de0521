"""Words of the demo grammar: nouns with their hypernyms, places, actions with paraphrases, and how they inflect.

Three grammars, one per split. No noun of a person, an animal, a thing or a place stands in two of them; they share
only function words, sizes, numbers and the most general nouns (``SHARED_NOUNS``). Notation of the tables:

* ``group: own|synonym, other`` -- nouns below one hypernym; the words of one noun are separated by ``|``.
* ``verb|synonym > broader <> opposite`` -- one action; ``broader`` verbs follow from it, ``<>`` sets two actions apart.
* ``{}`` is where the object stands (default: at the end); ``*`` marks a verb that makes no good passive; ``~`` marks
  a converse, whose subject is the patient ("the boy beat the girl" = "the girl lost to the boy").
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

SHARED_NOUNS = frozenset({"person", "people", "animal", "object", "thing"})
TOP_WORDS = {"person": ("person",), "animal": ("animal",), "thing": ("object", "thing")}

_PEOPLE = {
    "train": """medical professional|health professional: doctor|physician, nurse, dentist, paramedic
        musician|music maker: guitarist|guitar player, drummer, pianist|piano player, cellist
        child|kid: boy|lad, girl|lass
        athlete|sportsperson: sprinter|short-distance runner, swimmer, boxer, gymnast
        scientist|researcher: chemist, biologist, physicist, astronomer|stargazer
        cook: head chef, pastry chef, line cook
        driver|motorist: truck driver|trucker, bus driver, taxi driver|cabbie""",
    "dev": """construction worker|builder: carpenter|woodworker, bricklayer, roofer, plumber
        performer|entertainer: clown, juggler, magician|conjurer, acrobat
        relative|relation: grandmother|grandma, grandfather|grandpa, aunt, uncle
        official|public servant: mayor, judge, ambassador|envoy""",
    "test": """emergency responder|rescuer: firefighter|fireman, lifeguard, police officer|cop
        cleric|member of the clergy: priest, monk, nun, bishop
        writer|author: poet, novelist, journalist|reporter, playwright
        royal|member of the royal family: king|monarch, queen, prince, princess
        shopkeeper|store owner: florist|flower seller, grocer, bookseller, jeweler""",
}
_ANIMALS = {
    "train": """dog|hound: poodle, beagle, spaniel
        farm animal|farmyard animal: horse, goat, cow, pig|hog""",
    "dev": "bird|feathered creature: goose, duck, swan, rooster|cockerel",
    "test": """rodent: squirrel, rat, hamster
        big cat: lion, tiger, leopard""",
}
_PLACES = {
    "train": """in: in the kitchen; in the office|at the workplace; in the garage; in the classroom|in the schoolroom;
        in the hospital|in the infirmary; in the living room|in the lounge
        out: in the park; on the beach|on the seashore; on the street|on the road; in the forest|in the woods;
        on the rooftop""",
    "dev": """in: in the library; in the museum; in the gym|in the fitness center; in the basement|in the cellar;
        in the bedroom
        out: in the garden|in the yard; on the bridge; in the meadow|in the grassland; in the desert""",
    "test": """in: in the church|in the house of worship; in the bakery|in the bread shop; in the barn;
        in the theater|in the playhouse; in the airport|in the terminal
        out: by the lake; on the mountain|on the mountainside; on the pier|on the dock; in the orchard;
        in the market square|in the plaza""",
}
# One scene a block: venue (in, out, any), the things, then its actions.
_SCENES = {
    "train": (
        """any; string instrument|stringed instrument: guitar, violin|fiddle, cello, harp
        play|*make music on > use
        tune|*adjust the strings of > adjust
        repair|fix|mend > *work on <> smash|shatter > damage""",
        """in; vegetable: carrot, onion, cucumber, potato
        slice|cut {} into slices > cut|cut up
        wash|rinse {} with water > clean
        peel|*take the skin off > prepare
        freeze <> thaw|defrost""",
        """out; motor vehicle: car|automobile, van, truck|lorry, motorcycle|motorbike
        drive|*travel in > use
        wash|clean {} with soapy water > clean
        *start the engine of|*get the motor going of <> *turn off the engine of|*shut down the motor of
        buy|purchase > acquire <> sell|*find a buyer for > *part with""",
        """any; container: box|carton, suitcase, crate, trunk
        open <> close|shut
        lock|secure {} with a key <> unlock|*release the lock of
        fill|load > *put things into <> empty|unload > *take things out of
        lift|pick up|raise > move <> put down|set down|lower > move""",
        """in; document|paper: letter, contract|written agreement, report, invoice|bill
        read|*read through > *look at
        sign|*put a signature on > *write on
        hide|conceal|put {} out of sight <> reveal|show|put {} on display
        tear up|rip {} to shreds > destroy""",
        """any; garment|item of clothing: shirt, jacket, sweater|pullover, scarf
        put on|*get dressed in <> take off|*get out of
        fold|fold up <> unfold|spread out
        iron|press {} with an iron > smooth
        sew|make {} with a needle > make""",
        """any; light|light source: lantern, flashlight|electric torch, desk lamp
        switch on|turn on <> switch off|turn off
        repair|fix|mend > *work on <> smash|shatter > damage
        clean|wipe {} with a cloth > *touch""",
        """any; toy|plaything: kite, doll, teddy bear|stuffed bear, spinning top
        hide|conceal|put {} out of sight <> reveal|show|put {} on display
        buy|purchase > acquire <> sell|*find a buyer for > *part with
        lose|misplace <> find|discover""",
    ),
    "dev": (
        """any; fruit: apple, orange, pear, peach
        eat|*make a meal of > consume
        drop|*let {} fall <> catch|grab {} in the air
        weigh|put {} on the scales > measure""",
        """any; tool|hand tool: hammer, saw, drill, wrench|spanner
        use|*work with > handle
        borrow|take {} on loan > obtain <> lend out|give {} out on loan > *part with
        break|damage <> mend|repair""",
        """any; furnishing|piece of furniture: chair, table, sofa|couch, cabinet|cupboard
        assemble|put together > build <> take apart|dismantle
        paint|*put a coat of paint on > decorate
        drag|haul {} along the ground > move
        cover|*put a cloth over > *do something to <> uncover|*take the cloth off""",
        """in; electronic device|gadget: laptop|portable computer, television|TV set, radio, camera
        plug in|connect {} to the power <> unplug|disconnect {} from the power
        test|try out > use
        pack|put {} into the packaging <> unpack|take {} out of the packaging""",
        """any; bag: backpack|rucksack, handbag|purse, basket
        carry|*walk around with > hold
        lift|raise > move <> lower|set down > move
        steal|*run off with > take <> return|give back""",
    ),
    "test": (
        """out; boat|small vessel: canoe, kayak, sailboat|sailing boat, raft
        tie up|moor|fasten {} with a rope <> untie|set loose
        steer|navigate > control
        rent|hire|*pay for the use of > use
        push {} into the water|launch > move <> pull {} out of the water|haul {} ashore > move""",
        """any; baked treat|baked good: pie, cake|gateau, muffin, croissant
        bake|cook {} in the oven > make
        taste|*take a bite of|*try a mouthful of > *eat some of
        hide|put {} away out of sight <> serve|dish up
        decorate|*put icing on > *work on""",
        """any; jewel|precious ornament: ring, necklace, bracelet|bangle, brooch
        polish|rub {} with a cloth > clean
        steal|*make off with > take <> return|give back|hand back
        admire|*gaze in wonder at > *look at
        buy|purchase > acquire <> sell|*find a buyer for > *part with""",
        """out; flower|flowering plant: rose, tulip, daisy, sunflower
        water|*pour water on > *look after
        plant|put {} in the soil <> dig up|uproot|pull {} out of the soil
        smell|sniff|*breathe in the scent of
        draw|sketch|*make a drawing of > depict""",
        """out; ball: football, basketball, volleyball, rubber ball
        throw|toss|hurl > release <> catch|grab {} in the air
        inflate|blow up|fill {} with air <> deflate|*let the air out of
        kick|hit {} with a foot > hit""",
        """out; structure: fence, wall, tower, shed
        build|construct|put up > make <> demolish|tear down|knock down > destroy
        climb|scale|*get to the top of
        measure|*find the height of|*take the dimensions of""",
    ),
}
# Actions of one being on another; the first block takes animals too.
_ENCOUNTERS = {
    "train": (
        """chase|pursue|*run after
        push|shove > touch <> pull|tug > touch
        wake up|rouse""",
        """carry|*walk along holding > hold
        teach|instruct|~*learn from|~*take lessons from
        beat|defeat|*win against|~*lose to
        photograph|*take a picture of|~*pose for a photo taken by""",
    ),
    "dev": (
        """follow|*trail after|*go along behind|~*go along in front of
        frighten|scare > disturb <> calm down|soothe""",
        """interview|*put questions to|~*answer questions from
        praise|*speak well of <> scold|tell off
        phone|call {} on the telephone|~*get a phone call from""",
    ),
    "test": (
        """lead|guide|~*follow the lead of
        watch|observe|*keep an eye on > see
        feed|*give food to|~*get food from <> *take food from|*grab a meal from""",
        """rescue|save|*bring {} to safety > help
        hire|employ|*give a job to|~*get a job from <> fire|dismiss|~*lose a job because of
        lift|raise|hoist > move <> put down|set down > move""",
    ),
}
_STATES = {
    "train": """sit down|take a seat <> stand up|get up
        sleep|doze|take a nap > rest
        laugh|giggle <> cry|weep|shed tears""",
    "dev": """whisper|speak very softly > speak <> shout|yell|speak very loudly > speak
        dance|move to the music > move
        wait|hang around""",
    "test": """work|do a job|carry out a task <> rest|relax|take a break
        sing|perform a song <> stay silent|keep quiet
        fall down|tumble to the ground <> get up|rise from the ground""",
}

_PLURALS = {
    "person": "people",
    "child": "children",
    "goose": "geese",
    "lass": "lasses",
    "scarf": "scarves",
    "potato": "potatoes",
    "fireman": "firemen",
    "item of clothing": "items of clothing",
    "piece of furniture": "pieces of furniture",
    "member of the clergy": "members of the clergy",
    "member of the royal family": "members of the royal family",
}
# lemma: third person, past, past participle, -ing form
_IRREGULAR = {
    "be": ("is", "was", "been", "being"),
    "beat": ("beats", "beat", "beaten", "beating"),
    "blow": ("blows", "blew", "blown", "blowing"),
    "break": ("breaks", "broke", "broken", "breaking"),
    "breathe": ("breathes", "breathed", "breathed", "breathing"),
    "bring": ("brings", "brought", "brought", "bringing"),
    "build": ("builds", "built", "built", "building"),
    "buy": ("buys", "bought", "bought", "buying"),
    "catch": ("catches", "caught", "caught", "catching"),
    "cut": ("cuts", "cut", "cut", "cutting"),
    "dig": ("digs", "dug", "dug", "digging"),
    "do": ("does", "did", "done", "doing"),
    "draw": ("draws", "drew", "drawn", "drawing"),
    "drive": ("drives", "drove", "driven", "driving"),
    "eat": ("eats", "ate", "eaten", "eating"),
    "fall": ("falls", "fell", "fallen", "falling"),
    "feed": ("feeds", "fed", "fed", "feeding"),
    "find": ("finds", "found", "found", "finding"),
    "freeze": ("freezes", "froze", "frozen", "freezing"),
    "get": ("gets", "got", "gotten", "getting"),
    "give": ("gives", "gave", "given", "giving"),
    "go": ("goes", "went", "gone", "going"),
    "hang": ("hangs", "hung", "hung", "hanging"),
    "hide": ("hides", "hid", "hidden", "hiding"),
    "hit": ("hits", "hit", "hit", "hitting"),
    "hold": ("holds", "held", "held", "holding"),
    "keep": ("keeps", "kept", "kept", "keeping"),
    "lead": ("leads", "led", "led", "leading"),
    "lend": ("lends", "lent", "lent", "lending"),
    "let": ("lets", "let", "let", "letting"),
    "lose": ("loses", "lost", "lost", "losing"),
    "make": ("makes", "made", "made", "making"),
    "pay": ("pays", "paid", "paid", "paying"),
    "put": ("puts", "put", "put", "putting"),
    "read": ("reads", "read", "read", "reading"),
    "rise": ("rises", "rose", "risen", "rising"),
    "run": ("runs", "ran", "run", "running"),
    "see": ("sees", "saw", "seen", "seeing"),
    "sell": ("sells", "sold", "sold", "selling"),
    "set": ("sets", "set", "set", "setting"),
    "sew": ("sews", "sewed", "sewn", "sewing"),
    "shed": ("sheds", "shed", "shed", "shedding"),
    "show": ("shows", "showed", "shown", "showing"),
    "shut": ("shuts", "shut", "shut", "shutting"),
    "sing": ("sings", "sang", "sung", "singing"),
    "sit": ("sits", "sat", "sat", "sitting"),
    "sleep": ("sleeps", "slept", "slept", "sleeping"),
    "speak": ("speaks", "spoke", "spoken", "speaking"),
    "spread": ("spreads", "spread", "spread", "spreading"),
    "stand": ("stands", "stood", "stood", "standing"),
    "steal": ("steals", "stole", "stolen", "stealing"),
    "take": ("takes", "took", "taken", "taking"),
    "teach": ("teaches", "taught", "taught", "teaching"),
    "tear": ("tears", "tore", "torn", "tearing"),
    "tell": ("tells", "told", "told", "telling"),
    "throw": ("throws", "threw", "thrown", "throwing"),
    "tie": ("ties", "tied", "tied", "tying"),
    "untie": ("unties", "untied", "untied", "untying"),
    "wake": ("wakes", "woke", "woken", "waking"),
    "weep": ("weeps", "wept", "wept", "weeping"),
    "win": ("wins", "won", "won", "winning"),
    "write": ("writes", "wrote", "written", "writing"),
}
_DOUBLED = frozenset({"drop", "drag", "grab", "hug", "plug", "rub", "rip", "tug", "unplug", "control"})


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
    if noun in _PLURALS:
        return _PLURALS[noun]
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
    if head in _IRREGULAR:
        forms = (head, *_IRREGULAR[head])
    else:
        y_stem = head.endswith("y") and head[-2] not in "aeiou"
        third = (
            head[:-1] + "ies" if y_stem else head + ("es" if head.endswith(("s", "x", "z", "ch", "sh", "o")) else "s")
        )
        stem = head + head[-1] if head in _DOUBLED else head
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
    people = tuple(n for line in _PEOPLE[split].splitlines() for n in _group(line, "person"))
    animals = tuple(n for line in _ANIMALS[split].splitlines() for n in _group(line, "animal"))
    venues: dict[str, tuple[Place, ...]] = {}
    inside, _, outside = _PLACES[split].partition("out:")
    for venue, text in (("in", inside.partition(":")[2]), ("out", outside)):
        venues[venue] = tuple(Place(tuple(p.strip().split("|")), venue == "out") for p in text.split(";"))
    venues["any"] = venues["in"] + venues["out"]
    scenes = []
    things: tuple[Noun, ...] = ()
    for block in _SCENES[split]:
        header, *lines = block.splitlines()
        venue, _, group = header.partition(";")
        members = tuple(_group(group, "thing"))
        things += members
        scenes.append(Scene(_actions(lines, group), people, members, venues[venue]))
    anyone, humans = _ENCOUNTERS[split]
    beings = people + animals
    scenes.append(Scene(_actions(anyone.splitlines(), "beings"), beings, beings, venues["any"]))
    scenes.append(Scene(_actions(humans.splitlines(), "humans"), people, people, venues["any"]))
    scenes.append(Scene(_actions(_STATES[split].splitlines(), "states"), people, (), venues["any"]))
    return Grammar(tuple(scenes), people + animals + things, venues["any"])
