"""Text that is no JSON: .parquet files and hub data sets. Imported only where one is given, as `datasets` is slow."""

from collections.abc import Iterator
from pathlib import Path

import datasets

from engine.errors import UserError, first_line


def parquet_rows(file: Path) -> Iterator[tuple[dict, str]]:
    """(row, "FILE: row 3") of a .parquet file. Raises UserError with the file."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs lines of its own about what is reported below
    try:
        rows = datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield row, f"{file}: row {number}"
    except Exception as error:  # each kind of damage has its own
        raise UserError(f"{file}: is no readable .parquet file ({first_line(error)})") from None


def hub_rows(corpus: str, config: str | None) -> Iterator[tuple[dict, str]]:
    """(row, corpus) of a data set of the hub, streamed: nothing is written to disk. Raises UserError."""
    try:
        yield from ((row, corpus) for row in datasets.load_dataset(corpus, config, split="train", streaming=True))
    except Exception as error:  # the network, the name, the configuration: all the user's to fix
        why = first_line(error)
        raise UserError(f"--corpus {corpus}: no local file, and not to be had from the hub: {why}") from None
