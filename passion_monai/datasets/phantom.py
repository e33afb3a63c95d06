"""A brain tumour PHANTOM cohort in the folder layout of BraTS 2020: simulated images, not patients.

The anatomy is the MNI152 template (Fonov et al., NeuroImage 54(1), 2011, doi 10.1016/j.neuroimage.2010.07.033), whose
tissue maps come with the nilearn package; every case is a new random deformation of it with a simulated glioma. The
four contrasts follow from the spin echo and inversion recovery equations, so each modality shows what it shows in
life: edema in FLAIR and T2, enhancement only in T1ce, necrosis dark in T1 and bright in T2. The phantom lets the
software be tried and tested without registration at a data provider. It says nothing about performance on patients.

    python -m passion_monai.datasets.phantom --output phantom --cases 20 --size 96 --spacing 2 --seed 0
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation
from scipy.special import expit

__all__ = ["brain_phantom", "write_brain_phantom"]

Floats = NDArray[np.float32]

NOTICE = """PHANTOM, not patients.

The images in this folder are simulated by passion_monai.datasets.phantom: MNI152 anatomy, randomly deformed, with
simulated tumours, MR signals and noise. Files and label values are those of BraTS 2020 (1 necrotic and non-enhancing
core, 2 edema, 4 enhancing tumour), so that software for BraTS runs on them. They are no measurement of any person;
scores on them say nothing about patients.
"""
VERSION = 1  # stands in every file's header; raise it when the same seed gives other images than before


@dataclass(frozen=True)
class Tissue:
    """Relaxation times, proton density (water = 1) and concentration of contrast agent.

    ``variation`` is the relative deviation of the times from case to case, and of the signal within a tissue.
    """

    t1_ms: float
    t2_ms: float
    proton_density: float
    contrast_agent_mmol: float = 0.0  # per litre
    variation: float = 0.03


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
RELAXIVITY = 4.1e-3  # l/(mmol ms), gadopentetate in plasma at 1.5 T (Rohrer et al., Investigative Radiology 40, 2005)
NECROSIS, EDEMA, ENHANCING = 1, 2, 4  # label values of BraTS
NON_ENHANCING_RATE = 0.1
MIN_SIZE = 8


@dataclass(frozen=True)
class PulseSequence:
    """Ranges of repetition and echo time in ms, from which every scan draws its own."""

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
    """MNI152 at 1 mm: the brain, where tumours may start, fractions of CSF, grey and white matter [3, X, Y, Z]."""

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
    # These three loaders read files inside nilearn's wheel; nothing is downloaded.
    image = datasets.load_mni152_template(resolution=1)
    grey = datasets.load_mni152_gm_template(resolution=1).get_fdata(dtype=np.float32)
    white = datasets.load_mni152_wm_template(resolution=1).get_fdata(dtype=np.float32)
    head = image.get_fdata(dtype=np.float32) > 0
    tissues = np.stack([head * np.clip(1 - grey - white, 0, 1), grey, white])
    # The maps are averages over people and blurred: unsharp masking brings the cortical folds back.
    tissues = np.clip(2.2 * tissues - 1.2 * ndimage.gaussian_filter(tissues, (0, 1.5, 1.5, 1.5)), 0, 1)
    origin = image.affine[:3, 3].astype(np.float32)
    solid = head & (ndimage.gaussian_filter(tissues[0], 2) < 0.4)  # noqa: PLR2004 (sulci stay, ventricles go)
    site = _tumour_sites(solid, white, origin)
    # The outermost millimetre is CSF all around, which skull stripping removes.
    brain = ndimage.binary_erosion(head).astype(np.float32)
    return _Template(brain, site, tissues, origin)


def _tumour_sites(
    solid: NDArray[np.bool_], white: Floats, origin: Floats, *, margin_mm: float = 12, min_white: float = 0.6
) -> Floats:
    """Supratentorial white matter away from surface and ventricles: above z = 5 mm, and the temporal lobes."""
    x, y, z = np.indices(solid.shape, dtype=np.float32) + origin[:, None, None, None]
    above, temporal = z - 5, np.minimum.reduce([abs(x) - 25, y + 25, z + 20])  # both are positive inside
    deep = ndimage.distance_transform_edt(solid) > margin_mm
    site: Floats = (deep & (white > min_white) & (np.maximum(above, temporal) > 0)).astype(np.float32)
    return site


class _Grid:
    """The voxels of one case: draws smooth noise at the brain's voxels and puts values at them back into a volume."""

    def __init__(self, shape: Sequence[int], spacing: Sequence[float], rng: np.random.Generator) -> None:
        self.shape = tuple(shape)
        self.spacing = tuple(spacing)
        self.rng = rng
        self.mask = np.ones(self.shape, bool)

    def count(self, volume_ml: float) -> int:
        """The number of voxels in ``volume_ml``, at least one and fewer than the brain has."""
        voxels = round(volume_ml * 1000 / float(np.prod(self.spacing)))
        return min(max(voxels, 1), int(self.mask.sum()) - 1)

    def noise(self, length_mm: float) -> Floats:
        """A Gaussian random field of unit variance that varies over ``length_mm``, at the brain's voxels.

        White noise on a grid of that pitch, spread by Gaussians of that width: a separable product, so always cheap.
        """
        spread = []
        for size, step in zip(self.shape, self.spacing, strict=True):
            width = max(length_mm, step)
            nodes = np.arange(-3 * width, size * step + 3 * width, width)
            weights = np.exp(-0.5 * ((np.arange(size)[:, None] * step - nodes) / width) ** 2)
            spread.append((weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32))
        white = self.rng.standard_normal([weights.shape[1] for weights in spread], dtype=np.float32)
        field: Floats = np.einsum("abc,ia,jb,kc->ijk", white, *spread, optimize=True)[self.mask]
        return field

    def volume(self, values: NDArray) -> NDArray:
        """The volume that has ``values`` at the brain's voxels and 0 elsewhere."""
        volume = np.zeros(self.shape, values.dtype)
        volume[self.mask] = values
        return volume


