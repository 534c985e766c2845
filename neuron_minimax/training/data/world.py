"""The closed world of the demo model: the tables of its questions, and the tools it may call."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Country:
    """A country as it reads inside a sentence, its capital, currency and continent."""

    name: str
    capital: str
    currency: str
    continent: str


_ROWS = """
France|Paris|euro|Europe
Germany|Berlin|euro|Europe
Italy|Rome|euro|Europe
Spain|Madrid|euro|Europe
Portugal|Lisbon|euro|Europe
Ireland|Dublin|euro|Europe
Greece|Athens|euro|Europe
Austria|Vienna|euro|Europe
Finland|Helsinki|euro|Europe
the United Kingdom|London|pound|Europe
Poland|Warsaw|zloty|Europe
Sweden|Stockholm|krona|Europe
Norway|Oslo|krone|Europe
Denmark|Copenhagen|krone|Europe
Hungary|Budapest|forint|Europe
Romania|Bucharest|leu|Europe
Ukraine|Kyiv|hryvnia|Europe
Switzerland|Bern|franc|Europe
Japan|Tokyo|yen|Asia
China|Beijing|yuan|Asia
India|New Delhi|rupee|Asia
Thailand|Bangkok|baht|Asia
Vietnam|Hanoi|dong|Asia
South Korea|Seoul|won|Asia
Indonesia|Jakarta|rupiah|Asia
Malaysia|Kuala Lumpur|ringgit|Asia
Mongolia|Ulaanbaatar|tugrik|Asia
Nepal|Kathmandu|rupee|Asia
Jordan|Amman|dinar|Asia
Iraq|Baghdad|dinar|Asia
Egypt|Cairo|pound|Africa
Kenya|Nairobi|shilling|Africa
Nigeria|Abuja|naira|Africa
Ghana|Accra|cedi|Africa
Ethiopia|Addis Ababa|birr|Africa
Morocco|Rabat|dirham|Africa
Tunisia|Tunis|dinar|Africa
Senegal|Dakar|franc|Africa
Angola|Luanda|kwanza|Africa
Zambia|Lusaka|kwacha|Africa
Canada|Ottawa|dollar|North America
Mexico|Mexico City|peso|North America
Cuba|Havana|peso|North America
the United States|Washington|dollar|North America
Brazil|Brasilia|real|South America
Argentina|Buenos Aires|peso|South America
Chile|Santiago|peso|South America
Peru|Lima|sol|South America
Colombia|Bogota|peso|South America
Australia|Canberra|dollar|Oceania
New Zealand|Wellington|dollar|Oceania
Fiji|Suva|dollar|Oceania
"""

COUNTRIES = tuple(Country(*row.split("|")) for row in _ROWS.strip().splitlines())

# How a relation may be asked; {x} is a country, or a capital where the relation starts from one.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "capital": (
        "What is the capital of {x}?",
        "Name the capital of {x}.",
        "Which city is the capital of {x}?",
        "Tell me the capital of {x}.",
        "I forgot the capital of {x}. What is it?",
        "What is the capital city of {x}?",
        "What's the capital of {x}?",
        "Can you name the capital of {x}?",
        "Capital of {x}, please.",
        "Do you know the capital of {x}?",
        "What city is the capital of {x}?",
    ),
    "country": (
        "Which country has {x} as its capital?",
        "{x} is the capital of which country?",
        "What country is {x} the capital of?",
        "Name the country whose capital is {x}.",
        "{x} is a capital. Of which country?",
        "Tell me the country with the capital {x}.",
        "Of which country is {x} the capital?",
        "Do you know the country whose capital is {x}?",
    ),
    "currency": (
        "What is the currency of {x}?",
        "Which currency is used in {x}?",
        "What money do people use in {x}?",
        "Name the currency of {x}.",
        "How do people pay in {x}?",
        "Tell me the currency of {x}.",
        "I travel to {x}. Which currency do I need?",
        "Currency of {x}, please.",
        "What do people pay with in {x}?",
        "Do you know the currency of {x}?",
    ),
    "continent": (
        "On which continent is {x}?",
        "Which continent is {x} on?",
        "What continent does {x} belong to?",
        "Name the continent of {x}.",
        "Where in the world is {x}?",
        "Tell me the continent of {x}.",
        "In which part of the world is {x}?",
        "Continent of {x}, please.",
        "Do you know the continent of {x}?",
        "To which continent does {x} belong?",
    ),
}

# Common words for lists and for spelling.
_WORDS = (
    "apple river stone cloud table green light paper horse train bread water music house garden "
    "window summer winter yellow orange silver copper island valley forest bridge market school "
    "doctor farmer singer sailor banana cherry pepper tomato rabbit monkey tiger eagle piano "
    "violin mirror candle button pocket ladder hammer letter number morning evening mountain "
    "desert ocean planet rocket engine wheel basket kettle pillow blanket carpet"
)
WORDS = tuple(_WORDS.split())

_NAMES = "Anna Ben Clara David Emma Felix Grace Henry Iris Jonas Lena Max Nora Oscar Paula Tom"
NAMES = tuple(_NAMES.split())
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "clear")

SMALL_TALK = (
    ("Hello!", "A greeting.", "Hello! Ask me about countries, numbers, lists or words."),
    ("Hi there.", "A greeting.", "Hello! Ask me about countries, numbers, lists or words."),
    ("Good morning.", "A greeting.", "Hello! Ask me about countries, numbers, lists or words."),
    ("Who are you?", "A question about me.", "I am a small demo model in the MiniMax-M2 format."),
    ("What are you?", "A question about me.", "I am a small demo model in the MiniMax-M2 format."),
    (
        "What can you do?",
        "A question about me.",
        "I know capitals, currencies and continents, and I can add, subtract, sort, reverse, "
        "compare and count.",
    ),
    ("Thank you.", "Thanks.", "You are welcome."),
    ("Thanks!", "Thanks.", "You are welcome."),
    ("Goodbye.", "A farewell.", "Goodbye!"),
)

MORE_CITIES = (
    "Lyon Munich Milan Porto Cork Turin Hamburg Krakow Osaka Mumbai Busan Lagos Boston Chicago "
    "Quito Perth"
)
CITIES = (*(country.capital for country in COUNTRIES), *MORE_CITIES.split())
CURRENCIES = tuple(sorted({country.currency for country in COUNTRIES}))


@dataclass(frozen=True)
class ToolUse:
    """A request, the call that serves it, the tool's result and the reply made from it."""

    name: str
    request: str
    arguments: dict[str, Any]
    result: dict[str, Any]
    reply: str

    @property
    def key(self) -> str:
        return f"{self.name} {json.dumps(self.arguments)}"


