"""Images of servers, which are not trusted."""

from __future__ import annotations

import io
import warnings

from PIL import Image

from bayesian_merger.errors import TrialError, one_line

# An image larger than this is no image of a diffusion model.
_MOST_PIXELS = 2**26


def decoded(data: bytes, size: tuple[int, int] | None) -> Image.Image:
    """The image, in RGB; TrialError if it is none, or of another size."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # see below
            image = Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"])
        if image.width * image.height > _MOST_PIXELS:
            raise TrialError(f"the server made an image of {image.width} x {image.height}")
        if size and image.size != size:
            width, height = size
            raise TrialError(
                f"the server made an image of {image.width} x {image.height}, not {width} x {height}"
            )
        return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise TrialError(f"the server's image cannot be read ({one_line(error)})") from error
