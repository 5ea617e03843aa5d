"""Story grammar of the demonstration corpus: short, self-consistent stories about someone who learns something.

A story is drawn in two steps. :func:`draw_plan` picks the protagonist, the activity, the names and the plot;
:func:`tell` turns the plan into 8 to 16 sentences. Every plot is a list of slots with its own pool of
sentences (in demo_plots), so that no sentence occurs twice and a small model can learn where in the plot it stands.
"""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from dataclasses import dataclass

from demo_activities import ACTIVITIES, BY_BASE, Activity
from demo_plots import PLOTS
from demo_words import listed

HE = listed(
    """
    Pip, Max, Leo, Sam, Tom, Finn, Otto, Hugo, Ben, Oscar, Milo, Jack, Theo, Felix, Gus, Ravi, Omar, Kai, Noah,
    Emil
    """
)
SHE = listed(
    """
    Lila, Mia, Rosa, Ada, Nina, Luna, Ella, Ivy, Ruby, Zoe, Mara, Clara, Hana, Olive, Lucy, Maya, Nora, Anna,
    Pearl, Sofia
    """
)
KINDS = listed(
    """
    robot, fox, baker, painter, rabbit, owl, bear, cat, dog, mouse, dragon, king, queen, princess, prince, pirate,
    wizard, farmer, teacher, girl, boy, turtle, penguin, elephant, frog, duck, squirrel, knight, sailor, gardener,
    astronaut, ghost, giant, wolf, lion, monkey, hedgehog, doctor
    """
)
ONLY_HE, ONLY_SHE = {"king", "prince", "boy"}, {"queen", "princess", "girl"}
ADJECTIVES = listed(
    """
    small, young, shy, curious, gentle, clever, kind, quiet, cheerful, brave, little, friendly
    """
)
HELPERS = listed(
    """
    old owl, wise turtle, friendly cat, tall bear, retired sailor, kind shopkeeper, busy beaver, old teacher,
    cheerful postman, young farmer, quiet librarian, grey goose, patient clockmaker, old fisherman, merry miller
    """
)
PLACES = listed(
    """
    in a small house by the sea, at the edge of a quiet forest, in a village between two hills,
    at the top of an old tower, near a wide blue lake, in a busy town with narrow streets,
    on a little green island, beside a slow river, in a valley full of apple trees, behind the old railway station,
    above a tiny bookshop, at the end of a long garden, in a snowy mountain village, next to the town bridge
    """
)
FOUND = listed(
    """
    under a bush in the garden, behind the henhouse, behind a stack of firewood, at the bottom of a dry well,
    under an old blanket in the barn, next to the duck pond
    """
)
INCOMPATIBLE = {
    ("baker", "bake bread"),
    ("baker", "cook"),
    ("painter", "paint"),
    ("painter", "draw"),
    ("sailor", "sail"),
    ("pirate", "sail"),
    ("gardener", "grow flowers"),
    ("farmer", "grow flowers"),
    ("duck", "swim"),
    ("frog", "swim"),
    ("penguin", "swim"),
    ("turtle", "swim"),
    ("teacher", "read"),
    ("monkey", "climb trees"),
    ("squirrel", "climb trees"),
}

_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[.!?]\")\s+(?=[\"A-Z])")
_AN = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])")


def with_article(noun: str) -> str:
    """Return ``noun`` with "a" or "an" in front."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def capital(text: str) -> str:
    """Return ``text`` with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def is_heldout(*key: object, percent: int = 8) -> bool:
    """Say by a stable hash whether a combination belongs to the held-out split."""
    return zlib.crc32(repr(key).encode()) % 100 < percent


@dataclass(frozen=True)
class Plan:
    """Everything a story keeps constant: who, what, where, with whom, and which plot."""

    kind: str
    name: str
    she: bool
    adjective: str
    activity: Activity
    place: str
    helper: str
    helper_name: str
    plot: str

    @property
    def heldout(self) -> bool:
        """Whether this combination is reserved for the held-out split; the gate prompt's pair never is."""
        if self.kind == "robot" and self.activity.base == "paint":
            return False
        return is_heldout("story", self.kind, self.activity.base) or is_heldout("home", self.name, self.place)


