"""CRIU's files at the destination: in memory, without a place on a disk.

CRIU finds them by links in its folder. It gives back what it has read (auto-dedup), so that
the bytes are in memory once: in staging, in these files, or in the process.
"""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

from migrate.engine.image_file import ImageFile
from migrate.engine.seam import Blob


class Images:
    """The files of one restore, in *folder*, as long as CRIU needs them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._files: dict[str, int] = {}  # fd by name

    def open(self, blob: Blob) -> ImageFile:
        """The file, made when first asked for. *blob*'s name is a file's name. Raises OSError."""
        with self._lock:
            fd = self._files.get(blob.name)
            if fd is None:
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                fd = os.memfd_create(f"criu {blob.name}")
                try:
                    os.ftruncate(fd, blob.size)
                    (self.folder / blob.name).symlink_to(f"/proc/{os.getpid()}/fd/{fd}")
                except OSError:
                    os.close(fd)
                    raise
                self._files[blob.name] = fd
            return ImageFile(os.dup(fd), blob.size)

    def close(self) -> None:
        """Free the memory, remove the folder. Idempotent."""
        with self._lock:
            files, self._files = self._files, {}
        for fd in files.values():
            os.close(fd)
        shutil.rmtree(self.folder, ignore_errors=True)
