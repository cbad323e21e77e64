import pytest
import tokenizers

from zhizhi.large_models.tiny_text import tiny_text
from zhizhi.large_models.tokenizer_bpe import BPETokenizer, train_bpe

pytestmark = pytest.mark.parity
CHINESE = (
    "起初，神创造天地。地是空虚混沌，渊面黑暗；神的灵运行在水面上。神说：“要有光”，就有了光。" * 3
)
SAMPLE = "And God said, Let there be light: 你好，世界！ x_1 = 3.14\n\n  don't"


@pytest.mark.parametrize(
    ("text", "vocab_size", "min_count"),
    [(tiny_text(), 900, 2), (CHINESE, 400, 1), (CHINESE + tiny_text()[:5000], 700, 3)],
)
def test_merges_and_ids_are_those_of_tokenizers(text, vocab_size, min_count):
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = tokenizers.decoders.ByteLevel()
    theirs.train_from_iterator(
        [text],
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_count,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    ours = BPETokenizer(train_bpe([text], vocab_size=vocab_size, min_count=min_count))
    assert ours.vocab_size == theirs.get_vocab_size()
    for sample in (text, SAMPLE):
        assert ours.encode(sample) == theirs.encode(sample).ids
        assert theirs.decode(ours.encode(sample)) == sample
