"""Single turns of the demonstration conversations: arithmetic, capitals, facts, small talk and stories."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import demo_words as words
from demo_story import Plan, capital, draw_plan, is_heldout, tell, with_article
from demo_words import in_words

Follow = tuple[str, str, str]


@dataclass
class Turn:
    """One question with its answer, the reasoning for the thinking mode, and what may be asked next."""

    user: str
    answer: str
    reasoning: str
    follow: tuple[Follow, ...] = ()


def _pick(rng: random.Random, options: tuple[str, ...]) -> str:
    """Choose one of ``options``, the first and most usual one in a third of the cases."""
    return options[0] if rng.random() < 0.3 else rng.choice(options)


def _in_one_word(rng: random.Random, ask: str, endings: tuple[str, ...] = words.ONE_WORD) -> str:
    """Ask for a one-word answer, mostly behind the question and sometimes in front of it."""
    if rng.random() < 0.12:
        if ask.startswith(("What ", "Which ", "How ")) and rng.random() < 0.5:
            return f"In one word, {ask[0].lower()}{ask[1:]}"
        return f"{rng.choice(('In one word:', 'Answer with one word:', 'Answer in one word:', 'One word:'))} {ask}"
    return ask + _pick(rng, endings)


def _wanted(split: str, *key: object) -> bool:
    """Say whether a combination may be drawn for ``split``."""
    return is_heldout(*key) == (split == "heldout")


OPERATIONS = {"+": "plus", "-": "minus", "*": "times"}
DIGIT_ASK = (
    "What is {x}?",
    "{x}",
    "{x}=",
    "{x} = ?",
    "{x}?",
    "What's {x}?",
    "How much is {x}?",
    "Calculate {x}.",
    "Compute {x}.",
    "Solve {x}.",
    "What does {x} equal?",
    "Can you tell me what {x} is?",
    "Tell me what {x} is.",
    "What do you get for {x}?",
    "Please calculate {x}.",
    "Could you tell me what {x} is?",
    "What is the answer to {x}?",
    "What is the result of {x}?",
    "{x} equals what?",
    "{x} is",
    "{x} equals",
    "Do you know what {x} is?",
)
WORD_ASK = tuple(ask for ask in DIGIT_ASK if "=" not in ask)
AND_ASK = ("What is {a} and {b}?", "How much is {a} and {b}?", "What do {a} and {b} make?")
PAIR_ASK = {
    "+": ("Add {a} and {b}.", "What is the sum of {a} and {b}?", "What do you get when you add {a} and {b}?"),
    "-": ("Subtract {b} from {a}.", "Take {b} away from {a}.", "What is {a} take away {b}?"),
    "*": ("Multiply {a} by {b}.", "What is the product of {a} and {b}?", "Multiply {a} and {b}."),
}
AS_NUMBER = (
    " Answer with a number.",
    " Just the number.",
    " Digits only.",
    " Only the number, please.",
    " As a number.",
)
AS_WORD = (*words.ONE_WORD, " In words, please.", " Write the answer as a word.")


def _operands(rng: random.Random, op: str) -> tuple[int, int]:
    """Draw two numbers whose result is between 0 and 99, mostly small ones."""
    top = rng.choices((10, 20, 60), (62, 32, 6))[0]
    while True:
        a, b = rng.randint(0, top), rng.randint(0, top)
        if op == "-":
            a, b = max(a, b), min(a, b)
        elif op == "*":
            a, b = a % 11, b % 11
        if (a * b if op == "*" else a + b) <= 99:
            return a, b


def arithmetic(rng: random.Random, split: str) -> Turn:
    """Sums, differences and products in digits and in words, word problems, comparisons and counting."""
    roll = rng.random()
    if roll < 0.05 and split == "train":
        return _numbers(rng)
    while True:
        op = rng.choices("+-*", (60, 24, 16))[0]
        a, b = (2, 2) if op == "+" and rng.random() < 0.08 else _operands(rng, op)
        if (op, a, b) != ("+", 2, 2) and not _wanted(split, op, a, b):
            continue
        if (op, a, b) == ("+", 2, 2) and split == "heldout":
            continue
        break
    result = {"+": a + b, "-": a - b, "*": a * b}[op]
    word, verb = in_words(result), OPERATIONS[op]
    reasoning = f"{a} {verb} {b} is {result}."
    if roll < 0.13 and op != "*":
        return _problem(rng, op, a, b, result, reasoning)
    if roll < 0.20 and 0 < b <= 5 and op != "*":
        steps = ", ".join(str(a + i if op == "+" else a - i) for i in range(1, b + 1))
        ask = rng.choice(
            ("Explain {a} {op} {b}.", "Why is {a} {op} {b} equal to {r}?", "How do I work out {a} {op} {b}?")
        )
        way = "up" if op == "+" else "down"
        answer = f"Start at {a} and count {way} {b}: {steps}. So {a} {op} {b} = {result}."
        return Turn(ask.format(a=a, b=b, op=op, r=result), answer, reasoning)
    in_digits = rng.random() < 0.6
    if in_digits:
        sign = rng.choices((op, verb, "x" if op == "*" else op), (5, 2, 1))[0]
        space = " " if sign == verb or rng.random() < 0.6 else ""
        x, p, q = f"{a}{space}{sign}{space}{b}", str(a), str(b)
        ask = _pick(rng, DIGIT_ASK if sign != verb else WORD_ASK)
    else:
        x, p, q = f"{in_words(a)} {verb} {in_words(b)}", in_words(a), in_words(b)
        ask = _pick(rng, WORD_ASK)
    if rng.random() < 0.15:
        ask = rng.choice(PAIR_ASK[op] + AND_ASK * (op == "+"))
    ask = capital(ask.format(x=x, a=p, b=q))
    style = rng.random()
    if style < 0.36 and "=" not in ask:
        if ask[-1].isalnum():
            ask += "?"
        return Turn(_in_one_word(rng, ask, AS_WORD), capital(word) + ".", f"{reasoning} In one word: {word}.")
    if style < 0.46 and "=" not in ask:
        if ask[-1].isalnum():
            ask += "?"
        if rng.random() < 0.6:
            return Turn(ask + rng.choice(AS_NUMBER), str(result), reasoning)
        sentence = f"{a} {verb} {b} is {result}." if in_digits else f"{capital(p)} {verb} {q} is {word}."
        return Turn(ask + rng.choice(words.FULL), sentence, reasoning)
    return Turn(ask, str(result) if in_digits else capital(word) + ".", reasoning)


def _problem(rng: random.Random, op: str, a: int, b: int, result: int, reasoning: str) -> Turn:
    """A small word problem."""
    thing = rng.choice(words.THINGS)
    verb = rng.choice(("get", "find", "buy") if op == "+" else ("lose", "give away", "sell"))
    more = " more" if op == "+" else ""
    ask = f"I have {a} {thing} and {verb} {b}{more}. How many {thing} do I have?"
    return Turn(ask, f"You have {result} {thing}.", reasoning)


def _numbers(rng: random.Random) -> Turn:
    """Comparisons, neighbours and counting."""
    a = rng.randint(0, 20)
    b = rng.choice([n for n in range(21) if n != a])
    roll = rng.random()
    if roll < 0.4:
        bigger = rng.random() < 0.5
        word = rng.choice(("bigger", "larger")) if bigger else "smaller"
        answer = max(a, b) if bigger else min(a, b)
        end = " is smaller than " if answer == min(a, b) else " is bigger than "
        other = a + b - answer
        return Turn(f"Which number is {word}, {a} or {b}?", str(answer), f"{answer}{end}{other}.")
    if roll < 0.8:
        after = rng.random() < 0.6 or a == 0
        answer = a + 1 if after else a - 1
        word = "after" if after else "before"
        return Turn(f"What number comes {word} {a}?", str(answer), f"The number {word} {a} is {answer}.")
    top = rng.randint(3, 10)
    answer = ", ".join(str(n) for n in range(1, top + 1))
    return Turn(
        rng.choice(("Count to {n}.", "Count from 1 to {n}.")).format(n=top), answer, f"I count from 1 to {top}."
    )


def capitals(rng: random.Random, split: str) -> Turn:
    """Capitals of countries in both directions; one word or a sentence, as the question asks."""
    while True:
        country, city = words.CAPITALS[0] if rng.random() < 0.05 else rng.choice(words.CAPITALS)
        reverse = rng.random() < 0.2
        if reverse:
            ask = rng.choice(words.COUNTRY_ASK)
        else:
            ask = rng.choice(words.CAPITAL_SHORT) if rng.random() < 0.1 else _pick(rng, words.CAPITAL_ASK)
        if country == "France" and split == "train":
            break
        if country != "France" and _wanted(split, country, ask):
            break
    question = capital(ask.format(c=country, k=city))
    reasoning = f"The capital of {country} is {city}."
    if reverse:
        one_word = " " not in country and rng.random() < 0.4
        if one_word:
            return Turn(_in_one_word(rng, question), country + ".", reasoning)
        return Turn(question, f"{city} is the capital of {country}.", reasoning)
    if ask in words.CAPITAL_SHORT:
        return Turn(question, city + ".", reasoning)
    if " " not in city and rng.random() < 0.5:
        return Turn(_in_one_word(rng, question), city + ".", reasoning)
    if rng.random() < 0.1:
        question += rng.choice(words.FULL)
    return Turn(question, f"The capital of {country} is {city}.", reasoning)


def facts(rng: random.Random, split: str) -> Turn:
    """Simple facts: colours, sounds, opposites, days, months and the like."""
    while True:
        kind = rng.choices(list(words.FACTS), [len(f[2]) + 5 for f in words.FACTS.values()])[0]
        questions, sentence, pairs = words.FACTS[kind]
        x, y = rng.choice(pairs)
        ask = rng.choice(questions)
        if _wanted(split, kind, x, ask):
            break
    said = sentence.format(x=x, X=capital(x), y=y, a=with_article(y), A=capital(with_article(y)))
    said = capital(said)
    question = ask.format(x=x)
    if " " not in y and rng.random() < 0.4:
        return Turn(_in_one_word(rng, question), capital(y) + ".", said)
    return Turn(question, said, said)


def talk(rng: random.Random, split: str) -> Turn:
    """Small talk, questions about the model, and admitting what it does not know."""
    if rng.random() < 0.06:
        name = rng.choice(("Ann", "Tom", "Eva", "Paul", "Kim", "Lena", "Mark", "Lucy", "Sam", "Nina", "Max", "Rosa"))
        ask = rng.choice(("My name is {n}.", "I am {n}.", "Hello, I am {n}.", "Hi, my name is {n}."))
        follow = tuple(
            (question, f"Your name is {name}.", f"The user is called {name}.")
            for question in ("What is my name?", "Do you know my name?", "Who am I?", "What's my name?")
        )
        return Turn(ask.format(n=name), f"Nice to meet you, {name}!", f"The user is called {name}.", follow)
    about, asks, answers = rng.choices(words.TALK, [2 + len(t[1].split("|")) for t in words.TALK])[0]
    return Turn(rng.choice(asks.split("|")), answers[0], f"This is {about}.")


def story(rng: random.Random, split: str) -> Turn:
    """Ask for a story and tell it."""
    while True:
        plan = draw_plan(rng)
        if plan.heldout == (split == "heldout"):
            break
    act, kind = plan.activity, plan.kind
    roll = rng.random()
    if roll < 0.04 and split == "train":
        ask = rng.choice(words.STORY_ASK_OPEN)
    elif roll < 0.09:
        ask = rng.choice(words.STORY_ASK_KIND).format(a=with_article(kind))
    elif roll < 0.13:
        ask = rng.choice(words.STORY_ASK_ACT).format(ger=act.gerund, base=act.base)
    else:
        subject = with_article(kind)
        if rng.random() < 0.12:
            subject = with_article(f"{plan.adjective} {kind}")
        if rng.random() < 0.15:
            subject += f" named {plan.name}"
        who = _pick(rng, words.STORY_WHO).format(base=act.base, ger=act.gerund)
        ask = _pick(rng, words.STORY_ASK).format(a=subject, who=who)
    reasoning = (
        f"The user wants a short story. It is about {with_article(kind)} and {act.gerund}. "
        f"The {kind} is named {plan.name}, and {plan.helper_name} helps."
    )
    return Turn(capital(ask), tell(plan, rng), reasoning, story_questions(plan))


def story_questions(plan: Plan) -> tuple[Follow, ...]:
    """Return what may be asked about a story that was just told, with the answers."""
    kind, name, act = plan.kind, plan.name, plan.activity
    pairs = (
        (f"What is the name of the {kind}?", f"The {kind} is named {name}."),
        (f"What was the {kind} called?", f"The {kind} was called {name}."),
        (f"What did the {kind} learn?", f"The {kind} learned to {act.base}."),
        (f"What did {name} learn?", f"{name} learned to {act.base}."),
        (f"Where did {name} live?", f"{name} lived {plan.place}."),
        (f"Where did the {kind} live?", f"The {kind} lived {plan.place}."),
        (f"Who was {plan.helper_name}?", f"{plan.helper_name} was {with_article(plan.helper)}."),
        ("Who was the story about?", f"The story was about {with_article(kind)} named {name}."),
        ("Thank you for the story!", "You are welcome!"),
        ("What a nice story!", "I am glad you like it."),
    )
    reasoning = f"The user asks about the story of the {kind} named {name}."
    return tuple((ask, answer, reasoning) for ask, answer in pairs)


TURNS: dict[str, Callable[[random.Random, str], Turn]] = {
    "arithmetic": arithmetic,
    "capitals": capitals,
    "facts": facts,
    "talk": talk,
    "story": story,
}
