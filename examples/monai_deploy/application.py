"""A MONAI Deploy application: the DICOM series of a study in, a DICOM SEG out, whatever sequences there are.

    python application.py -i STUDY -o OUTPUT -m BUNDLE

`rules.json` beside it says, in the language of the SDK's DICOMSeriesSelectorOperator, which series is which sequence.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from monai.deploy.conditions import CountCondition
from monai.deploy.core import Application, Fragment, Operator, OperatorSpec
from monai.deploy.operators.dicom_data_loader_operator import DICOMDataLoaderOperator
from monai.deploy.operators.dicom_series_selector_operator import DICOMSeriesSelectorOperator

from passion_monai import Segmenter
from passion_monai.dicom_seg import segment_series

RULES = Path(__file__).parent / "rules.json"


class PassionOperator(Operator):
    """Segments each study from the series that were selected, and writes a DICOM SEG for it.

    Input:
        study_selected_series_list: what DICOMSeriesSelectorOperator puts out. A selection is called like its sequence;
            one that no series fits is a missing sequence.

    Args:
        fragment: the application.
        segmenter: of a bundle.
        output: folder for the files.
    """

    def __init__(self, fragment: Fragment, *args: Any, segmenter: Segmenter, output: Path, **kwargs: Any) -> None:
        self.segmenter = segmenter
        self.output = output
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        """Name the input."""
        spec.input("study_selected_series_list")

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Segment each study.

        Raises:
            ValueError: when no series was selected, or not exactly one for each sequence.
        """
        studies = op_input.receive("study_selected_series_list")
        if not studies:
            raise ValueError("No series fits any of the rules.")
        for study in studies:
            with tempfile.TemporaryDirectory() as folder:
                series = write_selected(study.series_by_selection_name, Path(folder))
                logging.info("Written: %s", segment_series(self.segmenter, series, self.output))


def write_selected(selected: dict[str, list[Any]], folder: Path) -> dict[str, Path]:
    """Write series that the SDK holds in memory, each into a folder of its own.

    Args:
        selected: of each sequence, the SelectedSeries.
        folder: where to make the folders.

    Returns:
        The folder of each sequence.

    Raises:
        ValueError: when several series fit a sequence, or one fits several.
    """
    sequences = {name: [str(one.series.SeriesInstanceUID) for one in several] for name, several in selected.items()}
    found = [uid for several in sequences.values() for uid in several]
    if len(found) > len(sequences) or len(set(found)) < len(found):
        raise ValueError(f"The rules must select one series for each sequence, and another for each: {sequences}.")
    for name, (one,) in selected.items():
        (folder / name).mkdir()
        for index, instance in enumerate(one.series.get_sop_instances()):
            instance.get_native_sop_instance().save_as(folder / name / f"{index}.dcm")
    return {name: folder / name for name in selected}


class PassionApplication(Application):
    """Loader, selector and segmentation."""

    def compose(self) -> None:
        """Connect the operators."""
        context = Application.init_app_context(self.argv)
        loader = DICOMDataLoaderOperator(
            self, CountCondition(self, 1), input_folder=Path(context.input_path), name="loader"
        )
        # All that match, since the first one of several might be the wrong one.
        selector = DICOMSeriesSelectorOperator(self, rules=RULES.read_text(), all_matched=True, name="selector")
        segmenter, output = Segmenter(context.model_path), Path(context.output_path)
        passion = PassionOperator(self, segmenter=segmenter, output=output, name="passion")
        self.add_flow(loader, selector, {("dicom_study_list", "dicom_study_list")})
        self.add_flow(selector, passion, {("study_selected_series_list", "study_selected_series_list")})


if __name__ == "__main__":
    PassionApplication().run()
