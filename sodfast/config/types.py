"""What many keys share: their bounds, texts that name a file or an object, and a group of keys."""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

# Bounds beyond which a number is no use and its conversion to 32 bits fails in the middle of a run.
MOST, LARGEST, COLDEST = 2**31 - 1, 1e9, 1e-6


def _warm_or_greedy(temperature: float) -> float:
    if 0 < temperature < COLDEST:
        raise ValueError(f"must be 0 or at least {COLDEST:g}")
    return temperature


def _names_a_file(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a character that no path may hold")
    return text


def _fits_a_file_system(text: str) -> str:
    names = text.encode().split(b"/")
    if len(text.encode()) > 4095 or max(map(len, names)) > 255:
        raise ValueError("is longer than a path may be")
    return text


def _names_an_object(source: str) -> str:
    """The file of `FILE.py:NAME` in full, so that a run can be resumed from any folder."""
    place, _, name = source.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError("must be FILE.py:NAME or module.submodule:NAME")
    return f"{os.path.abspath(place)}:{name}" if place.endswith(".py") else source


Positive = Annotated[int, Field(ge=1, le=MOST)]
Count = Annotated[int, Field(ge=0, le=MOST)]
Interval = Count  # in steps; 0: never
Fraction = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Decay = Annotated[float, Field(ge=0, lt=1)]
TopP = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=COLDEST, le=LARGEST)]
NonNegative = Annotated[float, Field(ge=0, le=LARGEST)]
WarmOrGreedy = Annotated[NonNegative, AfterValidator(_warm_or_greedy)]  # 0: greedy
AboveZero = Annotated[float, Field(gt=0, le=LARGEST)]
Gibibytes = Annotated[float, Field(gt=0, le=1e6)]
NewPath = Annotated[str, AfterValidator(_names_a_file)]  # its length is the directory's business
PathText = Annotated[NewPath, AfterValidator(_fits_a_file_system)]
SourceText = Annotated[str, AfterValidator(_names_an_object)]  # of the user's own Python


class Section(BaseModel):
    """A group of keys: it cannot be changed, and refuses unknown keys, NaN and infinity.

    The text below a key says what it does, and its unit; reference.py makes a page of them.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
