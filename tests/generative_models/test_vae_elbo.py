"""TODO: the sentence that these tests prove."""

from zhizhi.generative_models.vae_elbo import vae_elbo


def test_vae_elbo_is_written_and_has_an_independent_route() -> None:
    assert vae_elbo(0.0) == 0.0  # TODO: the same number by another way
