"""The whole files that damage.py starts from: pictures, weights of every kind, clips, shards, a run's states."""

import contextlib
import io
from functools import cached_property

import cv2
import numpy as np
import torch
from PIL import Image

import mfx
import sd
from checkpoints import published
from networks import lpips
from tests import small
from tests.networks import write_networks
from tests.runs import MEADOW
from tests.training import fit_tiny, write_shards


class Whole:
    """What the kinds start from, in `folder`; each part is made when a kind first asks for it"""

    def __init__(self, folder):
        torch.set_num_threads(1)
        cv2.setNumThreads(1)
        self.folder = folder
        self.photo = Image.open(MEADOW).convert("RGB").resize((48, 40))
        self.photo.save(folder / "photo.png")
        Image.new("L", (48, 40)).save(folder / "black.png")

    @cached_property
    def sd(self):
        sd.save(small.stable_diffusion(), self.folder / "sd", torch.float16)
        return self.folder / "sd"

    @cached_property
    def mfx(self):
        mfx.save(small.magic_fixup(), self.folder / "mfx", torch.float16)
        return self.folder / "mfx"

    @cached_property
    def tensors(self):
        return small.to_original(small.stable_diffusion())

    @cached_property
    def networks(self):
        folder = self.folder / "networks"
        folder.mkdir()
        write_networks(folder)
        backbone = lpips.LPIPS().state_dict()
        heads = {name: backbone.pop(name) for name in list(backbone) if name.startswith("lin")}
        for name, tensors in zip(published.LPIPS, (backbone, heads)):
            torch.save(tensors, folder / name)
        return folder

    @cached_property
    def pairs(self):
        return write_shards(self.folder / "pairs", shards=2, each=2)

    @cached_property
    def clips(self):
        """-> {ending: bytes}"""
        found = {}
        frames = [np.asarray(self.photo.rotate(i))[..., ::-1].copy() for i in range(30)]
        for ending, code in ((".mp4", "mp4v"), (".avi", "MJPG"), (".mkv", "mp4v")):
            path = self.folder / f"clip{ending}"
            video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), 12, (48, 40))
            for frame in frames:
                video.write(frame)
            video.release()
            if path.exists() and path.stat().st_size:
                found[ending] = path.read_bytes()
        return found

    @cached_property
    def run(self):
        folder = self.folder / "run"
        folder.mkdir()
        fit_tiny(folder)
        return folder

    @cached_property
    def pictures(self):
        """-> {name: bytes} in every format and mode that Pillow writes"""
        Image.init()
        rgba = self.photo.convert("RGBA")
        rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
        deep = Image.fromarray(np.arange(48 * 40, dtype=np.uint16).reshape(40, 48) * 34)
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "a picture"
        modes = [self.photo, rgba, deep, *(self.photo.convert(mode) for mode in ("1", "L", "P", "LA", "CMYK", "F"))]
        found = {}
        for name in sorted(set(Image.SAVE) - {"PDF"}):
            for picture in modes:
                for options in ({}, {"exif": exif}, {"save_all": True, "append_images": [picture]}):
                    data = io.BytesIO()
                    with contextlib.suppress(Exception):  # not every format takes every mode
                        picture.save(data, name, **options)
                        found[f"{name} {picture.mode} {' '.join(options)}"] = data.getvalue()
        return found
