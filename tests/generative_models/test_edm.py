"""TODO: the sentence that these tests prove."""

from zhizhi.generative_models.edm import edm


def test_edm_is_written_and_has_an_independent_route() -> None:
    assert edm(0.0) == 0.0  # TODO: the same number by another way
