"""Sizes, times and energies as users write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odt_plan.ir.errors import UsageError
from odt_plan.planner.sizes import (
    LARGEST_BYTES,
    format_bytes,
    format_joules,
    format_seconds,
    parse_bytes,
    parse_joules,
    parse_seconds,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("320KB", 327_680),
        ("320 KiB", 327_680),
        ("320kb", 327_680),
        ("320K", 327_680),
        (" 320 KB ", 327_680),
        ("0x50000", 327_680),
        ("0X5_0000", 327_680),
        ("327680", 327_680),
        ("327680B", 327_680),
        ("327,680 B", 327_680),
        ("1MB", 1_048_576),
        ("1MiB", 1_048_576),
        ("1.5MB", 1_572_864),
        ("32.3MB", 33_869_004),
        ("0.3KB", 307),
        ("0.5 k", 512),
        ("2G", 2 << 30),
        ("1", 1),
    ],
)
def test_size_is_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *("320 kb/s", "-5KB", "+5KB", "", " ", "nan", "inf", "1e6", "KB", "5 iB", "5i", "3 2 KB"),
        *("0x", "0xg", "0x5KB", "1,5MB", "32,0KB", "1.KB", ".5KB", "1TB", "320KB extra"),
        *("320\nKB", "\uff11\uff12KB"),
    ],
)
def test_what_is_no_size_is_told_in_one_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--ram: .* is not a size; write for example 320KB") as e:
        parse_bytes(text, "--ram")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1.5", "1.5 bytes, not a whole number"),
        ("0.0001KB", "outside 1 byte"),
        ("0", "outside 1 byte"),
        ("0x0", "outside 1 byte"),
        ("9" * 60, "outside 1 byte"),
        ("9" * 60 + "GB", "outside 1 byte"),
    ],
)
def test_impossible_sizes_are_rejected(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as e:
        parse_bytes(text)
    assert len(str(e.value)) < 200


@given(st.integers(1, LARGEST_BYTES))
def test_printed_bytes_are_read_back(n: int) -> None:
    exact = format_bytes(n).split(" (")[0]
    assert parse_bytes(exact) == parse_bytes(hex(n)) == parse_bytes(str(n)) == n


def outcome(text: str) -> int | str:
    """Bytes, or the message of the usage error."""
    try:
        return parse_bytes(text)
    except UsageError as e:
        return str(e)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_one_line(text: str) -> None:
    result = outcome(text)
    assert "\n" not in result if isinstance(result, str) else 0 < result <= LARGEST_BYTES


def test_bytes_are_printed_with_their_binary_unit() -> None:
    assert format_bytes(327_680) == "327,680 B (320.00 KiB)"
    assert format_bytes(1_048_576) == "1,048,576 B (1.00 MiB)"
    assert format_bytes(1023) == "1,023 B"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0.5s", 0.5), ("500ms", 0.5), ("500 ms", 0.5), ("0.5", 0.5), ("20us", 2e-5)],
)
def test_time_is_read(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "joules"), [("2mJ", 2e-3), ("2 mj", 2e-3), ("0.002", 2e-3), ("3J", 3.0), ("5uJ", 5e-6)]
)
def test_energy_is_read(text: str, joules: float) -> None:
    assert parse_joules(text) == pytest.approx(joules)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1h", "nan", "inf", "1 s s", "0s", "1e99s"])
def test_what_is_no_time_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--latency: "):
        parse_seconds(text, "--latency")


@pytest.mark.parametrize(
    ("value", "text"), [(1.5, "1.50 s"), (0.0421, "42.1 ms"), (0.5, "500 ms"), (2.5e-6, "2.50 us")]
)
def test_times_have_three_digits(value: float, text: str) -> None:
    assert format_seconds(value) == text


def test_energies_have_three_digits() -> None:
    assert [format_joules(j) for j in (1.5, 2e-3, 4.2e-6)] == ["1.50 J", "2.00 mJ", "4.20 uJ"]
