"""Prompts as A1111 reads them: its own examples, chunks, and a text encoder that sees each as if alone."""

import warnings

import pytest
import torch

import clip
from models import prompts
from tests import small
from tests.small import TOKENIZER, relative_error

DOG = TOKENIZER.encode("dog")


@pytest.fixture(scope="module")
def model():
    return small.stable_diffusion()


@pytest.mark.parametrize("prompt, parts", [  # from the documentation of A1111's own parser
    ("normal text", [["normal text", 1]]),
    ("an (important) word", [["an ", 1], ["important", 1.1], [" word", 1]]),
    ("(unbalanced", [["unbalanced", 1.1]]),
    (r"\(literal\]", [["(literal]", 1]]),
    ("(unnecessary)(parens)", [["unnecessaryparens", 1.1]]),
    ("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).", [
        ["a ", 1], ["house", 1.573], [" ", 1.1], ["on", 1], [" a ", 1.1], ["hill", 0.55], [", sun, ", 1.1],
        ["sky", 1.4641], [".", 1.1]]),
    ("", []),
    ("a :1.4) b: c] \\\\ \\d", [["a :1.4) b: c] \\ d", 1]]),  # nothing was opened
    ("(a:-1.5)[b", [["a", -1.5], ["b", 1 / 1.1]]),
    ("(a BREAK b:2) BREAKS", [["a", 2], [prompts.BREAK, 2], ["b", 2], [" BREAKS", 1]]),
])  # fmt: skip
def test_weights_are_a1111s(prompt, parts):
    found = prompts.parse_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in parts]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in parts])


@pytest.mark.parametrize("weight", ["1.2.3", ".", "9" * 400])
def test_a_weight_that_is_no_number(weight):
    with pytest.raises(ValueError, match="no number: ':"):
        prompts.parse_weights(f"a (dog:{weight})")


def test_chunks_of_75():
    def lengths(prompt):
        ids, _ = prompts.split_chunks(TOKENIZER, prompt)
        assert (ids[:, 0] == TOKENIZER.vocab[clip.START]).all()
        return [(row[1:] == TOKENIZER.vocab[clip.END]).int().argmax().item() for row in ids]

    word = "dog " if len(DOG) == 1 else "a "
    assert len(TOKENIZER.encode(word)) == 1
    assert lengths("") == [0] and lengths(word * 75) == [75] and lengths(word * 76) == [75, 1]
    assert lengths(word * 160) == [75, 75, 10]
    # What began after a comma among the last 20 tokens moves on, a comma itself does not count as that.
    assert lengths(word * 60 + "," + word * 20) == [61, 20]
    assert lengths(word * 50 + "," + word * 30) == [75, 6]
    assert lengths(word * 55 + "," + word * 30) == [56, 30]
    assert lengths(word * 75 + "," + word) == [75, 2] and lengths(word * 74 + "," + word) == [75, 1]
    assert lengths(f"BREAK {word} BREAK BREAK {word} BREAK") == [0, 1, 0, 1]


def test_plain_prompts_are_read_as_ever(model):
    texts = ["a red circle", ""]
    assert torch.equal(model.encode_prompt(texts, a1111=True)[0], model.encode_prompt(texts[:1])[0])
    assert relative_error(model.encode_prompt(texts, a1111=True), model.encode_prompt(texts)) < 1e-5


def test_weights_multiply_and_the_mean_stays(model):
    plain, weighted = (model.encode_prompt([p], a1111=True) for p in ("a red dog", "a (red:1.5) dog"))
    a, red = len(TOKENIZER.encode("a")), len(TOKENIZER.encode("red"))
    expected = plain.clone()
    expected[:, 1 + a : 1 + a + red] *= 1.5
    expected *= plain.mean() / expected.mean()
    torch.testing.assert_close(weighted, expected)
    assert torch.equal(model.encode_prompt(["a (red:1.0) dog"], a1111=True), plain)


def test_a_long_prompt_is_its_chunks(model):
    first, second = "a red circle", "two blue squares"
    both = model.encode_prompt([f"{first} BREAK {second}"], a1111=True)
    alone = model.encode_prompt([first, second])
    assert relative_error(both, alone.flatten(0, 1)[None]) < 1e-5


def test_each_prompt_of_another_length_is_as_if_alone(model):
    """Also beside the negative prompt, which is shorter as a rule."""
    texts = ["a red circle", "(a:1.3) red BREAK blue squares", "a BREAK dog BREAK ball"]
    z, t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((3,), 500)
    together = model.denoiser(texts, "blue", 3.0, a1111=True)(z, t)
    for j, text in enumerate(texts):
        one = slice(j, j + 1)
        prompted, plain = (model.unet(z[one], t[one], model.encode_prompt([x], a1111=True)) for x in (text, "blue"))
        assert relative_error(together[one], plain + 3 * (prompted - plain)) < 1e-4


def test_what_is_not_read_is_said(model):
    def said(text, **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.encode_prompt([text], **options)
        return " | ".join(str(w.message) for w in caught)

    assert "'(dog:1.4)' is read as it stands" in said("a (dog:1.4)") and "--a1111" in said("a (dog:1.4)")
    assert "left out" in said("dog " * 90) and "--a1111" in said("dog " * 90)
    assert not said("a (dog), [cat] at 12:30: a: b)")
    assert not said("a (dog:1.4)" + "dog " * 90, a1111=True)
    for unknown in ("[cat:dog:0.5]", "[cat|dog]", "cat AND dog", "<lora:cat:0.5>"):
        assert "of A1111's language only" in said(unknown, a1111=True)
