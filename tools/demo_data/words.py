"""Words of the demo grammar: nouns with their hypernyms, places, actions with paraphrases, irregular forms.

Three grammars, one per split. No noun of a person, an animal, a thing or a place is in two of them; they share
only function words, sizes, numbers and the most general nouns (``SHARED_NOUNS``). Notation of the tables:

* ``group: own|synonym, other`` -- nouns below one hypernym; the words of one noun are separated by ``|``.
* ``verb|synonym > broader <> opposite`` -- one action; ``broader`` verbs follow from it, ``<>`` sets two actions apart.
* ``{}`` marks the position of the object (default: the end); ``*`` marks a verb that makes no good passive; ``~`` marks
  a converse, whose subject is the patient ("the boy beat the girl" = "the girl lost to the boy").
"""

SHARED_NOUNS = frozenset({"person", "people", "animal", "object", "thing"})
TOP_WORDS = {"person": ("person",), "animal": ("animal",), "thing": ("object", "thing")}

PEOPLE = {
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
ANIMALS = {
    "train": """dog|hound: poodle, beagle, spaniel
        farm animal|farmyard animal: horse, goat, cow, pig|hog""",
    "dev": "bird|feathered creature: goose, duck, swan, rooster|cockerel",
    "test": """rodent: squirrel, rat, hamster
        big cat: lion, tiger, leopard""",
}
PLACES = {
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
SCENES = {
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
ENCOUNTERS = {
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
STATES = {
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

PLURALS = {
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
IRREGULAR = {
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
DOUBLED = frozenset({"drop", "drag", "grab", "hug", "plug", "rub", "rip", "tug", "unplug", "control"})
