"""Values that no writer of ours makes, put somewhere into JSON."""

import json
import random
from typing import Any

MARK = "zqx9"  # of texts that are code somewhere
TEXTS = (
    "{{ 7*7777777 }}zqx9",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}zqx9",
    "__import__('os').system('true') #zqx9",
    '1;}\n#include "/etc/passwd"\n//zqx9',
    "../../../../etc/passwd#zqx9",
    "'; DROP TABLE records; --zqx9",
    "[/zqx9] [link=file:///etc/passwd]zqx9[/link] :smile:",
    "%s%n zqx9",
    "\x1b[2J\x1b]0;zqx9\x07",
    "\x9b31m",
    "\u202ezqx9",
    "\ud800",
    "a\r\nb\tzqx9",
    "\x00",
    "٣",
    "9" * 5000,
    "x" * 20_000,
    "",
)
NUMBERS = ("1e999", "NaN", "-Infinity", "-0.0", "5e-324", "1e308", "0." + "1" * 5000)
WHOLE = (0, -1, 1, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**308, 10**400)
DEEP = ("[" * 3000 + "]" * 3000, '{"a":' * 3000 + "1" + "}" * 3000, "[" * 100 + "]" * 100)


class Raw(str):
    """Text that stands in JSON as it is."""

    __slots__ = ()


def value(r: random.Random) -> Any:
    """Something hostile."""
    kinds: list[Any] = [
        r.choice(TEXTS),
        r.choice(TEXTS),
        r.choice(WHOLE),
        Raw(r.choice(NUMBERS)),
        Raw(r.choice(DEEP)),
        Raw("9" * r.choice((4299, 4301, 50_000))),
        r.choice((None, True, [], {}, [[1]], {"a": 1})),
    ]
    return r.choice(kinds)


def mutate(r: random.Random, data: Any) -> None:
    """Change one place of nested lists and dicts: another value or name, gone, or doubled."""
    box, key = r.choice(list(_places(data)))
    way = r.random()
    if way < 0.7:
        box[key] = value(r)
    elif way < 0.8:
        del box[key]
    elif isinstance(box, dict):
        box[r.choice((*TEXTS, "plan", "__class__"))] = box[key]
    else:
        box.append(box[key])


def _places(data: Any) -> Any:
    for key in list(data) if isinstance(data, dict) else range(len(data)):
        yield data, key
        if isinstance(data[key], dict | list):
            yield from _places(data[key])


def spoil(r: random.Random, data: bytes) -> bytes:
    """Change a few bytes: flipped, gone, doubled, or cut."""
    changed = bytearray(data)
    for _ in range(r.choice((1, 1, 4, 20))):
        at, way = r.randrange(max(1, len(changed))), r.random()
        if way < 0.4 and changed:
            changed[at] = r.randrange(256)
        elif way < 0.6:
            del changed[at : at + r.choice((1, 10, 500))]
        elif way < 0.8:
            changed[at:at] = changed[at : at + r.randrange(100)]
        elif way < 0.9:
            changed[at:at] = r.choice((b"NaN", b"[" * 2000, b"\xed\xa0\x80", b"9" * 5000, b"\0"))
        else:
            del changed[at:]
    return bytes(changed)


def dumped(data: Any) -> bytes:
    """JSON, also of what `json.dumps` refuses: `Raw` as it is, and any number."""
    return _text(data).encode("utf-8", "surrogatepass")


def _text(data: Any) -> str:
    if isinstance(data, Raw):
        return str(data)
    if isinstance(data, dict):
        pairs = (f"{json.dumps(str(name))}: {_text(each)}" for name, each in data.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(data, list):
        return f"[{', '.join(map(_text, data))}]"
    return json.dumps(data)
