"""A bundle behind MONAI Label: `monailabel start_server --app integrations/monailabel --studies … --conf bundle …`.

An image of the server is a patient: all sequences there are of him are segmented together, in whatever subset.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from pydicom.dataset import Dataset

from passion_monai import Segmenter
from passion_monai.datasets.discovery import strip_extension

STORE = ".monailabel"
"""Folder of the studies that holds the labels; hidden, so that no label is taken for a patient's image."""


class PassionApp(MONAILabelApp):  # type: ignore[misc]
    """Serves one bundle.

    Args:
        app_dir: folder of this file.
        studies: folder of the patients, or the address of a DICOMweb server.
        conf: ``bundle``, the folder of the bundle; ``ids``, those of its ``inference.yaml`` that are set, as JSON; and
            with a DICOMweb server, for each sequence a pattern that the description of its series fits, such as
            ``flair *FLAIR*``.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        if "bundle" not in conf:
            raise ValueError("Say which bundle to serve: --conf bundle bundles/brats_rfnet_passion.")
        self.segmenter = Segmenter(conf["bundle"], **json.loads(conf.get("ids", "{}")))
        self.patterns = {name: conf[name] for name in self.segmenter.modalities if name in conf}
        self.patients: dict[str, dict[str, str]] = {}
        super().__init__(
            app_dir, studies, conf, name=self.segmenter.bundle.name, description="Segments whatever there is"
        )

    def init_datastore(self) -> Datastore:
        """Of patients in a folder, each with the first of his sequences as what a viewer shows."""
        if self.studies.startswith(("http://", "https://")):
            return self.init_remote_datastore()
        store = Path(self.studies).resolve() / STORE
        store.mkdir(exist_ok=True)
        for link in store.iterdir():
            if link.is_symlink():
                link.unlink()
        for name, files in self.segmenter.discover(self.studies).items():
            shown = Path(next(iter(files.values()))).resolve()
            (store / (name + shown.name.removeprefix(strip_extension(shown.name)))).symlink_to(shown)
            self.patients[name] = files
        return LocalDatastore(str(store), extensions=settings.MONAI_LABEL_DATASTORE_FILE_EXT)

    def init_infers(self) -> dict[str, InferTask]:
        """One model, which has the bundle's name."""
        return {self.segmenter.bundle.name: Segmentation(self)}

    def infer(self, request: Mapping[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Inference that knows whom it is asked for: MONAI Label puts a file in the place of the id."""
        answer: dict[str, Any] = super().infer({**request, "id": request["image"]}, datastore)
        return answer

    def images(self, image: str) -> Mapping[str, str]:
        """The sequences of a patient.

        Args:
            image: id of a patient; with a DICOMweb server the UID of any series of his study; or a folder with the
                files of one, as a session has it.

        Raises:
            ValueError: when the folder holds several patients, or nothing says which sequence the file is.
        """
        if image in self.patients:
            return self.patients[image]
        if not Path(image).is_dir():
            if isinstance(self.datastore(), DICOMWebDatastore):
                return self._series(image)
            raise ValueError(
                f"{image} is none of the studies' patients: give the id of one, a folder with the files of one, or the "
                'parameter "images" with the path of each sequence.'
            )
        patients = self.segmenter.discover(image)
        if len(patients) != 1:
            raise ValueError(f"{image} holds the patients {sorted(patients)}; give the folder of one.")
        return next(iter(patients.values()))

    def _series(self, uid: str) -> dict[str, str]:
        """The sequences in the study of a series on the DICOMweb server, by the descriptions of its series."""
        client = self.datastore()._client
        # There is such a series: its images were fetched before.
        study = Dataset.from_json(client.search_for_series(search_filters={"SeriesInstanceUID": uid})[0])
        found = client.search_for_series(study_instance_uid=study.StudyInstanceUID, fields=["SeriesDescription"])
        described = {
            str(series.SeriesInstanceUID): str(series.get("SeriesDescription", ""))
            for series in map(Dataset.from_json, found)
            if series.get("Modality") == "MR"
        }
        images = {}
        for name, pattern in self.patterns.items():
            fitting = [uid for uid, text in described.items() if fnmatch(text.lower(), pattern.lower())]
            if len(fitting) > 1:
                raise ValueError(
                    f"--conf {name} {pattern!r} fits several series: {[described[uid] for uid in fitting]}."
                )
            if fitting:
                images[name] = self.datastore().get_image_uri(fitting[0])
        if not images:
            raise ValueError(
                f"No series of the study fits --conf {self.patterns}; there are {sorted(described.values())}."
            )
        return images


class Segmentation(InferTask):  # type: ignore[misc]
    """Segments a patient from the sequences there are."""

    def __init__(self, app: PassionApp) -> None:
        self._app = app
        classes = app.segmenter.classes
        super().__init__(
            InferType.SEGMENTATION,
            labels={name: value for name, value in classes.items() if value != next(iter(classes.values()))},
            dimension=3,
            description=f"Segments from any subset of {', '.join(app.segmenter.modalities)}",
        )

    def is_valid(self) -> bool:
        """Whether there is something to run, which the app has made sure of."""
        return True

    def __call__(self, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The path of the label image, which the server removes, and the record of the prediction.

        Args:
            request: ``id``, see :meth:`PassionApp.images`; or ``images``, the path of each sequence on the server.

        Raises:
            HTTPException: with what is wrong with the patient's images.
        """
        try:
            images = request.get("images") or self._app.images(str(request["id"]))
            result = self._app.segmenter(images)
        except (FileNotFoundError, ValueError) as error:
            raise HTTPException(status_code=400, detail=str(error)) from error  # which viewers show
        handle, path = tempfile.mkstemp(suffix=".nii.gz")
        os.close(handle)
        result.label.to_filename(path)
        return path, {"label_names": self.labels, **result.record}
