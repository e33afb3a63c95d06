"""Simulates a PHANTOM of a brain with a tumour, in the modalities of BraTS: not a patient.

The anatomy is the MNI152 template (Fonov et al., NeuroImage 54(1), 2011, doi 10.1016/j.neuroimage.2010.07.033); the
nilearn package contains its tissue maps. Each case is a new random deformation of it with a simulated glioma. The spin
echo and inversion recovery equations give the four contrasts, so each modality shows the same as in patients: edema in
FLAIR and T2, enhancement only in T1ce, necrosis dark in T1 and bright in T2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from scipy.special import expit

from passion_monai.datasets.mr_signal import RELAXIVITY, Floats, Grid, Tissue, receive

__all__ = ["SEQUENCES", "brain_phantom"]

# CSF, grey and white matter: BrainWeb, 1.5 T (Kwan, Evans, Pike, IEEE TMI 18(11), 1999). Tumour: rounded values from
# the range that relaxometry of gliomas reports (Just and Thelen, Radiology 169(3), 1988; Blystad et al., Scientific
# Reports 10, 2020): both times are longer than in healthy tissue, most of all in necrosis. The contrast agent
# shortens the rim's T1 by 0.8 s, as measured ("Quantitative T1 mapping indicates tumor infiltration beyond the
# enhancing part of glioblastomas", NMR in Biomedicine 33(4), 2020: 838 +- 210 ms).
TISSUES: Mapping[str, Tissue] = {
    "csf": Tissue(2569, 329, 1.0, variation=0.02),
    "grey": Tissue(833, 83, 0.86, variation=0.04),
    "white": Tissue(500, 70, 0.77),
    "vessel": Tissue(1400, 100, 0.85, contrast_agent_mmol=2.0, variation=0.2),
    "edema": Tissue(1050, 145, 0.88, variation=0.07),
    "enhancing": Tissue(1150, 120, 0.88, contrast_agent_mmol=0.5, variation=0.14),
    "necrosis": Tissue(1600, 220, 0.95, variation=0.14),
}
NECROSIS, EDEMA, ENHANCING = 1, 2, 4  # label values of BraTS
NON_ENHANCING_RATE = 0.1


@dataclass(frozen=True)
class PulseSequence:
    """Ranges of repetition and echo time in ms; each scan draws its own values."""

    repetition_ms: tuple[float, float]
    echo_ms: tuple[float, float]
    inversion: bool = False
    contrast: bool = False


SEQUENCES: Mapping[str, PulseSequence] = {
    "flair": PulseSequence((8000, 10000), (110, 140), inversion=True),
    "t1ce": PulseSequence((450, 650), (8, 15), contrast=True),
    "t1": PulseSequence((450, 650), (8, 15)),
    "t2": PulseSequence((3500, 6000), (85, 110)),
}


@dataclass(frozen=True)
class _Template:
    """MNI152 at 1 mm: brain mask, possible tumour sites, fractions of CSF, grey and white matter [3, X, Y, Z]."""

    brain: Floats
    site: Floats
    tissues: Floats
    origin_mm: Floats

    def sample(self, volume: Floats, points: Floats) -> Floats:
        """Interpolates ``volume`` at ``points`` [3, ...] in MNI millimetres."""
        voxels = points - self.origin_mm.reshape(3, *[1] * (points.ndim - 1))
        values: Floats = ndimage.map_coordinates(volume, voxels, order=1)
        return values


@lru_cache(maxsize=1)
def _template() -> _Template:
    try:
        from nilearn import datasets
    except ImportError as error:
        raise ImportError('The phantom needs the MNI152 maps of nilearn: pip install "passion-monai[demo]"') from error
    # These three loaders read files of nilearn's wheel and download nothing.
    image = datasets.load_mni152_template(resolution=1)
    grey = datasets.load_mni152_gm_template(resolution=1).get_fdata(dtype=np.float32)
    white = datasets.load_mni152_wm_template(resolution=1).get_fdata(dtype=np.float32)
    head = image.get_fdata(dtype=np.float32) > 0
    tissues = np.stack([head * np.clip(1 - grey - white, 0, 1), grey, white])
    # The maps are blurred averages over people; unsharp masking restores the cortical folds.
    tissues = np.clip(2.2 * tissues - 1.2 * ndimage.gaussian_filter(tissues, (0, 1.5, 1.5, 1.5)), 0, 1)
    origin = image.affine[:3, 3].astype(np.float32)
    solid = head & (ndimage.gaussian_filter(tissues[0], 2) < 0.4)  # noqa: PLR2004 (keeps sulci, removes ventricles)
    site = _tumour_sites(solid, white, origin)
    # The outermost millimetre is all CSF; skull stripping removes it.
    brain = ndimage.binary_erosion(head).astype(np.float32)
    return _Template(brain, site, tissues, origin)


def _tumour_sites(
    solid: NDArray[np.bool_], white: Floats, origin: Floats, *, margin_mm: float = 12, min_white: float = 0.6
) -> Floats:
    """Supratentorial white matter far from surface and ventricles: above z = 5 mm, and in the temporal lobes."""
    x, y, z = np.indices(solid.shape, dtype=np.float32) + origin[:, None, None, None]
    above, temporal = z - 5, np.minimum.reduce([abs(x) - 25, y + 25, z + 20])  # both distances are positive inside
    deep = ndimage.distance_transform_edt(solid) > margin_mm
    site: Floats = (deep & (white > min_white) & (np.maximum(above, temporal) > 0)).astype(np.float32)
    return site


def brain_phantom(
    shape: Sequence[int], spacing: Sequence[float], seed: int | Sequence[int]
) -> tuple[dict[str, NDArray[np.int16]], NDArray[np.uint8]]:
    """Simulates one PHANTOM case: four modalities of a brain with a glioma, and the label.

    A field of view smaller than the head cuts it, as in a scanner; the tumour is then smaller too.

    Args:
        shape: number of voxels X, Y, Z.
        spacing: voxel size in mm.
        seed: one or several integers; equal seeds give equal cases.

    Returns:
        Images by modality name, int16 [X, Y, Z], in LPS orientation, 0 outside the brain and at least 1 inside; and
        the label, uint8 [X, Y, Z]: 0 background, 1 necrotic and non-enhancing core, 2 edema, 4 enhancing tumour.

    Raises:
        ImportError: nilearn, which contains the anatomy, is not installed.
    """
    rng = np.random.default_rng(seed)
    grid = Grid(shape, spacing, rng)
    template = _template()
    world = _world_points(grid)
    points = _deform(world, grid)
    grid.mask = template.sample(template.brain, points) > 0.5  # noqa: PLR2004
    world, points = world[:, grid.mask], points[:, grid.mask]

    brain_ml = float(grid.mask.sum() * np.prod(spacing)) / 1000
    whole_ml = min(rng.uniform(35, 150), 0.2 * brain_ml)
    core_ml = whole_ml * rng.uniform(0.15, 0.5)
    radius = (core_ml * 1000 * 0.75 / np.pi) ** (1 / 3)
    sites = np.flatnonzero(template.sample(template.site, points) > 0.5)  # noqa: PLR2004
    start = rng.choice(sites if len(sites) else len(world[0]))
    points = _push_aside(points, points[:, [start]], 2.2 * radius, rng=rng)
    healthy = _healthy_tissues(template, points, grid)
    other_side = expit(-points[0] * np.sign(points[0, start]))
    depth = _core_depth(world - world[:, [start]], healthy, grid, radius=radius, volume_ml=core_ml, barrier=other_side)
    reach = _edema_reach(depth, healthy, grid, volume_ml=whole_ml, barrier=other_side)
    fractions, label = _paint(healthy, depth, reach, grid)
    times = _relaxation_times(rng)
    images = {name: _acquire(sequence, times, fractions, grid=grid) for name, sequence in SEQUENCES.items()}
    return images, grid.volume(label)


def _world_points(grid: Grid) -> Floats:
    """Positions of the voxels of an LPS grid in RAS millimetres [3, X, Y, Z]; the centre is 0."""
    centred = [
        sign * step * (np.arange(size, dtype=np.float32) - (size - 1) / 2)
        for sign, step, size in zip((-1, -1, 1), grid.spacing, grid.shape, strict=True)
    ]
    return np.stack(np.meshgrid(*centred, indexing="ij")).astype(np.float32)


def _deform(world: Floats, grid: Grid) -> Floats:
    """Maps positions in the case to the template, in mm: pose and size of the head, then its individual shape."""
    turn = Rotation.from_euler("xyz", grid.rng.normal(0, 4, 3), degrees=True).as_matrix()
    size = grid.rng.normal(0.94, 0.03, 3)  # MNI152 is larger than most heads
    middle = np.array([0, -17, 5]) + grid.rng.normal(0, 2, 3)  # of the template's brain
    points = np.tensordot((turn / size).astype(np.float32), world, axes=1)
    points += middle.astype(np.float32)[:, None, None, None]
    for length_mm, amplitude_mm in ((30, 3.0), (9, 1.3)):  # lobes, folds
        for axis in points:
            axis += amplitude_mm * grid.noise(length_mm).reshape(grid.shape)
    return points


def _push_aside(points: Floats, centre: Floats, width_mm: float, *, rng: np.random.Generator) -> Floats:
    """Mass effect: pushes the anatomy around ``centre`` [3, 1] away from the tumour."""
    offset = points - centre
    squared = (offset**2).sum(0) / width_mm**2
    pushed: Floats = centre + offset * (1 - rng.uniform(0.2, 0.45) * np.exp(-squared))
    return pushed


def _healthy_tissues(template: _Template, points: Floats, grid: Grid) -> Floats:
    """Fractions of CSF, grey and white matter [3, voxels] of one individual, drawn from the template's averages."""
    fractions = np.stack([template.sample(tissue, points) for tissue in template.tissues])
    fractions *= np.exp(0.45 * np.stack([grid.noise(3) for _ in fractions]))
    fractions[0] *= 2.2  # the averages have lost most of the CSF in the sulci
    fractions = np.clip(fractions, 1e-3, None) ** 3  # sharpens the maps: most voxels of an individual have one tissue
    healthy: Floats = fractions / fractions.sum(0)
    return healthy


