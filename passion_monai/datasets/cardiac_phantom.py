"""Simulates a PHANTOM of a heart with an infarct, in the modalities of MyoPS: not a patient.

The phantom is a short-axis stack from base to apex: left ventricle with papillary muscles, crescent-shaped right
ventricle, epicardial fat, and around them chest wall, lung and liver. Edema fills the wall in the territory of one
coronary artery; the scar inside it starts at the cavity. The signal equations give the three contrasts, so each
modality shows the same as in patients: bSSFP bright blood and the borders of the muscle, LGE the scar against nulled
muscle, T2 edema with dark blood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from passion_monai.datasets.mr_signal import RELAXIVITY, Floats, Grid, Tissue, receive

__all__ = ["cardiac_phantom", "draw_slices"]

# At 1.5 T. Blood: Stanisz et al., MRM 54(3), 2005. Myocardium and edema, T1: Ugander et al., JACC Cardiovascular
# Imaging 5(6), 2012; T2: Giri et al., JCMR 11:56, 2009 (52 and 69 ms). Fat, liver, muscle: de Bazelaire et al.,
# Radiology 230(3), 2004. Contrast agent 15 minutes after the injection, in proportion to the extracellular volume:
# blood 0.57, muscle 0.27, scar 0.55 (Ugander et al., European Heart Journal 33(10), 2012).
TISSUES: Mapping[str, Tissue] = {
    "air": Tissue(1000, 50, 0.0),
    "fat": Tissue(343, 58, 0.9, contrast_agent_mmol=0.03),
    "muscle": Tissue(856, 27, 0.8, contrast_agent_mmol=0.06),
    "lung": Tissue(1199, 79, 0.15, contrast_agent_mmol=0.1, variation=0.2),
    "liver": Tissue(586, 46, 0.8, contrast_agent_mmol=0.15, variation=0.05),
    "blood": Tissue(1441, 290, 0.95, contrast_agent_mmol=0.34, variation=0.04),
    "myocardium": Tissue(1000, 52, 0.8, contrast_agent_mmol=0.16, variation=0.04),
    "edema": Tissue(1190, 69, 0.86, contrast_agent_mmol=0.19, variation=0.05),
    "scar": Tissue(1190, 69, 0.86, contrast_agent_mmol=0.33, variation=0.07),
}
NORMAL, LEFT_BLOOD, RIGHT_BLOOD, EDEMA, SCAR = 200, 500, 600, 1220, 2221  # label values of MyoPS
MIN_SLICES = 3
NO_SCAR_RATE = 0.15
# Middle of each territory in degrees, counted from the patient's left towards anterior: left anterior descending, left
# circumflex and right coronary artery (Cerqueira et al., Circulation 105(4), 2002).
TERRITORIES = (105.0, 0.0, 250.0)


def draw_slices(shape: Sequence[int], seed: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of one case; its number of slices is drawn from 3 to the third entry of `shape`."""
    most = int(shape[2])
    slices = np.random.default_rng(seed).integers(min(MIN_SLICES, most), most, endpoint=True)
    return (int(shape[0]), int(shape[1]), int(slices))


@dataclass(frozen=True)
class _Heart:
    """Signed distances of the voxels from the borders of one heart's parts in mm, positive inside."""

    left_blood: Floats
    left_outside: Floats
    right_blood: Floats
    right_outside: Floats
    papillary: Floats
    edema: Floats
    scar: Floats


def cardiac_phantom(
    shape: Sequence[int], spacing: Sequence[float], seed: int | Sequence[int]
) -> tuple[dict[str, NDArray[np.int16]], NDArray[np.uint16]]:
    """Simulates one PHANTOM case: three modalities of a heart with an infarct, and the label.

    Args:
        shape: number of voxels X, Y, and of slices from base to apex.
        spacing: pixel size and distance between slices in mm.
        seed: one or several integers; equal seeds give equal cases.

    Returns:
        Images by modality name, int16 [X, Y, Z], at least 1; X ends at the patient's left, Y at posterior. And the
        label, uint16 [X, Y, Z]: 0 background, 200 normal myocardium, 500 and 600 left and right
        ventricular blood pool, 1220 edema, 2221 scar.
    """
    rng = np.random.default_rng(seed)
    grid = Grid(shape, spacing, rng)
    x, y, depth = _positions(grid)
    heart = _draw_heart(x, y, depth, grid)
    fractions = _paint(heart, x, y, grid)
    times = _relaxation_times(rng)
    coil = np.exp(-0.004 * y + rng.uniform(0.05, 0.2) * grid.noise(60))  # the receiver coils lie on the chest
    images = {}
    for name, signals in _signals(times, rng).items():
        texture = 1 + (np.array([tissue.variation for tissue in TISSUES.values()]) @ fractions) * grid.noise(3)
        # The noise of the scan is relative to this.
        level = max(signals["myocardium"], 0.5 * signals["blood"], 0.5 * signals["scar"])
        image = (np.array([signals[tissue] for tissue in TISSUES]) @ fractions) * coil * texture
        images[name] = grid.volume(receive(image.astype(np.float32), 2 * level, rng))
    return images, grid.volume(_label(heart))


