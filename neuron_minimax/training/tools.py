"""The tools that demo conversations offer, with one request, its call and its result for each."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from neuron_minimax.training.world import COUNTRIES, NAMES, SKIES

MORE_CITIES = (
    "Lyon Munich Milan Porto Cork Turin Hamburg Krakow Osaka Mumbai Busan Lagos Boston Chicago "
    "Quito Perth"
)
CITIES = (*(country.capital for country in COUNTRIES), *MORE_CITIES.split())
CURRENCIES = tuple(sorted({country.currency for country in COUNTRIES}))


@dataclass(frozen=True)
class ToolUse:
    """A request, the call that serves it, what the tool returns and how the reply reads."""

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
    return rng.choices(USES, weights=(4, 3, 4, 2, 1))[0](rng)


def offered(rng: random.Random, needed: str | None = None) -> list[dict[str, Any]]:
    """One or two schemas in random order, `needed` among them."""
    others = [name for name in SCHEMAS if name != needed]
    names = ([needed] if needed else []) + rng.sample(others, rng.randint(0 if needed else 1, 1))
    rng.shuffle(names)
    return [SCHEMAS[name] for name in names]
