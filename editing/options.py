"""What can be said on the command line of sample.py, and what cannot be said together."""

from pathlib import Path

import diffusion
import samplers
import vae
from common.cli import Parser, check_needs, check_outputs, file_name, given, number, picture_size
from editing.change_maps import RIGHT

AUTO = "auto"  # as a prompt: what is in the picture
MAPS = ["change_map", "mask", "strength_fan", "strength"]  # how much of the picture changes
COARSE = ["edit", "collage"]  # what it becomes: Magic Fixup

# What stands beside what. An option, and others of which it needs one.
NEEDS = {
    "change_map": ["image", "collage"], "mask": ["image"], "strength_fan": ["image"], "strength": ["image"],
    "edit": ["image"], "segments": ["collage"],
    "white_is_change": ["change_map", "mask"], "softness": ["mask"],
    "no_skip": MAPS + COARSE, "paste_back": MAPS, "blend": MAPS,
    "a1111": ["prompt", "negative"], "words": ["prompt"],
    "switch": ["refiner"], "prior": ["weights"],
}
# A Stable Diffusion, XL or not, takes every option. What only it takes:
STABLE = ["a1111", "words", "lora", "vae", "refiner", "prediction"]
# An option that asks for another model, whose it is, and the options that this model does not take.
FIXUP = ("Magic Fixup's: it takes no text, and no map but --change-map",
         [*STABLE, "prompt", "negative", "guidance", "mask", "strength_fan", "strength", "prior", "super_resolution"])
REFUSED = {
    "edit": FIXUP,
    "collage": FIXUP,
    "prior": ("Kandinsky's", [*STABLE, "spacing", "super_resolution"]),
    "super_resolution": ("DeepFloyd IF's: it has pixels for latents, and a sampler of its own",
                         [*STABLE, "sampler", "spacing", "no_skip", "blend", "paste_back", "size", "vae_memory",
                          "compile", "sheet", "steps_strip"]),
}


