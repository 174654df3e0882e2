"""Edit a picture, each pixel by as much as you say: two papers, and a command line for both.

    python sample.py --image P.png --change-map M.png --prompt "snow at night"
    python sample.py --image P.png --change-map depth --prompt "..."     or from segments: sam:...
    python sample.py --image P.png --mask M.png --softness 8 --prompt "..."        soft-inpainting
    python sample.py --image P.png --strength-fan 5 --prompt "..."    columns of growing strength
    python sample.py --image P.png --strength 0.6 --prompt "..."   one strength everywhere: SDEdit
    python sample.py --image P.png --strength 0.6 --prompt auto    the words for the picture found
    python sample.py --prompt "..."                                                  text to image
    python sample.py --image P.png --edit E.png      Magic Fixup of a coarse edit; alpha 0 = holes
    python sample.py --collage edits.json               the same edit, written down as segments
    python sample.py --image P.png --edit E.png --change-map M.png    both papers: white stays as
                                                                      it is in the edit
Maps and masks are black, or 0, where the picture changes and white, or 1, where it is kept, as in
the paper on Differential Diffusion. --white-is-change takes them the other way round, as many
tools do. Without --weights the toy models run that this project trained and ships. --weights
takes any Stable Diffusion 1.x, 2.x or XL (a folder, .safetensors or .ckpt), or for --edit and
--collage a Magic Fixup (a folder, or the released file). With --refiner it runs the first share
of the steps, and a refiner the rest. With --super-resolution the two folders are
the stages of a DeepFloyd IF; with --prior they are the prior and the decoder of a Kandinsky 2.2.
"""

if __name__ == "__main__":
    from common import interrupts

    interrupts.watch("sample.py")

import functools
import warnings
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import diffdiff
import mfx
import samplers
import sd
from checkpoints.lora import merge_lora
from checkpoints.magicfixup import looks_like_magic_fixup
from checkpoints.parts import replace_vae
from checkpoints.words import learn_word
from common.cli import TOY, TOY_MFX, report_errors, shorten_warnings, tell
from common.devices import choose_device, choose_precision, compile_unets, find_unets, make_fast
from common.pictures import (
    enlarge,
    fitted_size,
    labelled,
    labelled_columns,
    picture_to_tensor,
    save_pictures,
    tensor_to_picture,
)
from diffusion import draw_noise
from editing import cascade, inputs, options, paste
from editing.few_steps import blend_overrides
from kernels.memory import hold_memory
from models import kandinsky, xl
from models.prompts import list_texts

# -------------------------------------------------------------------------------------------------
# The edits


