"""clip.py against transformers' CLIPTextModel and CLIPTokenizer, and open_clip's tokenizer."""

import importlib.util
import json
import random
import unicodedata
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import clip
from checkpoints import configs
from checkpoints.parts import load_image_encoder, save_part
from tests.small import CAPTIONS, TOKENIZER, random_ids, relative_error

# --- The text encoder -----------------------------------------------------------------------------


def ours_and_peer(folder, config):
    """The same random weights in our model and in transformers', which opens a folder that we wrote."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ours = clip.TextEncoder(config).eval()
    for p in ours.parameters():  # every bias and norm gets a value of its own
        p.data += 0.1 * torch.randn(p.shape)
    save_file(ours.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(configs.text_config_to_json(config)))
    peer_class = getattr(transformers, configs.text_config_to_json(config)["architectures"][0])
    peer, info = peer_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info  # no key missing, unexpected or of another shape
    return ours, peer.eval()


@pytest.mark.parametrize(("width", "heads", "length", "activation"),
                         [(64, 4, 77, "quick_gelu"), (64, 1, 16, "gelu"), (96, 3, 77, "gelu")])
@torch.no_grad()
def test_same_numbers_as_transformers(tmp_path, width, heads, length, activation):
    config = clip.TextConfig(300, width, 3, heads, length, 4 * width, activation, eos=299)
    ours, peer = ours_and_peer(tmp_path, config)
    ids = random_ids(config, length=length)
    want = peer(ids)
    context, pooled = ours.encode(ids)
    assert context.shape == (3, length, width)
    assert relative_error(context, want.last_hidden_state) <= 1e-4
    assert relative_error(pooled, want.pooler_output) <= 1e-4
    assert torch.equal(ours(ids), context)
    assert configs.text_config_from_json(peer.config.to_dict()) == config


@torch.no_grad()
def test_penultimate_layer_of_sd2_and_both_of_sdxl(tmp_path):
    config = clip.TextConfig(300, 64, 4, 4, 77, 256, "gelu", 299, skip_last=1, projection=48)
    sd2, peer = ours_and_peer(tmp_path, config)
    ids = random_ids(config)
    want = peer(ids, output_hidden_states=True)
    penultimate = want.hidden_states[-2]
    assert relative_error(sd2(ids), peer.text_model.final_layer_norm(penultimate)) <= 1e-4
    # SD 2's folder stores one layer less instead of skipping one.
    shorter = clip.TextEncoder(replace(config, layers=3, skip_last=0))
    shorter.load_state_dict({k: v for k, v in sd2.state_dict().items() if ".layers.3." not in k})
    assert relative_error(shorter(ids), sd2(ids)) <= 1e-5  # of weights at other addresses
    sdxl = clip.TextEncoder(replace(config, final_norm=False))
    sdxl.load_state_dict(sd2.state_dict())
    context, pooled = sdxl.encode(ids)
    assert relative_error(context, penultimate) <= 1e-4
    assert relative_error(pooled, want.text_embeds) <= 1e-4


# --- The tokenizer --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_clip():
    """(open_clip's tokenizer module, its merges file), without importing the package, which needs torchvision."""
    pytest.importorskip("ftfy")
    pytest.importorskip("regex")
    package = importlib.util.find_spec("open_clip")
    if package is None:
        pytest.skip("open_clip is not installed")
    folder = Path(package.submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", folder / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, folder / clip.ARCHIVE


FIXED = """a photo of the Cat dog's isn't THEY'RE we'll i'd I'M 'S ''s 've 'ſ 2024 3.14 ½ x² Ⅷ ١٢ e\u0301 n\u0303 Å ŉ \
don’t “quoted” ‘single’ … — ﬁne ﬅ Ｆｕｌｌ ｶﾞ　wide 👩‍👩‍👧 🇫🇷 &amp; &lt;b&gt; &amp;lt; &rsquo; &eacute; &#8217; &#x41; \
&#150; &amp &copy &notit; < <b> & İstanbul ΣΑΣ ẞ straße Ǆ <|startoftext|> <|endoftext|> <|EndOfText|> \
!<|endoftext|> <|endoftext </w> Ġ \u200b \u00ad \ufeff x\x07y \x1b[31mred \x85 \x92s hello_world \
http://a.b/c?d=1&e=2 C++ #tag @you $5.00 100% :-) (((masterpiece:1.3))) ------ !!!???"""


def random_strings(count, seed):
    """Strings of whatever a prompt can hold, glued with and without spaces."""
    rng = random.Random(seed)
    # Characters that this Python's Unicode does not know yet are left out, and so is U+0345: a Greek mark without a
    # class of its own, which the `regex` package loses when it ignores case.
    everything = [chr(i) for i in range(0x20, 0x20000) if unicodedata.category(chr(i)) not in ("Cn", "Co", "Cs")
                  and i != 0x345]
    scripts = [(0x21, 0x7F), (0xA1, 0x250), (0x370, 0x400), (0x400, 0x530), (0x5D0, 0x5EB), (0x620, 0x6D4),
               (0x904, 0x940), (0xE01, 0xE3A), (0x10D0, 0x10FF), (0x1100, 0x11FA), (0x1E00, 0x1F00), (0x2010, 0x2070),
               (0x2150, 0x218C), (0x2190, 0x2400), (0x3041, 0x3100), (0x4E00, 0x9FFD), (0xAC00, 0xD7A4),
               (0xFB00, 0xFB07), (0xFF01, 0xFFEF), (0x1F300, 0x1F6D0)]
    scripts = [[chr(i) for i in range(*s) if unicodedata.category(chr(i)) != "Cn" and i != 0x345] for s in scripts]
    fixed = FIXED.split(" ")
    spaces = [" ", "  ", "", "", "\n", "\t", "\r\n", "\u00a0", "\u2003", "\u2028", "\u3000"]
    for _ in range(count):
        parts = []
        for _ in range(rng.choice([0, 1, 2, 3, 5, 8, 13, 60])):
            source = rng.choice([fixed, fixed, everything, rng.choice(scripts), rng.choice(scripts)])
            part = rng.choice(fixed) if source is fixed else "".join(rng.choices(source, k=rng.randint(1, 6)))
            parts += [part, rng.choice(spaces) if rng.random() < 0.3 else " "]
        yield "".join(parts)


def test_same_ids_as_open_clip(open_clip):
    import ftfy
    import regex

    module, archive = open_clip
    ours, theirs = clip.Tokenizer.load(archive), module.SimpleTokenizer(str(archive))
    # open_clip respells the special tokens; spell them as OpenAI's CLIP and Stable Diffusion do.
    for name, token in (("<start_of_text>", clip.START), ("<end_of_text>", clip.END)):
        theirs.pat = regex.compile(theirs.pat.pattern.replace(name, regex.escape(token)), regex.IGNORECASE)
        theirs.encoder[token] = theirs.encoder[name]
        theirs.cache[token] = token
    assert len(ours.vocab) == 49408
    # Mojibake repair is the part of ftfy that is not ours: strings that it would change are left out.
    strings = [s for s in random_strings(1000, seed=0) if ftfy.fix_text(s) == ftfy.fix_text(s, fix_encoding=False)]
    strings += ["", " ", "\ud83d\ude00 x\ud800 lone surrogate", "a <b>\n&rdquo;", "a " * 100, "word" * 200, *CAPTIONS]
    assert len(strings) > 5 / 6 * 1000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = ours(strings)
    want = theirs(strings)
    wrong = [(s, a.tolist(), b.tolist()) for s, a, b in zip(strings, got, want) if not torch.equal(a, b)]
    assert not wrong, (len(wrong), wrong[0])


def test_every_character_is_split_as_by_the_regex_package():
    regex = pytest.importorskip("regex")
    pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
    chars = [chr(i) for i in range(0x21, 0x110000) if unicodedata.category(chr(i)) not in ("Cn", "Cs") and i != 0x345]
    text = "".join(c for c in chars if not c.isspace())
    assert len(text) > 100_000
    assert clip.split_words(text) == pattern.findall(text)
    spaced = "a" + "a ".join(text) + " "  # every character after a space and before a letter
    assert clip.split_words(spaced) == pattern.findall(spaced)


def test_same_ids_as_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    peer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    texts = [*CAPTIONS, "", "A CAFÉ at 5 o'clock", "e\u0301 日本語 привет 👩‍👧 x²", "a <|endoftext|> b",
             "no  double\n spaces", "red " * 90, "unseen qwertz-words [and] {brackets}"]
    want = peer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with pytest.warns(UserWarning, match="left out"):
        got = TOKENIZER(texts)
    assert got.shape == (len(texts), 77)
    assert torch.equal(got, want)
    # and back: the one tokenizer.json that transformers 5 itself writes
    peer.save_pretrained(tmp_path / "theirs")
    assert torch.equal(clip.Tokenizer.load(tmp_path / "theirs")(CAPTIONS), got[: len(CAPTIONS)])


def test_sd2_pads_with_exclamation_mark(tmp_path):
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    # As in SD 2's folder, where the two files disagree.
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["pad_token"] == clip.END
    ids = clip.Tokenizer.load(tmp_path)("red")[0].tolist()
    assert ids[2:] == [TOKENIZER.vocab[clip.END]] + [0] * 74
    peer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    assert ids == peer("red", padding="max_length", truncation=True).input_ids
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!", "lstrip": False}}))
    assert clip.Tokenizer.load(tmp_path).pad == "!"
    assert clip.Tokenizer.load(tmp_path, pad=clip.END).pad == clip.END
    (tmp_path / "special_tokens_map.json").unlink()
    assert clip.Tokenizer.load(tmp_path).pad == clip.END


@torch.no_grad()
def test_clips_image_encoder_in_a_folder_of_all_of_clip(tmp_path):
    """As openai/clip-vit-large-patch14 is stored: both networks in one file. And written again, alone."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    config = transformers.CLIPConfig(text_config=sizes | {"vocab_size": 99}, projection_dim=24,
                                     vision_config=sizes | {"image_size": 56, "patch_size": 14})
    peer = transformers.CLIPModel(config).eval()
    for p in peer.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    peer.save_pretrained(tmp_path / "clip")
    ours = load_image_encoder(tmp_path / "clip")
    x = torch.randn(2, 3, 56, 56)
    want = peer.visual_projection(peer.vision_model(x).pooler_output)
    assert relative_error(ours(x), want) <= 1e-5
    save_part(ours, tmp_path / "alone")
    assert torch.equal(load_image_encoder(tmp_path / "alone")(x), ours(x))
    alone = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "alone")
    assert relative_error(ours(x), alone(x).image_embeds) <= 1e-5
