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


def test_as_many_lines_as_before_keep_their_places_one_by_one() -> None:
    assert align(["a", "b", "c", "d"], ["a", "x", "y", "d"]) == [0, 1, 2, 3]


def test_a_tab_is_four_columns() -> None:
    assert align(["y", "\ta", "q"], ["    a"]) == [1]


def test_text_put_in_where_nothing_was_comes_from_the_nearest_line_that_is_gone() -> None:
    assert align(["<in>", "k", "m", "z"], ["1", "k", "2", "m", "z"]) == [0, 1, 0, 2, 3]
    file, seen = ["<a>", "k", "l", "<b>", "m", "z"], ["1", "k", "l", "2", "m", "9", "z"]
    assert align(file, seen) == [0, 1, 2, 3, 4, 3, 5]


def test_only_lines_within_ten_are_near() -> None:
    between = [f"k{n}" for n in range(9)]
    for more, origin in ((0, 0), (1, 11)):
        kept = [*between, *(f"l{n}" for n in range(more))]
        file, seen = ["<in>", *kept, "m", "z"], ["1", *kept, "2", "m", "z"]
        assert align(file, seen)[len(kept) + 1] == origin
