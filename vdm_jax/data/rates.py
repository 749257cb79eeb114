"""Frame rates as fractions, so that neither the frames of a long film nor its sound drift."""

from fractions import Fraction

NTSC = Fraction(1001, 1000)  # a rate such as 29.97 is short for 30 / 1.001
CLOSE = 3e-4  # frames a second within which a rate is taken for one of these


def rational(fps) -> Fraction:
    """Returns a frame rate as a fraction: 12.5 is 25/2, 29.97 is 30000/1001, and 23.976 is 24000/1001.

    fps: frames a second, a number above 0
    """
    exact = Fraction(fps).limit_denominator(1_001_000)
    whole = round(exact * NTSC)
    return whole / NTSC if exact.denominator > 1 and whole and abs(float(exact * NTSC - whole)) < CLOSE else exact


def sample_count(frames, fps, sample_rate: int) -> int:
    """Returns the whole samples of sound in some frames, rounded down."""
    return int(frames * sample_rate / rational(fps))
