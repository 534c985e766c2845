"""The closed world of the demo model: the tables its questions are made of."""

from dataclasses import dataclass


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
