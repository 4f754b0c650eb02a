"""Images of servers and in files, which are not trusted."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from bayesian_merger.errors import MergerError, TrialError, one_line

# An image larger than this is no image of a diffusion model.
_MOST_PIXELS = 2**26


@contextmanager
def pillow_errors() -> Iterator[None]:
    """Turn what Pillow raises of a file that is damaged or no image into an OSError; no warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (MergerError, OSError):
        raise
    except Exception as error:  # of a damaged file Pillow raises anything, a SyntaxError too
        raise OSError(one_line(error)) from error


def decoded(data: bytes, size: tuple[int, int] | None) -> Image.Image:
    """The image, in RGB; TrialError if it is none, or of another size."""
    try:
        with pillow_errors():
            image = Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"])
            if image.width * image.height > _MOST_PIXELS:
                raise TrialError(f"the server made an image of {image.width} x {image.height}")
            if size and image.size != size:
                width, height = size
                raise TrialError(
                    f"the server made an image of {image.width} x {image.height}, not {width} x "
                    f"{height}"
                )
            return image.convert("RGB")
    except OSError as error:
        raise TrialError(f"the server's image cannot be read ({one_line(error)})") from error
