"""Constant expressions of GNU ld: numbers with K and M, symbols, ORIGIN, LENGTH, C's operators."""

from __future__ import annotations

import re
from collections.abc import Callable

_TOKEN = re.compile(
    r"\s*(?:(?P<number>0[xX][0-9a-fA-F]+|\$[0-9a-fA-F]+|[0-9]+)(?P<unit>[kKmM]?)(?![\w.$])"
    r"|(?P<name>[A-Za-z_.$][\w.$]*)"
    r"|(?P<operator><<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|~!<>?:(),]))"
)
#: Longer ones stand in no linker script, and would nest too deep.
_MOST_TOKENS = 256
_WORD = 1 << 64

_BINARY: tuple[dict[str, Callable[[int, int], int]], ...] = (  # loosest first
    {"||": lambda a, b: int(bool(a or b))},
    {"&&": lambda a, b: int(bool(a and b))},
    {"|": lambda a, b: a | b},
    {"&": lambda a, b: a & b},
    {"==": lambda a, b: int(a == b), "!=": lambda a, b: int(a != b)},
    {
        "<": lambda a, b: int(a < b),
        ">": lambda a, b: int(a > b),
        "<=": lambda a, b: int(a <= b),
        ">=": lambda a, b: int(a >= b),
    },
    {"<<": lambda a, b: a << min(b, 64), ">>": lambda a, b: a >> min(b, 64)},
    {"+": lambda a, b: a + b, "-": lambda a, b: a - b},
    {"*": lambda a, b: a * b, "/": lambda a, b: a // b, "%": lambda a, b: a % b},
)


def evaluate(
    text: str,
    symbol: Callable[[str], int],
    region: Callable[[str, str], int],
    defined: Callable[[str], bool],
) -> int:
    """Value of an expression, modulo 2^64.

    Args:
        text: The expression.
        symbol: Value of a symbol; raises ValueError if it has none.
        region: ``ORIGIN`` or ``LENGTH`` of a memory region; raises ValueError if it is not known.
        defined: Whether a symbol has a value.

    Raises:
        ValueError: It is broken, or needs what is known only when the program is linked.
    """
    tokens, at = [], 0
    stripped = text.strip()
    while at < len(stripped):
        match = _TOKEN.match(stripped, at)
        if match is None:
            raise ValueError(f"can't read {stripped[at : at + 20].strip()!r}")
        tokens.append(match)
        at = match.end()
    if len(tokens) > _MOST_TOKENS:
        raise ValueError("the expression is too long")
    parser = _Parser(tokens, symbol, region, defined)
    value = parser.conditional()
    if (more := parser.peek()) is not None:
        raise ValueError(f"can't read {more!r} after the expression")
    return value


class _Parser:
    def __init__(
        self,
        tokens: list[re.Match[str]],
        symbol: Callable[[str], int],
        region: Callable[[str, str], int],
        defined: Callable[[str], bool],
    ) -> None:
        self._tokens, self._at = tokens, 0
        self._taken = True  # else the branch of a ``?`` whose value does not matter
        self._symbol, self._region, self._defined = symbol, region, defined

    def peek(self) -> str | None:
        return self._tokens[self._at][0].strip() if self._at < len(self._tokens) else None

    def _next(self) -> re.Match[str]:
        if self._at == len(self._tokens):
            raise ValueError("the expression ends too early")
        self._at += 1
        return self._tokens[self._at - 1]

    def _take(self, wanted: str) -> None:
        if (found := self._next()[0].strip()) != wanted:
            raise ValueError(f"{wanted} is missing before {found!r}")

    def conditional(self) -> int:
        value = self._binary(0)
        if self.peek() != "?":
            return value
        self._next()
        taken, wanted = self._taken, bool(value)
        self._taken = taken and wanted
        yes = self.conditional()
        self._take(":")
        self._taken = taken and not wanted
        no = self.conditional()
        self._taken = taken
        return yes if wanted else no

    def _binary(self, level: int) -> int:
        if level == len(_BINARY):
            return self._unary()
        value = self._binary(level + 1)
        while (operator := self.peek()) in _BINARY[level]:
            self._next()
            right = self._binary(level + 1)
            if operator in ("/", "%") and right == 0:
                if self._taken:
                    raise ValueError("division by zero")
                right = 1
            value = _BINARY[level][operator](value, right) % _WORD
        return value

    def _unary(self) -> int:
        token = self._next()
        if token["number"]:
            return _number(token)
        if token["name"]:
            return self._named(token["name"])
        operator = token["operator"]
        if operator == "(":
            value = self.conditional()
            self._take(")")
            return value
        if operator not in ("-", "+", "~", "!"):
            raise ValueError(f"can't read {operator!r}")
        value = self._unary()
        changed = {"-": -value, "+": value, "~": ~value, "!": int(not value)}
        return changed[operator] % _WORD

    def _named(self, name: str) -> int:
        if self.peek() != "(":
            return self._symbol(name) if self._taken else 0
        self._next()
        if name in ("ORIGIN", "LENGTH", "DEFINED"):
            what = self._next()["name"] or ""
            self._take(")")
            return int(self._defined(what)) if name == "DEFINED" else self._region(name, what)
        if name not in ("MAX", "MIN", "ALIGN", "ABSOLUTE"):
            raise ValueError(f"{name}(...) is known only when the program is linked")
        values = [self.conditional()]
        while self.peek() == ",":
            self._next()
            values.append(self.conditional())
        self._take(")")
        if name == "ABSOLUTE" and len(values) == 1:
            return values[0]
        if len(values) != 2:
            raise ValueError(f"{name} takes two values")
        if name == "ALIGN":
            return -(-values[0] // max(1, values[1])) * max(1, values[1])
        return max(values) if name == "MAX" else min(values)


def _number(token: re.Match[str]) -> int:
    digits = token["number"]
    if digits[:2].lower() == "0x":
        value = int(digits, 16)
    elif digits[0] == "$":
        value = int(digits[1:], 16)
    elif digits[0] == "0" and len(digits) > 1:
        if not set(digits) <= set("01234567"):
            raise ValueError(f"{digits} starts with 0, as octal numbers do, and is none")
        value = int(digits, 8)
    else:
        value = int(digits)
    return value * {"": 1, "k": 1 << 10, "m": 1 << 20}[token["unit"].lower()]
