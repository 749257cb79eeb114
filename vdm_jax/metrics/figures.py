"""Pictures of clips, sounds and tasks, drawn with Pillow: contact sheets, spectrograms, curves, scheduling matrices.

A file that cannot be written raises a UserError.
"""

import functools
import math
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vdm_jax.data import writing

COLUMNS = 8  # frames in a row of a contact sheet; a shorter video shows all its frames
SCALE = 4  # screen pixels for each pixel of a contact sheet, along each side


def contact_sheet(path, videos: Sequence, captions: Sequence[str]) -> None:
    """Writes a PNG with a row for each clip: its caption above frames that are equally spaced over the clip.

    videos: uint8 arrays [F, H, W, 3], one for each caption; their sizes may differ
    """
    font, gap = ImageFont.load_default(size=13), 4
    strips = []
    for video in videos:
        picks = np.linspace(0, len(video) - 1, min(COLUMNS, len(video))).round().astype(int)
        tiles = np.asarray(video)[picks].repeat(SCALE, axis=1).repeat(SCALE, axis=2)
        strips.append(np.concatenate(np.pad(tiles, ((0, 0), (0, 0), (0, gap), (0, 0))), axis=1))
    width = max(strip.shape[1] for strip in strips)
    letters = max(16, int(width / font.getlength("n")))
    blocks = [textwrap.wrap(caption, letters) or [""] for caption in captions]  # lines of each caption
    heights = [16 * len(lines) + strip.shape[0] + 2 * gap for lines, strip in zip(blocks, strips, strict=True)]
    sheet = Image.new("RGB", (width, sum(heights)))
    draw, top = ImageDraw.Draw(sheet), 0
    for lines, strip, height in zip(blocks, strips, heights):
        draw.multiline_text((2, top), "\n".join(lines), fill="white", font=font, spacing=3)
        sheet.paste(Image.fromarray(strip), (0, top + 16 * len(lines) + gap))
        top += height
    _save(path, sheet)


