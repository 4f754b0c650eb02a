from __future__ import annotations

import pytest

from bayesian_merger.toml import TOMLDecodeError, loads


@pytest.mark.parametrize("part", ["a", '"a"', "'a'", '"\\""', " a\t", "ä-1"])
@pytest.mark.parametrize("shape", ["{} = 1", "[{}]", "x = {{ {} = 1 }}"])
def test_key_of_thousands_of_parts_is_refused_unread(part: str, shape: str) -> None:
    text = shape.format(".".join([part] * 24_000))
    with pytest.raises(TOMLDecodeError, match="line 2 has a key of more than 20 parts"):
        loads(f"y = 1\n{text}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = [" + "1," * 200_000 + "]", "more than 100000 lines and commas"),
        ("a = '" + "x" * 2**24 + "'", "more than 8388608 characters"),
        ("a = " + "[" * 10_000, "nested too deeply"),
    ],
)
def test_what_would_take_long_to_read_is_refused(text: str, said: str) -> None:
    with pytest.raises(TOMLDecodeError, match=said):
        loads(text)


def test_text_may_hold_pictures_and_as_many_dots_as_it_likes() -> None:
    text = "Red. Sky. " * 20 + "Wait ... " * 100 + "1. One. Two. Three, and 3.14 of v1.2.3"
    assert loads(f"a.b.c = '{text}'\nimage = '{'x' * 2_000_000}'")["a"]["b"]["c"] == text


@pytest.mark.parametrize(
    "text", ["x" * 2**22, '\\"' * 2**21, "x." * 19 + "\n", '"' * 2**22, "a " * 2**21]
)
def test_what_looks_like_a_key_is_soon_seen_to_be_none(text: str) -> None:
    with pytest.raises(TOMLDecodeError):
        loads(text)