def _positions(grid: Grid) -> tuple[Floats, Floats, Floats]:
    """Warped positions in mm, from the middle to the patient's left and posterior; and depth, base 0 to apex 1."""
    sides = [step * (np.arange(size) - (size - 1) / 2) for step, size in zip(grid.spacing, grid.shape, strict=True)]
    x, y, _ = (axis.ravel().astype(np.float32) for axis in np.meshgrid(*sides, indexing="ij"))
    for axis in (x, y):
        axis += 3 * grid.noise(35) + 0.8 * grid.noise(10)
    first_mm = grid.rng.uniform(5, 20)
    slices_mm = first_mm + grid.spacing[2] * np.arange(grid.shape[2])
    depth = np.broadcast_to(np.minimum(slices_mm / 90, 0.85), grid.shape).ravel().astype(np.float32)
    return x, y, depth


def _draw_heart(x: Floats, y: Floats, depth: Floats, grid: Grid) -> _Heart:
    rng = grid.rng
    turn = np.radians(rng.normal(0, 10))
    shift = rng.normal(0, 6, 2)
    u, v = x - shift[0] - 8 * depth, y - shift[1] - 5 * depth  # the apex points to the left and forward
    u, v = np.cos(turn) * u + np.sin(turn) * v, np.cos(turn) * v - np.sin(turn) * u
    u *= np.exp(rng.normal(0, 0.05))
    radius, angle = np.hypot(u, v), np.arctan2(-v, u)
    cavity = rng.uniform(20, 28) * np.sqrt(1 - 0.9 * depth**2) + 0.8 * grid.noise(12)
    wall = rng.uniform(7.5, 11) * (1 - 0.2 * depth) + 0.8 * grid.noise(15)
    left_blood, left_outside = cavity - radius, cavity + wall - radius

    # An ellipse behind the septum, minus the left ventricle.
    size = (cavity + wall) * rng.uniform(0.95, 1.1)
    across = (u + 0.95 * size) / (1.05 * (1 - 0.35 * depth))
    along = v / (1.4 * (1 - 0.4 * depth))
    right = size - np.hypot(across, along) + 0.8 * grid.noise(12)
    right_blood = np.minimum(right - 3, -left_outside)

    papillary = np.full_like(x, -np.inf)
    for middle in np.radians((rng.normal(300, 12), rng.normal(60, 12))):
        place = np.hypot(u - 0.62 * cavity * np.cos(middle), v + 0.62 * cavity * np.sin(middle))
        papillary = np.maximum(papillary, rng.uniform(3, 5) - 8 * np.abs(depth - 0.45) - place)
    edema, scar = _draw_infarct(angle, radius - cavity, wall, depth, grid=grid)
    inside = np.minimum(left_outside, -left_blood)
    return _Heart(
        left_blood, left_outside, right_blood, right, papillary, np.minimum(edema, inside), np.minimum(scar, inside)
    )


def _draw_infarct(
    angle: Floats, above_cavity: Floats, wall: Floats, depth: Floats, *, grid: Grid
) -> tuple[Floats, Floats]:
    """Depth of each voxel in edema and scar in mm: sectors of the wall; the scar starts at the cavity."""
    rng = grid.rng
    middle = np.radians(rng.choice(TERRITORIES) + rng.normal(0, 15))
    from_middle = np.abs((angle - middle + np.pi) % (2 * np.pi) - np.pi)
    along = np.clip(1 - ((depth - rng.uniform(0.2, 0.65)) / rng.uniform(0.3, 0.6)) ** 2, 0, None)
    half = np.radians(rng.uniform(35, 65)) * np.sqrt(along)
    arc = 28.0  # mm per radian in the middle of the wall, to measure distances in mm
    edema = arc * (half - from_middle) + 1.5 * grid.noise(6)
    scar = arc * (half * rng.uniform(0.55, 0.85) - from_middle) + 1.5 * grid.noise(6)
    scar = np.minimum(scar, rng.uniform(0.4, 1.0) * wall - above_cavity + 0.7 * grid.noise(5))
    empty = np.full_like(edema, -1e3)
    edema = np.where(along > 0, edema, empty)
    has_scar = rng.random() >= NO_SCAR_RATE
    return edema, np.minimum(scar, edema) if has_scar else empty


