"""models/t5.py: both files of a tokenizer, how it cuts a text, and what padding does to the encoder."""

import json

import pytest
import torch

from checkpoints.parts import SkipInit
from models import t5
from tests import small_deepfloyd as small_if

TOKENIZER = t5.Tokenizer(small_if.PIECES, small_if.CHARMAP)


@pytest.mark.parametrize("write", [small_if.write_spiece, small_if.write_json,
                                   lambda folder: small_if.write_json(folder, nested=True)])
def test_files(tmp_path, write):
    write(tmp_path)
    got = t5.Tokenizer.load(tmp_path)
    assert got.pieces == TOKENIZER.pieces and got.unknown == 2 and got.unknown_score == TOKENIZER.unknown_score
    assert [got.encode(text) for text in small_if.TEXTS] == [TOKENIZER.encode(text) for text in small_if.TEXTS]


def test_files_that_are_not_whole(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"put spiece\.model, or tokenizer\.json"):
        t5.Tokenizer.load(tmp_path)
    small_if.write_json(tmp_path)
    file = tmp_path / "tokenizer.json"
    c = json.loads(file.read_text())
    for change in ({"model": {"type": "BPE", "vocab": {"a": 1}}}, {"normalizer": {"precompiled_charsmap": "AAAA"}},
                   {"added_tokens": None}):
        file.write_text(json.dumps(c | change))
        with pytest.raises(ValueError, match=r"tokenizer\.json is damaged .*: copy it again"):
            t5.Tokenizer.load(tmp_path)
    small_if.write_spiece(tmp_path)
    file = tmp_path / "spiece.model"
    whole = file.read_bytes()
    for damaged in (b"", b"<html>", b"\xff" * 99, whole[1:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"spiece\.model is damaged"):
            t5.Tokenizer.load(tmp_path)


def test_a_damaged_table_of_characters():
    """It is seen where a text needs it."""
    cut = t5.Tokenizer(small_if.PIECES, bytes([4, 0, 0, 0]) + small_if.CHARMAP[4:8])
    with pytest.raises(ValueError, match=r"T5's tokenizer is damaged: copy its spiece\.model"):
        cut.encode("a")


def test_a_word_is_cut_in_the_likeliest_way():
    pieces = [("<unk>", 0.0, t5.UNKNOWN), ("</s>", 0.0, 3)]
    pieces += [(text, score, t5.NORMAL) for text, score in
               (("▁", -2.0), ("▁a", -4.5), ("a", -3.0), ("b", -3.0), ("ab", -5.0), ("aba", -6.0), ("bab", -8.5))]
    cut = t5.Tokenizer(pieces)
    words = {"ab": ["▁", "ab"], "b": ["▁", "b"], "aba": ["▁", "aba"], "abab": ["▁", "aba", "b"], "": [],
             "  a  ab ": ["▁a", "▁", "ab"], "azzb": ["▁a", "<unk>", "b"], "</s>": ["▁", "<unk>"]}
    for text, want in words.items():
        assert [pieces[i][0] for i in cut.encode(text)] == want


def test_characters_are_replaced():
    assert TOKENIZER.normalize("ﬁ①㎞\tx\u3000e\u0301\u200b語") == "fi1km x é語"
    assert t5.Tokenizer(small_if.PIECES).normalize("ﬁ") == "ﬁ"
    assert TOKENIZER.normalize("\ud800") == "?"  # half of a character, from a broken command line


def test_full_size():
    with torch.device("meta"), SkipInit():
        model = t5.T5(t5.T5Config())
    assert sum(p.numel() for p in model.parameters()) == 4_762_310_656
