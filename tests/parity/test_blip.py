"""networks/blip.py against transformers' BLIP: of the same random weights the same logits and captions."""

import json

import pytest
import torch

from checkpoints import published
from networks import blip
from tests.small import relative_error

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A narrow BLIP: of transformers, and ours of the file that it saves"""
    torch.manual_seed(0)
    text = dict(hidden_size=128, encoder_hidden_size=128, intermediate_size=512, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=32)
    image = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=2, image_size=64)
    config = transformers.BlipConfig(text_config=text, vision_config=image)
    peer = transformers.BlipForConditionalGeneration(config).eval()
    for name, p in peer.named_parameters():
        p.data = 1.0 + 0.3 * torch.randn_like(p) if "norm.weight" in name.lower() else 0.25 * torch.randn_like(p)
    folder = tmp_path_factory.mktemp("networks") / "blip-image-captioning-base"
    peer.save_pretrained(folder)
    return peer, published.load("blip", published.find("blip", folder.parent))


@torch.no_grad()
def test_the_same_logits(both):
    peer, ours = both
    x, ids = torch.randn(2, 3, 64, 64), torch.randint(30524, (2, 9))
    want = peer(pixel_values=x, input_ids=ids)
    seen = ours.vision_model(x)
    assert relative_error(seen, want.image_embeds) < 1e-4
    assert relative_error(ours.text_decoder(ids, seen), want.logits) < 1e-4


@pytest.mark.parametrize("beams", [1, 3])
def test_the_same_captions(both, beams):
    """Greedy, and by the release's three beams. The end is made likely enough to come."""
    peer, ours = both
    x, start, ends = torch.randn(3, 3, 64, 64), [blip.START, 1037, 3861, 1997], 0
    for bias in (0.0, 13.0, 16.0):
        for model in (peer, ours):
            model.text_decoder.cls.predictions.bias.data[blip.END] = bias
        with torch.no_grad():
            peer.text_decoder.cls.predictions.decoder.bias = peer.text_decoder.cls.predictions.bias
            seen = ours.vision_model(x)
        for picture, one in zip(x, seen):
            got = blip.search(ours, one[None], start, beams)
            want = peer.generate(picture[None], torch.tensor([[*start, 0]]), num_beams=beams, max_length=20,
                                 min_length=5, do_sample=False)[0].tolist()
            ends += blip.END in want
            want = [i for i in want if i != 0]  # padding
            assert got == (want[:-1] if want[-1] == blip.END else want)
    assert ends


def test_words(tmp_path):
    """The ids of transformers' BertTokenizer, from either file; and the words again."""
    words = "[PAD] [UNK] [CLS] [SEP] a picture of cat ##s on ' s the couch caf ##e , . ! 1 ##2 un ##aff ##able".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    peer = transformers.BertTokenizer(str(tmp_path / "vocab.txt")) if not hasattr(
        transformers, "BertTokenizerLegacy") else transformers.BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    ours = blip.Tokenizer.load(tmp_path)
    for text in ("a picture of", "Cats, on the COUCH!", "the cat's caf\u00e9 12", "unaffable zebra.", "  "):
        assert ours.encode(text) == peer.encode(text, add_special_tokens=False), text
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": ours.pieces}}))
    (tmp_path / "vocab.txt").unlink()
    again = blip.Tokenizer.load(tmp_path)
    assert again.pieces == ours.pieces
    assert again.decode([3, *again.encode("the cats' couch, unaffable!"), 0]) == "the cats'couch, unaffable!"
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match="copy it again"):
        blip.Tokenizer.load(tmp_path)
