"""clip.py: files of tokenizers that are missing or damaged, and configurations that are wrong."""

import gzip
import json

import pytest

import clip
from checkpoints import configs
from tests.small import TOKENIZER


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
