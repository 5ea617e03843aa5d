#!/usr/bin/env python3
"""The content rules of verify.sh: is an answer of `ds4 generate --json` (on standard input) right?

    ds4 generate "What is 2+2? Answer with one word." --json | scripts/verify_checks.py arithmetic

Prints the answer and one verdict line; exits 0 on PASS, 1 on FAIL. Needs nothing but the standard library.

Every rule reads the answer only (reasoning is cut off) and tolerates what a large model adds: markdown, typographic
quotes and dashes, an opening line, a title. The bounds of the story are set far below what written English does and
far above what a looping or damaged model does:

    rule                                   bound      ordinary stories      loops, word salad
    words                                  >= 60      120 to 900            -
    sentences that are whole               >= 90 %    100 %                 < 50 %
    words in a sentence, on average        4 to 40    9 to 25               1 or hundreds
    the same sentence (4 words or more)    <= 2 x     1 x                   many
    different 4-word sequences             >= 75 %    >= 93 %               < 50 %
    one 6-word sequence (or 1 % of words)  <= 3 x     1 or 2 x              many
    a phrase again and again at once       <= 4 x     <= 3 x ("tap, tap")   many
    different words in windows of 50       >= 50 %    70 to 90 %            < 40 %
    function words (the, a, and, ...)      >= 25 %    40 to 60 %            < 20 % in word salad
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections import Counter

MIN_WORDS = 60
MIN_WHOLE_SENTENCES = 0.9
SENTENCE_WORDS = (4, 40)
MAX_SAME_SENTENCE = 2
MIN_DISTINCT_4GRAMS = 0.75
MAX_SAME_6GRAM = 3
MAX_AT_ONCE = 4
WINDOW, MIN_DISTINCT_IN_WINDOW = 50, 0.5
MIN_FUNCTION_WORDS = 0.25

WORD = re.compile(r"[^\W_]+(?:['’‑-][^\W_]+)*")
OPENING = "\"'“‘«([—–- *_"
CLOSING = "\"'”’»)]*_"
SENTENCE_END = re.compile(r"[.!?…。]+[" + re.escape(CLOSING) + r"]*(?=\s|$)")
NUMBER = re.compile(r"(?<![\w.,])([-−]?)(\d+(?:[.,]\d+)*)(?!\w)")
# "2 + 2", "two plus two", "adding 2 to 2", "the two numbers", "in 1 word": the question said again, no answer
QUESTION_AGAIN = re.compile(
    r"\b(?:2|two)\s*(?:[+＋]|plus|and|to|with|more than)\s*(?:another\s+)?(?:2|two)\b"
    r"|\b(?:2|two)\s+(?:numbers|integers|values|twos)\b|\b1[- ]word\b",
    re.I,
)
LIST_NUMBER = re.compile(r"^\s*[1-9][.)]\s+", re.M)
NUMBER_WORDS = set(  # without "one": "in one word", "one of them"
    re.findall(
        r"\w+",
        """zero two three five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
        eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million""",
    )
)
FUNCTION_WORDS = set(
    re.findall(
        r"\w+",
        """a an the and or but so then than as if of to in on at by for from with without into onto over under up down
        out off about after before when while where until through again i you he she it we they me him her us them my
        your his its our their this that these those there here who which what how is are was were be been being am
        has have had do does did would could should can will might may must not no all every each one some any very
        too just only still now never""",
    )
)


def clean_answer(text: str) -> str:
    """The answer alone: a reasoning part that a model wrote into it is cut off."""
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.S)
    return text.rsplit("</think>", 1)[-1].split("<think>")[0].strip()


def unprintable(text: str) -> str | None:
    """The first character that no text should hold (controls, replacement character, private use), named."""
    for char in text:
        if char == "\ufffd" or (unicodedata.category(char) in ("Cc", "Cs", "Co") and char not in "\n\r\t"):
            return f"U+{ord(char):04X}"
    return None


def negated(text: str, start: int) -> bool:
    """Whether what starts at ``start`` is denied: "not 4", "isn't equal to four"."""
    return (
        re.search(r"(?:\b(?:not|never)|n['’]t)(?:\s+(?:equal|to|really|the|be|number))*\s*$", text[:start], re.I)
        is not None
    )


def check_arithmetic(answer: str, _cut: bool) -> str | None:
    """Four or 4 as a whole number, and no other number beside it (the sum may be said again)."""
    text = answer
    if len(LIST_NUMBER.findall(text)) > 1:  # "1. ... 2. ...": steps, where a single "4. " is an answer
        text = LIST_NUMBER.sub(" ", text)
    text = QUESTION_AGAIN.sub(" ", text)
    right, wrong = 0, []
    for match in NUMBER.finditer(text):
        minus = match[1] and not re.search(r"[\w)]\s*$", text[: match.start()])
        if minus or not re.fullmatch(r"4(?:\.0+)?", match[2]) or negated(text, match.start()):
            wrong.append(match[0])
        else:
            right += 1
    for match in WORD.finditer(text):
        word = match[0].lower()
        if word == "four" and not negated(text, match.start()):
            right += 1
        elif word == "four" or NUMBER_WORDS & set(re.split(r"[-‑]", word)):
            wrong.append(match[0])
    if wrong:
        return f"another number is in the answer: {wrong[0]}"
    return None if right else "neither Four nor 4 is in the answer"


def check_capital(answer: str, _cut: bool) -> str | None:
    """Paris as a whole word."""
    named = any(not negated(answer, match.start()) for match in re.finditer(r"\bParis\b", answer, re.I))
    return None if named else "Paris is not in the answer"


def prose(text: str) -> list[str]:
    """The paragraphs of a story without markdown, title, opening line ("Here is a story:") and closing "The End"."""
    paragraphs = []
    for line in text.splitlines():
        bare = re.sub(r"^\s*(?:#+|>+|[-*+•]|\d+[.)])\s+", "", line)
        heading = line.lstrip().startswith("#")
        bare = re.sub(r"\*+|__+|`+|~~", "", bare).strip().strip("_").strip()
        if not WORD.search(bare) or heading:
            continue
        ended = re.search(r"[.!?…。][" + re.escape(CLOSING) + r"]*$", bare)
        short = len(WORD.findall(bare)) <= 12
        emphasised = re.fullmatch(r"\s*(\*\*?|__?).*\1\s*", line)
        first = not paragraphs
        if re.fullmatch(r"\W*the end\W*", bare, re.I) or (not ended and short and (first or emphasised)):
            continue
        if first and bare.endswith(":"):
            continue
        paragraphs.append(bare)
    return paragraphs


def sentences(paragraph: str) -> list[str]:
    """Split after a sentence's end, unless the text goes on in lower case ('"Why?" asked Ada.')."""
    parts, start = [], 0
    for match in SENTENCE_END.finditer(paragraph):
        following = paragraph[match.end() :].lstrip().lstrip(OPENING)
        if not following[:1].islower():
            parts.append(paragraph[start : match.end()].strip())
            start = match.end()
    parts.append(paragraph[start:].strip())
    return [part for part in parts if WORD.search(part)]