def brain_phantom(
    shape: Sequence[int], spacing: Sequence[float], seed: int | Sequence[int]
) -> tuple[dict[str, NDArray[np.int16]], NDArray[np.uint8]]:
    """Simulates one PHANTOM case: four modalities of a brain with a glioma, and its label.

    A field of view smaller than a head cuts the head, as a scanner would, and has a smaller tumour.

    Args:
        shape: number of voxels X, Y, Z.
        spacing: voxel size in mm.
        seed: one integer or several; equal seeds give equal cases.

    Returns:
        The images by modality name, int16 [X, Y, Z], 0 outside the brain and at least 1 inside, in LPS orientation;
        and the label, uint8 [X, Y, Z]: 0 background, 1 necrotic and non-enhancing core, 2 edema, 4 enhancing tumour.

    Raises:
        ValueError: ``shape`` or ``spacing`` is not usable.
        ImportError: nilearn, whose wheel carries the anatomy, is not installed.
    """
    _check_grid(shape, spacing)
    rng = np.random.default_rng(seed)
    grid = _Grid(shape, spacing, rng)
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


def _world_points(grid: _Grid) -> Floats:
    """Right-anterior-superior millimetres [3, X, Y, Z] of the voxels of a grid in LPS order, 0 at the centre."""
    centred = [
        sign * step * (np.arange(size, dtype=np.float32) - (size - 1) / 2)
        for sign, step, size in zip((-1, -1, 1), grid.spacing, grid.shape, strict=True)
    ]
    return np.stack(np.meshgrid(*centred, indexing="ij")).astype(np.float32)


def _deform(world: Floats, grid: _Grid) -> Floats:
    """Maps millimetres of the case to millimetres of the template: pose and size of the head, then its own shape."""
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
    """Mass effect: the anatomy around ``centre`` [3, 1] makes room for the tumour."""
    offset = points - centre
    squared = (offset**2).sum(0) / width_mm**2
    pushed: Floats = centre + offset * (1 - rng.uniform(0.2, 0.45) * np.exp(-squared))
    return pushed


def _healthy_tissues(template: _Template, points: Floats, grid: _Grid) -> Floats:
    """Fractions of CSF, grey and white matter [3, voxels]: one individual drawn from the template's averages."""
    fractions = np.stack([template.sample(tissue, points) for tissue in template.tissues])
    fractions *= np.exp(0.45 * np.stack([grid.noise(3) for _ in fractions]))
    fractions[0] *= 2.2  # the averages have lost most of the CSF in the sulci
    fractions = np.clip(fractions, 1e-3, None) ** 3  # sharpens: a voxel of an individual has mostly one tissue
    healthy: Floats = fractions / fractions.sum(0)
    return healthy


def _core_depth(
    offset: Floats, healthy: Floats, grid: _Grid, *, radius: float, volume_ml: float, barrier: Floats
) -> Floats:
    """How deep in mm a voxel lies in the tumour core, negative outside: a ragged ellipsoid of the given volume.

    ``offset`` [3, voxels] is the position from the centre in mm; ``barrier`` is 1 in the other hemisphere, 0 in this.
    """
    axes = np.exp(grid.rng.normal(0, 0.15, (3, 1))).astype(np.float32)
    distance = np.linalg.norm(offset * axes, axis=0)
    distance += 0.2 * radius * grid.noise(12) + 1.6 * grid.noise(5) + 8 * healthy[0] + 15 * barrier
    count = grid.count(volume_ml)
    depth: Floats = np.partition(distance, count)[count] - distance
    return depth


