"""T5's encoder and tokenizer against transformers, and against SentencePiece where it is installed."""

import io

import pytest
import torch

from models import t5
from tests import small
from tests import small_deepfloyd as small_if

transformers = pytest.importorskip("transformers")


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{}, {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20}])
def test_encoder(sizes):
    c = transformers.T5Config(vocab_size=300, d_model=64, num_layers=3, num_heads=4, d_kv=12, d_ff=96,
                              feed_forward_proj="gated-gelu", use_cache=False, **sizes)
    peer = small.randomise(transformers.T5EncoderModel(c))
    model = t5.T5(t5.config_from_json(c.to_dict())).eval()
    tensors = peer.state_dict()
    del tensors["encoder.embed_tokens.weight"]  # `shared` once more
    model.load_state_dict(tensors)
    ids = torch.randint(300, (3, 77), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(77) < torch.tensor([[77], [20], [1]])
    want = peer(ids, attention_mask=mask).last_hidden_state
    assert small.relative_error(model(ids, mask), want) <= 1e-4
    assert small.relative_error(model.bfloat16()(ids, mask).float(), want) <= 0.05


def test_other_networks_of_the_family_are_refused():
    with pytest.raises(ValueError, match="feed_forward_proj = 'relu'; only 'gated-gelu'"):
        t5.config_from_json(transformers.T5Config().to_dict())


def test_tokenizer(tmp_path):
    vocab = [(text, score) for text, score, _ in small_if.PIECES]
    peer = transformers.T5Tokenizer(vocab=vocab, _spm_precompiled_charsmap=small_if.CHARMAP, extra_ids=0)
    peer.save_pretrained(tmp_path)
    ours = t5.Tokenizer.load(tmp_path)
    options = dict(padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    want = peer(small_if.TEXTS, **options)
    ids, mask = ours(small_if.TEXTS)
    assert torch.equal(ids, want.input_ids) and torch.equal(mask, want.attention_mask.bool())
    with pytest.warns(UserWarning, match="76 are read"):
        assert torch.equal(ours(["red " * 99])[0], peer(["red " * 99], **options).input_ids)


def test_tokenizer_beside_sentencepiece(tmp_path):
    """With its own table for Unicode, which T5 was trained with"""
    sentencepiece = pytest.importorskip("sentencepiece")
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(small_if.TEXTS * 9), model_writer=file, vocab_size=120, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, normalization_rule_name="nmt_nfkc", minloglevel=2)
    (tmp_path / "spiece.model").write_bytes(file.getvalue())
    peer = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    ours = t5.Tokenizer.load(tmp_path)
    letters = torch.randint(32, 0xFFEF, (300, 12), generator=torch.Generator().manual_seed(0))
    random_texts = ["".join(map(chr, row)) for row in letters[(letters >> 11 != 0x1B).all(dim=1)].tolist()]
    for text in [*small_if.TEXTS, "▁ under▁ scores", *random_texts]:
        assert ours.encode(text) == peer.encode(text)
