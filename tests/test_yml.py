from __future__ import annotations

import datetime

import pytest

from bayesian_merger.yml import loads


def test_yaml_is_plain_data() -> None:
    assert loads("") is None
    assert loads("a: &x [1, 2.5, yes, ~]\nb: *x") == {key: [1, 2.5, True, None] for key in "ab"}
    assert loads("day: 2023-04-18") == {"day": datetime.date(2023, 4, 18)}
    assert loads("day: 2023-04-18", dates=False) == {"day": "2023-04-18"}


def test_file_may_be_as_long_as_what_it_spells_out() -> None:
    assert loads(f"image: {'x' * 1_200_000}") == {"image": "x" * 1_200_000}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "expected"),
        ("a: !!python/object/apply:os.system [ls]", "python/object"),
        ("a: 2001-01-32", "day"),
        ("[" * 10_000, "recursion"),
        ("a: \x1b", "not allowed"),
        ("a: *" + "x" * 10_000, "undefined alias"),
        *((f"a: {tag}", "its tag") for tag in ("!!int ''", "!!bool x", "!!timestamp x")),
        ('\na: "\\ud800"', "the text in line 2 holds what is no character"),
        ("\na: &x [*x]", "what begins in line 2 is endless"),
        ("a: [" + "1," * 200_000 + "]", "more than 100000 lines and commas"),
        ("- 1\n" * 200_000, "more than 100000 lines and commas"),
        ("x" * 2**24, "more than 8388608 characters"),
        ("\na: " + ":".join("1" * 80_000), "the number in line 2 has more than 1000 digits"),
        ("\na: " + ":".join("1" * 80_000) + ".5", "the number in line 2 has more than 1000"),
    ],
)
def test_what_is_no_yaml_is_told_in_one_short_line(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        loads(text)
    assert len(str(caught.value)) <= 300
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("grows", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_that_multiply_are_refused_before_they_do(grows: str) -> None:
    lines = ["a0: &a0 {x: y}"]
    lines += [f"a{n}: &a{n} {grows.format(', '.join([f'*a{n - 1}'] * 9))}" for n in range(1, 30)]
    with pytest.raises(ValueError, match="aliases"):
        loads("\n".join(lines))