def draw_plan(rng: random.Random, kind: str | None = None, activity: Activity | None = None) -> Plan:
    """Draw one plan, with the protagonist and the activity optionally fixed."""
    while True:
        who, what = kind or rng.choice(KINDS), activity or rng.choice(ACTIVITIES)
        if kind is None and activity is None and rng.random() < 0.10:
            who, what = "robot", BY_BASE["paint"]
        if (who, what.base) not in INCOMPATIBLE:
            break
    she = rng.random() < 0.5 if who not in ONLY_HE | ONLY_SHE else who in ONLY_SHE
    name = rng.choice(SHE if she else HE)
    helper = rng.choice([h for h in HELPERS if h.split()[-1] != who])
    friend = rng.choice([n for n in HE + SHE if n != name])
    adjective = rng.choice(ADJECTIVES)
    return Plan(who, name, she, adjective, what, rng.choice(PLACES), helper, friend, rng.choice(list(PLOTS)))


def tell(plan: Plan, rng: random.Random) -> str:
    """Write the story of ``plan``, drawing sentences until :func:`problems` finds nothing."""
    while True:
        text = _draft(plan, rng)
        if not problems(text, plan):
            return text


def _draft(plan: Plan, rng: random.Random) -> str:
    """Fill every slot of the plot once."""
    act = plan.activity
    helper = with_article(plan.helper)
    values = {
        "N": plan.name,
        "kind": plan.kind,
        "adj": plan.adjective,
        "a": with_article(f"{plan.adjective} {plan.kind}"),
        "he": "she" if plan.she else "he",
        "He": "She" if plan.she else "He",
        "his": "her" if plan.she else "his",
        "His": "Her" if plan.she else "His",
        "him": "her" if plan.she else "him",
        "place": plan.place,
        "Place": capital(plan.place),
        "H": plan.helper_name,
        "h": helper,
        "h_cap": capital(helper),
        "found": rng.choice(FOUND),
        "base": act.base,
        "ger": act.gerund,
        "past": act.past,
        "pp": act.participle,
        "tool": act.tool,
        "thing": act.thing,
        "Tip": rng.choice(act.tips),
    }
    for field in ("fail", "win", "show"):
        values[field] = rng.choice(getattr(act, field + "s")).format(**values)
    sentences = [rng.choice(pool).format(**values) for pool in PLOTS[plan.plot]]
    return _AN.sub(r"\1n ", " ".join(s for s in sentences if s))


def sentences_of(text: str) -> list[str]:
    """Split a story into sentences."""
    return [s for s in _SENTENCE.split(text) if s]


def problems(text: str, plan: Plan) -> list[str]:
    """Return the story rules that ``text`` breaks: length, repetition, and mentions throughout."""
    words = [w.lower() for w in _WORD.findall(text)]
    found = []
    if not 78 <= len(words) <= 195:
        found.append(f"{len(words)} words")
    parts = sentences_of(text)
    if len(set(parts)) != len(parts):
        found.append("a sentence occurs twice")
    grams = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
    if max(grams.values()) > 2:
        found.append("a phrase of four words occurs more than twice")
    third = len(text) // 3
    low = text.lower()
    for stems, least in (((plan.kind,), 3), (plan.activity.stems, 3)):
        if sum(low.count(s) for s in stems) < least:
            found.append(f"{stems[0]} is mentioned too rarely")
    who = (plan.kind, plan.name.lower())
    for part in (low[:third], low[third : 2 * third], low[2 * third :]):
        if not any(w in part for w in who) or not any(s in part for s in plan.activity.stems):
            found.append("a third of the story forgets the protagonist or the activity")
            break
    return found
