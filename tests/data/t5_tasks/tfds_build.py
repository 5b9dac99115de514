"""Builds data sets with TFDS's own code from local files, without a network."""

import importlib.resources
import importlib.resources.abc
import sys
from pathlib import Path
from unittest import mock


def build(source: Path, data_dir: Path, *datasets: str) -> None:
    """``source`` holds what the downloads would: folders of archives, files by their names."""
    # TFDS 4.9.10 imports it to build anything, and does not ask for it to be installed.
    sys.modules.setdefault("importlib_resources", importlib.resources)
    sys.modules.setdefault("importlib_resources.abc", importlib.resources.abc)
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()

    def fetched(self, urls):
        if isinstance(urls, str):
            return str(source)
        return {name: str(source / url.rpartition("/")[2]) for name, url in urls.items()}

    with mock.patch.object(tfds.download.DownloadManager, "download_and_extract", fetched):
        for dataset in datasets:
            config = tfds.download.DownloadConfig(try_download_gcs=False)
            builder = tfds.builder(dataset, data_dir=str(data_dir))
            builder.download_and_prepare(download_config=config)
