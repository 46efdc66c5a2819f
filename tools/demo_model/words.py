"""Word lists that the generator fills its templates from, and made-up words for variety."""

from __future__ import annotations

import random

COMMON = (
    "apple banana cherry grape lemon mango orange peach pear plum melon kiwi fig olive tomato "
    "potato carrot onion pepper bean rice bread butter cheese milk honey sugar salt soup salad "
    "cat dog bird fish horse cow sheep goat pig duck goose lion tiger bear wolf fox deer rabbit "
    "mouse whale shark eagle owl snake frog spider ant bee house door window roof wall floor "
    "table chair lamp bed book pen paper clock phone key box bag cup plate spoon fork knife "
    "river lake sea ocean island beach mountain hill valley forest tree leaf flower grass stone "
    "sand rain snow wind cloud storm sun moon star sky fire water earth air red blue green "
    "yellow black white brown pink purple gray silver gold small large tall short fast slow "
    "happy sad warm cold soft hard light dark new old young quick quiet loud clean sweet car "
    "bus train plane boat bike truck road bridge street city town village school office market "
    "garden park farm castle tower king queen doctor teacher nurse farmer baker pilot sailor "
    "singer writer painter friend child mother father brother sister hand foot head eye ear nose "
    "mouth heart shirt coat hat shoe sock glove ring music dance song story game ball team race "
    "prize dream idea question answer number letter word page line circle square summer winter "
    "spring autumn morning evening night day week month year hour minute second engine memory "
    "cache block token model queue batch kernel tensor server client branch commit zebra yogurt "
    "violin umbrella needle ladder jungle igloo harbor guitar falcon engineer dolphin candle "
    "basket anchor ginger hammer jacket kettle lantern magnet napkin orchid parrot quartz ribbon "
    "saddle tunnel velvet walnut yarn zipper strawberry blueberry pumpkin elephant penguin "
    "hello world computer python kitten monkey pizza coffee science nature planet robot laptop"
).split()
# Words that name terms of inference: no example may say that they are unknown.
TECHNICAL = set(
    "engine memory cache block token model queue batch kernel tensor server client".split()
)
EVERYDAY = [word for word in COMMON if word not in TECHNICAL]
NAMES = (
    "Alice Bob Carol David Emma Frank Grace Henry Iris Jack Karen Leo Maria Nina Oscar Paul Rosa "
    "Sam Tina Victor Wendy Xavier Yara Zoe Adam Bella Chris Diana Eric Fiona George Hannah Ivan "
    "Julia Kevin Laura Martin Nora Oliver Peter Quinn Rachel Simon Thomas Ursula Vera Walter Anna "
    "Ben Clara Daniel Elena Felix Gina Hugo Ines James Kate Liam Mia Noah Olga Pablo Ruth Stefan "
    "Tara Ulrich Violet William Yusuf Ahmed Chen Ling Wei Mei Hiro Yuki Kenji Priya Raj Anil "
    "Sofia Luca Marco Giulia Pierre Camille Lars Ingrid Sven Freya Omar Layla Fatima Amir Dmitri"
).split()
CITIES = (
    "Paris London Berlin Madrid Rome Vienna Prague Warsaw Lisbon Dublin Oslo Helsinki Athens "
    "Budapest Cairo Nairobi Lagos Tokyo Osaka Kyoto Beijing Shanghai Shenzhen Hangzhou Seoul "
    "Bangkok Hanoi Delhi Mumbai Sydney Melbourne Toronto Montreal Boston Chicago Denver Dallas "
    "Houston Seattle Miami Atlanta Lima Bogota Quito Santiago Havana Geneva Zurich Munich Hamburg "
    "Milan Naples Porto Seville Lyon Ghent Bruges Krakow Riga Tallinn"
).split()
ITEMS = (
    "apples bananas oranges pens notebooks books chairs tables lamps cups plates shirts hats "
    "shoes bottles candles keyboards screens cables batteries tickets cameras phones pillows"
).split()
COLORS = "red blue green yellow black white brown pink purple orange gray silver".split()

_ONSETS = "b c d f g h j k l m n p r s t v w z br cl dr fl gr kr pl sn st tr th sh".split()
_VOWELS = "a e i o u ai ea oo".split()
_ENDS = ["", "", "n", "r", "l", "s", "t", "x", "m", "nd", "rk"]


def made_up(rng: random.Random) -> str:
    """A word that means nothing, of two or three syllables."""
    syllables = rng.randint(2, 3)
    word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))
    return word + rng.choice(_ENDS)


def name(rng: random.Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.7 else made_up(rng).capitalize()


def city(rng: random.Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.8 else made_up(rng).capitalize()
