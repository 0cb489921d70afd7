"""Damage to JSON and to bytes: chosen by a random generator, so that a seed and a number name a case."""

import copy
import json

_DEEP, _HUGE, _TWICE = "@deep@", "@huge@", "@twice@"
EVIL = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 10**30, 1e308, -0.5, float("nan"), float("inf"),
    "", " ", "x", "x" * 100_000,
    "\x1b]0;owned\x07", "\ud800", "a\0b", "../../etc/passwd", "/dev/zero", "漢", "0", "-1",
    [], {}, [None], [[]], {"": 1}, [0] * 1000, _DEEP, _HUGE,
]  # fmt: skip


def mutated_json(value, random):
    """`value` as text, changed in one to three places."""
    value = copy.deepcopy(value)
    for _ in range(random.randint(1, 3)):
        value = _change(value, random)
    text = json.dumps(value)
    if random.random() < 0.05:
        text = text[: random.randrange(len(text) + 1)]
    for mark, content in ((_DEEP, "[" * 100_000 + "]" * 100_000), (_HUGE, "9" * 10_000)):
        text = text.replace(json.dumps(mark), content)
    return text


def _change(value, random):
    if not isinstance(value, (dict, list)) or not value or random.random() < 0.02:
        return copy.deepcopy(random.choice(EVIL))
    # Step by step, so that a vocabulary of thousands is no likelier than a setting beside it.
    holder = value
    while True:
        key = random.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
        below = holder[key]
        if not isinstance(below, (dict, list)) or not below or random.random() < 0.3:
            break
        holder = below
    kind = random.random()
    if kind < 0.6:
        holder[key] = copy.deepcopy(random.choice(EVIL))
    elif kind < 0.75:
        del holder[key]
    elif kind < 0.85 and isinstance(holder, dict):
        holder[random.choice(["", "unknown", "x" * 5000, "\x1b[2J", "\ud800"])] = holder.pop(key)
    elif kind < 0.95:
        holder[key] = copy.deepcopy(random.choice(list(value.values() if isinstance(value, dict) else value)))
    elif isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
        holder[key] = holder[key] * random.choice([-1, 2, 1000, 0.5])
    return value


def mutated_bytes(data, random):
    """`data` with bytes flipped, cut, doubled, overwritten or put in between."""
    data = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(data) + 1)
        kind = random.random()
        if kind < 0.5 and data:
            data[at % len(data)] ^= 1 << random.randrange(8)
        elif kind < 0.65:
            number = random.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 0xFFFF])
            data[at : at + 4] = number.to_bytes(4, random.choice(["big", "little"]))
        elif kind < 0.75:
            del data[at:]
        elif kind < 0.85:
            del data[at : at + random.randrange(64)]
        elif kind < 0.95:
            data[at:at] = random.randbytes(random.randrange(64))
        else:
            data[at:at] = data[at : at + random.randrange(4096)]
    return bytes(data)
