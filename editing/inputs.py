"""What the options of sample.py name -> pictures, coarse edits and maps, as models take them."""

import warnings
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

import collage
import diffdiff
from checkpoints import published
from checkpoints.parts import TOY_CAPTIONER, load_part
from common.cli import tell
from common.colours import colour_transform, to_srgb
from common.files import read_json
from common.pictures import (
    KINDS,
    fit_edit,
    fitted_size,
    lay_on,
    map_over,
    map_to_grey,
    map_to_tensor,
    on_checkerboard,
    open_picture,
    picture_to_tensor,
    to_rgb,
    to_rgba,
)
from editing import change_maps
from editing.edits_json import read_edits
from editing.options import AUTO, check_files
from networks import blip, sam
from toy import captions

ALPHA = "alpha"  # as a map or mask: the picture's own


def read(args, dtype, device):
    """-> the picture, RGB; a coarse edit of it, RGBA; a map or mask over it, (H, W), 0 = change.

    None for what the options do not name. A prompt "auto" becomes words. ValueError or OSError for
    what cannot be used. The networks that find depth, segments, words are gone when this returns.
    """
    # All files of networks are found before the first is read
    spec = change_maps.parse_spec(args.change_map or "")
    kinds = [spec.network] if spec else []
    if args.segments == "sam":
        kinds.append("sam")
    auto = args.prompt == AUTO
    if auto and not is_toy(args.weights):
        kinds.append("blip")
    if args.networks and not (kinds or auto):
        raise ValueError("--networks needs --change-map depth or sam:..., or --segments sam, or --prompt auto")
    folder = args.networks or published.FOLDER
    files = {kind: published.find(kind, folder) for kind in kinds}
    # A map has more greys than half precision tells apart
    dtypes = {kind: dtype if kind == "blip" else torch.float32 for kind in files}
    networks = {kind: published.load(kind, files[kind], dtypes[kind], device) for kind in files}
    segment_at = sam.segmenter(networks["sam"]) if "sam" in networks else None

    photo = open_picture(args.image) if args.image else None
    original = to_rgb(photo) if photo else None
    if auto:
        args.prompt = describe(original, networks.get("blip"), files.get("blip"), device)
        tell(f"the prompt is '{args.prompt}'")
    coarse = mu = None
    if args.edit:
        coarse = open_picture(args.edit)
        alpha = fit_edit(coarse, original, original.size).getchannel("A")
        if alpha.getextrema()[0] == 255:
            no_holes = f"no holes are marked in {args.edit} (by alpha 0)"
            warnings.warn(f"{no_holes}: all of it counts as kept", stacklevel=2)
    elif args.collage:
        made = read_edits(args.collage, segment_at if args.segments == "sam" else None)
        check_files(args, made.files)
        if not original:
            original = Image.fromarray(made.image)
            original.info = made.info
        sizes = "x".join(map(str, original.size)), "{1}x{0}".format(*made.image.shape)
        if sizes[0] != sizes[1]:
            both = f"{args.image} is {sizes[0]} and the picture in {args.collage} {sizes[1]}"
            raise ValueError(f"{both}: its points are in pixels, so both must be of one size")
        made.image = np.array(original)
        coarse = Image.fromarray(made.coarse())
        coarse.info = original.info
        fit_edit(coarse, original, original.size)  # raises if nothing is left

    _, longest, _ = KINDS[Path(args.out).suffix.lower()]
    if args.paste_back and max(original.size) > longest:
        size = "{} x {} pixels".format(*original.size)
        raise ValueError(f"{args.out}: this format does not hold {size}, say .png")
    if args.paste_back and isinstance(args.size, tuple):
        squeezed = args.size[0] / args.size[1] * original.height / original.width
        if not 0.9 < squeezed < 1.1:
            raise ValueError("--paste-back lays the result over all of the picture, of {}x{} pixels: a --size of {}x{} "
                             "would squeeze it; say one number".format(*original.size, *args.size))

    drawn = args.change_map or args.mask
    if args.paste_back and photo and not args.edit:
        warn_of_loss(photo, args.image, drawn == ALPHA)
    if spec:
        network = networks[spec.network]
        image = np.asarray(to_srgb(original))
        mu = change_maps.compute_map(spec, image, network, args.white_is_change, segment_at)
    elif drawn:
        picture = alpha_of(photo, args.image) if drawn == ALPHA else open_picture(drawn)
        grey = map_to_grey(picture, args.white_is_change)
        mu = map_over(grey, original, args.white_is_change)
        warn_of_greys(picture, grey, drawn, bool(args.mask), args.white_is_change)
    return original, coarse, mu


def is_toy(weights):
    """Is this a toy's folder? Its text encoder is narrower than any that was published, which have 768 and more."""
    config = read_json(Path(weights) / "text_encoder/config.json", default={})
    width = config.get("hidden_size", config.get("d_model"))
    return type(width) is int and width < 768