def _paint(heart: _Heart, x: Floats, y: Floats, grid: Grid) -> Floats:
    """Fractions of all tissues [tissues, voxels], blended at their borders."""
    border_mm = 0.4 * float(np.mean(grid.spacing[:2]))
    rng = grid.rng
    body = 128 - np.hypot((x + 40) / 1.3, y - 42)  # an ellipse; the image shows its front and left side
    skin, chest = rng.uniform(8, 22), rng.uniform(10, 16)
    liver = np.minimum(y - 50 + 0.15 * x + 5 * grid.noise(30), 60 - x)
    around = np.maximum(heart.left_outside, heart.right_outside)
    # From the outside in; each tissue covers those before it.
    layers = [
        ("fat", body),
        ("muscle", body - skin),
        ("lung", body - skin - chest),
        ("liver", np.minimum(liver, body - skin - chest)),
        ("fat", around + rng.uniform(3, 6) + 2 * grid.noise(12)),
        ("myocardium", heart.right_outside),
        ("blood", heart.right_blood),
        ("myocardium", heart.left_outside),
        ("blood", heart.left_blood),
        ("myocardium", np.minimum(heart.papillary, heart.left_blood)),
        ("edema", heart.edema),
        ("scar", heart.scar),
    ]
    names = list(TISSUES)
    fractions = np.zeros((len(names), x.size), np.float32)
    fractions[names.index("air")] = 1
    for tissue, inside in layers:
        cover = expit(inside / border_mm).astype(np.float32)
        fractions *= 1 - cover
        fractions[names.index(tissue)] += cover
    return fractions


def _label(heart: _Heart) -> NDArray[np.uint16]:
    label = np.zeros(heart.left_blood.shape, np.uint16)
    label[heart.right_blood > 0] = RIGHT_BLOOD
    label[heart.left_outside > 0] = NORMAL
    label[heart.left_blood > 0] = LEFT_BLOOD  # with the papillary muscles, as is common
    label[heart.edema > 0] = EDEMA
    label[heart.scar > 0] = SCAR
    return label


def _relaxation_times(rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """T1 and T2 of each tissue of one case in ms."""
    times = {}
    for name, tissue in TISSUES.items():
        t1, t2 = np.exp(rng.normal(0, tissue.variation, 2)) * (tissue.t1_ms, tissue.t2_ms)
        times[name] = (float(t1), float(t2))
    return times


def _signals(times: Mapping[str, tuple[float, float]], rng: np.random.Generator) -> dict[str, dict[str, float]]:
    """Signal of each tissue in each modality.

    bSSFP:  density * sin(a) * (1 - E1) / (1 - (E1 - E2) cos(a) - E1 E2) * exp(-TE / T2), E1 = exp(-TR / T1), E2 alike.
    LGE:    density * |1 - 2 exp(-TI / T1c)|, 1 / T1c = 1 / T1 + relaxivity * concentration; TI nulls the myocardium.
    T2:     density * (1 - exp(-TR / T1)) * exp(-TE / T2), fat suppressed; blood dark, as it leaves the slice.
    """
    density = {name: tissue.proton_density for name, tissue in TISSUES.items()}
    flip, repetition = np.radians(rng.uniform(50, 70)), rng.uniform(2.8, 3.6)
    dose = rng.uniform(0.8, 1.2)
    enhanced = {
        name: 1 / (1 / t1 + RELAXIVITY * dose * TISSUES[name].contrast_agent_mmol) for name, (t1, _) in times.items()
    }
    inversion = enhanced["myocardium"] * np.log(2) * rng.uniform(0.97, 1.06)  # in practice TI is never exact
    echo, heartbeats = rng.uniform(60, 85), rng.uniform(1600, 2400)
    left_over = {"fat": rng.uniform(0.05, 0.15), "blood": rng.uniform(0.05, 0.2)}
    bssfp, lge, t2_weighted = {}, {}, {}
    for name, (t1, t2) in times.items():
        e1, e2 = np.exp(-repetition / t1), np.exp(-repetition / t2)
        steady = np.sin(flip) * (1 - e1) / (1 - (e1 - e2) * np.cos(flip) - e1 * e2)
        bssfp[name] = float(density[name] * steady * np.exp(-repetition / 2 / t2))
        lge[name] = float(density[name] * abs(1 - 2 * np.exp(-inversion / enhanced[name])))
        recovered = (1 - np.exp(-heartbeats / t1)) * np.exp(-echo / t2)
        t2_weighted[name] = float(density[name] * recovered * left_over.get(name, 1.0))
    return {"bssfp": bssfp, "lge": lge, "t2": t2_weighted}