def parse(argv, description):
    """-> the parser, the options; None for what is left out and has its default in sample.py"""
    p = Parser(prog="sample.py", description=description)
    add = p.add_argument
    add("--image", type=file_name, help="the picture to edit")
    add_coarse = p.add_mutually_exclusive_group().add_argument
    add_coarse("--edit", type=file_name, help="for Magic Fixup: a coarse edit, alpha 0 = holes")
    add_coarse("--collage", type=file_name, help="JSON: such an edit, of its picture or --image")
    add("--prompt", help="what the edited parts should show; or auto: what is in --image, by BLIP or the toy's own "
        "captioner")
    add("--negative", help="what they should not show")
    add("--a1111", action="store_true",
        help="read prompts as that web UI does: weights as (word:1.4), and more than 75 tokens")
    add("--words", nargs="+", type=file_name, help="files of learned words, by textual inversion, for the prompt")

    add_map = p.add_mutually_exclusive_group().add_argument
    add_map("--change-map", type=file_name, help="grey picture: black = change fully, white = keep. Or "
            f"{RIGHT['depth']}. Or {RIGHT['sam']}. Or alpha: the picture's own")
    add_map("--mask", type=file_name, help="black = repaint, white = keep; blurred by --softness. Or alpha: the "
            "picture's own, repainted where it is transparent")
    add_map("--strength-fan", type=read_strengths, help="N columns, or a list: 0.2,0.5,0.8")
    add_map("--strength", type=number(float, 0, 1), help="0 = keep all, 1 = keep nothing")
    add("--softness", type=number(float, 0, 1000), help="in pixels of --image (default: 40)")
    add("--white-is-change", action="store_true", help="white, or 1, is where the picture changes")
    add("--paste-back", action="store_true",
        help="at the size of --image: what the map keeps in full is the photograph's own pixels")
    add("--segments", choices=["classical", "sam"], help="who resolves a collage's clicks")
    add("--networks", type=file_name, help="folder of SAM's, MiDaS's, BLIP's files (default: weights)")

    add("--weights", type=file_name, help="a folder, .safetensors or .ckpt (default: the toy)")
    add("--vae", type=file_name, help="another autoencoder in place of theirs: a folder or a file")
    add("--refiner", type=file_name, help="likewise, for the last steps: Stable Diffusion XL's, or for any other model "
        "a plain one of its latents, or a UNet alone")
    add("--super-resolution", type=file_name, help="DeepFloyd IF's second stage, a folder; --weights is its first")
    add("--prior", type=file_name, help="Kandinsky 2.2's, a folder; --weights is its decoder")
    add("--lora", action="append", type=read_lora_option, metavar="FILE[:WEIGHT]",
        help="a LoRA, LoCon or DoRA, merged into the weights; several times for several (default: weight 1)")
    add("--switch", type=number(float, 0, 1), help="the share of the steps before it (default: 0.8)")
    add("--prediction", choices=["epsilon", "v_prediction"], help="in place of what the weights say "
        "that they predict")

    add("--sampler", choices=list(samplers.SAMPLERS),
        help="(default: ddim; an XL: euler; a latent consistency model: lcm)")
    add("--spacing", choices=diffusion.SPACINGS, help="which timesteps it visits: trailing for Turbo, Lightning and "
        "Hyper-SD (default: what a folder says, or leading)")
    add("--steps", type=number(int, 1, 1000), help="k of the paper (default: 100; an edit: 50; trailing and lcm: 4)")
    add("--no-skip", action="store_true", help="run also the steps that the map overwrites")
    add("--blend", action="store_true", help="with few steps: a strength that lies between two of them counts too")
    add("--guidance", type=number(float, 0, 100),
        help="classifier-free; 1 = none (default: 7.5; trailing and lcm: 1)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0)
    add("--samples", type=number(int, 1, 100), default=1, help="results, from as many seeds")
    add("--size", type=picture_size, help="side of a square of equal area, or WxH")

    add("--device", default="auto", help="auto, cpu, cuda, mps")
    add("--precision", choices=["auto", "fp32", "fp16", "bf16"], default="auto")
    add("--vae-memory", type=number(float, 0.01, 1000),
        help=f"GiB, above which the autoencoder works in tiles (default: {vae.MEMORY // 2**30})")
    add("--compile", action="store_true", help="compile first: minutes, for many or large edits")

    add("--out", type=file_name, default="out.png",
        help="PNG, JPEG or WebP, by its ending; several samples are out-SEED.png")
    add("--sheet", type=file_name, help="as well: input, edit, map and output in a row")
    add("--steps-strip", type=file_name, help="as well: what the model believed on the way")
    return p, p.parse_args(argv)


def read_strengths(text):
    """'5' -> five strengths from 0.2 to 1; '0.2,0.5,0.8' -> those."""
    if text.isdecimal():
        n = number(int, 1, 100)(text)
        return [(i + 1) / n for i in range(n)]
    return [number(float, 0, 1)(strength) for strength in text.split(",")]


def read_lora_option(text):
    """'style.safetensors:0.8' -> the file and 0.8; without a weight, the file and 1."""
    name, colon, weight = text.rpartition(":")
    if not colon or "/" in weight or "\\" in weight:  # a colon of the path
        return file_name(text), 1.0
    return file_name(name), number(float, -100, 100)(weight)


def check(args):
    """ValueError for what does not go together, before anything is read."""
    for option, (whose, refused) in REFUSED.items():
        asked, others = given(args, [option]), given(args, refused)
        if asked and others:
            raise ValueError(f"{others[0]} does not go with {asked[0]}, which is {whose}")
    check_needs(args, NEEDS)
    if args.super_resolution and not (args.image and args.weights):
        raise ValueError("--super-resolution needs --image, and DeepFloyd IF's first stage as --weights")
    if args.image and not given(args, MAPS + COARSE):
        raise ValueError("say how much of the picture changes: --change-map, --mask, "
                         "--strength-fan or --strength; or what it becomes: --edit or --collage")
    if not (args.image or args.collage or args.prompt):
        raise ValueError('say what to draw: --prompt "a red ball on grass at noon"')
    if args.prompt == AUTO and not args.image:
        raise ValueError("--prompt auto says what is in --image: say which")
    if args.sampler == "lcm" and args.spacing not in (None, "lcm"):
        raise ValueError(f"--spacing {args.spacing} does not go with --sampler lcm, which has its own")
    check_guidance(args)
    check_files(args)


def check_files(args, named=()):
    """ValueError if an output cannot be written, or would replace an input, or one that a collage has named."""
    check_outputs([*result_paths(args), args.sheet, args.steps_strip],
                  [args.image, args.edit, args.collage, args.change_map, args.mask, *named])


def check_guidance(args, guided=False):
    """guided  True: the weights are a model of few steps that is told its guidance"""
    if guided and args.guidance not in (None, 1):
        raise ValueError("these weights have their guidance inside: leave out --guidance and --negative")
    if args.negative and args.guidance == 1:
        raise ValueError("--negative has no effect with --guidance 1: say more than 1")
    if args.guidance == 0 and (args.prompt or args.negative):
        raise ValueError("--guidance 0 leaves --prompt out, and draws what --negative says: say 1 or more")


def check_fan(args, columns):
    """ValueError for more strengths than latents in a row: they would mix."""
    if len(args.strength_fan or []) > columns:
        raise ValueError(f"--strength-fan has {len(args.strength_fan)} columns, and this size room for {columns}: say "
                         "fewer, or a larger --size")


def result_paths(args):
    """--out, or with several samples the same with the seed of each before its ending."""
    out = Path(args.out)
    if args.samples == 1:
        return [out]
    return [out.with_stem(f"{out.stem}-{args.seed + i}") for i in range(args.samples)]
