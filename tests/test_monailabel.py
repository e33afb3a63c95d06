"""The app for MONAI Label, asked over HTTP as 3D Slicer asks it."""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from passion_monai import Segmenter
from passion_monai.datasets.phantom import write_phantom
from passion_monai.networks import RFNet

requests = pytest.importorskip("requests")
pydicom = pytest.importorskip("pydicom")
pytest.importorskip(
    "monailabel", reason="its requirements and those of this project conflict: it has an environment of its own"
)

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles" / "brats_rfnet_passion"
SMALL = {"roi_size": [32, 32, 32], "spacing": [6.0, 6.0, 6.0], "network_def::width": 4}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A network that was not trained, since all that is asked here is that every way gives the same label."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    network = RFNet(3, num_modalities=4, num_classes=4, img_size=SMALL["roi_size"], width=SMALL["network_def::width"])
    torch.save(network.state_dict(), path)
    return SMALL | {"ckpt_path": str(path)}


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patients, one of whom has no FLAIR and no T2."""
    folder = tmp_path_factory.mktemp("studies")
    (folder / "datalist.json").write_text("{}", encoding="utf-8")
    write_phantom("brats", folder, num_cases=2, shape=(32, 32, 32), spacing=(6.0, 6.0, 6.0), seed=0)
    second = sorted(path for path in folder.iterdir() if path.is_dir())[1]
    for name in ("flair", "t2"):
        next(second.glob(f"*_{name}.nii.gz")).unlink()
    return folder


@contextmanager
def serving(studies: object, folder: Path, **conf: str) -> Iterator[str]:
    """The address of a server that is started for a test."""
    port, log = free_port(), folder / "log.txt"
    # It downloads this program, which DICOM SEGs are written with, where there is none.
    (folder / "itkimage2segimage").touch(mode=0o755)
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(ROOT / "integrations/monailabel")]
    command += ["--studies", str(studies), "--host", "127.0.0.1", "--port", str(port)]
    for name, value in conf.items():
        command += ["--conf", name, value]
    environment = {"PYTHONPATH": str(ROOT), "HOME": str(folder), "PATH": f"{folder}:{os.environ['PATH']}"}
    with running(command, log, env=os.environ | environment, cwd=folder) as process:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/info/", process, log)
        yield address


@contextmanager
def running(command: list[str], log: Path, **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **settings)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(180):
        if process.poll() is not None:
            break
        try:
            if requests.get(address, timeout=10).ok:
                return
        except requests.ConnectionError:
            time.sleep(1)
    raise RuntimeError(log.read_text())


@pytest.fixture(scope="module")
def server(studies: Path, ids: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(studies, tmp_path_factory.mktemp("server"), bundle=str(BUNDLE), ids=json.dumps(ids)) as address:
        yield address


def asked(server: str, folder: Path, **parameters: Any) -> tuple[nib.Nifti1Image, dict[str, Any]]:
    """What the server answers: the label image, and the record."""
    data = {"params": json.dumps(parameters.pop("params", {}))}
    record, label = (
        requests.post(f"{server}/infer/{BUNDLE.name}", params={**parameters, "output": output}, data=data, timeout=300)
        for output in ("json", "image")
    )
    assert record.ok, record.text
    path = folder / "label.nii.gz"
    path.write_bytes(label.content)
    return nib.load(path), record.json()


def test_a_viewer_learns_what_there_is(server: str, studies: Path):
    info = requests.get(f"{server}/info/", timeout=60).json()
    assert info["models"][BUNDLE.name]["labels"]["enhancing tumour"] == 4
    images = requests.get(f"{server}/datastore/?output=all", timeout=60).json()["objects"]
    assert sorted(images) == sorted(path.name for path in studies.iterdir() if path.is_dir() and path.name[0] != ".")
    sample = requests.post(f"{server}/activelearning/random", json={}, timeout=60).json()
    assert sample["id"] in images


def test_patients_are_segmented_from_what_they_have(server: str, studies: Path, ids: dict[str, Any], tmp_path: Path):
    segmenter = Segmenter(BUNDLE, **ids)
    used = []
    for name, files in segmenter.discover(studies).items():
        expected = segmenter(files)
        ways = [{"image": name}, {"image": str(studies / name)}, {"image": name, "params": {"images": files}}]
        for number, way in enumerate(ways):
            (tmp_path / str(number)).mkdir(exist_ok=True)
            label, record = asked(server, tmp_path / str(number), **way)
            assert np.array_equal(label.dataobj, expected.label.dataobj)
            np.testing.assert_array_equal(label.affine, expected.label.affine)
            assert record["modalities_used"] == list(files)
        used.append(list(files))
    assert used == [["flair", "t1ce", "t1", "t2"], ["t1ce", "t1"]]


def test_a_session_takes_files_of_a_patient_who_is_not_there(
    server: str, studies: Path, ids: dict[str, Any], tmp_path: Path
):
    segmenter = Segmenter(BUNDLE, **ids)
    files = next(iter(segmenter.discover(studies).values()))
    chosen = {name: files[name] for name in ("flair", "t1")}
    uploaded = [("files", (Path(path).name, Path(path).read_bytes())) for path in chosen.values()]
    session = requests.put(f"{server}/session/", files=uploaded, timeout=60).json()["session_id"]
    label, record = asked(server, tmp_path, session_id=session)
    assert record["modalities_used"] == ["flair", "t1"]
    assert np.array_equal(label.dataobj, segmenter(chosen).label.dataobj)


def test_a_label_is_kept_with_its_patient_and_is_no_image(server: str, studies: Path, tmp_path: Path):
    name = sorted(path.name for path in studies.iterdir() if path.is_dir() and path.name[0] != ".")[0]
    label, _ = asked(server, tmp_path, image=name)
    label.to_filename(tmp_path / "edited.nii.gz")
    with (tmp_path / "edited.nii.gz").open("rb") as file:
        kept = requests.put(f"{server}/datastore/label?image={name}", files={"label": file}, timeout=60)
    assert kept.ok, kept.text
    assert (studies / ".monailabel" / "labels" / "final" / f"{name}.nii.gz").is_file()
    assert len(Segmenter(BUNDLE).discover(studies)) == 2


@pytest.mark.parametrize(
    ("asked_for", "answer"),
    [
        ({"image": "{studies}"}, "holds the patients"),
        ({"image": "{studies}/datalist.json"}, "none of the studies' patients"),
        (
            {"image": "{studies}", "params": {"images": {"pet": "x.nii.gz"}}},
            "files: unknown key 'pet'",
        ),
        ({"image": "{studies}", "params": {"images": {"t1": "x.nii.gz"}}}, "it does not exist"),
    ],
)
def test_what_is_wrong_is_said(server: str, studies: Path, asked_for: dict[str, Any], answer: str):
    image = asked_for["image"].format(studies=studies)
    data = {"params": json.dumps(asked_for.get("params", {}))}
    response = requests.post(f"{server}/infer/{BUNDLE.name}", params={"image": image}, data=data, timeout=60)
    assert response.status_code == 400
    assert answer in response.json()["detail"]


def write_series(path: str, description: str, folder: Path, study: pydicom.Dataset) -> str:
    """An image as the files of a DICOM series; returns the series' UID."""
    image = nib.as_closest_canonical(nib.load(path))
    voxels = np.round(image.get_fdata() / image.get_fdata().max() * 4000).astype(np.uint16)
    x, y, z = (float(size) for size in image.header.get_zooms())
    corner = np.diag([-1, -1, 1]) @ image.affine[:3, 3]
    uid = pydicom.uid.generate_uid()
    for index in range(voxels.shape[2]):
        slice_ = copy.deepcopy(study)
        slice_.SeriesInstanceUID, slice_.SOPInstanceUID = uid, pydicom.uid.generate_uid()
        slice_.SeriesDescription, slice_.InstanceNumber = description, index + 1
        slice_.PixelSpacing, slice_.SliceThickness = [y, x], z
        slice_.ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]
        slice_.ImagePositionPatient = [*corner[:2].tolist(), float(corner[2]) + index * z]
        slice_.Rows, slice_.Columns = voxels.shape[1], voxels.shape[0]
        slice_.PixelData = np.ascontiguousarray(voxels[:, :, index].T).tobytes()
        slice_.save_as(folder / f"{uid}_{index}.dcm", write_like_original=False)
    return str(uid)


