"""TODO: the sentence that these tests prove."""

from zhizhi.generative_models.flow_matching import flow_matching


def test_flow_matching_is_written_and_has_an_independent_route() -> None:
    assert flow_matching(0.0) == 0.0  # TODO: the same number by another way
