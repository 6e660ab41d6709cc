"""The units that may follow a number: a closed list, because a word outside it may be part of the number.

"5k", "2 dozen", "3 halves" and "4 Mrd" are other numbers than 5, 2, 3 and 4, in ways that no list of exceptions ends.
"""

from __future__ import annotations

import re

# Symbols are read as they are spelled: m is a metre, M a million, and neither is the other.
SYMBOLS = frozenset(
    """
    m cm mm km nm dm Km KM CM in ft yd mi ha ac g kg mg Kg KG lb lbs oz l L ml mL dl dL cl cL kl kL gal qt pt cc tbsp
    tsp s sec ms min h hr hrs am pm AM PM mph kph kmh rpm fps Hz kHz MHz GHz N J kJ cal kcal W kW MW kWh V Pa kPa atm
    mol C F deg rad KB kB MB GB TB px dB sq cu pts pcs ct USD EUR GBP CAD AUD INR RMB CNY JPY CHF st nd rd th % ° € £
    ¥ ₹
    """.split()
)

# Words in the singular, in any case; a plural in -s, -es or -ies is recognised.
WORDS = frozenset(
    """
    meter metre centimeter centimetre millimeter millimetre kilometer kilometre inch foot feet yard mile hectare acre
    gram kilogram milligram kilo ton tonne pound ounce stone liter litre milliliter millilitre gallon quart pint cup
    glass tablespoon teaspoon second minute hour day week weekday weekend month year decade century night morning degree
    celsius fahrenheit kelvin radian watt kilowatt volt ampere joule calorie newton pascal byte bit kilobyte megabyte
    gigabyte hertz percent percentage point unit dollar cent euro penny pennies pence nickel dime buck coin bill rupee
    yuan yen peso franc krona square cubic per each apiece total altogether in all left remaining more old long
    tall wide high deep away now today
    person people man men woman women child children kid boy girl baby adult student pupil teacher worker employee
    member friend guest customer player passenger visitor voter citizen resident soldier doctor nurse cousin sibling
    brother sister family families couple pair team group class classes room house apartment building floor school
    animal dog cat puppy puppies kitten bird chicken hen duck goose geese cow sheep goat pig horse fish rabbit
    mouse mice deer bee ant spider egg apple orange banana pear peach plum grape cherry cherries strawberry lemon melon
    mango potato tomato carrot onion vegetable fruit bean seed nut tree bush plant flower rose tulip leaf leaves branch
    cookie cake cupcake pie pizza slice piece candy candies chocolate sweet donut muffin sandwich burger meal lunch
    dinner snack drink bottle can jar bowl plate box boxes bag basket bucket crate carton packet pack package bundle
    case row column shelf shelves page book notebook magazine newspaper letter word sentence chapter question problem
    test quiz quizzes exam paper sheet card stamp sticker photo picture painting poster pen pencil crayon marker eraser
    ruler clip pin button bead marble ball balloon toy doll puzzle game match goal score lap step stair trip ride visit
    time turn way lesson session shift job task order ticket seat chair table desk lamp light bulb window door key phone
    computer laptop device tool nail screw brick tile board block stick rope string shirt sock shoe boot hat dress
    dresses skirt jacket coat glove scarf ring necklace bracelet car truck bus buses bicycle bike train plane boat ship
    wheel tire garden field farm store shop park road street city cities country countries state island rock stone
    shell lollipop ribbon flag song video movie show episode follower view message email call pizza loaf loaves batch
    serving portion scoop bite sip drop number object item thing element side angle corner edge face vertex vertices
    triangle circle rectangle cube digit divisor factor multiple solution value
    """.split()
)

_POWER = re.compile(r"(?<=[A-Za-z])(?:\^\{?-?[1-4]\}?|[²³])")
_A_DAY = re.compile(r" an? (?=[A-Za-z])")
_SHAPE = re.compile(r"[A-Za-z°%€£¥₹./· ]*")
_WORD = re.compile(r"[A-Za-z]+|[°%€£¥₹]")
_MILLION = re.compile(r" *m\b(?! *(?:$|[/·]|per\b))")  # "5 m people"; "5 m", "5 m/s" and "5 m per second" are metres


def is_unit(text: str, *, money: bool = False) -> bool:
    """True for text without a word, or with words of the list alone, joined by blanks, "/", "." or "per".

    money: the number has a currency sign, so that a short symbol next to it is a multiple ("$5m", "£2k").
    """
    text = _A_DAY.sub(" per ", _POWER.sub("", text))
    if _SHAPE.fullmatch(text) is None or _MILLION.match(text):
        return False
    words = _WORD.findall(text)
    if money and words and len(words[0]) < 3 and words[0] not in "%€£¥₹" and not text.lstrip().startswith("/"):
        return False
    return all(word in SYMBOLS or _is_listed(word.lower()) for word in words)


def _is_listed(word: str) -> bool:
    """True for a word of the list, and for its plural."""
    forms = (word, word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("ies") + "y")
    return any(form in WORDS for form in forms)
