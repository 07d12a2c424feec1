"""Pictures of a folder or a parquet file, one after the other, ready for a model: what an index is made of."""

import os
import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from modeling_edgeglass.images import FORMATS
from training.data import BadRowError, PixmoParquetImageTextDataset
from training.errors import DataError, printable
from training.images import UndecodableImageError
from training.index_files import Item
from training.parquet import find_parquet_files
from training.transforms import Transform, load_pixels

_CAPTION_LENGTH = 80  # letters that are kept to tell what was found


@dataclass(frozen=True)
class Picture:
    """A picture that was decoded.

    Args:
        item: Where it is from.
        pixels: Transformed (3, S, S); None where there is a defect.
        defect: Why it cannot be read.
    """

    item: Item
    pixels: Tensor | None
    defect: str | None = None


class FolderPictures(Dataset[Picture]):
    """The picture files of a folder and of the folders in it, in the order of their paths.

    Files are found by their suffix; those whose name or folder begins with a dot are passed over, and so are linked
    folders.

    Args:
        folder: Where they are.
        transform: Makes a tensor (3, S, S) of an RGB picture.

    Raises:
        DataError: There are none.
    """

    def __init__(self, folder: Path, transform: Transform) -> None:
        self.folder, self.transform = folder, transform
        suffixes, names = picture_suffixes(), []
        for parent, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths = [Path(parent, name) for name in files if not name.startswith(".")]
            names += [path.relative_to(folder).as_posix() for path in paths if path.suffix.lower() in suffixes]
        if not names:
            raise DataError(f"{folder}: no picture in this folder; parquet files are named themselves, as FOLDER/*")
        self.names = sorted(names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Picture:
        name = self.names[index]
        # What the system names need not be UTF-8, what is stored is.
        item = Item(os.fsencode(name).decode(errors="backslashreplace"))
        try:
            return Picture(item, load_picture(self.folder / name, self.transform))
        except DataError as error:
            return Picture(item, None, str(error))


class ParquetPictures(Dataset[Picture]):
    """The pictures of parquet files, in the order of the rows.

    Args:
        parquet_path: A file or a glob.
        transform: Makes a tensor (3, S, S) of an RGB picture.

    Raises:
        DataError: A file cannot be read, has no column of pictures or of captions, or has no rows.
    """

    def __init__(self, parquet_path: str, transform: Transform) -> None:
        self.rows = PixmoParquetImageTextDataset(find_parquet_files(parquet_path), transform)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Picture:
        stored = self.rows.pairs[index]
        file, row = self.rows.pairs.where(index)
        caption = " ".join((stored.caption or "")[:_CAPTION_LENGTH].split())
        item = Item(os.path.basename(file), row, stored.sample_id, caption)
        try:
            return Picture(item, self.rows.pixels(stored, random.Random(0)))
        except BadRowError as error:
            return Picture(item, None, str(error))


def open_pictures(source: str, transform: Transform) -> FolderPictures | ParquetPictures:
    """The pictures of a folder, a parquet file or a glob.

    Raises:
        DataError: There are none, or a file cannot be read.
    """
    return FolderPictures(Path(source), transform) if os.path.isdir(source) else ParquetPictures(source, transform)


def load_picture(path: Path, transform: Transform) -> Tensor:
    """Read a picture file and transform it (3, S, S).

    Raises:
        DataError: It cannot be read; the message does not name it.
    """
    try:
        if not path.is_file():
            raise DataError("no file")  # a pipe would never end
        return load_pixels(path.read_bytes(), transform, random.Random(0))
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}") from error
    except UndecodableImageError as error:
        raise DataError(f"no readable picture: {printable(str(error), 200)}") from error


def picture_suffixes() -> set[str]:
    """What names of picture files end with, such as `.png`."""
    return {suffix for suffix, format in Image.registered_extensions().items() if format in FORMATS}
