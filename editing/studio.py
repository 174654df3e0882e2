"""What the page of app.py asks for, but for the edits themselves: pictures, segments, coarse edits, maps."""

import functools
import hashlib
import re
import secrets
import shutil
import threading
import time

import numpy as np
import torch
from PIL import Image

import diffdiff
import samplers
from checkpoints import published
from common.colours import to_srgb
from common.devices import choose_device, choose_precision
from common.files import write_json
from common.pictures import tensor_to_picture, to_rgb
from editing import change_maps, jobs, options, segments, uploads
from editing.edits_json import check_keys, make_collage
from toy import world

SIDE = 2048  # pixels, to which a picture is shrunk
MASKS = 64  # of Segment Anything, the largest
PICTURE = r"[0-9a-f]{16}"  # the name of one


class Studio:
    """Pictures, and edits of them. ValueError, one line, for what cannot be.

    args  of app.py;  run(job, watch)  as jobs.Jobs takes it
    """

    def __init__(self, args, run):
        self.args = args
        self.folder = args.folder
        self.device = choose_device(args.device or "auto")
        self.dtype = choose_precision(args.precision or "auto", self.device)
        self.networks = {}  # kind: file, of those that are here
        for kind in ("sam", "midas"):
            try:
                self.networks[kind] = published.find(kind, args.networks or published.FOLDER)
            except FileNotFoundError:
                pass
        self.busy = threading.Lock()  # what takes memory is done for one request at a time
        self.load_network = functools.cache(self.load_network)
        self.find_polygons = functools.lru_cache(16)(self.find_polygons)
        (self.folder / "pictures").mkdir(exist_ok=True)
        self.jobs = jobs.Jobs(self.folder, run)

    def about(self):
        return {"samplers": list(samplers.SAMPLERS), "networks": list(self.networks),
                "folder": str(self.folder)}

    def add_picture(self, picture):
        picture = to_srgb(to_rgb(picture))
        picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        pixels = f"{picture.size}".encode() + picture.tobytes()
        name = hashlib.sha256(pixels).hexdigest()[:16]
        uploads.save_png(picture, self.folder / "pictures" / f"{name}.png")
        return {"picture": name, "width": picture.width, "height": picture.height}

    def path_of(self, name):
        if isinstance(name, str) and re.fullmatch(PICTURE, name):
            path = self.folder / "pictures" / f"{name}.png"
            if path.is_file():
                return path
        raise ValueError("this picture is no longer here: open it again")

    def draw_scene(self, seed):
        seed = uploads.check_number(seed, "a scene's seed", int, 0, 2**53)
        scene = world.random_scenes(1, torch.Generator().manual_seed(seed))
        return self.add_picture(tensor_to_picture(world.render(scene).image[0]))

    def make_coarse(self, name, parts):
        """The coarse edit, RGBA, as `sample.py --collage` makes it"""
        image = self.path_of(name)
        if isinstance(parts, list) and any(isinstance(p, dict) and "mask" in p for p in parts):
            raise ValueError("a segment of the page is a polygon: a mask would name a file")
        made = make_collage({"image": image.name, "segments": parts}, image.parent)
        return Image.fromarray(made.coarse())

    def find_polygons(self, path):
        """Of all segments of a picture, the largest first"""
        image = np.asarray(Image.open(path))
        if "sam" not in self.networks:
            return segments.outlines(segments.find_segments(image))
        labels = np.full(image.shape[:2], -1)
        masks = change_maps.largest_segments(MASKS, image, self.load_network("sam"))
        for n, mask in enumerate(masks):  # a smaller one over a larger one
            labels[mask] = n
        return segments.outlines(labels)

    def find_depth(self, path):
        image = np.asarray(Image.open(path))
        spec = change_maps.parse_spec("depth")
        mu = change_maps.compute_map(spec, image, self.load_network("midas"))
        return tensor_to_picture(mu[None])

    def load_network(self, kind):
        if kind not in self.networks:
            raise ValueError(f"there are no weights of {kind} here: docs/networks.md says which")
        return published.load(kind, self.networks[kind], self.dtype, self.device)

    def blur(self, drawn, softness):
        """Soft-inpainting (section 4.1) of any map"""
        mu = torch.from_numpy(np.asarray(uploads.read_map(drawn), np.float32)) / 255
        softness = uploads.check_number(softness, "a blur", float, 0, 200)
        return tensor_to_picture(diffdiff.soft_inpainting_map(mu, softness)[0])

    def submit(self, said):
        """-> the id of a job that waits in line"""
        check_keys(said, "a job", {"kind", "picture", "parameters", "segments", "map", "strengths"})
        kind, parameters = said.get("kind"), said.get("parameters")
        if kind not in list(uploads.FIELDS):
            raise ValueError("a job is a collage, a map or a fan")
        uploads.check_parameters(kind, parameters)
        picture = self.path_of(said.get("picture"))
        folder = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
        beside = {}  # file: picture
        if kind == "collage":
            beside["coarse.png"] = self.make_coarse(said.get("picture"), said.get("segments"))
            given = {"collage": folder / "edits.json", "weights": self.args.magic_fixup}
        else:
            given = {"image": folder / "picture.png", "weights": self.args.weights}
        if kind == "map":
            beside["map.png"] = uploads.read_map(said.get("map"))
            given["change-map"] = folder / "map.png"
            if beside["map.png"].size != Image.open(picture).size:
                raise ValueError("the map is not of the picture's size")
        if kind == "fan":
            given["strength-fan"] = uploads.check_strengths(said.get("strengths"))
        if parameters.get("prompt") == options.AUTO:
            given["networks"] = self.args.networks
        given |= parameters | {"out": folder / "out.png"}
        given |= {"device": self.args.device, "precision": self.args.precision}
        argv = [f"--{name}={value}" for name, value in given.items() if value not in (None, "")]

        folder.mkdir()
        try:
            shutil.copy(picture, folder / "picture.png")
            for name, made in beside.items():
                uploads.save_png(made, folder / name)
            if kind == "collage":
                edits = {"image": "picture.png", "segments": said["segments"]}
                write_json(folder / "edits.json", edits)
            options.check(options.parse(argv, "")[1])
            self.jobs.add(jobs.Job(folder.name, kind, parameters, argv))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder.name