@torch.inference_mode()
def edit(model, prompt, picture=None, change_map=None, *, size=None, repaint=None, negative="",
         guidance=7.5, sampler="ddim", steps=100, seed=0, skip=True, blend=False, watch=None,
         a1111=False, refiner=None, switch=xl.SWITCH):
    """Differential Diffusion; without `picture` and `change_map`, text to image.

    Prompts, pictures, maps and seeds may be several, in one batch: each is one, or N.

    model        of sd.load; it says where and in what precision to compute
    prompt       a string, or N of them
    picture      (1 or N, 3, H, W) in [-1, 1]
    change_map   (1 or N, 1, H, W) in [0, 1], 0 = change, 1 = keep
    size         (width, height) in pixels for text to image; None: the model's own
    repaint      (1 or N, 1, H, W), 1 = repaint: what an inpainting model sees at every step
    seed         a number, or N of them
    blend        a strength between two steps counts: editing/few_steps.py
    watch        called as watch(steps done, of how many, t, the model's guess at the clean latent)
                 after each step; what it raises ends the edit
    a1111        read weights in prompts, and long ones whole: models/prompts.py
    refiner      of sd.load, an XL's, for the steps that follow the first share `switch` of them
      ->         (N, 3, H, W) in about [0, 1]
    """
    seeds = list(seed) if hasattr(seed, "__iter__") else [seed]
    prompts = list_texts(prompt, "prompt")
    several = {"prompt": prompts, "seed": seeds, "picture": picture, "repaint": repaint}
    if change_map is not None and change_map.ndim == 4:
        several["change_map"] = change_map
    counts = {name: len(given) for name, given in several.items() if given is not None}
    N = max(counts.values())
    for name, count in counts.items():
        if count not in (1, N):
            raise ValueError(f"{name} has {count} where one, or {N}, are expected")
    prompts = list_texts(prompts, "prompt", N)
    seeds = seeds * (N // len(seeds))

    z_init = beside = None
    width, height = size or (model.size, model.size)
    if picture is not None:
        z_init = model.encode_image(picture)  # (1 or N, C, h, w)
        height, width = picture.shape[-2:]
    if repaint is not None:
        beside = model.inpainting_channels(picture, repaint)
    config = model.vae.config
    shape = config.latent_channels, height // config.factor, width // config.factor

    sampler = samplers.make_sampler(sampler, model.schedule, steps)
    said = dict(timesteps=sampler.timesteps, a1111=a1111, size=(height, width))
    if isinstance(model, kandinsky.Kandinsky):
        said["seeds"] = seeds
    denoise = model.denoiser(prompts, negative, guidance, beside, **said)
    if refiner:
        second = refiner.denoiser(prompts, negative, guidance, **said)
        denoise = xl.hand_over(denoise, second, switch, sampler.timesteps)
    return generate(model, denoise, shape, z_init, change_map, sampler, seeds, skip, blend,
                    watch)


@torch.inference_mode()
def fixup(model, reference, coarse, mask, change_map=None, *, sampler="ddim", steps=50, seeds=(0,),
          skip=True, blend=False, watch=None):
    """Magic Fixup: a coarse edit made into photographs, one for each of `seeds`, in one batch.

    model              of mfx.load
    reference, coarse  (1, 3, H, W) in [-1, 1]: before the edit; the edit, its holes filled in
    mask               (1, 1, H, W), 1 = content survived the edit, 0 = hole
    change_map         (1, 1, H, W), 1 = stays as it is in `coarse`. None: 0 everywhere
      ->               (N, 3, H, W) in about [0, 1]; the other arguments are `edit`'s
    """
    # Both papers at once. Algorithm 1 starts from the coarse latent under noise, which is Magic
    # Fixup's "latent initialization" (equation 4): under a black map it is Magic Fixup.
    I, I_coarse, M = model.encode_edit(reference, coarse, mask)
    options = {"eta": 1.0} if sampler == "ddim" else {}  # as released
    sampler = samplers.make_sampler(sampler, model.schedule, steps, **options)
    denoise = model.denoiser(I, I_coarse, M, sampler.timesteps)
    if change_map is None:
        change_map = torch.zeros(1, 1)
    return generate(model, denoise, I_coarse.shape[1:], I_coarse, change_map, sampler, list(seeds),
                    skip, blend, watch)


def generate(model, denoise, shape, z_init, change_map, sampler, seeds, skip, blend, watch):
    """What both end in: noise (N, *shape) of the seeds, the sampler under the map, the decoder."""
    noise = draw_noise(shape, seeds).to(model.vae.quant_conv.weight.device)
    guess = None

    def watched(z, t):
        nonlocal guess
        output = denoise(z, t)
        if watch:
            x0, _ = model.schedule.convert_output(output.to(z.dtype), z, int(t[0]))
            guess = int(t[0]), x0
        return output

    def report(i, z):
        bar.total = bar.n + sampler.k - i  # the first i that comes says how many steps are skipped
        bar.update()
        if watch:
            watch(bar.n, bar.total, *guess)

    with tqdm(total=sampler.k, unit="step", leave=False) as bar:
        options = dict(step_noise=samplers.make_step_noise(shape, seeds), callback=report)
        if z_init is None:
            z = samplers.run_sampler(watched, noise, sampler, **options)
        elif blend:
            z = blend_overrides(
                watched, z_init.expand_as(noise), change_map, sampler, noise, **options)
        else:
            z = diffdiff.differential_diffusion(
                watched, z_init.expand_as(noise), change_map, sampler, noise, skip=skip, **options)

    # One by one, since decoding takes the most memory
    x = torch.cat([model.decode(one) for one in z.split(1)]) / 2 + 0.5
    if not x.isfinite().all():
        single = find_unets(model)[0].conv_in.weight.dtype == torch.float32
        why = "are damaged" if single else "overflow in half precision, use --precision fp32"
        raise ValueError(f"the result is not finite: these weights {why}")
    return x


# -------------------------------------------------------------------------------------------------
# Load


def load_model(args, dtype, device):
    model = read_model(args, dtype, device)
    if args.vae_memory:
        model.vae.memory = args.vae_memory * 2**30
    return make_fast(model, device)


def read_model(args, dtype, device):
    path = Path(args.weights)
    if args.edit or args.collage:
        return mfx.load(path, dtype, device)
    if args.prior:
        return kandinsky.load(args.prior, path, dtype, device)
    try:
        model = sd.load(path, dtype, device, args.prediction, args.vae)
    except (ValueError, OSError):
        others = [
            (looks_like_magic_fixup(path), "a Magic Fixup: it goes with --edit or --collage"),
            ((path / "movq").is_dir(), "Kandinsky's: it goes with --prior"),
            ((path / "tokenizer/spiece.model").is_file(),
             "DeepFloyd IF's: it goes with --super-resolution"),
        ]
        for found, what in others:
            if found:
                raise ValueError(f"{path} is {what}") from None
        raise
    if model.xl and model.xl.refines:
        raise ValueError(f"{path} is a refiner of Stable Diffusion XL: it goes with --refiner, and "
                         "its base with --weights")
    reads, C = model.unet.config.in_channels, model.unet.config.out_channels
    if reads == 2 * C:
        raise ValueError("these weights follow instructions: reproduce/pix2pix.py runs them")
    if reads > C and not args.mask:
        raise ValueError("these weights are an inpainting model: it needs --image and --mask")
    model.require_tokenizers()
    if args.vae:
        replace_vae(model, args.vae)
    for file in args.words or []:
        names = learn_word(model, file)
        tell(f"sample.py: {file} is the word {' or '.join(names)}")
    for file, weight in args.lora or []:
        count = merge_lora(model, file, weight)
        tell(f"sample.py: {file} changes {count} layers, at weight {weight:g}")
    return model


def read_refiner(args, base, dtype, device):
    path = Path(args.refiner)
    if (path / "unet").is_dir() and not (base.xl or any(path.glob("text_encoder*"))):
        refiner = xl.load_unet(base, path, dtype, device)
        sd.check_fit(path, refiner)
    else:
        refiner = sd.load(path, dtype, device, args.prediction, args.vae)
        for file in args.words or []:
            learn_word(refiner, file)
    xl.check_refiner(base, refiner, args.refiner)
    refiner.require_tokenizers()
    make_fast(refiner, device)
    refiner.vae = base.vae  # their latents are the same, so one autoencoder will do
    return refiner


def choose_steps(args, model):
    """Spacing, sampler, steps and guidance: what is left out is as the model asks for."""
    schedule = model.schedule
    schedule.spacing = args.spacing or schedule.spacing
    is_xl = getattr(model, "xl", None) is not None
    usual = "lcm" if schedule.spacing == "lcm" else "euler" if is_xl else "ddim"
    args.sampler = args.sampler or ("ddpm" if args.prior else usual)
    # Models of few steps are distilled from one that was guided.
    # Zero terminal SNR is trailing too, and not distilled.
    distilled = schedule.spacing in ("trailing", "lcm") and schedule.name != "zero_snr"
    few = args.sampler == "lcm" or distilled
    coarse = args.edit or args.collage
    args.steps = args.steps or (4 if few else 50 if coarse else 100)
    guided = getattr(getattr(model, "unet", None), "guided", False)
    if args.guidance is None and not coarse:
        args.guidance = 1.0 if few or guided else kandinsky.GUIDANCE if args.prior else 7.5
    options.check_guidance(args, guided)
    first = samplers.make_sampler(args.sampler, schedule, args.steps).timesteps[0]
    if first < 900:
        warnings.warn(f"{args.steps} steps start at t = {first}, far below full noise: use 10 to "
                      "100, a divisor of 1000, or --spacing linspace", stacklevel=3)


# -------------------------------------------------------------------------------------------------
# Save


def save_results(args, x, device, dtype, over_photo=None, beside=()):
    """x (N, 3, H, W), a picture for each seed, and (picture, path) of other files: all, or none."""
    parameters = {name: value for name, value in vars(args).items() if value is not None}
    parameters["weights"] = str(args.weights)
    parameters["device"] = device.type
    parameters["precision"] = precision = str(dtype).removeprefix("torch.")
    files = []
    for i, path in enumerate(options.result_paths(args)):
        picture = tensor_to_picture(x[i])
        if over_photo:
            picture = over_photo(picture)
        if args.strength_fan:
            picture = labelled_columns(picture, [f"{s:.2g}" for s in args.strength_fan])
        files.append((picture, path, parameters | {"seed": args.seed + i}))
    save_pictures([*files, *((picture, path, parameters) for picture, path in beside)])
    for picture, path, said in files:
        what = f"{picture.width}x{picture.height}, seed {said['seed']}"
        how = f"{args.sampler} in {args.steps} steps, {device.type} in {precision}"
        tell(f"{path}: {what}, {how}")


def draw_predictions(model, predictions):
    """A strip of eight, or fewer, of what the model believed along the way, decoded."""
    last = len(predictions) - 1
    picked = np.linspace(0, last, min(8, last + 1)).round().astype(int)
    with torch.inference_mode():
        decoded = [model.decode(predictions[i][1])[0] / 2 + 0.5 for i in picked]
    labels = [f"t = {predictions[i][0]}" for i in picked]
    return labelled([tensor_to_picture(x) for x in decoded], labels)


# -------------------------------------------------------------------------------------------------
# The command: its options are in editing/options.py, its pictures in editing/inputs.py


def run(args, load=load_model, watch=None):
    """One command: read, load, edit, save. `load` may know the model already, and `watch` is
    `edit`'s: app.py has both."""
    args.weights = args.weights or (TOY_MFX if args.edit or args.collage else TOY)
    device = choose_device(args.device)
    dtype = choose_precision(args.precision, device)

    # Pictures and maps come first: a mistake in them is reported before weights are read
    original, coarse, mu = inputs.read(args, dtype, device)
    if args.super_resolution:
        x = cascade.edit(args, original, mu, dtype, device)
        return save_results(args, x, device, dtype)
    model = load(args, dtype, device)
    refiner = None
    if args.refiner:
        refiner = read_refiner(args, model, dtype, device)
        args.switch = xl.SWITCH if args.switch is None else args.switch
    choose_steps(args, model)

    # What the model is given, at its size
    size = fitted_size(original, args.size or model.size, model.vae.config.factor)
    options.check_fan(args, size[0] // model.vae.config.factor)
    picture = change_map = over_photo = None
    shown = {}  # on a sheet: label, and picture
    if original:
        map_size = original.size if args.paste_back else size
        change_map = inputs.fit_map(args, mu, original, map_size)
        if args.paste_back:
            original, coarse, change_map, over_photo = paste.prepare(
                original, coarse, change_map, size)
        picture = picture_to_tensor(original, size)
        shown["reference" if coarse else "input"] = tensor_to_picture(picture[0] / 2 + 0.5)
    seeds = range(args.seed, args.seed + args.samples)
    if coarse:
        filled, mask, shown["coarse edit"] = inputs.fit_coarse_edit(coarse, original, size)
        make = functools.partial(fixup, model, picture, filled, mask, seeds=seeds)
    else:
        inpainting = model.unet.config.in_channels > model.unet.config.out_channels
        make = functools.partial(
            edit, model, args.prompt or "", picture, size=size, negative=args.negative,
            guidance=args.guidance, seed=seeds, a1111=args.a1111,
            repaint=(change_map < 0.5).float() if inpainting else None,
            refiner=refiner, switch=args.switch,
        )
    if change_map is not None:
        shown["change map"] = tensor_to_picture(change_map[0])

    # The edit; with --compile a short one before it, in which all sizes of batches come up
    if args.compile:
        short = args.steps if coarse else min(3, args.steps)
        black = torch.zeros(1, 1)
        if refiner:
            compile_unets(refiner, lambda: None)
        seconds = compile_unets(model, lambda: make(black, sampler=args.sampler, steps=short))
        tell(f"compiled in {seconds:.0f} s, with an edit of {short} steps")
    predictions = []
    if args.steps_strip:
        watch = lambda done, total, t, x0: predictions.append((t, x0[:1].cpu()))  # noqa: E731
    x = make(change_map, sampler=args.sampler, steps=args.steps, skip=not args.no_skip,
             blend=args.blend, watch=watch)

    # The results, and what is saved beside them
    beside = []
    if args.sheet:
        several = coarse or args.samples > 1
        labels = [f"seed {seed}" for seed in seeds] if several else [args.prompt or ""]
        pictures = [enlarge(picture) for picture in (*shown.values(), *map(tensor_to_picture, x))]
        beside.append((labelled(pictures, [*shown, *labels]), args.sheet))
    if predictions:
        beside.append((draw_predictions(model, predictions), args.steps_strip))
    elif args.steps_strip:
        warnings.warn("no --steps-strip: a white map needs no step", stacklevel=2)
    save_results(args, x, device, dtype, over_photo, beside)


def main(argv=None):
    parser, args = options.parse(argv, __doc__)
    shorten_warnings(parser)
    kept = "pictures appear whole or not at all; the same command makes them anew"
    with report_errors(parser, "try fewer --samples, a smaller --size, or half precision", kept):
        options.check(args)
        run(args)


if __name__ == "__main__":
    hold_memory()
    main()
