"""The content rules of verify.sh: good answers pass, bad ones fail for the right reason."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_SPEC = importlib.util.spec_from_file_location("verify_checks", ROOT / "scripts" / "verify_checks.py")
assert _SPEC is not None
assert _SPEC.loader is not None
checks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(checks)

PLAIN = (
    "Once upon a time a small robot named Bolt lived in a quiet town by the sea. Every day Bolt swept the floor of the "
    "old school. One morning a painter called Mara left a box of colours on the table. Bolt looked at the red and the "
    "blue for a long while. Then it took a brush and made one careful line. The line was crooked, but Mara smiled and "
    "showed how to hold the brush. Bolt tried again on the next day, and the day after that. At last the robot painted "
    "the whole harbour, and the people of the town came to see it."
)

MARKDOWN = """Sure! Here's a short story about a robot learning to paint:

# **The Colour of Rust**

---

Unit‑7 had been built to weld, not to wonder. Still, when the factory lights dimmed at 6:30 p.m., it rolled — quietly, \
almost guiltily — toward the mural that Señora Ibáñez was restoring on the east wall…

“You’re staring,” she said, without turning around.

“I am *calculating*,” the robot replied. “The ratio of blue to—”

“No, no, no.” She laughed and pressed a brush into its gripper. “Painting isn’t arithmetic. What do you *feel*?”

Unit‑7 considered this for 4.2 seconds. Feel? It had pressure sensors, thermal sensors, a gyroscope; none of them \
seemed to apply. So it closed its shutters and remembered the sunrise over the loading dock. Drip, drip, drip went the \
ochre onto the concrete. Its first stroke wobbled, its second bled, and its third was — somehow — the exact orange of \
that morning.

“There,” whispered Señora Ibáñez. “Now you’re painting.”

Years later, visitors would ask who made the small, trembling sun in the corner. The guard would only shrug and say: \
“Somebody who learned to see.” 🎨

***The End***"""

DIALOGUE = """**Pip and the Painter**

"Can you teach me?" asked Pip, the little robot. "Please!" it added.

"Of course," said Old Tom. "First, we look. Then we paint."

They looked at the hill. They looked at the pond. They looked at the clouds until Pip's battery blinked red. "Is this \
painting?" it asked. "It is the best part," said Tom. On Tuesday Pip painted a hill that looked like a potato. On \
Wednesday it painted a pond that looked like a plate. But on Thursday the robot painted a cloud, and a child passing \
by said: "It's going to rain!" Pip's lights turned green. It had never been so proud of a grey smudge."""

GOOD_STORIES = {"plain": PLAIN, "markdown": MARKDOWN, "dialogue": DIALOGUE}


def wrong(name: str, text: str, *, finish: str = "stop", token_ids: tuple[int, ...] = (1, 2)) -> str | None:
    """What the rules find wrong with an answer; None for nothing."""
    return checks.verdict(name, {"text": text, "finish_reason": finish, "token_ids": list(token_ids)})[1]


@pytest.mark.parametrize(
    "text",
    [
        "4",
        "Four",
        "four.",
        "**Four**",
        "2+2 = 4",
        "2 + 2 equals 4.",
        "Two plus two is four.",
        "Four. (2 + 2 = 4)",
        "$2 + 2 = \\boxed{4}$",
        "The answer is 4.0",
        "Adding 2 to 2 gives four, said in one word.",
        "If you add the two numbers you get 4.",
        "1. Take 2 and 2.\n2. Add them.\n\nFour",
        "<think>2+2, maybe 5? No: 4. Or 17.</think>\n\nFour",
        "the user wants 7 words</think>Four",
        "The sum of 2 and 2 is 4, not anything else!",
    ],
)
def test_arithmetic_right(text):
    assert wrong("arithmetic", text) is None


@pytest.mark.parametrize(
    "text",
    [
        "5",
        "Five",
        "Two",
        "22",
        "44",
        "14",
        "4.5",
        "-4",
        "40",
        "4th",
        "fourteen",
        "twenty-four",
        "Twenty four",
        "fourth",
        "2+2",
        "2 + 2 = 5",
        "Five, not four",
        "4 or 5",
        "The answer is not 4.",
        "It isn't four.",
        "Paris",
        "<think>It is four",
        "four</think>",
    ],
)
def test_arithmetic_wrong(text):
    assert wrong("arithmetic", text)


@pytest.mark.parametrize(
    "text", ["Paris", "paris.", "**Paris**", "The capital of France is Paris.", "<think>Rome?</think>Paris"]
)
def test_capital_right(text):
    assert wrong("capital", text) is None


@pytest.mark.parametrize(
    "text", ["London", "Parisian", "comParis", "Par is", "It is not Paris.", "<think>Paris</think>Rome"]
)
def test_capital_wrong(text):
    assert wrong("capital", text)


