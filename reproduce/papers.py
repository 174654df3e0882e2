"""Every table and figure of both papers, supplements included: is it here, which item makes it, and why not more.

done      an item makes what the table or figure shows, by the paper's construction
stand-in  it tests the same claim, but replaces a method, the people or the kind of picture; or it shows only a part
absent    nothing makes it
"""

from collections import Counter
from typing import NamedTuple

from reproduce.lab import DD, MFX

DONE, STAND_IN, ABSENT = "done", "stand-in", "absent"


class Row(NamedTuple):
    where: str  # in the paper
    shows: str
    state: str
    item: str  # of --only; "" where nothing makes it
    why: str = ""


ROWS = {
    DD: (
        Row("Table 1", "CAM and DAM of three methods on three maps", DONE, "table1",
            "blended latent diffusion as published, an empty prompt; `--as-paper`: 1,000 pictures in 100 steps"),
        Row("Table 2", "users match maps to edits, and edits to prompts", STAND_IN, "study",
            "no people: CAM guesses the map, colours tell whether there were words"),
        Row("Table 3", "users prefer a method", STAND_IN, "study",
            "no people: CAM, and the base model's surprise at the picture"),
        Row("Table 4", "running time by the map's minimum", DONE, "figure23", "seconds of our own loop"),
        Row("Figure 1", "six edits", STAND_IN, "gallery",
            "six edits of the one toy; the paper's are of the community's checkpoints"),
        Row("Figure 2", "line 9 of Algorithm 1, its two products", DONE, "figure4"),
        Row("Figure 3", "edits with and without nested masks", DONE, "figure3", "both ways on the same noise"),
        Row("Figure 4", "the inference process", DONE, "figure4", "Algorithm 1 written out a second time"),
        Row("Figure 5", "SDXL, DeepFloyd IF and Kandinsky", ABSENT, "",
            "all three run here, on random weights beside diffusers (docs/proof.md); their own weights are not here"),
        Row("Figure 6", "soft-inpainting beside five ways to blend", DONE, "figure6", "all five"),
        Row("Figure 7", "strength fans", DONE, "figure7", "and the same strengths as separate edits"),
        Row("Figure 8", "four baselines", DONE, "baselines", "all four; 20 levels where the paper has 100"),
        Row("Figure 9", "beside InstructPix2Pix and DiffEdit", STAND_IN, "figure9",
            "DiffEdit; InstructPix2Pix where its weights are (`--instruct-weights`): the toy's is not trained"),
        Row("Figure 10", "edits beside blended latent diffusion and inpainting", DONE, "figure10",
            "a decoder is fitted to each picture's background, as published"),
        Row("Figure 11", "measured strength maps of three methods", DONE, "table1", "maps drawn after the paper's"),
        Row("Figure 12", "Figure 6 with three prompts and blurs", DONE, "figure6",
            "the paper's three blurs, in proportion to the picture"),
        Row("Figure 13", "Figure 10 with more seeds", DONE, "figure10"),
        Row("Figure 14", "many maps from one depth map", DONE, "figure14",
            "the toy's exact depth; of `--images`, MiDaS's"),
        Row("Figure 15", "eight maps, one prompt and seed", DONE, "gallery"),
        Row("Figure 16", "the strength of one region", DONE, "figure16", "five values; the region is a disc"),
        Row("Figure 17", "passes through the autoencoder", DONE, "figure17", "up to ten"),
        Row("Figure 18", "more of the baselines", DONE, "baselines", "four pictures, one prompt"),
        Row("Figure 19", "one pair or many, and the bias", DONE, "figure19", "fewer pairs than the paper's 1,000"),
        Row("Figure 20", "samplers", DONE, "figure20",
            "seven of our eight; LCM needs a model distilled for it"),
        Row("Figure 21", "twenty edits", DONE, "gallery", "in the toy world's words; of `--images` in the paper's"),
        Row("Figure 22", "the user study's questions", STAND_IN, "study", "as they were put to a measure"),
        Row("Figure 23", "the curve of Table 4", DONE, "figure23"),
        Row("Figure 24", "fans of two to five strengths", DONE, "figure7", "four pictures, one prompt"),
        Row("Figure 25", "fans zoomed in", DONE, "figure7", "two ranges"),
        Row("Figure 26", "where CAM and DAM differ", DONE, "figure26", "maps drawn again from the text"),
        Row("Figure 27", "more soft-inpainting, 64 pixels", DONE, "gallery",
            "three prompts, the blur in proportion"),
    ),
    MFX: (
        Row("Table in section 4.2", "the ablation, LPIPS", DONE, "ablation",
            "four models; the third attends to an embedding by the toy's captioner, where the paper has CLIP's"),
        Row("Figure 1", "edits beside earlier methods", STAND_IN, "mfx_figure2",
            "SDEdit and MasaCtrl, DragDiffusion in Figure 8; AnyDoor's weights are not to be had"),
        Row("Figure 2", "beside text-based editing", STAND_IN, "mfx_figure2",
            "MasaCtrl; InstructPix2Pix where its weights are"),
        Row("Figure 3", "overview of the pipeline", ABSENT, "", "a diagram; `mfx.py` is what it draws"),
        Row("Figure 4", "latent initialization", DONE, "mfx_figure4", "edits at night, from both starts"),
        Row("Figure 5", "the two motion models", DONE, "mfx_figure5",
            "on pairs from clips: flow, segments and depth are estimated"),
        Row("Figure 6", "applications", STAND_IN, "mfx_gallery", "shadows, reflections, night, focus; no reposing"),
        Row("Figure 7", "beside AnyDoor", STAND_IN, "mfx_figure7",
            "its protocol (cut, inpaint, insert again) with the toy's inpainting model"),
        Row("Figure 8", "beside DragDiffusion", STAND_IN, "mfx_figure8",
            "the method whole, handles from each edit's motion; but things are moved and scaled, not reposed"),
        Row("Figure 9", "what each motion model teaches", DONE, "mfx_figure9", "three models, on pairs from video"),
        Row("Figure 10", "without the detail extractor", DONE, "cross_reference",
            "the table's third model, with the embedding"),
        Row("Figure 11", "share of users who prefer it, edit by edit", STAND_IN, "mfx_figure11",
            "no people: 27 votes an edit, of three measures on three samples of either"),
        Row("Figure 12", "the study's pictures beside SDEdit", STAND_IN, "mfx_figure11",
            "toy edits, the most and the least preferred"),
    ),
}


def count_states(paper=None):
    """How many of a paper's tables and figures, or of both papers', are (done, stand-in, absent, all)"""
    states = Counter(row.state for of, rows in ROWS.items() for row in rows if paper in (None, of))
    return (*(states[s] for s in (DONE, STAND_IN, ABSENT)), states.total())