def _core_depth(
    offset: Floats, healthy: Floats, grid: Grid, *, radius: float, volume_ml: float, barrier: Floats
) -> Floats:
    """Depth of each voxel in the tumour core in mm, negative outside: a ragged ellipsoid of the given volume.

    ``offset`` [3, voxels] is the position relative to the centre in mm; ``barrier`` is 1 in the opposite hemisphere.
    """
    axes = np.exp(grid.rng.normal(0, 0.15, (3, 1))).astype(np.float32)
    distance = np.linalg.norm(offset * axes, axis=0)
    distance += 0.2 * radius * grid.noise(12) + 1.6 * grid.noise(5) + 8 * healthy[0] + 15 * barrier
    count = grid.count(volume_ml)
    depth: Floats = np.partition(distance, count)[count] - distance
    return depth


def _edema_reach(depth: Floats, healthy: Floats, grid: Grid, *, volume_ml: float, barrier: Floats) -> Floats:
    """Depth of each voxel in the whole tumour in mm, negative outside: edema spreads along the white matter.

    The whole tumour includes the core; its volume is about the given one.
    """
    csf, grey, _ = healthy
    resistance = np.maximum(-depth, 0) + 12 * grey + 60 * csf + 25 * barrier
    resistance += 5 * grid.noise(14) + 3 * grid.noise(7) + 1.5 * grid.noise(3)
    resistance[depth > 0] = resistance.min() - 1
    count = grid.count(volume_ml)
    reach: Floats = np.partition(resistance, count)[count] - resistance
    parts = ndimage.label(grid.volume(reach > 0))[0][grid.mask]
    connected = parts == np.bincount(parts[depth > 0]).argmax()
    return np.where(connected, reach, np.minimum(reach, -5))