@pytest.mark.parametrize("text", ["", "   \n", "<think></think>", "\ufffd"])
@pytest.mark.parametrize("name", ["arithmetic", "story", "capital"])
def test_nothing_generated(name, text):
    assert "nothing was generated" in str(wrong(name, text)) or "U+FFFD" in str(wrong(name, text))
    assert wrong(name, "Four Paris", token_ids=()) == "nothing was generated"
    assert checks.verdict(name, {})[1] == "the output has no text"


@pytest.mark.parametrize("name", GOOD_STORIES)
def test_good_story(name):
    assert wrong("story", GOOD_STORIES[name]) is None


def test_long_story():
    """Many names and turns, as long as a large model writes it; nothing in the bounds may depend on length."""
    people = "Ada Bo Cleo Dan Eli Fay Gus Hana Ivo June Kit Lena".split()  # noqa: SIM905
    things = (
        "a boat|the tall tower|an apple tree|her cat|the market|a bridge|the moon|an old shoe|a kite|geese|rain|a lamp"
    )
    paragraphs = [
        f"{person} brought {thing} to show the robot, number {index}. It mixed {index + 2} colours and {verb} for "
        f"{'an hour' if index % 2 else 'a whole afternoon'}. “{remark}” said {person}, and the others agreed."
        for index, (person, thing, verb, remark) in enumerate(
            zip(
                people,
                things.split("|"),
                ["painted", "worked", "scribbled", "dreamed"] * 3,
                ["Lovely!", "Is that my nose?", "Again, please,", "I would hang it in the hall,"] * 3,
                strict=True,
            )
        )
    ]
    text = PLAIN + "\n\n" + "\n\n".join(paragraphs) + "\n\n" + MARKDOWN
    assert len(text.split()) > 500
    assert wrong("story", text) is None


@pytest.mark.parametrize("name", GOOD_STORIES)
def test_story_cut_at_the_limit(name):
    story = GOOD_STORIES[name]
    words = story.split(" ")
    for keep in range(len(words) - 20, len(words)):
        text = " ".join(words[:keep])
        assert wrong("story", text, finish="length") is None, text[-40:]
    assert wrong("story", PLAIN[:-9] + "\ufffd", finish="length") is None  # half a character at the cut


def test_cut_story_must_still_have_its_words():
    text = PLAIN[: PLAIN.index("Then it took")] + "and on and on " * 20
    assert "words in whole sentences" in str(wrong("story", text, finish="length"))


def test_story_that_stops_in_a_sentence():
    assert "incomplete sentence" in str(wrong("story", PLAIN.rsplit(" ", 3)[0]))
    assert "incomplete sentence" in str(wrong("story", PLAIN + "\n\nAnd then the robot said:"))


LOOP = "The robot painted a tree. The painter smiled at the robot. "


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LOOP * 12, "loop"),
        (PLAIN + " The robot was very happy." * 3, "loop: 3 times the sentence"),
        (PLAIN + " It painted" + " and painted" * 8 + ".", "at once"),
        (PLAIN + " Bolt saw" + " red red red" * 3 + ".", "at once"),
        (" ".join(f"Robot {i} took the brush and painted a tree." for i in range(20)), "loop"),
        (PLAIN.replace("robot", "rabbit"), "does not mention robot"),
        (PLAIN.replace("paint", "point"), "does not mention paint"),
        ("The robot painted.", "only 3 words"),
        (PLAIN.lower(), "incomplete sentence"),
        (PLAIN.replace(".", ""), "incomplete sentence"),
        (PLAIN.replace(",", "").replace(". ", ", "), "words in a sentence on average"),
        (PLAIN.replace(" ", ". ").title(), "words in a sentence on average"),
        (PLAIN.replace("Mara", "Ma\x07ra"), "unprintable character U+0007"),
        (PLAIN.replace("Mara", "Ma\ufffdra"), "unprintable character U+FFFD"),
        ("<think>" + PLAIN, "nothing was generated"),
    ],
)
def test_bad_story(text, reason):
    assert reason in str(wrong("story", text))


def test_word_salad_is_no_story():
    rng = random.Random(1)
    content = [
        w
        for w in sorted(set(PLAIN.replace(".", "").replace(",", "").lower().split()))
        if w not in checks.FUNCTION_WORDS
    ]
    sentences = [" ".join(rng.choices(content, k=9)).capitalize() + "." for _ in range(12)]
    assert "function words" in str(wrong("story", "The robot paints. " + " ".join(sentences)))


@pytest.mark.parametrize("seed", range(3))
def test_story_of_few_words(seed):
    rng = random.Random(seed)
    vocabulary = "the robot a painted and brush then it saw in red".split()  # noqa: SIM905
    sentences = [" ".join(rng.choices(vocabulary, k=10)).capitalize() + "." for _ in range(12)]
    assert wrong("story", " ".join(sentences))
