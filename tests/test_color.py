import numpy as np
import pytest

from vdm_jax.data import color
from vdm_jax.data.color import BT709, BT2020, DISPLAY_P3, HLG, PQ

FROM_BT709 = {  # linear RGB of BT.709 -> of other primaries
    BT2020: np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]),
    DISPLAY_P3: np.array([[0.8225, 0.1775, 0], [0.0332, 0.9668, 0], [0.0171, 0.0724, 0.9105]]),
}


def gray(signal, transfer):
    return color.to_sdr(np.full((1, 3), signal), BT2020, transfer)[0]


def test_pq_is_the_published_curve():
    # ITU-R BT.2408, table 1: signals of known light
    for light, signal in [(0, 0.0), (100, 0.508), (203, 0.581), (1000, 0.752), (10_000, 1.0)]:
        assert color.pq_signal(light) == pytest.approx(signal, abs=1e-3)
        assert color.pq_light(color.pq_signal(light)) == pytest.approx(light, abs=1e-3)


def test_hlg_white_is_three_quarters_of_the_signal():
    np.testing.assert_allclose(color.hlg_light(np.array([[0.75] * 3, [1.0] * 3])), [[203.2] * 3, [1000] * 3], rtol=1e-3)


def test_tone_curve():
    dark = np.array([0.0, 1, 20, 80])  # below the knee
    np.testing.assert_allclose(color.compress(dark), dark, rtol=1e-6)
    light = color.compress(np.linspace(0, 1000, 200))
    assert (np.diff(light) > 0).all() and light[-1] == pytest.approx(203)
    assert color.compress(4000.0) == pytest.approx(203)
    # Diffuse white lies at a third of the way from the knee to the top: BT.2390's polynomial at T = 1/3
    white = color.pq_signal(203) / color.pq_signal(1000)
    knee = 1.5 * white - 0.5
    expected = (20 * knee + 4 * (1 - knee) + 7 * white) / 27
    assert color.pq_signal(color.compress(203.0)) / color.pq_signal(1000) == pytest.approx(expected)


def test_hdr_grays():
    for light in (1.0, 20.0, 80.0):
        np.testing.assert_allclose(gray(color.pq_signal(light), PQ), 255 * (light / 203) ** (1 / 2.4), atol=0.51)
    np.testing.assert_array_equal(gray(0.75, HLG), gray(color.pq_signal(203.15), PQ))
    assert (gray(0, PQ) == 0).all() and (gray(1, HLG) == 255).all() and (gray(1, PQ) == 255).all()


@pytest.mark.parametrize("primaries", [BT2020, DISPLAY_P3])
def test_wide_gamut_becomes_bt709(primaries):
    colors = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0.5], [0.2, 0.9, 0.4]])
    for scale, transfer, encode in (
        (1.0, BT709, lambda light: light ** (1 / 2.4)),
        (80 / 203, PQ, lambda light: color.pq_signal(203 * light)),
    ):
        got = color.to_sdr(encode(scale * colors @ FROM_BT709[primaries].T), primaries, transfer)
        expected = 255 * (scale * colors) ** (1 / 2.4)
        np.testing.assert_allclose(got, expected, atol=8)  # the matrices have four digits
        assert not color.is_sdr(primaries, transfer)
    assert color.is_sdr(BT709, BT709) and not color.is_sdr(BT709, HLG)