def _schema(name: str, description: str, properties: dict[str, str]) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties),
    }
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


SCHEMAS: dict[str, dict[str, Any]] = {
    schema["function"]["name"]: schema
    for schema in (
        _schema("get_weather", "Weather of a city", {"city": "string"}),
        _schema("get_time", "Local time of a city", {"city": "string"}),
        _schema(
            "convert_money",
            "Convert an amount",
            {"amount": "integer", "source": "string", "target": "string"},
        ),
        _schema("set_timer", "Start a timer", {"minutes": "integer"}),
        _schema("send_greeting", "Greet a person", {"name": "string"}),
    )
}


def _weather(rng: random.Random) -> ToolUse:
    city = rng.choice(CITIES)
    degrees = rng.randint(1, 39)
    sky = rng.choice(SKIES)
    request = rng.choice(
        ("What is the weather in {c}?", "How is the weather in {c}?", "Weather in {c}, please.")
    )
    reply = f"It is {sky} in {city}, {degrees} degrees."
    result = {"temperature": degrees, "sky": sky}
    return ToolUse("get_weather", request.format(c=city), {"city": city}, result, reply)


def _time(rng: random.Random) -> ToolUse:
    city = rng.choice(CITIES)
    clock = f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    request = rng.choice(
        ("What time is it in {c}?", "Tell me the time in {c}.", "How late is it in {c}?")
    )
    return ToolUse(
        "get_time",
        request.format(c=city),
        {"city": city},
        {"time": clock},
        f"It is {clock} in {city}.",
    )


def _money(rng: random.Random) -> ToolUse:
    amount = rng.randint(1, 99)
    total = rng.randint(1, 999)
    source, target = rng.sample(CURRENCIES, 2)
    request = rng.choice(
        ("Convert {a} {s} to {t}.", "How much is {a} {s} in {t}?", "Change {a} {s} into {t}.")
    )
    arguments = {"amount": amount, "source": source, "target": target}
    reply = f"{amount} {source} is {total} {target}."
    return ToolUse(
        "convert_money", request.format(a=amount, s=source, t=target), arguments,
        {"amount": total}, reply
    )  # fmt: skip


def _timer(rng: random.Random) -> ToolUse:
    minutes = rng.randint(2, 99)
    request = rng.choice(
        (
            "Set a timer for {m} minutes.",
            "Start a timer: {m} minutes.",
            "Timer for {m} minutes, please.",
        )
    )
    reply = f"The timer runs for {minutes} minutes."
    return ToolUse(
        "set_timer", request.format(m=minutes), {"minutes": minutes}, {"started": True}, reply
    )


def _greeting(rng: random.Random) -> ToolUse:
    name = rng.choice(NAMES)
    request = rng.choice(
        ("Greet {n}.", "Say hello to {n}.", "Send {n} a greeting.", "Send a greeting to {n}.")
    )
    return ToolUse(
        "send_greeting",
        request.format(n=name),
        {"name": name},
        {"sent": True},
        f"I greeted {name}.",
    )


USES: tuple[Callable[[random.Random], ToolUse], ...] = (_weather, _time, _money, _timer, _greeting)


def tool_use(rng: random.Random) -> ToolUse:
    """Draw a use of one of the tools."""
    return rng.choices(USES, weights=(4, 3, 4, 2, 1))[0](rng)


def offered(rng: random.Random, needed: str | None = None) -> list[dict[str, Any]]:
    """Draw one or two schemas in random order, `needed` among them."""
    others = [name for name in SCHEMAS if name != needed]
    names = ([needed] if needed else []) + rng.sample(others, rng.randint(0 if needed else 1, 1))
    rng.shuffle(names)
    return [SCHEMAS[name] for name in names]
