"""Programs run in this process: what they are run on, what they save, and the line in which they refuse."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import mfx
import sample
import sd

ROOT = Path(sample.__file__).parent
MEADOW, GRADIENT = str(ROOT / "examples/meadow.png"), str(ROOT / "examples/gradient.png")

# --- Running --------------------------------------------------------------------------------------


def run(tmp_path, *argv, out="out.png", steps=4):
    """sample.py -> the picture (H, W, 3), or None if it is saved under other names, as several samples are"""
    out = tmp_path / out
    usual = ["--steps", str(steps), "--precision", "fp32", "--device", "cpu"]
    sample.main([*usual, *map(str, argv), "--out", str(out)])
    return np.asarray(Image.open(out).convert("RGB"), int) if out.exists() else None


def last_line(capsys, *argv, program=sample):
    """-> the line in which a program refuses, after warnings or a progress bar"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        program.main([*map(str, argv)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in said
    return said.strip().splitlines()[-1]


def fails(capsys, *argv, program=sample):
    """-> the one line that a person gets, with nothing before it"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        program.main([*map(str, argv)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith(f"{program.__name__}.py: error: "), lines
    return lines[0]


# --- Comparing ------------------------------------------------------------------------------------


def same_picture(a, b):
    """To one grey level: every run reads its weights anew, and a network of weights at other addresses gives the same
    numbers to a tolerance."""
    return a.shape == b.shape and np.abs(a - b).max() <= 1


def contents(folder, but=(".png",)):
    """-> {name: bytes} of the files in a folder"""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix not in but}


# --- Files to run on ------------------------------------------------------------------------------


def save(path, array):
    """An array as a picture -> its path"""
    Image.fromarray(array).save(path)
    return path


def save_edit(path):
    """The meadow with a block of it moved to the right -> the file, (128, 128, 4) uint8"""
    x = np.dstack([np.asarray(Image.open(MEADOW).convert("RGB")), np.full((128, 128), 255, np.uint8)])
    x[60:100, 70:110] = x[60:100, 20:60]
    x[60:100, 20:60] = 0
    return save(path, x), x


def half_white(path):
    """A map: black, a ramp, and the right half white."""
    ramp = np.clip(np.arange(128) * 8 - 256, 0, 255).astype(np.uint8)
    return save(path, np.tile(ramp, (128, 1)))


def black_and_white(z):
    """Of a latent of a picture edited under `half_white`: the columns that are black in it, and those that are white"""
    width = z.shape[-1]
    return z[..., : width // 4], z[..., width // 2 :]


def film(path, frames=38, fps=25, size=(96, 64), pan=0.6, seed=0, cut=None):
    """A landscape of blurred noise that pans by `pan` pixels per frame; at frame `cut` it becomes another one.
    A video, or a folder of frames if the path has no ending -> the path"""
    w, h = size

    def landscape(seed):
        coarse = np.random.default_rng(seed).integers(0, 256, (12, 24, 3), np.uint8)
        return cv2.resize(coarse, (3 * w, h), interpolation=cv2.INTER_CUBIC)

    scenes, pictures = [landscape(seed), landscape(seed + 1000)], []
    for i in range(frames):
        shift = np.array([[1, 0, -pan * i], [0, 1, 0]], float)
        pictures.append(cv2.warpAffine(scenes[cut is not None and i >= cut], shift, (w, h), flags=cv2.INTER_LINEAR))
    if Path(path).suffix:
        video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, size)
        for picture in pictures:
            video.write(picture)
        video.release()
    else:
        path.mkdir()
        for i, picture in enumerate(pictures):
            cv2.imwrite(str(path / f"frame {i + 1}.png"), picture)
    return path


def picture(files, extension):
    """One of the pictures of a pair, {extension: bytes} -> (H, W, 3 or 4) uint8, BGR as OpenCV has it"""
    return cv2.imdecode(np.frombuffer(files[extension], np.uint8), cv2.IMREAD_UNCHANGED)


# --- A Magic Fixup to run -------------------------------------------------------------------------


def random_fixup(toy):
    """A Magic Fixup made of the toy: its new input channels are random instead of zero, so that everything it is shown
    matters."""
    made, C, g = mfx.from_stable_diffusion(toy), toy.unet.config.out_channels, torch.Generator().manual_seed(0)
    with torch.no_grad():
        for network in (made.synthesizer, made.extractor):
            new = network.conv_in.weight[:, C:]
            new.copy_(0.03 * torch.randn(new.shape, generator=g))
    return made


def save_random_fixup(folder):
    toy = sd.load(sample.TOY, torch.float32)
    mfx.save(random_fixup(toy), folder, torch.float16, vae=os.path.relpath(sample.TOY / "vae", folder.resolve()))
    return folder
