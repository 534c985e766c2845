"""The kinds of question of the demo's closed world: one generator each, with steps and answer."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from neuron_minimax.training.data.world import COUNTRIES, PHRASINGS, WORDS


@dataclass(frozen=True)
class Question:
    """A user's turn and the reply. Questions with equal keys are the same question."""

    kind: str
    key: str
    text: str
    reasoning: str
    answer: str
    operands: tuple = ()


def fact(rng: random.Random, relation: str | None = None, follow_up: bool = False) -> Question:
    """Ask for a capital (both ways), currency or continent; the last two also of a capital."""
    kind = relation or rng.choice(("capital", "currency", "continent"))
    country = rng.choice(COUNTRIES)
    relation = "country" if kind == "capital" and not follow_up and rng.random() < 0.3 else kind
    by_capital = relation == "country" or (
        relation in ("currency", "continent") and rng.random() < 0.25
    )
    subject = country.capital if by_capital else country.name
    phrasing = (
        rng.choice(("And {x}?", "What about {x}?"))
        if follow_up
        else rng.choice(PHRASINGS[relation])
    )
    answers = {
        "capital": f"The capital of {subject} is {country.capital}.",
        "country": f"{country.capital} is the capital of {country.name}.",
        "currency": f"The currency of {subject} is the {country.currency}.",
        "continent": f"{_sentence(subject)} is in {country.continent}.",
    }
    steps = f"{subject} -> {relation}"
    if by_capital and relation != "country":
        steps = f"{subject} -> {country.name} -> {relation}"
    text = _sentence(phrasing.format(x=subject))
    return Question(kind, f"{kind}: {text}", text, steps, answers[relation])


def addition(rng: random.Random, first: int | None = None) -> Question:
    """Ask for a sum of two numbers up to 99, or add to the running total `first`.

    The steps go column by column.
    """
    second = rng.randint(1, 99)
    given = first
    first = rng.randint(1, 99) if first is None else first
    phrasings = (
        "What is {a} + {b}?",
        "{a} + {b} = ?",
        "Add {a} and {b}.",
        "How much is {a} plus {b}?",
        "{a} plus {b}?",
    )
    text = (
        rng.choice(phrasings).format(a=first, b=second) if given is None else f"Now add {second}."
    )
    low, high = sorted((first, second))
    return Question(
        "sum", f"sum: {low} {high}", text, _add_steps(first, second),
        f"{first} + {second} = {first + second}.",
        (first + second,),
    )  # fmt: skip


def _add_steps(first: int, second: int) -> str:
    steps = []
    carry = 0
    place = 1
    while place == 1 or first >= place or second >= place:
        a = first // place % 10
        b = second // place % 10
        steps.append(f"{a}+{b}+{carry}={a + b + carry}")
        carry = (a + b + carry) // 10
        place *= 10
    return "\n".join(steps)


def subtraction(rng: random.Random) -> Question:
    """Ask for a difference of at least 0 of two numbers up to 99, column by column."""
    second, first = sorted((rng.randint(1, 99), rng.randint(1, 99)))
    phrasings = (
        "What is {a} - {b}?", "{a} - {b} = ?", "Subtract {b} from {a}.",
        "How much is {a} minus {b}?", "{a} minus {b}?",
    )  # fmt: skip
    ones = first % 10 + 10 * (first % 10 < second % 10)
    borrow = int(ones >= 10)
    steps = [
        f"{ones}-{second % 10}={ones - second % 10}",
        f"{first // 10}-{second // 10}-{borrow}={first // 10 - second // 10 - borrow}",
    ]
    text = rng.choice(phrasings).format(a=first, b=second)
    answer = f"{first} - {second} = {first - second}."
    return Question(
        "difference",
        f"difference: {first} {second}",
        text,
        "\n".join(steps),
        answer,
        (first - second,),
    )


def sorting(rng: random.Random) -> Question:
    """Ask to sort three to five digits, ascending or descending."""
    numbers = [rng.randint(0, 9) for _ in range(rng.randint(3, 5))]
    descending = rng.random() < 0.4
    shown = " ".join(map(str, numbers))
    phrasings = (
        (
            "Sort descending: {x}",
            "Sort from largest to smallest: {x}",
            "Put in descending order: {x}",
        )
        if descending
        else (
            "Sort: {x}",
            "Sort ascending: {x}",
            "Sort from smallest to largest: {x}",
            "Put in ascending order: {x}",
        )
    )
    result = " ".join(map(str, sorted(numbers, reverse=descending)))
    order = "descending" if descending else "ascending"
    return Question(
        "sort", f"sort: {order} {shown}", rng.choice(phrasings).format(x=shown), order,
        f"Sorted: {result}",
        tuple(result.split()),
    )  # fmt: skip


def reversing(rng: random.Random, items: tuple[str, ...] | None = None) -> Question:
    """Ask to reverse three to five words or digits, or `items`, the list of the turn before."""
    given = items
    if items is None:
        count = rng.randint(3, 5)
        items = (
            tuple(rng.sample(WORDS, count))
            if rng.random() < 0.6
            else tuple(str(rng.randint(0, 9)) for _ in range(count))
        )
    shown = " ".join(items)
    result = " ".join(reversed(items))
    phrasings = (
        "Reverse the list: {x}",
        "Reverse: {x}",
        "Say in reverse order: {x}",
        "Turn around: {x}",
    )
    text = (
        rng.choice(phrasings).format(x=shown)
        if given is None
        else rng.choice(("Reverse that.", "Now reverse it."))
    )
    return Question(
        "reverse",
        f"reverse: {shown}",
        text,
        "reverse order",
        f"Reversed: {result}",
        tuple(items[::-1]),
    )


