"""Outputs are compared as a person would: numbers by value, words exactly."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mdproof.compare import (
    address_in,
    first_difference,
    same_figure,
    same_number,
    text_diff,
)

SAME = [
    ("loss 0.6931", "loss 0.6931"),
    ("loss 0.6931", "loss 0.6932"),  # one unit of the last digit shown
    ("x = 1234.5678", "x = 1234.60"),  # within the relative tolerance
    ("tensor([ 1.5410, -0.2934])", "tensor([1.5410, -0.2934])"),  # a column's blanks
    ("a\nb\n", "a\nb"),
    ("err 1e-07", "err 1.4e-07"),
    ("nan inf -inf", "nan inf -inf"),
    ("step 10 of 20", "step 10 of 20"),
    ("v1.2.3", "v1.2.3"),
    ("{'a', 'b'}", "{'b', 'a'}"),  # a set has no order
    ("{\"it's\", 'b'}", "{'b', \"it's\"}"),
    ("frozenset({'a', 'b', 'c'})", "frozenset({'c', 'a', 'b'})"),
    ("[{'a', 'b'}, {'c', 'd'}]", "[{'b', 'a'}, {'d', 'c'}]"),
    ("{'a', 'b'} 0.50", "{'b', 'a'} 0.51"),
    ("{1, 'a', -2}", "{'a', -2, 1}"),
    ("{'a, b', 'c'}", "{'c', 'a, b'}"),
    ("accuracy 97.31%", "accuracy 97.32%"),
    ("1,234.56", "1,234.57"),
    ("-0.0", "0.0"),
    ("| a | 0.50 |", "|  a |  0.51 |"),
    ("took 1.25ms", "took 1.26ms"),  # a unit sticks to its number
    ("2.50x faster", "2.51x faster"),
    ("1.50e+03GB", "1.5001e3GB"),
    ("1.0+2.000j", "1.0+2.001j"),
    ("0.50μs", "0.51μs"),
    ("[1. 2. 3.\n 4.]", "[1. 2.\n 3. 4.]"),  # rows break where there is room
    ("tensor([[1.0, 2.0],\n        [3.0, nan]])", "tensor([[1.0, 2.0], [3.0, nan]])"),
    ("a [1.00, ...,\n 2.00] b\nc", "a [1.01, ..., 2.00] b\nc"),
]
DIFFERENT = [
    ("loss 0.6931", "loss 0.6934"),
    ("0.500", "0.5012"),
    ("loss 0.6931", "LOSS 0.6931"),
    ("step 10", "step 11"),  # integers are exact
    ("True", "False"),
    ("a\nb", "a"),
    ("a", "a\nb"),
    ("0.5", "-0.5"),
    ("v1.2.3", "v1.2.4"),
    ("[1, 2, 3]", "[1, 3, 2]"),
    ("1.0 nan", "nan 1.0"),
    ("x0.1", "x0.2"),
    ("1e999", "2.5"),
    ("2.5", "-1e999"),
    ("inf", "-inf"),
    ("{'a', 'b'}", "{'a', 'c'}"),
    ("{'a', 'b'}", "{'a', 'b', 'c'}"),
    ("{1, 2}", "{1, 3}"),
    ("{'a, b', 'c'}", "{'a', 'b, c'}"),
    ("['a', 'b']", "['b', 'a']"),
    ("('a', 'b')", "('b', 'a')"),
    ("{'a': 1, 'b': 2}", "{'b': 2, 'a': 1}"),  # a dictionary keeps its order
    ("[{'a', 'b'}, {'c', 'd'}]", "[{'c', 'd'}, {'a', 'b'}]"),
    ("2.13.0", "2.14.0"),
    ("torch 2.13.0+cpu", "torch 2.13.1+cpu"),
    ("2026-11-27", "2026-11-28"),
    ("0x7f01", "0x7f02"),
    ("sm_80", "sm_90"),
    ("fp16", "fp32"),
    ("1/3", "1/4"),
    ("1,234", "1,235"),
    ("100000000", "100000001"),
    ("1e-3", "1e-2"),
    ("97.31%", "97.31"),
    ("1.0+2.0j", "1.0+3.0j"),
    ("nan", "0.0"),
    ("1.25ms", "1.25us"),
    ("1.25ms", "1.29ms"),
    ("80GB", "81GB"),
    ("2.0rc1", "2.0rc2"),
    ("2.0rc1", "2.1rc1"),
    ("[1. 2. 3.\n 4.]", "[1. 2. 3. 5.]"),
    ("[1. 2.]", "[1. 3.]"),
    ("[1. 2. 3. 4.]", "[1. 2. 3. 4."),
    ("[[1, 2],\n [3, 4]]", "[[1, 2, 3, 4]]"),
    ("['a',\n 'b']", "['a', 'b']"),  # text is not an array
    ("[0, 1)\na", "[0, 1) a"),
]


@pytest.mark.parametrize(("recorded", "new"), SAME)
def test_what_a_person_would_call_the_same_is_the_same(recorded: str, new: str) -> None:
    assert first_difference(recorded, new, rtol=1e-4) is None


@pytest.mark.parametrize(("recorded", "new"), DIFFERENT)
def test_what_a_person_would_call_different_is_different(recorded: str, new: str) -> None:
    assert first_difference(recorded, new, rtol=1e-4) is not None


def test_the_first_pair_of_lines_that_disagree_is_named() -> None:
    assert first_difference("a\n1.00\nc", "a\n2.00\nd", rtol=1e-4) == ("1.00", "2.00")
    assert first_difference("a\nb", "a", rtol=1e-4) == ("b", "(no such line)")


def test_the_tolerance_is_the_one_given() -> None:
    assert first_difference("1.0000", "1.0300", rtol=0.05) is None
    assert first_difference("1.0000", "1.0600", rtol=0.05) is not None


@given(st.floats(allow_nan=False, allow_infinity=False, width=32), st.integers(1, 6))
def test_a_number_printed_twice_is_the_same_number(value: float, digits: int) -> None:
    text = f"{value:.{digits}e}"
    assert same_number(text, text, rtol=0.0)


@given(st.floats(0.1, 1e6), st.floats(0.01, 0.5))
def test_a_number_off_by_more_than_the_tolerance_is_another(value: float, off: float) -> None:
    a, b = f"{value:.8e}", f"{value * (1 + off):.8e}"
    assert not same_number(a, b, rtol=1e-4)


@given(st.text(alphabet="ab 1.e-+\n", max_size=30))
def test_every_text_equals_itself(text: str) -> None:
    assert first_difference(text, text, rtol=0.0) is None


def test_two_drawings_agree_within_a_point_and_in_every_element() -> None:
    svg = '<svg><path id="a1" d="M 1.0 2.0 L 30.5 40.5" style="stroke: #3b82f6"/></svg>'
    assert same_figure(svg, svg.replace("30.5", "30.9").replace("a1", "b7"))
    assert not same_figure(svg, svg.replace("30.5", "35.0"))
    assert not same_figure(svg, svg.replace("30.5", "31.9"))
    large = svg.replace("30.5", "300")  # a hundredth, where that is more than a point
    assert same_figure(large, large.replace("300", "302.9"))
    assert not same_figure(large, large.replace("300", "303.1"))
    assert not same_figure(svg, svg.replace("M 1.0 2.0 L", "M 1.0 2.0 L 3 3 L"))
    assert not same_figure(svg, svg.replace("stroke", "fill"))


@given(st.sets(st.text(alphabet="ab, :{}1.", max_size=4), min_size=2, max_size=5), st.randoms())
def test_a_set_printed_in_any_order_is_the_same_until_an_element_changes(
    values: set[str], random: Random
) -> None:
    one = sorted(values)
    other = random.sample(one, len(one))
    braces = ["{" + repr(items)[1:-1] + "}" for items in (one, other)]
    assert first_difference(*braces, rtol=0.0) is None
    changed = "{" + repr([*one[1:], "z"])[1:-1] + "}"
    assert first_difference(braces[1], changed, rtol=0.0) is not None


@given(st.lists(st.floats(width=32), min_size=1, max_size=12), st.integers(1, 40), st.randoms())
def test_an_array_wrapped_anywhere_is_the_same_until_a_number_changes(
    values: list[float], width: int, random: Random
) -> None:
    np = pytest.importorskip("numpy")
    with np.printoptions(linewidth=width):
        narrow = f"x = {np.array(values)}, end"
    with np.printoptions(linewidth=1000):
        wide = f"x = {np.array(values)}, end"
        changed = list(values)
        changed[random.randrange(len(values))] = 12345.5 if 12345.5 not in values else 54321.5
        other = f"x = {np.array(changed)}, end"
    assert first_difference(narrow, wide, rtol=0.0) is None
    assert first_difference(narrow, other, rtol=1e-4) is not None


def test_a_diff_shows_what_changed_and_one_line_around_it() -> None:
    assert text_diff("a\nb\nc\nd\n", "a\nb\nc\ne") == "@@ -3,2 +3,2 @@\n c\n-d\n+e"
    assert text_diff("a  \nb", "a\nb\n") == ""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a <function f at 0x7f3a2b1c>\n", "<function f at 0x7f3a2b1c>"),
        ("<__main__.A object at 0x7F3A2B1C4D50>", "<__main__.A object at 0x7F3A2B1C4D50>"),
        ("[<A at 0x7f3a2b1c>, 1]", "<A at 0x7f3a2b1c>"),
        ("address 0x7f3a2b1c", ""),
        ("<b> 1 at 0x7f", ""),
        ("x < y at 0x7f3a2b1c", ""),
    ],
)
def test_an_object_shown_by_its_address_is_found(text: str, found: str) -> None:
    assert address_in(text) == found
