"""Parameters that several recipes share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from koine.data.formats import BY_NAME
from koine.plan import Parameter

DTYPES = ("auto", "float32", "bfloat16")

ModelFolder = Annotated[Path, Parameter("Folder of a model of ours, or OWNER/NAME of the hub.")]
DataPath = Annotated[
    Path,
    Parameter(
        "Your text: a file, a folder, or OWNER/NAME of the hub; JSON Lines, Parquet, CSV or plain text."
    ),
]
FieldNames = Annotated[
    tuple[str, ...],
    Parameter("Names of the fields in your records, for example text=content,language=lang."),
]
FormatName = Annotated[
    str,
    Parameter("Format of your records; empty: recognised by their fields.", choices=("", *BY_NAME)),
]
Languages = Annotated[
    tuple[str, ...], Parameter("Language codes to use, for example de,hi; empty: all of the data.")
]
DomainPaths = Annotated[tuple[str, ...], Parameter("Text of each domain, as NAME=PATH,NAME=PATH.")]
SequenceLength = Annotated[int, Parameter("Length of a training row.", unit="tokens", low=2)]
BatchSize = Annotated[int, Parameter("Rows of a training step.", unit="rows", low=1)]
MicroBatchSize = Annotated[
    int, Parameter("Rows computed at once: fewer need less memory; 0: the whole batch.", unit="rows", low=0)
]
LearningRate = Annotated[float, Parameter("Peak learning rate.", above=0, high=1e3)]
DType = Annotated[
    str, Parameter("Precision of the computation; auto: the faster one on this machine.", choices=DTYPES)
]
EvaluationDocuments = Annotated[
    int, Parameter("Held-out documents of each language or domain in an evaluation.", unit="documents", low=1)
]
MaxBytesPerLanguage = Annotated[int, Parameter("Most text taken of each language.", unit="bytes", low=1)]
MinBytesPerLanguage = Annotated[
    int, Parameter("Languages with less text than this are left out.", unit="bytes", low=0)
]
MaxBytes = Annotated[int, Parameter("Most text taken of each domain.", unit="bytes", low=1)]
HeldoutBytes = Annotated[int, Parameter("Most held-out text of each domain.", unit="bytes", low=1)]
MaxBadShare = Annotated[
    float, Parameter("Stop when more than this share of the records cannot be read.", low=0, high=1)
]
Seed = Annotated[int, Parameter("Random seed.", low=0)]
