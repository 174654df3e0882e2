"""What models/pipelines.py cannot drive, told in one line.

The pipelines are stand-ins: it looks at what they are called and at their configurations.
"""

from types import SimpleNamespace

import pytest
import torch

from models import pipelines

Z = torch.zeros(1, 4, 8, 8)
LINSPACE = {"_class_name": "Euler", "beta_schedule": "scaled_linear", "timestep_spacing": "linspace"}


def make(name="FluxPipeline", config=None, scheduler=None):
    pipe = type(name, (), {})()
    pipe.config = config or {}
    pipe.scheduler = SimpleNamespace(config={"_class_name": "S", "shift": 1.0} if scheduler is None else scheduler)
    pipe.vae_scale_factor = 8
    return pipe


def make_flux():
    pipe = make()
    pipe.encode_prompt = lambda *_: (torch.zeros(1, 3, 8), torch.zeros(1, 8), torch.zeros(3, 3))
    return pipe


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: pipelines.make_denoiser(make("AuraFlowPipeline"), "a cat"), "AuraFlow.* not known .* FluxPip"),
        (lambda: pipelines.make_denoiser(make("FluxFillPipeline"), "a cat"), "FluxFillPipeline is not known"),
        (lambda: pipelines.make_sampler(make("KolorsPipeline"), Z, 5), "KolorsPipeline is not known"),
        (lambda: pipelines.make_denoiser(make("StableDiffusionXLImg2ImgPipeline", {"requires_aesthetics_score": True}),
                                         "a cat"), "refiner .* take the base"),
        (lambda: pipelines.make_denoiser(make(), "a cat", negative="dogs"), "no negative prompt"),
        (lambda: pipelines.make_denoiser(make_flux(), "a cat")(Z[..., 1:, :], torch.tensor([5.0])),
         "7 x 8 .* multiples of 16 pixels"),
        (lambda: pipelines.make_sampler(make(scheduler={"_class_name": "DDIMScheduler"}), Z, 5), "levels of DDIMSch"),
        (lambda: pipelines.make_sampler(make(scheduler={"shift": 1.0, "shift_terminal": 0.02}), Z, 5),
         "with shift_terminal are not known"),
        (lambda: pipelines.make_sampler(make(scheduler={"shift": 1.0, "use_karras_sigmas": True}), Z, 5),
         "with use_karras_sigmas are not known"),
        (lambda: pipelines.make_sampler(make("StableDiffusionXLPipeline", scheduler={"beta_schedule": "cosine"}), Z, 5),
         "cosine"),
        (lambda: pipelines.make_sampler(make("StableDiffusionXLPipeline", scheduler={"_class_name": "EDM"}), Z, 5),
         "levels of EDM .* EulerDiscreteScheduler of leading"),
        (lambda: pipelines.make_sampler(make("StableDiffusionXLPipeline", scheduler=LINSPACE), Z, 5), "of Euler"),
        (lambda: pipelines.make_sampler(make(), Z, 0), "1 or more, not 0"),
    ],
)
def test_errors_are_one_clear_line(call, words):
    with pytest.raises(ValueError, match=words) as e:
        call()
    assert "\n" not in str(e.value)


def test_a_subclass_is_what_it_was_made_from():
    base = type("FluxPipeline", (), {})
    assert pipelines.recognise(type("MyFlux", (base,), {})()) == "flux"


def test_an_xl_of_few_steps_has_the_steps_that_it_was_distilled_for():
    pipe = make("StableDiffusionXLPipeline", scheduler=LINSPACE | {"timestep_spacing": "trailing"})
    assert pipelines.make_sampler(pipe, Z, 4).timesteps == [999, 749, 499, 249]
    pipe.scheduler = type("LCMScheduler", (), {"config": LINSPACE | {"timestep_spacing": "leading"}})()
    sampler = pipelines.make_sampler(pipe, Z, 4)
    assert sampler.timesteps == [999, 759, 499, 259] and sampler.stochastic


def test_an_autoencoder_that_overflows_computes_in_full_precision():
    for dtype, upcast, want in ((torch.float16, True, torch.float32), (torch.float16, False, torch.float16),
                                (torch.bfloat16, True, torch.bfloat16)):
        vae = torch.nn.Linear(2, 2).to(dtype)
        vae.config, vae.dtype = {"force_upcast": upcast}, dtype
        pipelines.keep_finite(vae)
        assert vae.weight.dtype == want
