"""Filling a JSON object from a sentence, and calling a named tool with JSON arguments."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from tools.demo_model import words
from tools.demo_model.common import Example, ask, is_held_out

Values = dict[str, Any]
Draw = Callable[[random.Random], Values]


def _person(rng: random.Random) -> Values:
    jobs = "teacher doctor farmer baker pilot nurse writer painter engineer singer".split()
    return {
        "name": words.name(rng), "age": rng.randint(1, 99), "city": words.city(rng),
        "job": rng.choice(jobs),
    }  # fmt: skip


def _order(rng: random.Random) -> Values:
    return {
        "customer": words.name(rng), "item": rng.choice(words.ITEMS),
        "quantity": rng.randint(2, 99), "price": rng.randint(1, 500),
    }  # fmt: skip


def _meeting(rng: random.Random) -> Values:
    days = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
    return {
        "person": words.name(rng), "day": rng.choice(days),
        "time": f"{rng.randint(7, 20):02}:{rng.choice(['00', '15', '30', '45'])}",
        "room": rng.randint(1, 99),
    }  # fmt: skip


def _pet(rng: random.Random) -> Values:
    return {
        "owner": words.name(rng), "animal": rng.choice("cat dog horse rabbit parrot".split()),
        "pet_name": words.made_up(rng).capitalize(), "color": rng.choice(words.COLORS),
    }  # fmt: skip


def _trip(rng: random.Random) -> Values:
    return {
        "traveler": words.name(rng), "from": words.city(rng), "to": words.city(rng),
        "by": rng.choice("train plane bus car boat".split()),
    }  # fmt: skip


SENTENCES: list[tuple[Draw, list[str]]] = [
    (_person, [
        "{name} is {age} years old, lives in {city} and works as a {job}.",
        "{name}, a {age} year old {job}, lives in {city}.",
        "My friend {name} from {city} is a {job} and {age} years old.",
        "In {city} I met {name}, who is {age} and works as a {job}.",
        "The {job} {name} is {age} and comes from {city}.",
    ]),
    (_order, [
        "{customer} ordered {quantity} {item} for {price} dollars.",
        "{customer} bought {quantity} {item} and paid {price} dollars.",
        "For {price} dollars, {customer} gets {quantity} {item}.",
        "Please send {quantity} {item} to {customer}; the price is {price} dollars.",
    ]),
    (_meeting, [
        "The meeting with {person} is on {day} at {time} in room {room}.",
        "On {day} at {time} I meet {person} in room {room}.",
        "{person} booked room {room} for {day} at {time}.",
        "We see {person} in room {room} on {day}, {time}.",
    ]),
    (_pet, [
        "{owner} has a {color} {animal} called {pet_name}.",
        "The {color} {animal} of {owner} is named {pet_name}.",
        "{pet_name} is a {color} {animal} that belongs to {owner}.",
    ]),
    (_trip, [
        "{traveler} travels from {from} to {to} by {by}.",
        "{traveler} takes the {by} from {from} to {to}.",
        "By {by}, {traveler} goes to {to}, starting in {from}.",
    ]),
]  # fmt: skip
FILL = [
    "Fill this JSON object from the sentence. {o} Sentence: {s}",
    "Fill in the JSON object {o} from this sentence: {s}",
    "Extract the fields {o} as JSON: {s}",
    "Complete the JSON {o} with the facts in this text: {s}",
    "Text: {s} Fill this JSON: {o}",
]


def _empty(value: Any) -> Any:
    return "" if isinstance(value, str) else 0


def json_filling(rng: random.Random) -> Example:
    draw, sentences = rng.choice(SENTENCES)
    values = draw(rng)
    sentence = rng.choice(sentences).format(**values)
    keys = list(values)
    if rng.random() < 0.5:
        keys = rng.sample(keys, rng.randint(2, len(keys)))
    shown = json.dumps({key: _empty(values[key]) for key in keys})
    answer = json.dumps({key: values[key] for key in keys})
    question = ask(rng, FILL, o=shown, s=sentence)
    return Example("json filling", f"{keys} {sentence}", question, (answer,))


def _tool(name: str, about: str, /, **parameters: str) -> dict[str, Any]:
    """A signature in the form of the OpenAI chat API; parameters as name=type."""
    fields = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": fields, "required": list(fields)}
    function = {"name": name, "description": about, "parameters": schema}
    return {"type": "function", "function": function}


def _city(rng: random.Random) -> Values:
    return {"city": words.city(rng)}


def _name(rng: random.Random) -> Values:
    return {"name": words.name(rng)}


def _item(rng: random.Random) -> Values:
    return {"item": rng.choice(words.ITEMS), "quantity": rng.randint(1, 99)}


def _minutes(rng: random.Random) -> Values:
    return {"minutes": rng.randint(1, 180)}


def _two_numbers(rng: random.Random) -> Values:
    return {"a": rng.randint(0, 9999), "b": rng.randint(0, 9999)}


def _route(rng: random.Random) -> Values:
    return {"start": words.city(rng), "end": words.city(rng)}


def _light(rng: random.Random) -> Values:
    rooms = "kitchen bedroom office bathroom garden hall".split()
    return {"room": rng.choice(rooms), "state": rng.choice(["on", "off"])}


def _message(rng: random.Random) -> Values:
    return {"to": words.name(rng), "text": " ".join(rng.sample(words.COMMON, rng.randint(2, 5)))}


def _query(rng: random.Random) -> Values:
    return {"query": " ".join(rng.sample(words.COMMON, rng.randint(1, 3)))}


TOOLS: list[tuple[dict[str, Any], Draw, list[str]]] = [
    (_tool("get_weather", "Current weather in a city", city="string"), _city, [
        "What is the weather in {city}?", "How is the weather in {city} today?",
        "Is it raining in {city}?", "Tell me the weather in {city}.", "Weather in {city}",
    ]),
    (_tool("get_time", "Current local time in a city", city="string"), _city, [
        "What time is it in {city}?", "Tell me the time in {city}.", "Current time in {city}?",
    ]),
    (_tool("find_contact", "Look up a person's phone number", name="string"), _name, [
        "What is the phone number of {name}?", "Find the number of {name}.",
        "Look up {name} in my contacts.", "How can I call {name}?",
    ]),
    (_tool("order_item", "Order items", item="string", quantity="integer"), _item, [
        "Order {quantity} {item}.", "Please buy {quantity} {item}.", "I need {quantity} {item}.",
        "Can you order {quantity} {item} for me?",
    ]),
    (_tool("set_timer", "Start a timer", minutes="integer"), _minutes, [
        "Set a timer for {minutes} minutes.", "Start a {minutes} minute timer.",
        "Remind me in {minutes} minutes.", "Wake me in {minutes} minutes.",
    ]),
    (_tool("multiply", "Multiply two numbers", a="integer", b="integer"), _two_numbers, [
        "Use the tool to multiply {a} by {b}.", "What is {a} times {b}?", "Multiply {a} and {b}.",
    ]),
    (_tool("add", "Add two numbers", a="integer", b="integer"), _two_numbers, [
        "Use the tool to add {a} and {b}.", "What is {a} plus {b}?", "Add {a} and {b}.",
    ]),
    (_tool("find_route", "Route between two cities", start="string", end="string"), _route, [
        "How do I get from {start} to {end}?", "Find a route from {start} to {end}.",
        "Route from {start} to {end}, please.",
    ]),
    (_tool("set_light", "Switch a light", room="string", state="string"), _light, [
        "Turn {state} the light in the {room}.", "Switch the {room} light {state}.",
        "Lights {state} in the {room}, please.",
    ]),
    (_tool("send_message", "Send a text message", to="string", text="string"), _message, [
        "Send {to} the message: {text}", "Write to {to}: {text}", "Tell {to} this: {text}",
    ]),
    (_tool("search", "Search the web", query="string"), _query, [
        "Search for {query}", "Search the web for {query}.", "Look up {query} on the web.",
    ]),
]  # fmt: skip


def call_text(name: str, arguments: Values) -> str:
    """A tool call as the chat template writes it."""
    call = {"name": name, "arguments": arguments}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def tool_calling(rng: random.Random) -> Example:
    chosen = rng.sample(TOOLS, rng.choice([1, 1, 2, 3, 4]))
    signature, draw, questions = rng.choice(chosen)
    arguments, name = draw(rng), signature["function"]["name"]
    question = ask(rng, questions, **arguments)
    tools = tuple(tool for tool, _, _ in chosen)
    key = f"{name} {json.dumps(arguments)}"
    return Example("tool calling", key, question, (call_text(name, arguments),), tools)


RESULTS: list[tuple[str, Draw, str, str]] = [
    ("get_weather", _city, '{{"degrees": {n}, "sky": "{w}"}}',
     "In {city} it is {n} degrees and {w}."),
    ("set_timer", _minutes, '{{"ok": true}}', "Done: the timer is set for {minutes} minutes."),
    ("find_contact", _name, '{{"phone": "{n}"}}', "The phone number of {name} is {n}."),
    ("order_item", _item, '{{"ok": true}}', "Done: {quantity} {item} ordered."),
]  # fmt: skip


def tool_result(rng: random.Random) -> Example:
    """The turn after a call: the history holds question and call, the question is the result."""
    name, draw, result, answer = rng.choice(RESULTS)
    signature, _, questions = next(t for t in TOOLS if t[0]["function"]["name"] == name)
    arguments = draw(rng)
    while is_held_out("tool calling", f"{name} {json.dumps(arguments)}"):
        arguments = draw(rng)  # the call in the history must not be one of the evaluation
    extra = {"n": rng.randint(1, 39), "w": rng.choice(["sunny", "cloudy", "rainy", "windy"])}
    if name == "find_contact":
        extra["n"] = rng.randint(10_000, 999_999)
    shown = result.format(**arguments, **extra)
    history = ((ask(rng, questions, **arguments), call_text(name, arguments)),)
    question = f"<tool_response>\n{shown}\n</tool_response>"
    final = answer.format(**arguments, **extra)
    key = f"{name} {arguments} {shown}"
    return Example("tool result", key, question, (final,), (signature,), history)