def is_whole(sentence: str) -> bool:
    """Begins with a capital or a digit, ends with a stop; speech may break off with a dash, a line end with a colon."""
    first = sentence.lstrip(OPENING)[:1]
    begins = first.isdigit() or (first.isalpha() and not first.islower())
    ends = re.search(r"(?:[.!?…。][" + re.escape(CLOSING) + r"]*|[—–-][\"”’']|:)$", sentence)
    return begins and ends is not None


def story_sentences(text: str, cut: bool) -> list[str]:
    """All sentences of a story; a tail that the token limit cut off is left out."""
    found = [sentence for paragraph in prose(text) for sentence in sentences(paragraph)]
    if cut and found and (not is_whole(found[-1]) or found[-1].endswith(":")):
        found.pop()
    return found


def most_at_once(words: list[str]) -> tuple[int, str]:
    """How often a phrase of 1 to 10 words follows itself without a break, and the phrase."""
    best = (1, "")
    for size in range(1, 11):
        run = 0
        for index in range(size, len(words)):
            run = run + 1 if words[index] == words[index - size] else 0
            if run // size + 1 > best[0]:
                best = (run // size + 1, " ".join(words[index - size + 1 : index + 1]))
    return best


def check_loops(words: list[str], found: list[str]) -> str | None:
    """Bounded repetition of sentences, of word sequences anywhere and of phrases at once."""
    same = Counter(" ".join(WORD.findall(sentence.lower())) for sentence in found if len(WORD.findall(sentence)) >= 4)
    sentence, count = same.most_common(1)[0] if same else ("", 0)
    if count > MAX_SAME_SENTENCE:
        return f"loop: {count} times the sentence '{sentence}'"
    count, phrase = most_at_once(words)
    if count > MAX_AT_ONCE:
        return f"loop: '{phrase}' {count} times at once"
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    if len(set(grams)) < MIN_DISTINCT_4GRAMS * len(grams):
        return f"loop: only {len(set(grams))} of {len(grams)} sequences of 4 words are different"
    gram, count = Counter(tuple(words[i : i + 6]) for i in range(len(words) - 5)).most_common(1)[0]
    if count > max(MAX_SAME_6GRAM, len(words) / 100):
        return f"loop: {count} times '{' '.join(gram)}'"
    return None


def check_story(text: str, cut: bool) -> str | None:
    """A story of whole sentences about a robot and painting that goes on without looping."""
    found = story_sentences(text, cut)
    words = [word.lower().replace("’", "'") for sentence in found for word in WORD.findall(sentence)]
    if len(words) < MIN_WORDS:
        return f"only {len(words)} words in whole sentences, {MIN_WORDS} are needed"
    for stem in ("robot", "paint"):
        if not any(word.startswith(stem) for word in words):
            return f"the story does not mention {stem}"
    if looping := check_loops(words, found):
        return looping
    broken = [sentence for sentence in found if not is_whole(sentence)]
    if len(broken) > (1 - MIN_WHOLE_SENTENCES) * len(found) or found[-1] in broken or found[-1].endswith(":"):
        return f"incomplete sentence: '{(broken or found)[-1][:80]}'"
    average = len(words) / len(found)
    if not SENTENCE_WORDS[0] <= average <= SENTENCE_WORDS[1]:
        return f"{average:.1f} words in a sentence on average, {SENTENCE_WORDS[0]} to {SENTENCE_WORDS[1]} are plausible"
    windows = [words[i : i + WINDOW] for i in range(len(words) - WINDOW + 1)]
    variety = sum(len(set(window)) / WINDOW for window in windows) / len(windows)
    if variety < MIN_DISTINCT_IN_WINDOW:
        return f"only {variety:.0%} different words in windows of {WINDOW}"
    function = sum(part in FUNCTION_WORDS for word in words for part in [word.split("'")[0]]) / len(words)
    if function < MIN_FUNCTION_WORDS:
        return f"only {function:.0%} function words: no English prose"
    return None


CHECKS = {"arithmetic": check_arithmetic, "story": check_story, "capital": check_capital}


def verdict(name: str, record: dict) -> tuple[str, str | None]:
    """The cleaned answer of a `ds4 generate --json` object, and what is wrong with it (None: nothing)."""
    text = record.get("text")
    if not isinstance(text, str):
        return "", "the output has no text"
    cut = record.get("finish_reason") == "length"
    answer = clean_answer(text).rstrip("\ufffd") if cut else clean_answer(text)  # the limit can split a character
    if not answer or not record.get("token_ids"):
        return answer, "nothing was generated"
    if bad := unprintable(answer):
        return answer, f"unprintable character {bad}"
    return answer, CHECKS[name](answer, cut)


def main(arguments: list[str]) -> int:
    """Check the JSON object on standard input by the rules named in ``arguments``; the exit code."""
    if len(arguments) != 1 or arguments[0] not in CHECKS:
        print(f"usage: verify_checks.py {'|'.join(CHECKS)} < answer.json", file=sys.stderr)
        return 2
    name = arguments[0]
    try:
        record = json.loads(sys.stdin.buffer.read().decode("utf-8"))
    except ValueError as error:
        print(f"FAIL {name}: the output is no JSON in UTF-8 ({error})")
        return 1
    answer, wrong = verdict(name, record if isinstance(record, dict) else {})
    print(answer)
    print(f"FAIL {name}: {wrong}" if wrong else f"PASS {name}: {summary(name, answer)}")
    return 1 if wrong else 0


def summary(name: str, answer: str) -> str:
    """What the verdict line says of a good answer."""
    if name == "story":
        return f"{len(WORD.findall(answer))} words, robot and painting, whole sentences, no loop"
    return " ".join(answer.split())[:60]


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main(sys.argv[1:]))
