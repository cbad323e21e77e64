"""Lines moved by preprocessors are led back to the file."""

from mdproof.lines import align


def test_the_same_lines_stay_where_they_are() -> None:
    assert align(["a", "", "b"], ["a", "", "b", "", ""]) == [0, 1, 2, 2, 2]


def test_front_matter_that_is_gone_moves_the_rest() -> None:
    assert align(["---", "x", "---", "a", "b"], ["a", "b"]) == [3, 4]


def test_what_a_line_became_has_its_place_and_what_is_below_keeps_its_own() -> None:
    assert align(["a", "<in>", "b"], ["a", "1", "2", "3", "b"]) == [0, 1, 1, 1, 2]


def test_tabs_and_marks_that_the_converter_changes_are_no_difference() -> None:
    assert align(["\ufeff\ta", "b  "], ["    a", "b"]) == [0, 1]


def test_a_lone_carriage_return_ends_a_line_but_not_in_the_file() -> None:
    assert align(["a\rb", "c"], ["a", "b", "c"]) == [0, 0, 1]


def test_included_text_that_repeats_a_line_of_the_page_stays_with_its_include() -> None:
    file = ["a", "<in>", "", "/// tip", "", "b"]
    seen = ["a", "1", "", "/// tip", "", "2", "", "/// tip", "", "b"]
    assert align(file, seen)[5] == 1
