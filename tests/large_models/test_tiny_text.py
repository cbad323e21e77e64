import pytest
import torch

from zhizhi.large_models.tiny_text import char_ids, text_batch, tiny_text


def test_the_text_is_eleven_chapters_of_verses():
    chapters = tiny_text().rstrip("\n").split("\n\n")
    verses = [len(chapter.splitlines()) for chapter in chapters]
    assert verses == [31, 25, 24, 26, 32, 22, 24, 22, 29, 32, 32]  # of the printed book


def test_ids_are_places_in_the_alphabet_and_a_stranger_is_refused():
    text = tiny_text()
    alphabet = "".join(sorted(set(text)))
    assert "".join(alphabet[i] for i in char_ids(text, alphabet).tolist()) == text
    with pytest.raises(ValueError, match=r"lacks \['c', 'd'\]"):
        char_ids("abcd", "ab")


def test_windows_are_cut_from_every_place_and_none_runs_over_the_end():
    g = torch.Generator().manual_seed(0)
    windows = text_batch(torch.arange(10), batch=500, length=6, generator=g)
    assert windows.shape == (500, 7)
    assert torch.equal(windows - windows[:, :1], torch.arange(7).expand(500, 7))
    assert set(windows[:, 0].tolist()) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="The text has 6 ids"):
        text_batch(torch.arange(6), batch=1, length=6)