def a_study() -> pydicom.Dataset:
    """What all slices of all series of it have in common."""
    slice_ = pydicom.Dataset()
    slice_.file_meta = pydicom.dataset.FileMetaDataset()
    slice_.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    slice_.is_little_endian, slice_.is_implicit_VR = True, False  # pydicom 2, which MONAI Label needs
    slice_.file_meta.MediaStorageSOPClassUID = slice_.SOPClassUID = pydicom.uid.MRImageStorage
    slice_.PatientID, slice_.PatientName, slice_.Modality = "1", "Phantom", "MR"
    slice_.StudyInstanceUID, slice_.FrameOfReferenceUID = pydicom.uid.generate_uid(), pydicom.uid.generate_uid()
    slice_.StudyDate, slice_.StudyTime, slice_.SeriesNumber, slice_.AccessionNumber = "20240101", "120000", 1, ""
    slice_.SamplesPerPixel, slice_.PhotometricInterpretation, slice_.PixelRepresentation = 1, "MONOCHROME2", 0
    slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit = 16, 16, 15
    return slice_


@pytest.fixture
def orthanc(tmp_path: Path) -> Iterator[str]:
    """The address of a DICOM server."""
    program = shutil.which("Orthanc")
    if program is None:
        pytest.skip("Orthanc is not installed")
    port = free_port()
    settings = {"HttpPort": port, "DicomServerEnabled": False, "StorageDirectory": str(tmp_path / "orthanc")}
    settings |= {"Plugins": ["/usr/share/orthanc/plugins"], "DicomWeb": {"Enable": True, "Root": "/dicom-web/"}}
    (tmp_path / "orthanc.json").write_text(json.dumps(settings), encoding="utf-8")
    log = tmp_path / "orthanc.txt"
    with running([program, str(tmp_path / "orthanc.json")], log) as process:
        wait_for(f"http://127.0.0.1:{port}/system", process, log)
        yield f"http://127.0.0.1:{port}"


def test_series_of_a_dicomweb_server(orthanc: str, studies: Path, ids: dict[str, Any], tmp_path: Path):
    files = next(iter(Segmenter(BUNDLE, **ids).discover(studies).values()))
    series, study = tmp_path / "series", a_study()
    series.mkdir()
    shown = write_series(files["t1"], "ax T1", series, study)
    write_series(files["flair"], "ax FLAIR", series, study)
    for path in series.iterdir():
        requests.post(f"{orthanc}/instances", data=path.read_bytes(), timeout=60).raise_for_status()
    conf = {"bundle": str(BUNDLE), "ids": json.dumps(ids), "flair": "*flair*", "t1": "*t1", "t2": "*t2*"}
    with serving(f"{orthanc}/dicom-web", tmp_path, **conf) as server:
        label, record = asked(server, tmp_path, image=shown)
    assert record["modalities_used"] == ["flair", "t1"]
    assert label.shape == nib.load(files["t1"]).shape