def spectrogram(path, audio: np.ndarray, sample_rate: int) -> None:
    """Writes a PNG of the power over time (s) and frequency (kHz) of a sound, float [N].

    The brightest color is the loudest point. The darkest color is 80 dB below the loudest point, or less.
    """
    audio = np.asarray(audio, np.float32)
    window = max(64, 2 ** round(math.log2(sample_rate / 30)))  # about 33 ms
    hop = max(window // 8, math.ceil(len(audio) / 1200))  # at most 1200 columns
    spans = np.lib.stride_tricks.sliding_window_view(np.pad(audio, window // 2), window)[::hop]
    power = np.abs(np.fft.rfft(spans * np.hanning(window), axis=1)) ** 2  # [columns, frequencies]
    level = 10 * np.log10(np.maximum(power / max(power.max(), 1e-12), 1e-8))  # -80..0 dB
    gray = Image.fromarray(((level.T[::-1] / 80 + 1) * 255).astype(np.uint8))  # high frequencies on top
    plot = ImageOps.colorize(gray, "black", (255, 250, 200), mid=(180, 40, 100)).resize((max(400, len(level)), 256))

    left, top, bottom = 48, 12, 32  # margins, in pixels
    sheet = Image.new("RGB", (left + plot.width + 16, top + plot.height + bottom), "white")
    sheet.paste(plot, (left, top))
    draw = ImageDraw.Draw(sheet)
    text = functools.partial(draw.text, fill="black", font=ImageFont.load_default(size=11))
    for share in np.linspace(0, 1, 6):
        x, y = left + plot.width * share, top + plot.height * (1 - share)
        draw.line([(x, top + plot.height), (x, top + plot.height + 4)], fill="black")
        draw.line([(left - 4, y), (left, y)], fill="black")
        text((x, top + plot.height + 5), f"{len(audio) / sample_rate * share:.2f}", anchor="mt")
        text((left - 6, y), f"{sample_rate / 2000 * share:.1f}", anchor="rm")
    text((left + plot.width / 2, sheet.height - 1), "time (s)", anchor="mb")
    text((2, top + 16), "kHz")
    _save(path, sheet)


def curves(path, shown: Mapping[str, tuple[Sequence[float], Sequence[float | None]]]) -> None:
    """Writes a PNG with a panel for each curve, from its start to its end, and from 0 or less to its largest value.

    shown: {title: (seconds, values)}; a value of None leaves a gap
    """
    width, height, left, gap = 480, 72, 56, 40  # of a panel, and its margins, in pixels
    sheet = Image.new("RGB", (left + width + 16, len(shown) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    text = functools.partial(draw.text, fill="black", font=ImageFont.load_default(size=11))
    for row, (title, (seconds, values)) in enumerate(shown.items()):
        top = row * (height + gap) + 18
        known = [value for value in values if value is not None]
        low, high = min([0, *known]), max([1e-3, *known])
        start, end = (seconds[0], seconds[-1]) if len(seconds) else (0, 0)
        text((left, top - 3), title, anchor="lb")
        draw.rectangle([left, top, left + width, top + height], outline="gray")
        text((left - 6, top), f"{high:.3g}", anchor="rt")
        text((left - 6, top + height), f"{low:.3g}", anchor="rb")
        text((left, top + height + 3), f"{start:g}", anchor="lt")
        text((left + width, top + height + 3), f"{end:g} s", anchor="rt")
        last = None
        for x, y in zip(seconds, values):
            if y is None:
                last = None
                continue
            share = (x - start) / (end - start) if end > start else 0.5
            point = left + width * share, top + height * (high - y) / (high - low)
            draw.line([last or point, point], fill=(40, 90, 170), width=2)
            draw.ellipse([point[0] - 1, point[1] - 1, point[0] + 1, point[1] + 1], fill=(40, 90, 170))
            last = point
    _save(path, sheet)


def scheduling_matrix(levels: Mapping[str, np.ndarray], cell: tuple[int, int]) -> Image.Image:
    """Returns a picture of a scheduling matrix: steps go down, latent frames go across, one panel for each modality.

    Noise, the lowest level, is dark. A context frame is a light column, and a generated frame turns from dark to light.

    levels: {'video': [N+1, T], 'audio': [N+1, T]} log SNR, as tasks.scheduling_matrix returns it
    cell: width and height of one level, in pixels
    """
    matrices = np.array([*levels.values()])  # [modalities, N+1, T]
    grays = (255 * (matrices - matrices.min()) / np.ptp(matrices)).astype(np.uint8)
    (_, rows, frames), (width, height) = matrices.shape, cell
    left, top, gap, bottom = 40, 22, 28, 40  # margins, in pixels
    panel = (frames * width, rows * height)
    sheet = Image.new("RGB", (left + len(matrices) * (panel[0] + gap), top + panel[1] + bottom), "white")
    text = functools.partial(ImageDraw.Draw(sheet).text, fill="black", font=ImageFont.load_default(size=11))
    for i, (name, gray) in enumerate(zip(levels, grays)):
        x = left + i * (panel[0] + gap)
        cells = Image.fromarray(gray).resize(panel, Image.Resampling.NEAREST)
        pixels = np.array(ImageOps.colorize(cells, (24, 28, 64), (250, 226, 150)))
        pixels[height - 1 :: height] = pixels[:, width - 1 :: width] = 255  # lines between the cells
        sheet.paste(Image.fromarray(pixels), (x, top))
        text((x + panel[0] / 2, top - 5), name, anchor="mb")
        for frame in range(0, frames, max(1, math.ceil(24 / width))):
            text((x + (frame + 0.5) * width, top + panel[1] + 4), str(frame), anchor="mt")
        text((x + panel[0] / 2, top + panel[1] + 18), "latent frame", anchor="mt")
    for row in range(0, rows, max(1, math.ceil(rows / 12), math.ceil(12 / height))):
        text((left - 6, top + (row + 0.5) * height), str(row), anchor="rm")
    text((2, top - 5), "step", anchor="lb")
    return sheet


def _save(path, image: Image.Image) -> None:
    with writing.replacing(path) as temporary:
        image.save(temporary, format="PNG")