def _paint(healthy: Floats, depth: Floats, reach: Floats, grid: Grid) -> tuple[Floats, NDArray[np.uint8]]:
    """Fractions of all tissues [tissues, voxels], and the label [voxels].

    The tissues blend at their borders (partial volume, edema that thins out); the label changes at the borders.
    """
    rim = grid.rng.uniform(2.5, 6) * (1 + 0.6 * grid.noise(8)) + grid.noise(3)
    if grid.rng.random() < NON_ENHANCING_RATE:
        rim[:] = -np.inf
    label = np.where(reach > 0, EDEMA, 0)
    label[depth > 0] = NECROSIS
    label[(depth > 0) & (depth < rim)] = ENHANCING

    border_mm = 0.4 * float(np.mean(grid.spacing))
    core = expit(depth / border_mm)
    enhancing = core * expit((rim - depth) / border_mm)
    water = np.clip(0.6 + 0.04 * reach + 0.12 * grid.noise(6), 0.3, 1)
    edema = (1 - core) * expit(reach / (border_mm + 0.7)) * water
    rest = 1 - core - edema
    csf, grey, white = healthy * rest
    # Looks like a tumour but is not: vessels in T1ce, age-related white matter lesions in FLAIR.
    vessel = csf * np.exp(-(grid.noise(10) ** 2 + grid.noise(10) ** 2) / 0.3)  # two surfaces intersect in a line
    lesion = 0.5 * white * np.clip(grid.noise(5) - grid.rng.uniform(1.6, 2.4), 0, 1)
    fractions = [csf - vessel, grey, white - lesion, vessel, edema + lesion, enhancing, core - enhancing]
    return np.stack(fractions).astype(np.float32), label.astype(np.uint8)  # in the order of TISSUES


