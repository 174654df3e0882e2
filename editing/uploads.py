"""What a page sends to app.py, none of which is trusted: pictures, drawn maps, the form's values."""

import base64
import io
import warnings

from PIL import Image

import samplers
from common.files import atomic_write
from common.pictures import map_to_grey, open_picture
from editing.edits_json import check_keys

PIXELS = 64 * 10**6
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # of Pillow's, those that start no program

# What a job says, as options of sample.py
NUMBERS = {"steps": (int, 1, 1000), "seed": (int, 0, 2**53 - 1), "samples": (int, 1, 8), "guidance": (float, 0, 100)}
LETTERS = 2000  # of a text, at most
FIELDS = {"collage": {"steps", "seed", "samples", "sampler"}}
FIELDS["map"] = FIELDS["fan"] = FIELDS["collage"] | {"prompt", "negative", "guidance"}


class Upload(io.BytesIO):
    def __str__(self):
        return "the file"


def read_picture(data):
    """Bytes -> picture, upright. ValueError for what is no picture, or too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            width, height = Image.open(Upload(data), formats=FORMATS).size
    except Image.DecompressionBombError:
        raise ValueError(f"the picture has more than {PIXELS // 10**6} megapixels: save it smaller") from None
    except Exception:  # a damaged file can fail in any way
        raise ValueError(f"this is no picture that can be read, of {', '.join(FORMATS)}") from None
    if width * height > PIXELS:
        raise ValueError(f"the picture has {width} x {height} pixels, more than {PIXELS // 10**6} megapixels: save it "
                         "smaller")
    return open_picture(Upload(data))


def read_map(text):
    """What the page has drawn, data:image/png;base64,... -> L. ValueError for anything else."""
    head, _, data = text.partition(",") if isinstance(text, str) else ("", "", "")
    if head != "data:image/png;base64":
        raise ValueError("a map comes as a data URL of a PNG")
    return map_to_grey(read_picture(base64.b64decode(data)))


def check_number(value, what, kind, low, high):
    """-> the number. ValueError, about `what`, for another type or outside its bounds."""
    if type(value) not in (int, kind) or not low <= value <= high:
        raise ValueError(f"{what} is {'a whole number' if kind is int else 'a number'} in {low} .. {high}")
    return value


def check_parameters(kind, parameters):
    """ValueError for anything but the FIELDS of a kind of job, of their types and within their bounds."""
    check_keys(parameters, f"the form of a {kind}", FIELDS[kind])
    for name, value in parameters.items():
        if name in NUMBERS:
            check_number(value, name, *NUMBERS[name])
        elif name == "sampler":
            if value not in list(samplers.SAMPLERS):
                raise ValueError(f"the sampler is one of {', '.join(samplers.SAMPLERS)}")
        elif not isinstance(value, str) or len(value) > LETTERS:
            raise ValueError(f"the {name} is a text of at most {LETTERS} letters")


def check_strengths(strengths):
    """-> them, as --strength-fan takes them. ValueError unless they are 2 to 10 numbers in 0 .. 1."""
    if not isinstance(strengths, list) or not 2 <= len(strengths) <= 10:
        raise ValueError("a fan has 2 to 10 strengths")
    return ",".join(str(check_number(strength, "a strength", float, 0, 1)) for strength in strengths)


def to_png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


def to_data_url(picture):
    return "data:image/png;base64," + base64.b64encode(to_png(picture)).decode()


def save_png(picture, path):
    with atomic_write(path) as temporary:
        temporary.write_bytes(to_png(picture))
