"""The picture of the README: frames of the demo's video with its prompt, above the top of its report.

    python -m studies.picture demo docs/demo.png

Needs Chromium. Runs on whatever ``make demo`` left in its folder.
"""

import html
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
from PIL import Image

from runtime.recipe import read_recipe
from validate.plots import data_uri
from wan22.errors import UserError
from wan22.files import write_file

FRAMES = 6
WIDTH, STRIP_HEIGHT, REPORT_HEIGHT = 1000, 190, 360  # CSS pixels
LARGEST_BYTES = 200 * 1024
COLOURS = (256, 128, 64, 32)  # of the palette, the first that is small enough
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --allow-file-access-from-files"
PAGE = """<!doctype html><meta charset="utf-8"><style>
body {{ margin: 0; font: 17px/1.4 system-ui, sans-serif; background: #fff; color: #1c2230; overflow: hidden; }}
.strip {{ display: grid; grid-template-columns: repeat({count}, 1fr); gap: 6px; padding: 14px; }}
.strip img {{ width: 100%; border-radius: 5px; display: block; }}
p {{ margin: 0 14px 10px; }} b {{ font-weight: 600; }}
iframe {{ border: 0; width: 100%; height: {height}px; }}
</style><div class="strip">{images}</div><p><b>wan-trt generate</b> “{prompt}”</p><iframe src="{report}"></iframe>"""


def picture(demo: Path) -> bytes:
    """A PNG of at most 200 KiB of the ``out.mp4`` and ``report.html`` in ``demo``.

    Raises:
        UserError: no demo there, no browser, or more than a palette can make small.
    """
    video, report = demo / "out.mp4", demo / "report.html"
    if not report.is_file():
        raise UserError(f"{demo} has no report.html", "what make demo leaves", "run make demo")
    with av.open(str(video)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    chosen = [frames[round(i)] for i in np.linspace(0, len(frames) - 1, min(len(frames), FRAMES))]
    images = "".join(f'<img src="{data_uri(_png(each))}">' for each in chosen)
    prompt, uri = html.escape(read_recipe(video).prompt), report.resolve().as_uri()
    page = PAGE.format(count=len(chosen), height=REPORT_HEIGHT, images=images, prompt=prompt, report=uri)
    return _small(_screenshot(page))


def _png(image: Image.Image, **options: bool) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


def _screenshot(page: str) -> Image.Image:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError("no Chromium", f"one of {', '.join(BROWSERS)} on PATH", "install chromium")
    with tempfile.TemporaryDirectory() as folder:
        source, shot = Path(folder, "page.html"), Path(folder, "page.png")
        source.write_text(page, encoding="utf-8")
        flags = [*FLAGS.split(), f"--window-size={WIDTH},{STRIP_HEIGHT + REPORT_HEIGHT}", f"--screenshot={shot}"]
        subprocess.run([browser, *flags, source.as_uri()], check=True, capture_output=True, timeout=120)
        return Image.open(io.BytesIO(shot.read_bytes())).convert("RGB")


def _small(image: Image.Image) -> bytes:
    for colours in COLOURS:
        content = _png(image.quantize(colours, dither=Image.Dither.NONE), optimize=True)
        if len(content) <= LARGEST_BYTES:
            return content
    raise UserError(f"{len(content)} bytes", f"at most {LARGEST_BYTES}", "show fewer frames")


def main() -> None:
    demo, output = map(Path, sys.argv[1:])
    write_file(output, picture(demo), "the picture")
    print(f"{output}: {output.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
