"""Maps HDR and wide-gamut colors to SDR: BT.709 primaries, and a display of gamma 2.4 (ITU-R BT.1886).

Diffuse white of an HDR picture, 203 cd/m^2 (ITU-R BT.2408), is the brightest value of SDR. Light above some 90 cd/m^2
is compressed by the curve of ITU-R BT.2390, so that lights up to 1,000 cd/m^2 keep their order. Primaries and transfer
functions have the numbers of ITU-T H.273, as in FFmpeg.
"""

import numpy as np

WHITE = 203.0  # cd/m^2
PEAK = 1000.0  # cd/m^2, of an HLG display, and of the displays on which most PQ pictures are made; PQ above is clipped
PQ, HLG = 16, 18
BT709, BT2020, DISPLAY_P3 = 1, 9, 12
# Linear RGB of other primaries -> linear RGB of BT.709; all have the white point D65. BT.2020: ITU-R BT.2407.
TO_BT709 = {
    BT2020: np.array([[1.6605, -0.5876, -0.0729], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1188]]),
    DISPLAY_P3: np.array([[1.2249, -0.2249, 0.0], [-0.0421, 1.0421, 0.0], [-0.0196, -0.0786, 1.0982]]),
}
# Constants of ITU-R BT.2100, tables 4 (PQ) and 5 (HLG)
M1, M2, C1, C2, C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
A, B, C = 0.17883277, 0.28466892, 0.55991073


def is_sdr(primaries: int, transfer: int) -> bool:
    """Returns whether values with these properties are shown as they are."""
    return transfer not in (PQ, HLG) and primaries not in TO_BT709


def pq_light(signal):
    """Returns the light in cd/m^2 of a PQ signal in [0, 1]: the EOTF of BT.2100, table 4."""
    power = np.asarray(signal) ** (1 / M2)
    return 10_000 * (np.maximum(power - C1, 0) / (C2 - C3 * power)) ** (1 / M1)


def pq_signal(light):
    """Returns the PQ signal in [0, 1] of a light in cd/m^2: the inverse EOTF of BT.2100, table 4."""
    power = (np.asarray(light) / 10_000) ** M1
    return ((C1 + C2 * power) / (1 + C3 * power)) ** M2


def hlg_light(signal):
    """Returns the light in cd/m^2 of an HLG signal [..., 3] in [0, 1] on a display with PEAK: BT.2100, table 5."""
    scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - C) / A) + B) / 12)
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593])
    return PEAK * luminance[..., None] ** 0.2 * scene


def compress(light):
    """Returns a light of 0..PEAK as a light of 0..WHITE, both in cd/m^2: ITU-R BT.2390-11, section 5.4.1."""
    top = pq_signal(PEAK)
    max_lum = pq_signal(WHITE) / top
    ks = 1.5 * max_lum - 0.5  # below this knee nothing changes
    e1 = np.minimum(pq_signal(light) / top, 1)
    t = (e1 - ks) / (1 - ks)
    p = (2 * t**3 - 3 * t**2 + 1) * ks + (t**3 - 2 * t**2 + t) * (1 - ks) + (3 * t**2 - 2 * t**3) * max_lum
    return pq_light(top * np.where(e1 < ks, e1, p))


def to_sdr(pixels: np.ndarray, primaries: int, transfer: int) -> np.ndarray:
    """Returns SDR pixels uint8 [..., 3] of RGB values [..., 3] in [0, 1].

    primaries: of the values; HDR values without known ones have those of BT.2020
    transfer: PQ, HLG, or any other number for an SDR signal
    """
    if transfer in (PQ, HLG):
        light = pq_light(pixels) if transfer == PQ else hlg_light(pixels)
        brightest = light.max(-1, keepdims=True)  # of the three colors: their ratios, so the hue, stay
        light = light * compress(brightest) / np.maximum(brightest, 1e-6) / WHITE
        primaries = primaries if primaries in (BT709, DISPLAY_P3) else BT2020
    else:
        light = pixels**2.4
    if primaries in TO_BT709:
        light = light @ TO_BT709[primaries].T
    return np.rint(255 * light.clip(0, 1) ** (1 / 2.4)).astype(np.uint8)