def describe(original, network, file, device):
    """What is in a picture, RGB, in words: by BLIP, its file given; without it by the toy's own."""
    x = picture_to_tensor(original, fitted_size(original, 512, 8))
    if network:
        return blip.caption(network, blip.Tokenizer.load(file.parent), x)[0]
    encoder = load_part(TOY_CAPTIONER, "toy_image_encoder", torch.float32, device)
    return captions.describe(encoder, x)[0]


def alpha_of(photo, name):
    """The picture's own alpha as a map: what is transparent changes."""
    if photo is None:
        raise ValueError(f"{ALPHA} is that of --image: say which")
    if not photo.has_transparency_data:
        raise ValueError(f"{name} has no alpha: nothing in it is transparent")
    return to_rgba(photo).getchannel("A")


def warn_of_loss(photo, name, repainted):
    """A word where --paste-back does not keep a photograph's own pixels.

    repainted  what is transparent in it
    """
    profile = photo.info.get("icc_profile")
    clear = photo.has_transparency_data and alpha_of(photo, name).getextrema()[0] < 255
    lost = {
        f"mode {photo.mode}": photo.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"),
        "transparency": clear and not repainted,
        "profile of grey": photo.mode in ("L", "LA") and colour_transform(profile, "L") is not None,
    }
    if any(lost.values()):
        what = " and ".join(word for word, is_lost in lost.items() if is_lost)
        warnings.warn(f"--paste-back does not keep the {what} of {name}: it becomes RGB of 8 bits", stacklevel=2)


def warn_of_greys(picture, grey, name, mask, white_is_change):
    """A word where the greys, L, of a map or mask, as it was opened, hardly mean what they do."""
    low, high = grey.getextrema()
    deep = picture.mode[0] in "IF" and np.asarray(picture).max() > 0  # its 1 of 65535 is 0 of 255
    steps = np.asarray(grey)
    steps = cv2.erode(cv2.inRange(steps, 26, 229), np.ones((3, 3)))  # not at the rim of a shape
    few = (grey if picture.mode[0] in "IF" else picture).resize((256, 256), Image.Resampling.NEAREST)
    colours = np.ptp(np.asarray(lay_on(few, "white")), axis=2)
    if np.mean(colours > 64) > 0.01:
        word = f"{name} is coloured: of its colours only the grey counts, 0.3 red + 0.59 green + 0.11 blue"
    elif high < 26 and (high or deep):
        word = (f"nothing in {name} is lighter than {high or 1} of 255, so all of it counts as about "
                "black: if its values are 0 and 1, or labels, spread them over 0 .. 255")
    elif low == high == (0 if white_is_change else 255):
        word = f"{name} keeps all of the picture: nothing changes"
    elif mask and low < high and (low > 127 or high < 128):
        word = (f"{name} has values of {low} to {high}, and a mask is cut at 127: all of it counts "
                f"as {'white' if low > 127 else 'black'}")
    elif mask and steps.any():
        word = f"--mask cuts the greys of {name} to black and white: --change-map keeps them"
    else:
        return
    warnings.warn(word, stacklevel=2)


def fit_map(args, mu, original, size):
    """The map, mask or strengths at `size` (width, height) -> (1, 1, H, W); None: there are none"""
    width, height = size
    aspect = width / height / (original.width / original.height)
    cut = 1 - min(aspect, 1 / aspect)
    if cut > 0.1:
        warnings.warn(f"{cut:.0%} of the picture is cut off, for a size of {width}x{height}", stacklevel=2)
    if args.strength_fan or args.strength is not None:
        strengths = args.strength_fan or [args.strength]
        return diffdiff.strength_fan_map(strengths, height, width)
    if mu is None:
        return None
    change_map = map_to_tensor(mu, size)
    if args.mask:
        softness = 40 if args.softness is None else args.softness  # in pixels of the original
        scale = (width * height / (original.width * original.height)) ** 0.5
        change_map = diffdiff.soft_inpainting_map(change_map.round(), softness * scale)
    return change_map


def fit_coarse_edit(coarse, original, size):
    """RGBA over `original` -> what `sample.fixup` takes, at `size`, and a picture of it for people

    (1, 3, H, W) in [-1, 1], its holes filled; the mask (1, 1, H, W), 1 = kept; RGB
    """
    coarse = to_srgb(fit_edit(coarse, original, size))
    kept = np.asarray(coarse.getchannel("A")) > 0
    filled = Image.fromarray(collage.fill_holes(np.asarray(coarse)[..., :3], ~kept))
    mask = torch.from_numpy(kept).float()[None, None]
    return picture_to_tensor(filled, size), mask, on_checkerboard(coarse)