def comparison(rng: random.Random) -> Question:
    """Ask for the larger or smaller number, the longer list or the one of larger maximum."""
    larger = rng.random() < 0.6
    if rng.random() < 0.6:
        first, second = rng.sample(range(1, 100), 2)
        best = max(first, second) if larger else min(first, second)
        asked = "larger" if larger else "smaller"
        steps = [f"{first // 10}{_sign(first // 10, second // 10)}{second // 10}"]
        if first // 10 == second // 10:
            steps.append(f"{first % 10}{_sign(first, second)}{second % 10}")
        phrasings = (
            "Which is {w}, {a} or {b}?",
            "Which number is {w}: {a} or {b}?",
            "{a} or {b}: which one is {w}?",
        )
        text = rng.choice(phrasings).format(w=asked, a=first, b=second)
        answer = f"{best} is {asked} than {first + second - best}."
        return Question(
            "compare", f"compare: {asked} {first} {second}", text, "\n".join(steps), answer
        )
    lists = [[rng.randint(0, 9) for _ in range(rng.randint(2, 4))] for _ in range(2)]
    values = [max(numbers) if larger else len(numbers) for numbers in lists]
    if values[0] == values[1]:
        return comparison(rng)
    asked = "has the larger maximum" if larger else "is longer"
    shown = " or ".join(" ".join(map(str, numbers)) for numbers in lists)
    answer = f"The {'first' if values[0] > values[1] else 'second'} list {asked}."
    steps = [f"{'maximum' if larger else 'length'}: {values[0]}{_sign(*values)}{values[1]}"]
    return Question(
        "compare", f"compare: {asked} {shown}", f"Which list {asked}: {shown}?", steps[0], answer
    )


def counting(rng: random.Random) -> Question:
    """Ask to count a letter in a spelled-out word; half of the words are made up."""
    if rng.random() < 0.5:
        word = rng.choice(WORDS)
    else:
        word = "".join(
            rng.choice("bdfklmnprst") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))
        )
    letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("abdeilnorst")
    steps = []
    count = 0
    for character in word:
        count += character == letter
        steps.append(f" {character}{count}")
    spelled = " ".join(word)
    phrasings = (
        "How many times does {l} occur in {x}?", "Count the letter {l} in {x}.",
        "How many {l} are in {x}?",
        "How often is {l} in {x}?",
    )  # fmt: skip
    text = rng.choice(phrasings).format(l=letter, x=spelled)
    answer = f"The letter {letter} occurs {count} {'time' if count == 1 else 'times'}."
    return Question("count", f"count: {letter} {word}", text, "".join(steps).strip(), answer)


ONE_LINERS: tuple[tuple[str, str], ...] = (
    ("prints the squares of the numbers below {n}", "print([x * x for x in range({n})])"),
    ("prints the sum of the numbers below {n}", "print(sum(range({n})))"),
    ("prints the even numbers below {n}", "print([x for x in range({n}) if x % 2 == 0])"),
    ("prints the odd numbers below {n}", "print([x for x in range({n}) if x % 2 == 1])"),
    ("prints the numbers from {n} down to 1", "print(list(range({n}, 0, -1)))"),
    (
        "prints {n} random digits",
        "import random; print([random.randint(0, 9) for _ in range({n})])",
    ),
    ("prints the word {w} {n} times", 'print("{w}" * {n})'),
    ("prints the word {w} in capital letters", 'print("{w}".upper())'),
    ("prints the word {w} backwards", 'print("{w}"[::-1])'),
    ("prints the length of the word {w}", 'print(len("{w}"))'),
    ("prints how often the letter {l} occurs in the word {w}", 'print("{w}".count("{l}"))'),
    ("prints the letters of the word {w} in order", 'print("".join(sorted("{w}")))'),
)


def python(rng: random.Random) -> Question:
    """Ask for a Python one-liner for a described task, with its numbers and words in place."""
    task, code = rng.choice(ONE_LINERS)
    values = {"n": rng.randint(2, 99), "w": rng.choice(WORDS), "l": rng.choice("abdeilnorst")}
    asked = task.format(**values)
    phrasings = (
        "Write a Python one-liner that {x}.",
        "Give me one line of Python that {x}.",
        "Python code that {x}?",
    )
    return Question(
        "python",
        f"python: {asked}",
        rng.choice(phrasings).format(x=asked),
        "code",
        code.format(**values),
    )


def _sign(first: int, second: int) -> str:
    if first == second:
        return "="
    return "<" if first < second else ">"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


# Every kind that is one question and one reply; facts are three kinds of one generator.
GENERATORS: dict[str, Callable[[random.Random], Question]] = {
    "capital": lambda rng: fact(rng, "capital"),
    "currency": lambda rng: fact(rng, "currency"),
    "continent": lambda rng: fact(rng, "continent"),
    "sum": addition,
    "difference": subtraction,
    "sort": sorting,
    "reverse": reversing,
    "compare": comparison,
    "count": counting,
    "python": python,
}