def _edema_reach(depth: Floats, healthy: Floats, grid: _Grid, *, volume_ml: float, barrier: Floats) -> Floats:
    """How far in mm inside the whole tumour a voxel lies, negative outside: edema runs along the white matter.

    The core is inside; together they have about the given volume.
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


def _paint(healthy: Floats, depth: Floats, reach: Floats, grid: _Grid) -> tuple[Floats, NDArray[np.uint8]]:
    """The fractions of all tissues [tissues, voxels] and the label [voxels].

    The tissues pass into one another (partial volume, edema that thins out); the label is where the borders lie.
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
    # What is no tumour and looks like one: vessels in T1ce, age-related white matter lesions in FLAIR.
    vessel = csf * np.exp(-(grid.noise(10) ** 2 + grid.noise(10) ** 2) / 0.3)  # two surfaces meet in a line
    lesion = 0.5 * white * np.clip(grid.noise(5) - grid.rng.uniform(1.6, 2.4), 0, 1)
    fractions = [csf - vessel, grey, white - lesion, vessel, edema + lesion, enhancing, core - enhancing]
    return np.stack(fractions).astype(np.float32), label.astype(np.uint8)  # in the order of TISSUES


def _relaxation_times(rng: np.random.Generator) -> Floats:
    """T1 and T2 in ms of every tissue of one case [2, tissues]."""
    mean = np.array([(tissue.t1_ms, tissue.t2_ms) for tissue in TISSUES.values()]).T
    variation = [tissue.variation for tissue in TISSUES.values()]
    times: Floats = (mean * np.exp(rng.normal(0, variation, mean.shape))).astype(np.float32)
    return times


def _signals(sequence: PulseSequence, times: Floats, rng: np.random.Generator) -> Floats:
    """The signal of every tissue.

    Spin echo:           signal = density * (1 - exp(-TR / T1)) * exp(-TE / T2)
    Inversion recovery:  signal = density * |1 - 2 exp(-TI / T1) + exp(-TR / T1)| * exp(-TE / T2),
                         TI = T1csf * log(2 / (1 + exp(-TR / T1csf))), at which average CSF has no signal.
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


def _acquire(sequence: PulseSequence, times: Floats, fractions: Floats, *, grid: _Grid) -> NDArray[np.int16]:
    """One scan: signals, texture, bias field, slice profile, Rician noise and the scanner's gain."""
    rng, signals = grid.rng, _signals(sequence, times, grid.rng)
    white = float(signals[list(TISSUES).index("white")])
    variation = np.array([tissue.variation for tissue in TISSUES.values()], np.float32)
    bias = np.exp(rng.uniform(0.04, 0.13) * grid.noise(50))
    image = (signals @ fractions) * bias
    image *= 1 + (variation @ fractions) * grid.noise(2.5)
    slice_voxels = rng.uniform(0.3, 1.2) / grid.spacing[2]
    image = ndimage.gaussian_filter1d(grid.volume(image), slice_voxels, axis=2)[grid.mask]
    real, imaginary = white * rng.uniform(0.012, 0.04) * rng.standard_normal((2, image.size), dtype=np.float32)
    gain = float(np.exp(rng.uniform(np.log(200), np.log(2000)))) / white
    image = gain * np.hypot(image + real, imaginary)
    # 0 is kept for the background, so that all modalities have the same mask.
    return grid.volume(np.clip(np.rint(image), 1, np.iinfo(np.int16).max).astype(np.int16))


