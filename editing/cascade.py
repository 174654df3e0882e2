"""DeepFloyd IF behind sample.py: what its options are for two networks of pixels, one after the other."""

from tqdm import tqdm

from common.pictures import picture_to_tensor
from editing import inputs
from models import deepfloyd


def edit(args, original, mu, dtype, device):
    """The picture and the map of `inputs.read` -> (N, 3, H, W) in [0, 1], one for each seed

    It writes into `args` the sampler, and the steps of both stages in words.
    """
    model = deepfloyd.load(args.weights, args.super_resolution, dtype, device)
    states = model.encode_prompt(args.prompt or "", args.negative or "")
    model.text = None  # it is larger than both stages together

    size = model.stages[-1].fit(*original.size)
    picture = picture_to_tensor(original, size).to(device)
    change_map = inputs.fit_map(args, mu, original, size)
    steps = [args.steps or k for k in deepfloyd.STEPS]
    guidance = [w if args.guidance is None else args.guidance for w in deepfloyd.GUIDANCE]
    seeds = range(args.seed, args.seed + args.samples)
    args.sampler = "ddpm"
    args.steps = " and ".join(map(str, steps))
    with tqdm(unit="step", leave=False) as bar:
        x = deepfloyd.edit(model, states, picture, change_map, steps, guidance, seeds, lambda i, z: bar.update())
    if not x.isfinite().all():
        raise ValueError("the result is not finite: these weights are damaged, or overflow; try --precision fp32")
    return x / 2 + 0.5
