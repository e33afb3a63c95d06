from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from monai.bundle import ConfigParser
from monai.utils import instantiate

from passion_monai.config import check_choices
from passion_monai.errors import end_with_words, find_words
from passion_monai.files import make_folder


def raised(action: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as error:  # noqa: PT011 - whatever it is
        action()
    return error.value


def test_words_of_the_package_below_those_of_monai():
    config = {"a": {"_target_": "passion_monai.config.check_choices", "allowed": ["x"], "b": "y"}, "c": "$@a"}
    error = raised(lambda: ConfigParser(config).get_parsed_content("c"))
    assert "Failed to instantiate" in str(error)
    assert find_words(error) == "b must be one of ['x'], got 'y'."


def test_words_of_the_package_above_those_of_the_system(tmp_path: Path):
    (tmp_path / "file").touch()
    assert find_words(raised(lambda: make_folder(tmp_path / "file"))).startswith(f"Cannot write {tmp_path / 'file'}: ")


def test_words_of_the_system_and_of_monai(tmp_path: Path):
    assert "No such file or directory" in find_words(raised((tmp_path / "none").read_text))
    misspelt = raised(lambda: instantiate("passion_monai.config.find_bundle_root", "default", nam="x"))
    assert "unexpected keyword argument 'nam'" in find_words(misspelt)


def handling() -> None:
    try:
        check_choices(["x"], b="y")
    except ValueError:
        torch.zeros(2) @ torch.zeros(3)


@pytest.mark.parametrize("action", [lambda: {}["x"], lambda: check_choices(3, b="y"), handling])  # type: ignore[arg-type]
def test_no_words_for_faults(action: Callable[[], object]):
    assert find_words(raised(action)) == ""


def test_other_programs_keep_their_tracebacks(monkeypatch: pytest.MonkeyPatch):
    before = sys.excepthook
    end_with_words(debug=False)
    assert sys.excepthook is before
    spec = SimpleNamespace(name="monai.bundle.__main__")
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=spec))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "excepthook", before)
    end_with_words(debug=False)
    assert sys.excepthook is not before