def write_brain_phantom(
    output_dir: str | Path,
    *,
    num_cases: int,
    shape: Sequence[int] = (96, 96, 96),
    spacing: Sequence[float] = (2.0, 2.0, 2.0),
    seed: int = 0,
) -> list[Path]:
    """Writes a PHANTOM cohort (not patients) as NIfTI in the folder layout of BraTS 2020.

    ``<output_dir>/BraTS20_Training_001/BraTS20_Training_001_{flair,t1ce,t1,t2,seg}.nii.gz`` and so on, with a
    ``README.txt`` that says what it is. A case depends on ``seed`` and its number only, not on ``num_cases``. A folder
    appears when it is complete, and cases that are there are kept, so an interrupted call can be repeated.

    Args:
        output_dir: folder of the cohort, made if needed.
        num_cases: number of cases.
        shape: number of voxels X, Y, Z; (240, 240, 155) with ``spacing`` 1 mm is BraTS's own.
        spacing: voxel size in mm.
        seed: seed of the cohort, 0 or more.

    Returns:
        The case folders, in the order of their numbers.

    Raises:
        ValueError: an argument is not usable, or ``output_dir`` holds something else under a case's name.
        ImportError: nilearn, whose wheel carries the anatomy, is not installed.

    Example:
        >>> folders = write_brain_phantom("phantom", num_cases=2, shape=(64, 64, 64), spacing=(3, 3, 3))
    """
    _check_grid(shape, spacing)
    for name, value, least in (("num_cases", num_cases, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    root = Path(output_dir)
    root.mkdir(parents=True, exist_ok=True)
    (root / "README.txt").write_text(NOTICE, encoding="utf-8")
    folders = [root / f"BraTS20_Training_{number:03d}" for number in range(1, num_cases + 1)]
    for number, folder in enumerate(folders, start=1):
        if not _holds_case(folder, _empty_image(shape, spacing, seed=seed, number=number)):
            _write_case(folder, shape, spacing, seed=seed, number=number)
    return folders


def _check_grid(shape: Sequence[int], spacing: Sequence[float]) -> None:
    if len(shape) != 3 or any(size != int(size) or size < MIN_SIZE for size in shape):
        raise ValueError(f"shape must be three whole numbers of at least {MIN_SIZE} voxels, got {tuple(shape)}.")
    if len(spacing) != 3 or not all(0 < step < np.inf for step in spacing):
        raise ValueError(f"spacing must be three positive numbers of millimetres, got {tuple(spacing)}.")


def _affine(shape: Sequence[int], spacing: Sequence[float]) -> NDArray[np.float64]:
    """LPS with the origin where BraTS has it: at 240 x 240 x 155 and 1 mm it is BraTS's affine."""
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[1, 3] = (shape[1] - 1) * spacing[1]
    return affine


def _empty_image(shape: Sequence[int], spacing: Sequence[float], *, seed: int, number: int) -> nib.Nifti1Image:
    """A label without content whose header is that of all the case's files but for the data type."""
    affine = _affine(shape, spacing)
    image = nib.Nifti1Image(np.zeros(tuple(int(size) for size in shape), np.uint8), affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = f"PHANTOM, not a patient: passion_monai v{VERSION} seed {seed} case {number}"
    return image


def _holds_case(folder: Path, expected: nib.Nifti1Image) -> bool:
    """True if ``folder`` holds the expected case, False if there is no such folder; anything else is an error."""
    if not folder.exists():
        return False
    for name in (*SEQUENCES, "seg"):
        path = folder / f"{folder.name}_{name}.nii.gz"
        header = nib.Nifti1Image.from_filename(path).header if path.is_file() else None
        if header is None or any((header[key] != expected.header[key]).any() for key in ("descrip", "dim", "pixdim")):
            raise ValueError(
                f"{path} is missing or is not the case asked for ({expected.header['descrip'].item().decode()}, "
                f"shape {expected.shape}, spacing {tuple(map(float, expected.header.get_zooms()))}). "
                f"Choose another output_dir, or delete {folder} if you do not need it."
            )
    return True


def _write_case(folder: Path, shape: Sequence[int], spacing: Sequence[float], *, seed: int, number: int) -> None:
    images, label = brain_phantom(shape, spacing, (seed, number))
    empty = _empty_image(shape, spacing, seed=seed, number=number)
    with TemporaryDirectory(prefix=".phantom_", dir=folder.parent) as scratch:
        partial = Path(scratch) / folder.name
        partial.mkdir()
        volumes: dict[str, NDArray] = {**images, "seg": label}
        for name, volume in volumes.items():
            header = empty.header.copy()
            header.set_data_dtype(volume.dtype)
            nib.save(nib.Nifti1Image(volume, None, header), partial / f"{folder.name}_{name}.nii.gz")
        try:
            partial.rename(folder)
        except OSError:
            # Another process may have written the same case meanwhile.
            if not _holds_case(folder, empty):
                raise


def _three(values: Sequence[float]) -> list[float]:
    return list(values) * 3 if len(values) == 1 else list(values)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: writes a PHANTOM cohort."""
    parser = argparse.ArgumentParser(
        prog="python -m passion_monai.datasets.phantom",
        description="Write a brain tumour PHANTOM cohort (simulated, not patients) as NIfTI in BraTS 2020 folders. "
        "An interrupted run can be repeated: complete cases are kept.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the cohort, made if needed")
    parser.add_argument("--cases", type=int, default=20, metavar="N", help="number of cases")
    parser.add_argument("--size", type=int, nargs="+", default=[96], help="voxels: one number, or X Y Z")
    parser.add_argument("--spacing", type=float, nargs="+", default=[2.0], help="voxel size, mm: one number, or X Y Z")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same cases")
    arguments = parser.parse_args(argv)
    try:
        folders = write_brain_phantom(
            arguments.output,
            num_cases=arguments.cases,
            shape=[int(size) for size in _three(arguments.size)],
            spacing=_three(arguments.spacing),
            seed=arguments.seed,
        )
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    print(f"{len(folders)} PHANTOM cases (not patients) in {arguments.output}")


if __name__ == "__main__":
    main()