def _relaxation_times(rng: np.random.Generator) -> Floats:
    """T1 and T2 of each tissue of one case in ms [2, tissues]."""
    mean = np.array([(tissue.t1_ms, tissue.t2_ms) for tissue in TISSUES.values()]).T
    variation = [tissue.variation for tissue in TISSUES.values()]
    times: Floats = (mean * np.exp(rng.normal(0, variation, mean.shape))).astype(np.float32)
    return times


def _signals(sequence: PulseSequence, times: Floats, rng: np.random.Generator) -> Floats:
    """Signal of each tissue.

    Spin echo:           signal = density * (1 - exp(-TR / T1)) * exp(-TE / T2)
    Inversion recovery:  signal = density * |1 - 2 exp(-TI / T1) + exp(-TR / T1)| * exp(-TE / T2),
                         TI = T1csf * log(2 / (1 + exp(-TR / T1csf))), which nulls the average CSF.
    Contrast agent:      1 / T1 rises by relaxivity * concentration.
    """
    repetition, echo = rng.uniform(*sequence.repetition_ms), rng.uniform(*sequence.echo_ms)
    t1, t2 = times
    density, agent = np.array([(tissue.proton_density, tissue.contrast_agent_mmol) for tissue in TISSUES.values()]).T
    if sequence.contrast:
        t1 = 1 / (1 / t1 + RELAXIVITY * agent * rng.uniform(0.7, 1.4))
    recovery = 1 - np.exp(-repetition / t1)
    if sequence.inversion:
        t1_csf = TISSUES["csf"].t1_ms
        inversion = t1_csf * np.log(2 / (1 + np.exp(-repetition / t1_csf)))
        recovery = abs(1 - 2 * np.exp(-inversion / t1) + np.exp(-repetition / t1))
    signals: Floats = (density * recovery * np.exp(-echo / t2)).astype(np.float32)
    return signals


def _acquire(sequence: PulseSequence, times: Floats, fractions: Floats, *, grid: Grid) -> NDArray[np.int16]:
    """Simulates one scan: signals, texture, bias field, slice profile, Rician noise and gain."""
    rng, signals = grid.rng, _signals(sequence, times, grid.rng)
    white = float(signals[list(TISSUES).index("white")])
    variation = np.array([tissue.variation for tissue in TISSUES.values()], np.float32)
    bias = np.exp(rng.uniform(0.04, 0.13) * grid.noise(50))
    image = (signals @ fractions) * bias
    image *= 1 + (variation @ fractions) * grid.noise(2.5)
    slice_voxels = rng.uniform(0.3, 1.2) / grid.spacing[2]
    image = ndimage.gaussian_filter1d(grid.volume(image), slice_voxels, axis=2)[grid.mask]
    return grid.volume(receive(image, white, rng))
