"""clip.py: what holds of the text encoder and the tokenizer, without a peer; files that are missing or damaged."""

import gzip
import json
import warnings
from dataclasses import replace

import pytest
import torch

import clip
from checkpoints import configs
from tests.small import CAPTIONS, TOKENIZER
from toy.vocabulary import learn_bpe


@pytest.mark.parametrize(("name", "count"), [("clip-vit-l", 123_060_480), ("openclip-vit-h", 340_387_840),
                                             ("openclip-bigg", 694_659_840)])
def test_table_has_the_known_sizes_and_shapes_give_it_back(name, count):
    config = clip.CONFIGS[name]
    with torch.device("meta"):
        state = clip.TextEncoder(config).state_dict()
    assert sum(p.numel() for p in state.values()) == count
    read = configs.text_config_from_shapes({k: tuple(v.shape) for k, v in state.items()})
    assert read == replace(config, skip_last=0, final_norm=True)  # what SDXL reads is not in the tensors
    assert configs.text_config_from_json(configs.text_config_to_json(config)) == read


def test_learn_bpe_round_trip(tmp_path):
    vocab, merges = learn_bpe(CAPTIONS, 560)
    assert (vocab, merges) == learn_bpe(CAPTIONS[::-1], 560)
    assert sorted(vocab.values()) == list(range(560))
    assert list(vocab)[-2:] == [clip.START, clip.END]
    assert list(vocab)[:512] == clip.ALPHABET
    toy = clip.Tokenizer(vocab, merges)
    assert len(toy.encode("circle")) < len("circle")
    for text in (*CAPTIONS, "日本語 ünïcode 👩‍👧"):
        assert toy.decode(toy.encode(text)).replace(" ", "") == clip.clean_text(text).replace(" ", "")
    toy.save(tmp_path)
    again = clip.Tokenizer.load(tmp_path)
    assert (again.vocab, again.merges, again.pad) == (vocab, merges, clip.END)
    full, _ = learn_bpe(["ab ab"], 1000)  # nothing left to merge
    assert len(full) == 512 + 1 + 2
    with pytest.raises(ValueError, match="514"):
        learn_bpe(CAPTIONS, 500)


def test_long_prompt_is_cut_with_one_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TOKENIZER("red " * 75)
    with pytest.warns(UserWarning) as caught:
        ids = TOKENIZER("red " * 75 + "and a green circle")[0]
    assert len(caught) == 1
    assert "and a green circle'" in str(caught[0].message) and "red" not in str(caught[0].message)
    assert "\n" not in str(caught[0].message)
    assert ids[-1] == TOKENIZER.vocab[clip.END] and (ids[1:-1] == TOKENIZER.vocab["red</w>"]).all()


def test_config_errors_and_old_files():
    with pytest.raises(ValueError, match="no CLIP text encoder"):
        configs.text_config_from_shapes({"conv.weight": (3, 3)})
    with pytest.raises(KeyError, match="hidden_size"):
        configs.text_config_from_json({"vocab_size": 49408})
    with pytest.raises(ValueError, match="relu"):
        clip.TextConfig(activation="relu")
    old = configs.text_config_to_json(clip.TextConfig()) | {"eos_token_id": 2}
    assert configs.text_config_from_json(old).eos == 49407
    learned = configs.text_config_to_json(clip.TextConfig()) | {"eos_token_id": 2, "vocab_size": 49410}
    assert configs.text_config_from_json(learned).eos == 49407


def test_missing_and_damaged_files_give_one_clear_line(tmp_path):
    def message(error, path):
        with pytest.raises(error) as e:
            clip.Tokenizer.load(path)
        assert str(tmp_path) in str(e.value) and "\n" not in str(e.value)
        return str(e.value)

    assert "vocab.json" in message(FileNotFoundError, tmp_path)
    assert "vocab.json" in message(FileNotFoundError, tmp_path / "nowhere")
    TOKENIZER.save(tmp_path)
    good = (tmp_path / "vocab.json").read_text(encoding="utf-8")
    for bad in (good[:50], "[1, 2]", good.replace('"!"', '"?!?"', 1)):
        (tmp_path / "vocab.json").write_text(bad, encoding="utf-8")
        assert "damaged" in message(ValueError, tmp_path)
    for i in ("7", -5, None, [1], True, 0.5):
        (tmp_path / "vocab.json").write_text(json.dumps(TOKENIZER.vocab | {"a": i}), encoding="utf-8")
        assert "whole number" in message(ValueError, tmp_path)
    (tmp_path / "vocab.json").write_text(good, encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n", encoding="utf-8")
    assert "'a b c'" in message(ValueError, tmp_path)
    (tmp_path / "merges.txt").unlink()
    assert "merges.txt" in message(FileNotFoundError, tmp_path)
    archive = tmp_path / clip.ARCHIVE
    archive.write_bytes(b"not a gzip file")
    assert "damaged" in message(ValueError, archive)
    archive.write_bytes(gzip.compress(b"header\na b\n" * 1000)[:-10])
    assert "damaged" in message(ValueError, archive)
    archive.write_bytes(gzip.compress(b"header\na b\n"))
    assert "48894" in message(ValueError, archive)
    archive.write_bytes(gzip.compress(bytes(2**27)))  # 130 kB, of which no more than 16 MB is unpacked
    assert "48894" in message(ValueError, archive)
