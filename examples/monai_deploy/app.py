"""A MONAI Deploy application: the DICOM files of a study in, a DICOM segmentation out.

    python app.py -i <folder of DICOM files> -o <folder> -m <folder of a bundle>

Adapt the rules to the descriptions that your scanners give. A sequence that no series fits is missing.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from monai.deploy.conditions import CountCondition
from monai.deploy.core import Application, ExecutionContext, InputContext, Operator, OperatorSpec, OutputContext
from monai.deploy.core.domain.dicom_series_selection import StudySelectedSeries
from monai.deploy.operators.dicom_data_loader_operator import DICOMDataLoaderOperator
from monai.deploy.operators.dicom_series_selector_operator import DICOMSeriesSelectorOperator

from passion_monai.dicom import segment

RULES = {
    "selections": [
        {"name": "flair", "conditions": {"Modality": "MR", "SeriesDescription": "(?i).*flair.*"}},
        {"name": "t1ce", "conditions": {"Modality": "MR", "SeriesDescription": "(?i).*t1.*(post|gd|contrast).*"}},
        {"name": "t1", "conditions": {"Modality": "MR", "SeriesDescription": "(?i)(?!.*(post|gd|contrast)).*t1.*"}},
        {"name": "t2", "conditions": {"Modality": "MR", "SeriesDescription": "(?i)(?!.*flair).*t2.*"}},
    ]
}


class SegmentationOperator(Operator):  # type: ignore[misc]
    """Segments each study from the series that were selected, which have the names of sequences.

    Args:
        bundle: folder of the bundle.
        output: folder for the DICOM segmentations, one for each study, which are called by its UID.
        ids: those of the bundle's ``inference.yaml`` that are set.
    """

    def __init__(self, *arguments: Any, bundle: Path, output: Path, ids: dict[str, Any], **settings: Any) -> None:
        self.bundle, self.output, self.ids = bundle, output, ids
        super().__init__(*arguments, **settings)

    def setup(self, spec: OperatorSpec) -> None:
        """Name the input."""
        spec.input("study_selected_series_list")

    def compute(self, op_input: InputContext, op_output: OutputContext, context: ExecutionContext) -> None:
        """Segment what has arrived."""
        for study in op_input.receive("study_selected_series_list"):
            with tempfile.TemporaryDirectory() as folder:
                path = self.output / f"{study.study.StudyInstanceUID}.dcm"
                segment(self.bundle, write_series(study, Path(folder)), path, ids=self.ids)


def write_series(study: StudySelectedSeries, folder: Path) -> dict[str, str]:
    """The series of a study in a folder each, by the names of their sequences."""
    for selected in study.selected_series:
        series = folder / selected.selection_name
        series.mkdir()  # which fails where two series fit one sequence
        for number, instance in enumerate(selected.series.get_sop_instances()):
            instance.get_native_sop_instance().save_as(series / f"{number}.dcm")
    return {path.name: str(path) for path in folder.iterdir()}


class PassionApp(Application):  # type: ignore[misc]
    """Loads the files, selects series, segments.

    Args:
        ids: those of the bundle's ``inference.yaml`` that are set.
    """

    def __init__(self, *arguments: Any, ids: dict[str, Any] | None = None, **settings: Any) -> None:
        self.ids = ids or {}
        super().__init__(*arguments, **settings)

    def compose(self) -> None:
        """Connect the operators."""
        paths = Application.init_app_context(self.argv)
        loader = DICOMDataLoaderOperator(self, CountCondition(self, 1), input_folder=Path(paths.input_path))
        selector = DICOMSeriesSelectorOperator(self, rules=json.dumps(RULES), all_matched=True, name="selector")
        segmentation = SegmentationOperator(
            self,
            bundle=Path(paths.model_path),
            output=Path(paths.output_path),
            ids=self.ids,
            name="segmentation",
        )
        self.add_flow(loader, selector, {("dicom_study_list", "dicom_study_list")})
        self.add_flow(selector, segmentation, {("study_selected_series_list", "study_selected_series_list")})


if __name__ == "__main__":
    PassionApp().run()
