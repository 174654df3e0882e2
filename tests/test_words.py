"""checkpoints/words.py: a learned word is one token, in a folder and from a file of any of the usual layouts."""

import json

import pytest
import torch
from safetensors.torch import save_file

import sd
from checkpoints.words import WordTokenizer, learn_word, load_tokenizer, read_word
from tests import small

WORD = "<My-Circle>"


def test_words_of_a_folder(tmp_path):
    """Every place where diffusers and transformers write them."""
    base, n = small.TOKENIZER, len(small.VOCAB)
    listed = {"id": n, "content": WORD}
    for name, content in (("added_tokens.json", {WORD: n, "<|endoftext|>": n - 1}),
                          ("tokenizer_config.json", {"added_tokens_decoder": {str(n): listed}}),
                          ("tokenizer.json", {"added_tokens": [listed]})):
        folder = tmp_path / name
        base.save(folder)
        (folder / name).write_text(json.dumps(content))
        got = load_tokenizer(folder)
        ids = got.encode(f"a{WORD} on a {WORD.lower()}s beach")
        assert ids == [*base.encode("a"), n, *base.encode("on a"), n, *base.encode("s beach")]
        assert got.decode([n, *base.encode("red circle")]) == f"{WORD.lower()} red circle"
        assert got.encode("a red circle") == base.encode("a red circle")
        got.save(tmp_path / "again")
        assert load_tokenizer(tmp_path / "again").encode(WORD) == [n]


def test_a_word_that_the_text_encoder_does_not_know(tmp_path):
    """Its row is missing: it is spelled out, with a word."""
    sd.save(small.stable_diffusion(), tmp_path)
    (tmp_path / "tokenizer" / "added_tokens.json").write_text(json.dumps({WORD: len(small.VOCAB)}))
    with pytest.warns(UserWarning, match="does not know the added words <My-Circle>"):
        got = sd.load(tmp_path)
    assert got.tokenizer.encode(WORD) == small.TOKENIZER.encode(WORD)


def test_a_word_of_letters_is_no_part_of_others():
    got = WordTokenizer(small.VOCAB, small.MERGES, "!", {"art": 1000, "<x>": 1001, "<x>_1": 1002, "<x>2": 1003})
    assert got.encode("art, ART") == [1000, *small.TOKENIZER.encode(","), 1000]
    assert got.encode("party arts") == small.TOKENIZER.encode("party arts")
    assert got.encode("<x> <x>2") == [1001, 1002, 1003]  # of two tokens; the longest that fits


def write(file, layout, rows):
    """-> the names by which the word goes"""
    named = {"string_to_token": {"*": torch.tensor(265)}, "name": "<other>", "step": 5}
    if layout == "A1111":
        torch.save(named | {"string_to_param": {"*": rows}}, file)
        return ["style", "<other>"]
    if layout == "original":
        params = torch.nn.ParameterDict({"*": torch.nn.Parameter(rows)})
        torch.save({"string_to_token": {"*": 265}, "string_to_param": params}, file)
        return ["style"]
    content = {"emb_params" if layout == "kohya" else WORD: rows}
    if file.suffix == ".safetensors":
        save_file(content, file)
    else:
        torch.save(content, file, _use_new_zipfile_serialization=layout != "legacy")
    return ["style"] if layout == "kohya" else [WORD]


@pytest.mark.parametrize("layout, suffix, n", [
    ("diffusers", ".safetensors", 0), ("diffusers", ".safetensors", 3), ("diffusers", ".bin", 1), ("legacy", ".bin", 0),
    ("kohya", ".safetensors", 1), ("kohya", ".pt", 3), ("A1111", ".pt", 0), ("A1111", ".pt", 3), ("original", ".pt", 1),
])
def test_a_word_from_a_file(tmp_path, layout, suffix, n):
    model = small.stable_diffusion()
    circle = model.tokenizer.encode("circle")
    rows = model.text.text_model.embeddings.token_embedding.weight[circle]
    rows = rows[0] if n == 0 else rows[:1].expand(n, -1).contiguous()
    names = write(tmp_path / f"style{suffix}", layout, rows.clone())
    assert learn_word(model, tmp_path / f"style{suffix}") == names
    with pytest.raises(ValueError, match="which another file is already"):
        learn_word(model, tmp_path / f"style{suffix}")
    for name in names:
        want = model.encode_prompt([" ".join(["a"] + ["circle"] * max(n, 1) + ["on a beach"])])
        assert len(circle) == 1  # so the learned word means what "circle" means
        assert torch.equal(model.encode_prompt([f"a {name} on a beach"]), want)
    sd.save(model, tmp_path / "folder")
    assert torch.equal(sd.load(tmp_path / "folder").encode_prompt([f"a {names[0]} on a beach"]), want)


def test_files_that_are_no_learned_word(tmp_path):
    def refused(content, words):
        save_file(content, tmp_path / "word.safetensors")
        with pytest.raises(ValueError, match=words) as e:
            learn_word(small.stable_diffusion(), tmp_path / "word.safetensors")
        assert "\n" not in str(e.value) and "word.safetensors" in str(e.value)

    refused({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, "XL")
    refused({"<x>": torch.ones(768)}, "width 768, and this one has 64")
    refused({"<x>": torch.ones(64), "<y>": torch.ones(64)}, "not a learned word")
    refused({"<x>": torch.ones(64, dtype=torch.int64)}, "not a learned word")
    refused({"<x>": torch.full((64,), float("nan"))}, "damaged: it is not finite")
    refused({"<x>": torch.ones(76, 64)}, "no prompt holds 76")
    refused({"<x>": torch.ones(0, 64)}, "no prompt holds 0")
    refused({"<x>": torch.ones(0)}, "not a learned word")
    refused({"<x>": torch.ones(2, 0)}, "not a learned word")
    refused({" ": torch.ones(64)}, "no name")
    refused({"lora_up.weight": torch.ones(4, 4, 3, 3)}, "not a learned word")
    torch.save({"string_to_param": {"*": [1, 2]}}, tmp_path / "word.pt")
    with pytest.raises(ValueError, match="not a learned word"):
        read_word(tmp_path / "word.pt")


@pytest.mark.parametrize("content", ['{"<x>": "7"}', '{"<x>": -1}', '{"<x>": true}', '{"": 600}', "[1]", "[" * 100_000])
def test_added_words_that_are_damaged(tmp_path, content):
    small.TOKENIZER.save(tmp_path)
    (tmp_path / "added_tokens.json").write_text(content)
    with pytest.raises(ValueError, match="damaged") as e:
        load_tokenizer(tmp_path)
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)
