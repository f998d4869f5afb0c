"""Opens zips of strangers."""

import struct
import zipfile
from typing import BinaryIO

from diffusion.errors import InputError

DIRECTORY_LIMIT = 2**24
"""The most bytes of a zip's list of members, of which each has about a hundred; as objects they take ten times that."""


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """Opens a zip for reading; raises InputError if it is none, or its list of members alone would fill the memory."""
    try:
        end = zipfile._EndRecData(file)  # zipfile reads the whole list before anybody can ask how long it is
        if not end or end[zipfile._ECD_SIZE] > DIRECTORY_LIMIT:
            raise zipfile.BadZipFile("it has no end, or more members than any file of its kind")
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise InputError(f"it is damaged, or no zip ({error})") from None
